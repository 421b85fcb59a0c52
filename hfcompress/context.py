"""A stage, the context in which it runs, and its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.data.source import cache_home, model_directory
from hfcompress.data.task import Split, Task
from hfcompress.measure.plain_texts import Reading
from hfcompress.models.adapters import base_of, is_adapter, merge_adapter
from hfcompress.models.artifact import Artifact, note_problem_type, open_artifact, save_weights, weights_hash
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.shape import Shape
from hfcompress.utils.distributed import agreed, on_main_process, process_state
from hfcompress.utils.errors import HfcompressError, Key, Problem
from hfcompress.utils.escape import Markdown
from hfcompress.utils.figures import Figure
from hfcompress.utils.files import write_text
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from hfcompress.data.local_models import LocalModels
    from hfcompress.measure.hardware import Abilities


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    Attributes:
        directory: The model directory.
        facts: What stage.json, report and card tell of it, as JSON.
        logits: The model's logits on its dummy inputs, in this process; the saved model must give the same. None on
            all processes but the first.
        reading: How the stage read its texts; whoever loads the saved model must read them alike. None as well.
    """

    directory: Path
    facts: Mapping[str, Any]
    logits: NDArray[Any] | None = None
    reading: Reading | None = None


@dataclass
class StageContext:
    """What a stage works with: the task, the models made so far, a directory of its own.

    Attributes:
        task: The recipe's task.
        seed: The recipe's seed.
        source: The model as it enters the first compressing stage; the default teacher.
        made: The artifacts so far, by stage name, and the recipe's own `model`.
        directory: Where the stage writes; renamed to its final name once the stage is done.
        callbacks: `transformers` callbacks that every training run takes on.
    """

    task: Task
    seed: int
    source: Artifact
    made: Mapping[str, Artifact]
    directory: Path
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def model_directory(self) -> Path:
        """Where the stage's model goes."""
        return self.directory / "model"

    @property
    def checkpoints(self) -> Path:
        """Where a training run keeps the state that it resumes from."""
        return self.directory / "checkpoints"

    def at(self, name: str) -> StageContext:
        """The same bench in a directory of its own below this one, for one of several trainings of a stage."""
        inner = copy(self)
        inner.directory = self.directory / name
        return inner

    def artifact(self, spec: str, parent: Artifact) -> Artifact:
        """The artifact that a `teacher:` or a student's `from:` names."""
        here = {"source": self.source, "parent": parent, **self.made}
        if spec in here:
            return here[spec]
        path = model_directory(spec)
        return open_artifact(_merged(path, self.task.auto_class) if is_adapter(path) else path, spec)

    def stage_of(self, artifact: Artifact) -> str | None:
        """Finds the stage of this recipe that made a model, by its name; None for a model that came from elsewhere."""
        stages = (name for name, made in self.made.items() if name != "model" and made.path == artifact.path)
        return next(stages, None)

    @cached_property
    def _raw(self) -> dict[str, datasets.Dataset]:
        return {split: self.task.read(split) for split in ("train", "dev")}

    @cached_property
    def _fingerprint(self) -> str:
        return str(self.task.fingerprint())

    def rows(self, split: Split) -> datasets.Dataset:
        """The raw rows of `train` or `dev`."""
        return self._raw[split]

    def encoded(
        self,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        labels: Mapping[str, int],
        raw: datasets.Dataset | None = None,
    ) -> datasets.Dataset:
        """The tokenized rows of `train` or `dev`, or of `raw` in their place."""
        return self.task.encode(self._raw[split] if raw is None else raw, tokenizer, labels)

    def sample(
        self, count: int, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int], seed: int | None = None
    ) -> datasets.Dataset:
        """At most so many tokenized rows of `train`, of a stream from as many first documents.

        They are drawn by the seed, by default the recipe's.
        """
        if self.task.is_streamed:
            import datasets

            raw = datasets.Dataset.from_list(list(self._raw["train"].take(count)))
        else:
            whole = self._raw["train"]
            raw = whole.shuffle(seed=self.seed if seed is None else seed).select(range(min(count, len(whole))))
        rows = self.encoded("train", tokenizer, labels, raw)
        return rows.select(range(min(count, len(rows))))

    def fingerprint(self, raw: datasets.Dataset | None = None) -> str:
        """A hash of the data that the stage sees, or of `raw` in the train split's place."""
        if raw is None:
            return self._fingerprint
        return hash_json([raw[column][:] for column in self.task.columns])

    def remember(self, name: str, find: Callable[[], Any]) -> Any:
        """Finds a JSON value once, and gives all processes the same one, also after the run was killed.

        Args:
            name: The file under `facts/` that keeps it.
            find: Finds it; called on the first process alone.
        """
        path = self.directory / "facts" / f"{name}.json"

        def read() -> Any:
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # not found yet, or damaged
                return None

        def find_once() -> None:
            if read() is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(find()))

        on_main_process(find_once)
        return agreed(read() if process_state().is_main_process else None)

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]
    ) -> StageResult:
        """Saves the stage's model, and says what the saved one must answer.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            facts: What stage.json, report and card tell of it.
        """
        found = list[StageResult]()

        def save() -> None:
            save_weights(model.cpu(), self.model_directory)
            reading = self.save_reading(tokenizer, dict(model.config.label2id or {}))  # type: ignore[arg-type]
            logits = logits_of(model, make_dummy_inputs(self.model_directory))
            found.append(StageResult(self.model_directory, facts, logits, reading))

        on_main_process(save)
        return found[0] if found else StageResult(self.model_directory, facts)

    def save_reading(self, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int]) -> Reading:
        """Puts beside the stage's model what a pipeline needs to answer as was measured: tokenizer, kind of problem."""
        tokenizer.save_pretrained(self.model_directory)
        note_problem_type(self.model_directory, self.task.problem_type)
        return Reading(self.task, tokenizer, labels, self.rows("dev"))


