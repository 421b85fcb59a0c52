"""The state of a prune stage: its fixed inputs, and the model between two steps."""

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
from hfcompress.pruning.latency_table import LatencyTable, find_table
from hfcompress.utils.distributed import all_reduce_sum, process_state

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.pruning.stage import Prune

ROWS, BATCH = 2048, 32
"""Number of calibration rows and batch size if the criterion itself uses no rows (Kwon et al. 2022)."""


@dataclass(frozen=True)
class PruningRun:
    """The inputs of a prune stage, which stay the same in all its steps.

    Attributes:
        options: The stage.
        shape: The parent's shape; all shares are of this one, also after earlier rounds.
        parent: The model that the stage gets.
        context: The stage's context.
        calibration: Training rows for scores and least squares.
        table: Timings of the parent's blocks if the budget is a latency, else None.
    """

    options: Prune
    shape: Shape
    parent: Artifact
    context: StageContext
    calibration: Calibration
    table: LatencyTable | None

    @property
    def calibration_rows(self) -> int:
        """The number of rows for mask rearrangement and least squares: as many as the criterion uses."""
        criterion = self.options.criterion
        return criterion.rows if isinstance(criterion, DataCriterion) else ROWS

    def load_parent(self) -> PreTrainedModel:
        """Loads the model that the stage gets."""
        return load_model(self.parent.path, self.context.task.auto_class)


@dataclass(frozen=True)
class PruningState:
    """A model between two steps of the schedule.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        layers: The parent's layers that are left, counted from 1.
        facts: The facts so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, ...]
    facts: PruningFacts


def start_run(options: Prune, shape: Shape, parent: Artifact, context: StageContext) -> PruningRun:
    """Prepares the calibration rows, and the timings if the budget is a latency; called on every process."""
    budget, table = options.budget, None
    if budget is not None and budget.latency is not None:

        def measure() -> object:
            return find_table(load_model(parent.path, context.task.auto_class), budget.setting).to_json()

        table = LatencyTable.from_json(context.remember("latency_table", measure))
    return PruningRun(options, shape, parent, context, _make_calibration(options, parent, context), table)


def _make_calibration(options: Prune, parent: Artifact, context: StageContext) -> Calibration:
    """Makes batches of the train split, which the processes share; each number of rows is encoded once."""
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
