"""Makes, judges and times candidates; each stage is made once and kept by its content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.measure.hardware import abilities
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.quality import judge_rows
from hfcompress.measure.rows import Rows
from hfcompress.measure.timing import time_models
from hfcompress.models.artifact import Artifact, label_ids, load_tokenizer, read_config
from hfcompress.recipe.loader import Loaded, load_objects
from hfcompress.recipe.schema import spell_out
from hfcompress.recipe.validate import check
from hfcompress.run.runner import run_stages
from hfcompress.searching.candidate import Candidate
from hfcompress.searching.race import Verdict, race
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.lock import wait_for
from hfcompress.utils.logging import log
from hfcompress.utils.margin import spell_margin
from hfcompress.utils.processors import default_threads

if TYPE_CHECKING:
    from hfcompress.measure.answers import Answer
    from hfcompress.recipe.target import Target

TIMED_ROWS = 128
"""Rows of a round in which a candidate and the source take turns."""


class Workshop:
    """Makes and measures the candidates of one search.

    Args:
        loaded: The recipe of the source: the model, its task, and a `finetune` stage if there is one.
        folder: The directory of the search.
        target: The limits.
    """

    def __init__(self, loaded: Loaded, folder: Path, target: Target) -> None:
        self.loaded, self.folder, self.target = loaded, folder, target
        self.task, self.seed = loaded.recipe.task, loaded.recipe.seed
        self._stack = ExitStack()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def source(self) -> Artifact:
        """The model that the candidates are made from and compared with."""
        found = self._run(self.loaded)[0]
        if not found.trainable or found.shape is None:
            raise HfcompressError(
                f"{found.path} is {found.runtime} {found.dtype}, and a search starts from a PyTorch model with float "
                "weights whose architecture hfcompress can cut",
                "search from the model that this one was made of",
            )
        return found

    def make_recipe(self, candidate: Candidate) -> Loaded:
        """The plain recipe that makes a candidate."""
        recipe = self.loaded.recipe
        content = spell_out(recipe)
        stages = [*content["stages"], *candidate.stages(self.train_rows, self.precision)]
        content.pop("search", None)
        measure = {**content["measure"], "margin": spell_margin(self.target.max_drop)}
        return load_objects({**content, "stages": stages, "measure": measure})

    @property
    def precision(self) -> str:
        """The precision of trainings: bfloat16 also on a CPU, if it multiplies bfloat16."""
        return "bfloat16" if abilities().has("avx512_bf16", "amx_bf16") else "auto"

    @cached_property
    def train_rows(self) -> int:
        """Rows of the train split."""
        return len(self.task.read("train"))

    def make(self, candidate: Candidate) -> Artifact:
        """Makes the model of a candidate; stages that it shares with others are made once."""
        loaded = self.make_recipe(candidate)
        check(loaded)
        return self._run(loaded)[-1]

    def _run(self, loaded: Loaded) -> list[Artifact]:
        with ExitStack() as stack:

            def place(name: str, key: str) -> Path:
                """The directory of a stage; no other worker makes it meanwhile."""
                held = self.folder / "stages" / key
                held.mkdir(parents=True, exist_ok=True)
                stack.enter_context(wait_for(held / "making"))
                return held / name

            return run_stages(loaded, place)

    @cached_property
    def rows(self) -> Any:
        """The rows of the dev split."""
        return self.task.read("dev")

    @cached_property
    def source_answer(self) -> Answer:
        """The source's answers to the dev split."""
        log.info(f"search: the source answers the {len(self.rows):,} rows of the dev split")
        return judge_rows(self._source_process, self.source_rows)

    def _read(self, artifact: Artifact, numbers: Sequence[int]) -> Rows:
        """Encodes rows of the dev split for a model."""
        tokenizer = load_tokenizer(artifact.path, self.task)
        return Rows(self.task, tokenizer, self.rows.select(numbers), label_ids(read_config(artifact.path)))

    @cached_property
    def source_rows(self) -> Rows:
        """The dev split as the source reads it."""
        return self._read(self.source, range(len(self.rows)))

    @cached_property
    def _source_process(self) -> ModelProcess:
        return self._stack.enter_context(self._open(self.source))

    def _open(self, artifact: Artifact) -> ModelProcess:
        latency = self.loaded.recipe.measure.latency
        threads = latency.threads or default_threads()
        return ModelProcess(artifact, self.task.auto_class, latency.device, threads, self.task.head)

    def judge(self, artifact: Artifact) -> Verdict:
        """Bounds the loss of a model on the dev split, by as many rows as are needed."""
        with self._open(artifact) as process:
            return race(
                self.source_answer,
                lambda numbers: judge_rows(process, self._read(artifact, numbers)),
                self.task.metric_function,
                self.target.max_drop,
                lower_is_better=not self.task.greater_is_better,
                seed=self.seed,
                samples=self.loaded.recipe.measure.bootstrap,
            )

    def time(self, artifact: Artifact) -> Mapping[int, Sequence[float]]:
        """Times a model beside the source, while no other worker of this machine times.

        Returns:
            For each batch size the speed-up and, if it is known, the ends of its 95% interval.
        """
        options = self.loaded.recipe.measure.latency
        # Without a grid of lengths, there is one entry for each batch size.
        options = options.model_copy(update={"rows": min(options.rows, TIMED_ROWS), "lengths": []})
        with wait_for(self.folder / "timing"), self._open(artifact) as process:
            models, numbers = [self.source, artifact], range(min(len(self.rows), options.rows))
            rows = [self._read(model, numbers) for model in models]
            found, _ = time_models([self._source_process, process], rows, options, self.seed, lambda _: None)
        return {
            entry["batch_size"]: (entry["speedup"], *(entry["speedup_interval"] or ()))
            for entry in found[1]
            if entry["speedup"] is not None
        }