def _merged(adapter: Path, auto_class: str) -> Path:
    """A peft adapter and its base as one model, made once and kept."""
    base = base_of(adapter, model_directory)
    directory = cache_home() / "merged" / hash_json([weights_hash(adapter), weights_hash(base), auto_class])

    def merge() -> None:
        if not directory.exists():
            merge_adapter(adapter, directory, auto_class, model_directory)

    on_main_process(merge)
    return directory


def uninstalled(modules: Sequence[str], extra: str) -> list[Problem]:
    """That modules are not installed, and the extra that brings them; nothing where there are none."""
    return [Problem(f"{', '.join(modules)} is not installed", f"pip install 'hfcompress[{extra}]'")] if modules else []


class Stage(StrictModel):
    """One step of a recipe; it is its own configuration.

    `plan` and `problems` read shapes only: no weights, no torch.
    """

    compresses: ClassVar[bool] = True
    """False for a stage that makes the source itself."""
    makes_task_head: ClassVar[bool] = False
    """True for a stage that can put the head of its task on any model."""
    ends_recipe: ClassVar[bool] = False
    """True for a stage whose model no other stage can work on."""
    tag: ClassVar[str] = ""
    """The tag of its models on the Hub."""
    relation: ClassVar[str] = "finetune"
    """How its model relates to the base model on the Hub (`base_model_relation` in the card)."""
    report_key: ClassVar[str] = ""
    """The key of report.json that keeps the stage's facts, by stage name; empty where it keeps none."""
    report_heading: ClassVar[str] = ""
    """The heading of the card's section about these facts."""
    reports: ClassVar[tuple[str, ...]] = ()
    """The names of these facts."""

    kind: Literal["finetune", "distill", "prune", "quantize"]

    def plan(self, shape: Shape) -> Shape:
        """The shape that the stage makes of a shape."""
        raise NotImplementedError

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        """What cannot work, with key paths inside the stage.

        Args:
            shape: The model that the stage gets.
            known: The shapes of the models that the recipe names (`source`, `parent`, …), as far as they are known.
            task: The stage's task.
        """
        return []

    def local_problems(self, models: LocalModels) -> list[Problem]:
        """What cannot work as far as configs, tokenizers and rows here tell, with key paths inside the stage.

        It is asked where `problems` found nothing; it reads files, and loads tokenizers.
        """
        start = models.named.get(self.starts_from)
        return models.reading_problems(start) if start is not None and start.directory != models.read_first else []

    @property
    def starts_from(self) -> str:
        """The name of the model whose tokenizer the stage's model has."""
        return "parent"

    def steps(self, task: Task) -> int | None:
        """Optimizer steps on one process; None where the number of the task's rows is not known."""
        return 0

    def specs(self) -> dict[Key, str]:
        """The models that the stage names besides its parent, by the key that names them."""
        return {}

    def task_of(self, task: Task) -> Task:
        """The task that the stage works on: the recipe's, or its own."""
        return task

    def unavailable(self) -> list[Problem]:
        """What the stage needs and this machine has not, with key paths inside the stage."""
        return []

    def options(self) -> dict[str, Any]:
        """The stage with its defaults resolved, as JSON."""
        return self.model_dump(mode="json", serialize_as_any=True)

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The devices on which the stage may compute the logits of its result."""
        return ("cpu",)

    def describe(self) -> Markdown:
        """What the stage does, as a sentence of the card."""
        return Markdown(f"**{self.kind}**")

    def limits(self) -> list[str]:
        """What a user of its model should know about its answers, as sentences of the card."""
        return []

    def advice(self, machine: Abilities) -> list[str]:
        """What is slow or inaccurate on this machine, each sentence after the key inside the stage that it is about."""
        return []

    @classmethod
    def summarize(cls, facts: Mapping[str, Any]) -> list[Markdown]:
        """What came of the stage, as paragraphs of the card, from the facts that the report keeps of it."""
        return []

    @classmethod
    def figures(cls, facts: Mapping[str, Any]) -> list[Figure]:
        """Pictures of the facts that the report keeps of it."""
        return []

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        """Writes the stage's model into `context.model_directory`; called on every process of a distributed run."""
        raise NotImplementedError


def require_trainable(parent: Artifact, stage: str) -> Shape:
    """The parent's shape, where it can be trained or cut.

    Raises:
        HfcompressError: for a quantized or exported model, or an architecture that is only measured.
    """
    if not parent.trainable:
        raise HfcompressError(
            f"{stage} needs a PyTorch model whose weights are floats, {parent.path} is {parent.runtime} {parent.dtype}",
            "put quantize last, or name the model that this one was made from",
        )
    if parent.shape is None:
        raise HfcompressError(f"the architecture of {parent.path} is not supported by {stage}")
    return parent.shape
