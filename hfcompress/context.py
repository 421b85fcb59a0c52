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
from hfcompress.models.save_tokenizer import save_tokenizer
from hfcompress.models.shape import Shape
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
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

    from hfcompress.data.local_models import LocalModel, LocalModels
    from hfcompress.measure.hardware import Abilities


@dataclass(frozen=True)
class StageResult:
    """The result of a stage.

    Attributes:
        directory: The model directory.
        facts: The facts of the stage for stage.json, report and card, as JSON.
        logits: The model's logits on its dummy inputs, in this process; the saved model must give the same logits. None
            on every process but the first.
        reading: The plain texts as the stage read them; a pipeline with the saved model must read them alike. None on
            every process but the first.
    """

    directory: Path
    facts: Mapping[str, Any]
    logits: NDArray[Any] | None = None
    reading: Reading | None = None


@dataclass
class StageContext:
    """The context that a stage runs in: the task, the models made so far, a directory of its own.

    Attributes:
        task: The recipe's task.
        seed: The recipe's seed.
        source: The model as it enters the first compressing stage; the default teacher.
        made: The models made so far, by stage name, and the recipe's own `model`.
        directory: The directory that the stage writes to; it gets its final name once the stage is done.
        callbacks: `transformers` callbacks for every training.
    """

    task: Task
    seed: int
    source: Artifact
    made: Mapping[str, Artifact]
    directory: Path
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def model_directory(self) -> Path:
        """The directory for the stage's model."""
        return self.directory / "model"

    @property
    def checkpoints(self) -> Path:
        """The directory for the checkpoints that a training resumes from."""
        return self.directory / "checkpoints"

    def nest(self, name: str) -> StageContext:
        """Makes a context with a directory below this one, for one of several trainings of a stage."""
        inner = copy(self)
        inner.directory = self.directory / name
        return inner

    def artifact(self, spec: str, parent: Artifact) -> Artifact:
        """Opens the model that a `teacher:` or a student's `from:` names; an adapter is merged into its base."""
        here = {"source": self.source, "parent": parent, **self.made}
        if spec in here:
            return here[spec]
        path = model_directory(spec)
        return open_artifact(_merge_adapter(path, self.task.auto_class) if is_adapter(path) else path, spec)

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
        """Returns the raw rows of `train` or `dev`."""
        return self._raw[split]

    def encode(
        self,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        labels: Mapping[str, int],
        raw: datasets.Dataset | None = None,
    ) -> datasets.Dataset:
        """Tokenizes the rows of `train` or `dev`, or `raw` in their place."""
        return self.task.encode(self._raw[split] if raw is None else raw, tokenizer, labels)

    def sample(
        self, count: int, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int], seed: int | None = None
    ) -> datasets.Dataset:
        """Draws and tokenizes at most `count` rows of `train`; a stream gives its first documents.

        Args:
            count: The number of rows.
            tokenizer: The tokenizer.
            labels: The label names and ids.
            seed: The seed of the draw, by default the recipe's.
        """
        if self.task.is_streamed:
            import datasets

            raw = datasets.Dataset.from_list(list(self._raw["train"].take(count)))
        else:
            whole = self._raw["train"]
            raw = whole.shuffle(seed=self.seed if seed is None else seed).select(range(min(count, len(whole))))
        rows = self.encode("train", tokenizer, labels, raw)
        return rows.select(range(min(count, len(rows))))

    def fingerprint(self, raw: datasets.Dataset | None = None) -> str:
        """Hashes the data that the stage sees, or `raw` in place of the train split."""
        if raw is None:
            return self._fingerprint
        return hash_json([raw[column][:] for column in self.task.columns])

    def remember(self, name: str, find: Callable[[], Any]) -> Any:
        """Finds a JSON value once; all processes get the same value, also if the run was killed and resumed.

        Args:
            name: The name of the file under `facts/` that keeps the value.
            find: Finds the value; it is called only on the first process.
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
        return broadcast(read() if process_state().is_main_process else None)

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]
    ) -> StageResult:
        """Saves the stage's model, with the logits that the saved model must give.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            facts: The facts of the stage for stage.json, report and card.
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
        """Saves the tokenizer and the problem type, so that a pipeline answers as the measured model did."""
        save_tokenizer(tokenizer, self.model_directory)
        note_problem_type(self.model_directory, self.task.problem_type)
        return Reading(self.task, tokenizer, labels, self.rows("dev"))


def _merge_adapter(adapter: Path, auto_class: str) -> Path:
    """Merges a peft adapter into its base, and keeps the merged model in the cache."""
    base = base_of(adapter, model_directory)
    directory = cache_home() / "merged" / hash_json([weights_hash(adapter), weights_hash(base), auto_class])

    def merge() -> None:
        if not directory.exists():
            merge_adapter(adapter, directory, auto_class, model_directory)

    on_main_process(merge)
    return directory


