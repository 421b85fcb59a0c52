"""Models whose files are on this machine already, and the first rows as their tokenizers read them.

With them, `check` finds problems that shapes do not show, before anything runs. A run applies the same rules to all
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.artifact import load_tokenizer, read_config
from hfcompress.models.shape import shape_of
from hfcompress.utils.errors import HfcompressError, Key, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
ROWS = 1000
"""The most rows of the train split that are read."""


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine, or a model that a stage will make with the same tokenizer.

    Attributes:
        directory: The directory of its tokenizer.
        labels: The label names and ids of its task head; None if they are not known.
        config: Its config.json; None for a model that is not made yet.
    """

    directory: Path
    labels: Mapping[str, int] | None = None
    config: Mapping[str, Any] | None = None


@dataclass
class LocalModels:
    """The models that a stage names, as far as they are on this machine, and the first rows of its task.

    Attributes:
        task: The stage's task.
        named: The models, by their names in the recipe: `parent`, `source`, `model`, an earlier stage, a directory.
        readable: True if the task's rows may be read.
        read_first: The directory of the first tokenizer that a run uses. It is not checked here, because the run finds
            its problems at once.
    """

    task: Task
    named: Mapping[str, LocalModel]
    readable: bool = True
    read_first: Path | None = None
    _tokenizers: dict[Path, Any] = field(default_factory=dict)
    _rows: dict[Any, Any] = field(default_factory=dict)

    def tokenizer(self, model: LocalModel) -> PreTrainedTokenizerBase:
        """Loads a model's tokenizer.

        Raises:
            HfcompressError: if it cannot be loaded.
        """
        if model.directory not in self._tokenizers:
            self._tokenizers[model.directory] = load_tokenizer(model.directory, self.task)
        return self._tokenizers[model.directory]

    @property
    def labels(self) -> Mapping[str, int]:
        """The label names and ids of a student: those of the source, or else those of the data."""
        source = self.named.get("source")
        if source is not None and source.labels is not None:
            return source.labels
        return {name: index for index, name in enumerate(self.task.label_names())}

    def rows(self, model: LocalModel) -> dict[str, Any]:
        """Encodes the first train rows with a model's tokenizer; of a stream, the dev rows instead.

        Raises:
            HfcompressError: if a run would refuse this tokenizer or these rows.
        """
        if model.directory not in self._rows:
            tokenizer, labels = self.tokenizer(model), self.labels
            with _no_progress_bars():
                self._rows[model.directory] = {
                    split: self.task.encode(rows, tokenizer, labels) for split, rows in self._first.items()
                }
        return self._rows[model.directory]  # type: ignore[no-any-return]

    def reading_problems(self, model: LocalModel) -> list[Problem]:
        """Returns the problems that a run would have with the first rows, as a model's tokenizer reads them."""
        return collect_problems(lambda: self.rows(model)) if self.readable else []

    def without_weights(self, model: LocalModel) -> PreTrainedModel:
        """Builds a model with the task head on the meta device."""
        import torch
        import transformers

        from hfcompress.models.surgery import empty_model

        config = read_config(model.directory)
        shape = shape_of(config, head=self.task.head)
        with torch.device("meta"):
            settings = transformers.AutoConfig.for_model(shape.architecture).from_dict(config)
            stock = getattr(transformers, self.task.auto_class)._model_mapping[type(settings)]
            return empty_model(stock.__name__, shape, settings)

    def vocabulary_problems(self, model: LocalModel, key: Key) -> list[Problem]:
        """Returns the reasons why a model's vocabulary cannot be cut."""
        from hfcompress.models.vocabulary import require_cuttable

        return collect_problems(lambda: require_cuttable(self.tokenizer(model)), key)

    @cached_property
    def _first(self) -> dict[str, Any]:
        train = self.task.read("train")
        if self.task.is_streamed:
            return {"train": train, "dev": self.task.read("dev")}
        return {"train": train.select(range(min(ROWS, len(train))))}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hides the progress bars of `datasets` inside the context."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def collect_problems(step: Callable[[], Any], key: Key = ()) -> list[Problem]:
    """Calls a step of a run, and returns the problems for which it is refused; the result of the step is dropped.

    Args:
        step: It raises HfcompressError for what it refuses.
        key: The key in the recipe that the step depends on.
    """
    try:
        step()
    except HfcompressError as error:
        return [replace(problem, key=key) for problem in error.problems]
    return []
