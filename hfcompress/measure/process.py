"""Runs a model in a fresh process, as the client of `worker.py`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hfcompress.measure.machine import Turn
from hfcompress.models.architectures import task_head_of
from hfcompress.models.artifact import MODELING_FILE, Artifact, find_missing_config, modeling_source, read_config
from hfcompress.models.loading_checks import require_complete_weights, require_finite_weights
from hfcompress.models.shape import count_labels
from hfcompress.utils.errors import HfcompressError, is_full_disk_message
from hfcompress.utils.files import require_space
from hfcompress.utils.processors import default_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hfcompress.data.task import Task

Batch = Mapping[str, "NDArray[Any]"]


class WorkerError(HfcompressError):
    """The process ended, or it could not do with the model what it was asked to do."""


class ModelProcess:
    """A model directory, loaded in a process of its own that does not know hfcompress.

    Args:
        artifact: The model to load. Code beside it is trusted if it is, byte for byte, the modeling file of this
            hfcompress; a pruned model with any other code is loaded after `import hfcompress`.
        auto_class: Such as `AutoModelForSequenceClassification`.
        device: `cpu` or `cuda`; graphs of ONNX and OpenVINO run on the CPU.
        threads: Threads of one operator; default: `default_threads()`. For a PyTorch model `time` can choose fewer.
        head: The kind of task head, which decides how `worker.reduce_logits` reduces the logits; `sequence` keeps them.
        as_stored: Compute in the type in which the weights are stored, see `Artifact.computed_on`; OpenVINO then
            computes floats in float32.
        dtype: Compute in this type instead, such as `bfloat16`; for float models of PyTorch.
        examine: Check the loaded weights. A start that is timed leaves it out: it reads them once more.

    Raises:
        WorkerError: if it does not load.
        HfcompressError: if some weights did not come from its files.
    """

    def __init__(
        self,
        artifact: Artifact,
        auto_class: str,
        device: str = "cpu",
        threads: int | None = None,
        head: str = "sequence",
        as_stored: bool = False,
        dtype: str | None = None,
        examine: bool = True,
    ) -> None:
        self.artifact, self.auto_class, self.head, self.as_stored = artifact, auto_class, head, as_stored
        self._dtype, self._examine = dtype, examine
        self.device = device if artifact.runtime == "torch" else "cpu"
        self.threads = threads or default_threads()
        self.batch_size = 0
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
            self.load(artifact, **choose_code(artifact))
        except BaseException:
            self.close()
            raise

    def load(self, artifact: Artifact, trust: bool, register: str | None) -> None:
        """Loads another model in place of the present one.

        Args:
            artifact: The model to load.
            trust: Run the code beside it.
            register: The folder to import hfcompress from before loading; None to load without hfcompress.
        """
        self.artifact, config = artifact, read_config(artifact.path)
        self.loaded = self._ask(
            "load",
            runtime=artifact.runtime,
            path=str(artifact.path),
            graph=artifact.choice.file,
            device=self.device,
            threads=self.threads,
            auto_class=self.auto_class,
            head=self.head,
            classes=_count_classes(self.auto_class, config),
            dtype=self._requested_dtype(),
            trust=trust,
            register=register,
            examine=self._examine,
            changes=find_missing_config(artifact.path) if artifact.runtime == "torch" else {},
        )
        if self.loaded["loading"] is not None:
            require_complete_weights(artifact.path, self.auto_class, self.loaded["loading"], config)
            require_finite_weights(artifact.path, self.loaded["loading"]["not_finite"])

    def _requested_dtype(self) -> str | None:
        """Returns the type to compute in; None if a quantized model's config or the runtime chooses it."""
        if self.artifact.runtime == "openvino":
            return "float32" if self.as_stored else None
        if not self.artifact.trainable:
            return None
        return self._dtype or (self.artifact.dtype if self.as_stored else self.artifact.computed_on(self.device))

    @property
    def dtype(self) -> str:
        """The type that the model computes in; the stored type if its weights are quantized."""
        if self.loaded["computing_type"] is not None:
            return str(self.loaded["computing_type"])
        return self._dtype or (self.artifact.dtype if self.as_stored else self.artifact.computed_on(self.device))

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        alone = {"HF_MODULES_CACHE": self._folder.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in distributed and not k.startswith("ACCELERATE_")}
        return {**kept, **threads, **alone}

    def logits(self, batches: Iterable[Batch]) -> NDArray[Any]:
        """Computes the logits of all batches, reduced by `worker.reduce_logits` and concatenated."""
        import numpy as np

        output = Path(self._folder.name) / "logits.npy"
        self._ask("logits", inputs=self._write(batches), output=str(output))
        return np.load(output, allow_pickle=False)

    def read(self, texts: Sequence[Sequence[str]], task: Task, pipeline: str | None) -> dict[str, Any]:
        """Gets the tokens of the directory's own tokenizer and the answers of a pipeline, see `worker.Worker.read`."""
        return self._ask(
            "read",
            path=str(self.artifact.path),
            texts=[list(text) for text in texts],
            truncation=task.truncation,
            max_length=task.max_length,
            pipeline=pipeline,
        )

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Sends the batches that `time` and `run_for` run, and warms the model up."""
        batches = list(batches)
        self.batch_size = len(batches[0]["input_ids"])
        self._ask("prepare", inputs=self._write(batches))

    @property
    def pid(self) -> int:
        """The process number."""
        return int(self.loaded["pid"])

    @property
    def chooses_threads(self) -> bool:
        """True if `time` can choose the threads: those of a graph are fixed when it is loaded, and a GPU has none."""
        return self.artifact.runtime == "torch" and self.device == "cpu"

    def time(self, threads: int | None = None, most: int | None = None) -> Turn:
        """Runs each prepared batch once.

        Args:
            threads: Threads of one operator, if the model `chooses_threads`.
            most: Number of batches, from the first on; default: all.
        """
        threads = threads if threads and self.chooses_threads else self.threads
        answer = self._ask("time", threads=threads, most=most)
        return Turn(threads=threads, **answer)

    def use_threads(self, threads: int) -> None:
        """Sets the threads of one operator; a graph is loaded again for that."""
        if threads != self.threads and self.artifact.runtime != "torch":
            self.threads = threads
            self.load(self.artifact, **choose_code(self.artifact))
        self.threads = threads

    def sustain(self, seconds: float) -> tuple[int, float]:
        """Runs the prepared batches for some seconds; returns the number of rows, and the seconds that they took."""
        answer = self._ask("sustain", threads=self.threads, seconds=seconds)
        return int(answer["rows"]), float(answer["seconds"])

    def start_again(self, batch: Batch) -> dict[str, float]:
        """Starts the model in one more process, and times that until the answer to a batch.

        Returns:
            `seconds` of all of it. Of these, `import_seconds` for the packages of the runtime and `load_seconds` for
            the model; the rest is Python's own start and the first answer.
        """
        start = time.perf_counter()
        options = (self.auto_class, self.device, self.threads, self.head, self.as_stored, self._dtype)
        with ModelProcess(self.artifact, *options, examine=False) as fresh:
            fresh.logits([batch])
            seconds = time.perf_counter() - start
            return {"seconds": seconds} | {key: fresh.loaded[key] for key in ("import_seconds", "load_seconds")}

    def peak_memory(self) -> tuple[int, int | None]:
        """Returns the peak resident memory of the process so far, and that of the GPU (None on a CPU), in bytes."""
        answer = self._ask("memory")
        return int(answer["process"]), answer["device"]

    def run_for(self, seconds: float) -> tuple[int, float]:
        """Runs the prepared batches over and over, for at least some seconds; returns the rows and the seconds."""
        answer = self._ask("run_for", seconds=seconds)
        return int(answer["rows"]), float(answer["seconds"])

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
            self._require_space()
            raise self._explain_end()
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            self._require_space(answer["error"])
            raise WorkerError(
                f"{self.artifact.path} in a fresh process: {_first_lines(answer['error'])}", answer["fix"]
            )
        return answer

    def _require_space(self, said: str = "") -> None:
        """Raises the error of a full disk if the process failed because of one."""
        if is_full_disk_message(said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._folder.name)
        require_space(Path(self._folder.name))

    def _explain_end(self) -> WorkerError:
        """Explains the end of the process by its exit code and its log."""
        code = self._process.wait(timeout=60)
        what = f"the process for {self.artifact.path} died"
        if code == -signal.SIGKILL:
            return WorkerError(
                f"{what}: it was killed, as systems do when they run out of memory",
                "free some memory, give the machine or container more, or measure fewer models at once",
            )
        self._log.seek(0)
        said = self._log.read()[-2000:].strip()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return WorkerError(f"{what} {how}" + (f": {said}" if said else ""))

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
"""Options of `load` after `import hfcompress`: pruned models need no `trust_remote_code`, and int8 layers load."""


def _count_classes(auto_class: str, config: Mapping[str, Any]) -> int | None:
    """Counts the logits of a text or a token by the config; None if the config does not say."""
    head = task_head_of(auto_class)
    if head in ("sequence", "token"):
        return count_labels(config)
    return 2 if head == "span" else None


def _first_lines(error: str) -> str:
    """Cuts a library's error to its first lines, which say what is wrong; the rest tells how it came about."""
    lines = [line for line in error.splitlines() if line.strip()]
    return "\n    ".join(lines[:4])[:1000]


def choose_code(artifact: Artifact) -> Mapping[str, Any]:
    """Chooses the code that may build the model: the file beside it, hfcompress's own, or none for a stock model."""
    if artifact.needs_import:
        return OWN_CODE
    if not artifact.is_pruned:
        return {"trust": False, "register": None}
    beside = artifact.path / MODELING_FILE
    ours = beside.is_file() and beside.read_bytes() == modeling_source().read_bytes()
    return {"trust": True, "register": None} if ours else OWN_CODE
