"""The client of `worker.py`: a model in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hfcompress.base.processors import default_threads
from hfcompress.base.shape import PRUNED
from hfcompress.measure.machine import Turn
from hfcompress.model.artifact import MODELING_FILE, Artifact, modeling_source, read_config, settled_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

Batch = Mapping[str, "NDArray[Any]"]


class WorkerError(RuntimeError):
    """The process failed, or answered that it could not."""


class ModelProcess:
    """A model directory, loaded in a process of its own that does not know hfcompress.

    Args:
        artifact: What to load. Code beside it is trusted where it is, byte for byte, the modeling file of this
            hfcompress; a pruned model with any other is loaded after `import hfcompress`.
        auto_class: Such as `AutoModelForSequenceClassification`.
        device: `cpu` or `cuda`; graphs of ONNX and OpenVINO run on the CPU.
        threads: Of one operator; by default as many as `default_threads` says. `time` can choose fewer of a PyTorch
            model's.
        head: What `logits` makes of the model's answer, see `worker.reduced`; by default nothing.
    """

    def __init__(
        self,
        artifact: Artifact,
        auto_class: str,
        device: str = "cpu",
        threads: int | None = None,
        head: str = "sequence",
    ) -> None:
        self.artifact, self.auto_class, self.head = artifact, auto_class, head
        self.device = device if artifact.runtime == "torch" else "cpu"
        self.threads = threads or default_threads()
        self._folder = TemporaryDirectory(prefix="hfcompress-worker-")
        self._log = (Path(self._folder.name) / "log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment(),
        )
        try:
            self.load(artifact, **code_for(artifact))
        except BaseException:
            self.close()
            raise

    def load(self, artifact: Artifact, trust: bool, register: str | None) -> None:
        """Loads a model in place of the one before.

        Args:
            artifact: What to load.
            trust: Run the code beside it.
            register: Where to import hfcompress from first; None where it stays unknown.
        """
        self.artifact = artifact
        self.loaded = self._ask(
            "load",
            runtime=artifact.runtime,
            path=str(artifact.path),
            device=self.device,
            threads=self.threads,
            auto_class=self.auto_class,
            head=self.head,
            trust=trust,
            register=register,
            changes=settled_config(artifact.path) if artifact.runtime == "torch" else {},
        )

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        alone = {"HF_MODULES_CACHE": self._folder.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in distributed and not k.startswith("ACCELERATE_")}
        return {**kept, **threads, **alone}

    def logits(self, batches: Iterable[Batch]) -> NDArray[Any]:
        """The logits of all batches, one after the other, as `worker.reduced` leaves them."""
        import numpy as np

        output = Path(self._folder.name) / "logits.npy"
        self._ask("logits", inputs=self._write(batches), output=str(output))
        return np.load(output, allow_pickle=False)

    def read(self, texts: Sequence[Sequence[str]], task: Any, pipeline: str | None) -> dict[str, Any]:
        """What the directory's own tokenizer makes of texts, and what a pipeline answers, see `worker.Worker.read`."""
        return self._ask(
            "read",
            path=str(self.artifact.path),
            texts=[list(text) for text in texts],
            truncation=task.truncation,
            max_length=task.max_length,
            pipeline=pipeline,
        )

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Takes the batches that `time` and `energy` run, and warms up."""
        self._ask("prepare", inputs=self._write(batches))

    @property
    def pid(self) -> int:
        """The number of the process."""
        return int(self.loaded["pid"])

    @property
    def chooses_threads(self) -> bool:
        """Whether `time` can choose the threads: a graph's are fixed when it is loaded, a GPU has none."""
        return self.artifact.runtime == "torch" and self.device == "cpu"

    def time(self, threads: int | None = None, most: int | None = None) -> Turn:
        """Runs each prepared batch once.

        Args:
            threads: Of one operator, where the model `chooses_threads`.
            most: How many batches, from the first on; all by default.
        """
        threads = threads if threads and self.chooses_threads else self.threads
        answer = self._ask("time", threads=threads, most=most)
        return Turn(threads=threads, **answer)

    def peak_bytes(self) -> int:
        """Peak memory so far, in bytes."""
        return int(self._ask("memory")["bytes"])

    def energy(self, seconds: float) -> float:
        """Watt-hours for 1,000 rows of the prepared batches, as codecarbon estimates them."""
        answer = self._ask("energy", seconds=seconds)
        return float(answer["watt_hours"] * 1000 / answer["rows"])

    def _write(self, batches: Iterable[Batch]) -> str:
        import numpy as np

        path = Path(self._folder.name) / "inputs.npz"
        arrays = {f"{i}/{name}": value for i, batch in enumerate(batches) for name, value in batch.items()}
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return str(path)

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise WorkerError(f"the process for {self.artifact.path} died: {self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise WorkerError(f"{self.artifact.path} in a fresh process: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # a process that died left a request unread
                self._process.stdin.close()
        self._process.wait(timeout=60)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OWN_CODE: Mapping[str, Any] = {"trust": False, "register": str(Path(__file__).parents[2])}
"""What builds a pruned model with no flag, and any int8 layers: `import hfcompress`."""


def is_pruned(artifact: Artifact) -> bool:
    """Whether a model is of a shape that no stock config can express, and so of code that is not transformers'."""
    return artifact.runtime == "torch" and str(read_config(artifact.path).get("model_type", "")).startswith(PRUNED)


def has_int8_layers(artifact: Artifact) -> bool:
    """Whether a model's layers are those of `model/int8_layers.py`, which travel with no checkpoint."""
    if artifact.runtime != "torch":
        return False
    quantization = read_config(artifact.path).get("quantization_config") or {}
    return bool(quantization.get("quant_method") == "hfcompress_int8")


def code_for(artifact: Artifact) -> Mapping[str, Any]:
    """Which code may build the model: the file beside it, hfcompress's own, or (for a stock model) none."""
    if has_int8_layers(artifact):
        return OWN_CODE
    if not is_pruned(artifact):
        return {"trust": False, "register": None}
    beside = artifact.path / MODELING_FILE
    ours = beside.is_file() and beside.read_bytes() == modeling_source().read_bytes()
    return {"trust": True, "register": None} if ours else OWN_CODE
