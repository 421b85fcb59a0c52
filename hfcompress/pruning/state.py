"""What a prune stage works with, and the model as it goes from one step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from hfcompress.context import StageContext
from hfcompress.models.artifact import Artifact, label_ids, load_model, load_tokenizer, read_config
from hfcompress.models.shape import Shape
from hfcompress.pruning.criteria.base import Calibration, DataCriterion
from hfcompress.pruning.facts import PruningFacts
from hfcompress.pruning.latency_table import Table, find_table
from hfcompress.utils.distributed import all_reduce_sum, process_state

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.pruning.stage import Prune

ROWS, BATCH = 2048, 32
"""Calibration rows and their batch size where the criterion looks at no rows itself (Kwon et al. 2022)."""


@dataclass(frozen=True)
class PruningRun:
    """What stays the same from the first step of a prune stage to its last.

    Attributes:
        options: The stage.
        shape: The parent's; shares are of this one, whatever earlier rounds cut.
        parent: The model that the stage gets.
        context: The stage's context.
        calibration: Training rows for scores and least squares.
        table: Timings of the parent's blocks, where the budget is a latency.
    """

    options: Prune
    shape: Shape
    parent: Artifact
    context: StageContext
    calibration: Calibration
    table: Table | None

    @property
    def calibration_rows(self) -> int:
        """Rows for mask rearrangement and least squares: as many as the criterion looks at."""
        criterion = self.options.criterion
        return criterion.rows if isinstance(criterion, DataCriterion) else ROWS

    def load_parent(self) -> PreTrainedModel:
        """Loads the model that the stage gets."""
        return load_model(self.parent.path, self.context.task.auto_class)


@dataclass(frozen=True)
class PruningState:
    """A model on its way through the schedule.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        layers: The parent's layers that are left, counted from 1.
        facts: What was found so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, ...]
    facts: PruningFacts


def start_run(options: Prune, shape: Shape, parent: Artifact, context: StageContext) -> PruningRun:
    """Prepares the calibration rows and, for a budget of latency, the timings; called on every process."""
    budget, table = options.budget, None
    if budget is not None and budget.latency is not None:

        def measure() -> object:
            return find_table(load_model(parent.path, context.task.auto_class), budget.setting).to_json()

        table = Table.from_json(context.remember("latency_table", measure))
    return PruningRun(options, shape, parent, context, _calibration(options, parent, context), table)


def _calibration(options: Prune, parent: Artifact, context: StageContext) -> Calibration:
    """Batches of the train split that the processes share; they are encoded once for each number of rows."""
    tokenizer, labels = load_tokenizer(parent.path, context.task), label_ids(read_config(parent.path))
    criterion, state = options.criterion, process_state()
    own: int | None = getattr(criterion, "seed", None)
    seed = context.seed if own is None else own
    size = criterion.batch_size if isinstance(criterion, DataCriterion) else BATCH

    @cache
    def encode(count: int) -> list[dict[str, Tensor]]:
        from hfcompress.training.batches import make_batches

        return list(make_batches(context.sample(count, tokenizer, labels, seed), tokenizer, context.task, size))

    def batches(count: int) -> Iterable[Mapping[str, Tensor]]:
        return encode(count)[state.process_index :: state.num_processes]

    return Calibration(batches, context.task.row_loss, seed, all_reduce_sum)