def report_missing(modules: Sequence[str], extra: str) -> list[Problem]:
    """Returns a problem if modules are not installed, with the extra that installs them."""
    return [Problem(f"{', '.join(modules)} is not installed", f"pip install 'hfcompress[{extra}]'")] if modules else []


class Stage(StrictModel):
    """A step of a recipe; it is its own configuration.

    `plan` and `problems` read shapes only: no weights, no torch.
    """

    compresses: ClassVar[bool] = True
    """False for a stage that makes the source itself."""
    makes_task_head: ClassVar[bool] = False
    """True for a stage that can put the task head of its task on any model."""
    ends_recipe: ClassVar[bool] = False
    """True for a stage after which no other stage can follow."""
    participle: ClassVar[str] = ""
    """The word for its models, such as `pruned`; a tag on the Hub if the stage compresses."""
    relation: ClassVar[str] = "finetune"
    """The relation of its model to the base model on the Hub (`base_model_relation` in the card)."""
    report_key: ClassVar[str] = ""
    """The key of report.json that holds the stage's facts, by stage name; empty if the report holds none."""
    report_heading: ClassVar[str] = ""
    """The heading of the card's section about these facts."""
    reports: ClassVar[tuple[str, ...]] = ()
    """The names of these facts."""

    kind: Literal["finetune", "distill", "prune", "quantize"]

    def plan(self, shape: Shape) -> Shape:
        """Plans the shape of the stage's model from the shape of the model that it gets."""
        raise NotImplementedError

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        """Lists what cannot work, with key paths inside the stage.

        Args:
            shape: The shape of the model that the stage gets.
            known: The shapes of the models that the recipe names (`source`, `parent`, …), as far as they are known.
            task: The stage's task.
        """
        return []

    def local_problems(self, models: LocalModels) -> list[Problem]:
        """Lists what cannot work with the configs, tokenizers and rows here, with key paths inside the stage.

        It reads files and loads tokenizers, so it is called only if `problems` found nothing.
        """
        start = models.named.get(self.starts_from)
        return models.reading_problems(start) if start is not None and start.directory != models.read_first else []

    def find_labels(self, start: LocalModel, models: LocalModels) -> Mapping[str, int] | None:
        """Finds the label names and ids of the task head that the stage's model will have; None if not known yet.

        Args:
            start: The model that the stage starts from.
            models: The models and rows on this machine.
        """
        return start.labels

    @property
    def trains_source_head(self) -> bool:
        """True if the stage trains the task head of the source, so that the recipe's model needs none."""
        return False

    @property
    def starts_from(self) -> str:
        """The name of the model whose tokenizer the stage's model gets."""
        return "parent"

    def steps(self, task: Task) -> int | None:
        """Counts the optimizer steps on one process; None if the number of rows is not known."""
        return 0

    def specs(self) -> dict[Key, str]:
        """Lists the models that the stage names besides its parent, by the key that names each."""
        return {}

    def task_of(self, task: Task) -> Task:
        """Returns the task that the stage works on: the recipe's `task`, or its own."""
        return task

    def unavailable(self) -> list[Problem]:
        """Lists what the stage needs but this machine lacks, with key paths inside the stage."""
        return []

    def options(self) -> dict[str, Any]:
        """Returns the options of the stage, defaults included, as JSON."""
        return self.model_dump(mode="json", serialize_as_any=True)

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The devices on which the stage may compute the logits of its result."""
        return ("cpu",)

    def describe(self) -> Markdown:
        """Describes the stage in a sentence for the card."""
        return Markdown(f"**{self.kind}**")

    def limits(self) -> list[str]:
        """Lists limits of its model that a user should know, as sentences for the card."""
        return []

    def advice(self, machine: Abilities) -> list[str]:
        """Lists what is slow or inaccurate on a machine: each entry is a key inside the stage and a sentence."""
        return []

    @classmethod
    def summarize(cls, facts: Mapping[str, Any]) -> list[Markdown]:
        """Summarizes the facts that the report holds of the stage, in paragraphs for the card."""
        return []

    @classmethod
    def figures(cls, facts: Mapping[str, Any]) -> list[Figure]:
        """Lists pictures of the facts that the report holds of the stage."""
        return []

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        """Writes the stage's model into `context.model_directory`; called on every process of a distributed run."""
        raise NotImplementedError


def require_trainable(parent: Artifact, stage: str) -> Shape:
    """Requires a parent that can be trained or cut, and returns its shape.

    Raises:
        HfcompressError: for a quantized or exported model, or an architecture that can only be measured.
    """
    if not parent.trainable:
        raise HfcompressError(
            f"{stage} needs a PyTorch model with float weights, but {parent.path} is {parent.runtime} {parent.dtype}",
            "put quantize last, or name the model before quantization",
        )
    if parent.shape is None:
        raise HfcompressError(f"{stage} does not support the architecture of {parent.path}")
    return parent.shape
