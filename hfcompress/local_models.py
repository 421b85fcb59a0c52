"""What lies on this machine already: configs, tokenizers and rows tell of a recipe what no shape does.

`check` looks before anything runs, at the first rows; the rules are those that a run asks of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.distillation.teacher_checks import (
    head_problems,
    label_problems,
    reading_problems,
    same_behaviour,
    same_inputs,
)
from hfcompress.models.artifact import load_tokenizer, read_config
from hfcompress.models.shape import shape_of
from hfcompress.utils.errors import HfcompressError, Key, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.distillation.options import DistillationOptions

ROWS = 1000
"""Rows of the train split that are looked at."""


@dataclass(frozen=True)
class Local:
    """A model that lies on this machine, or one that a stage will make with the same tokenizer.

    Attributes:
        directory: Where the tokenizer lies.
        labels: The head's label names and ids; None where they are not known.
        config: Its config.json; None of a model that is not made yet.
    """

    directory: Path
    labels: Mapping[str, int] | None = None
    config: Mapping[str, Any] | None = None


@dataclass
class Locals:
    """The models that a stage names, as far as they are known, and the task's first rows as their tokenizers read them.

    Attributes:
        task: The stage's task.
        named: By the name that the recipe has for them: `parent`, `source`, `model`, an earlier stage, a directory.
        readable: Whether the task's rows may be read.
        read_first: The directory whose tokenizer reads this task's rows as the first thing that a run does: it needs no
            look before.
    """

    task: Task
    named: Mapping[str, Local]
    readable: bool = True
    read_first: Path | None = None
    _tokenizers: dict[Path, Any] = field(default_factory=dict)
    _rows: dict[Any, Any] = field(default_factory=dict)

    def tokenizer(self, model: Local) -> PreTrainedTokenizerBase:
        """A model's tokenizer.

        Raises:
            HfcompressError: where it does not load.
        """
        if model.directory not in self._tokenizers:
            self._tokenizers[model.directory] = load_tokenizer(model.directory, self.task)
        return self._tokenizers[model.directory]

    @property
    def labels(self) -> Mapping[str, int]:
        """The label names and ids that a student has: the source's, else the data's."""
        source = self.named.get("source")
        if source is not None and source.labels is not None:
            return source.labels
        return {name: index for index, name in enumerate(self.task.label_names())}

    def rows(self, model: Local) -> dict[str, Any]:
        """The first train rows as a model's tokenizer encodes them; of a stream, the dev rows too, and no train row.

        Raises:
            HfcompressError: for whatever a run would say of the tokenizer or of these rows.
        """
        if model.directory not in self._rows:
            tokenizer, labels = self.tokenizer(model), self.labels
            with _quietly():
                self._rows[model.directory] = {
                    split: self.task.encode(rows, tokenizer, labels) for split, rows in self._first.items()
                }
        return self._rows[model.directory]  # type: ignore[no-any-return]

    def reading_problems(self, model: Local) -> list[Problem]:
        """What a run would say of the first rows as a model's tokenizer reads them."""
        return told(lambda: self.rows(model)) if self.readable else []

    def without_weights(self, model: Local) -> PreTrainedModel:
        """A model of the class that the task takes, on the meta device."""
        import torch
        import transformers

        from hfcompress.models.surgery import empty_model

        config = read_config(model.directory)
        shape = shape_of(config, head=self.task.head)
        with torch.device("meta"):
            settings = transformers.AutoConfig.for_model(shape.architecture).from_dict(config)
            stock = getattr(transformers, self.task.auto_class)._model_mapping[type(settings)]
            return empty_model(stock.__name__, shape, settings)

    def vocabulary_problems(self, model: Local, key: Key) -> list[Problem]:
        """Why a model's vocabulary cannot be cut."""
        from hfcompress.models.vocabulary import require_cuttable

        return told(lambda: require_cuttable(self.tokenizer(model)), key)

    @cached_property
    def _first(self) -> dict[str, Any]:
        train = self.task.read("train")
        if self.task.streamed:
            return {"train": train, "dev": self.task.read("dev")}
        return {"train": train.select(range(min(ROWS, len(train))))}


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars while the context lasts."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def told(ask: Callable[[], Any], key: Key = ()) -> list[Problem]:
    """What a step of a run would refuse, asked before it."""
    try:
        ask()
    except HfcompressError as error:
        return [replace(problem, key=key) for problem in error.problems]
    return []


def local_taught_problems(taught: DistillationOptions, student: Local, models: Locals) -> list[Problem]:
    """Why teachers that lie on this machine cannot teach a student that starts from one that does.

    The keys are those of a block with losses and a teacher.
    """
    found = list[Problem]()
    if models.readable:
        for number, loss in enumerate(taught.losses):
            found += [
                replace(p, key=("losses", number, *p.key)) for p in loss.task_problems(models.task, models.labels)
            ]
    for index, (key, name) in enumerate(taught.teacher_specs().items()):
        teacher = models.named.get(name)
        if teacher is None:
            continue
        problems = list[Problem]()
        answers = models.task.head != "mask" or any(loss.needs_logits for loss in taught.losses)
        if teacher.config is not None and answers:
            problems += head_problems(name, teacher.config, models.task)
        if models.readable and teacher.labels is not None and models.task.head in ("sequence", "token"):
            problems += label_problems(name, teacher.labels, models.labels, models.task)
        if models.readable and not problems and teacher.directory != student.directory:
            problems += told(lambda t=teacher, n=name, i=index: _require_reading(n, t, student, models, taught, i == 0))  # type: ignore[misc]
        found += [replace(problem, key=key) for problem in problems]
    return found


def _require_reading(
    name: str, teacher: Local, student: Local, models: Locals, taught: DistillationOptions, first: bool
) -> None:
    tokenizers = models.tokenizer(student), models.tokenizer(teacher)
    if same_behaviour(*tokenizers):
        return
    rows, theirs = models.rows(student), models.rows(teacher)
    if not same_inputs(*tokenizers, rows, theirs):
        problems = reading_problems(name, *tokenizers, rows["train"], theirs["train"], taught, models.task.head, first)
        if problems:
            raise HfcompressError(problems)
