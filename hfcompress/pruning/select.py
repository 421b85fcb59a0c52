"""What a prune stage decides of a model, and does to it: layers, hidden dimensions, heads and neurons, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext
from hfcompress.models.artifact import Artifact, label_ids, load_model, load_tokenizer, read_config
from hfcompress.models.shape import Shape, shape_of
from hfcompress.pruning.allocation import allocate, choose, kept
from hfcompress.pruning.budget import latency_note, target_of
from hfcompress.pruning.costs import Target
from hfcompress.pruning.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.pruning.criteria.obs import Obs
from hfcompress.pruning.schedules import Gradual
from hfcompress.utils.distributed import agreed, on_main_process, process_state
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.latency_table import Table
    from hfcompress.pruning.stage import Prune
    from hfcompress.training.overlay import TrainingOverlay

Change = Callable[["PreTrainedModel"], "PreTrainedModel"]
"""What was decided of one model; it can be done to any model of the same shape."""


ROWS, BATCH = 2048, 32
"""Rows that masks are rearranged and tuned on, and a batch of them, where the criterion looks at none (Kwon et al.)."""


@dataclass
class Cutting:
    """The decisions of one prune stage.

    Attributes:
        options: The stage.
        shape: The model's as the stage gets it: shares are of this one, whatever was cut in earlier rounds.
        parent: That model.
        context: The stage's context.
        kept_layers: The layers of the whole model, from 1, that no round has dropped.
    """

    options: Prune
    shape: Shape
    parent: Artifact
    context: StageContext
    kept_layers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = dict[str, Any]()
        self.kept_layers = list(range(1, len(self.shape.layers) + 1))
        self.tokenizer = load_tokenizer(self.parent.path, self.context.task)
        self.labels = label_ids(read_config(self.parent.path))

    def decided(self, model: PreTrainedModel, done: float) -> tuple[PreTrainedModel, list[Change]]:
        """The model with so much of the cutting done, and what was done to it, in order."""
        changes = list[Change]()
        for decide in (self._layers, self._hidden, self._units, self._weights):
            change = decide(model.to(process_state().device), done)
            if change is not None:
                model = change(model)
                changes.append(change)
        return model, changes

    def _layers(self, model: PreTrainedModel, done: float) -> Change | None:
        from hfcompress.pruning.narrow import drop_layers, must_stay

        if not self.options.layers:
            return None
        want = len(self.shape.layers) - round(self.options.layers * done)
        scores = self.options.criterion.layer_scores(model, self.calibration)
        bound = must_stay(shape_of(model.config.to_dict()))
        kept = sorted(sorted(range(len(scores)), key=lambda i: (i not in bound, -scores[i], i))[:want])
        self.kept_layers = [self.kept_layers[i] for i in kept]
        return partial(drop_layers, kept=kept)

    def _hidden(self, model: PreTrainedModel, done: float) -> Change | None:
        from hfcompress.pruning.narrow import cut_hidden

        if not self.options.hidden:
            return None
        want = kept(self.shape.hidden, self.options.hidden * done, self.options.multiple_of)
        scores = self.options.criterion.hidden_scores(model, self.calibration).cpu()
        dims = scores.argsort(descending=True, stable=True)[:want].sort().values.tolist()
        return partial(cut_hidden, dims=dims)

    def _units(self, model: PreTrainedModel, done: float) -> Change | None:
        from hfcompress.models.surgery import cut

        if "units" not in self.options.granularities:
            return None
        log.info(f"prune: scoring heads and neurons by {self.options.criterion.name}")
        scores = self.options.criterion.scores(model, self.calibration)
        self._look_at_sensitivity(model, scores)
        keep = self.chosen(scores, model, done)
        if self.options.rearrange:
            keep = self._rearranged(model, keep)
        if self.options.tuning == "scales":
            self._scale(model, keep)
        elif self.options.tuning == "weights":
            log.info("prune: refitting what stays")
            Obs(rows=self._rows).refit(model, keep, self.calibration)
        return partial(cut, keep=keep)

    def _weights(self, model: PreTrainedModel, done: float) -> Change | None:
        from hfcompress.pruning.sparsity import kept_weights, with_zeros

        if self.options.weights is None:
            return None
        log.info(f"prune: scoring single weights by {self.options.criterion.name}")
        self.options.criterion.sparsify(model, self.options.weights.at(done), self.calibration)
        return partial(with_zeros, kept=kept_weights(model))

    def chosen(self, scores: Scores, model: PreTrainedModel, done: float) -> list[Keep]:
        """The heads and neurons that stay when so much of the cutting is done."""
        from hfcompress.models.surgery import Keep

        if self.options.budget is not None:
            return allocate(scores, self.target(model, done), normalise=not self.options.criterion.comparable)
        heads = self._by_share(scores.heads, "heads", done)
        neurons = self._by_share(scores.neurons, "ffn", done)
        return [Keep(h, n) for h, n in zip(heads, neurons, strict=True)]

    def _by_share(self, scores: list[Tensor], block: str, done: float) -> list[tuple[int, ...]]:
        """What stays of the heads, or of the neurons: some blocks are emptied, of the others a share is cut.

        Args:
            scores: One tensor for each layer's weights.
            block: `heads` or `ffn`.
            done: How much of the cutting is done.
        """
        options = self.options
        share = options.heads if block == "heads" else options.ffn
        emptied = options.attention_blocks if block == "heads" else options.ffn_blocks
        multiple = 1 if block == "heads" or not share else options.multiple_of
        sums = [float(s.sum()) for s in scores]
        left = sorted(sorted(range(len(sums)), key=lambda i: (sums[i], i))[round(emptied * done) :])
        now = self._still_to_cut([len(scores[i]) for i in left], share * done, block)
        chosen = choose([scores[i] for i in left], now, multiple, options.allocation == "even")
        by_layer = dict(zip(left, chosen, strict=True))
        return [by_layer.get(i, ()) for i in range(len(scores))]

    def _still_to_cut(self, units: list[int], share: float, block: str) -> float:
        """Which share of these units goes, so that with what earlier rounds cut it is `share` of the whole model's."""
        if not share or not sum(units):
            return 0.0
        before = [x.heads // self.shape.group if block == "heads" else x.ffn for x in self.shape.layers]
        return max(1 - (1 - share) * len(units) * sum(before) / len(before) / sum(units), 0.0)

    def target(self, model: PreTrainedModel, done: float) -> Target:
        """What a budget leaves of a model when so much of the cutting is done."""
        budget, options = self.options.budget, self.options
        assert budget is not None
        now = shape_of(model.config.to_dict())
        length, empty = self.context.task.max_length, options.empty_blocks
        return target_of(budget, self.shape, now, options.multiple_of, length, self.table, done, empty)

    @cached_property
    def table(self) -> Table | None:
        """Timings of the source's blocks on this device, where a budget is a latency."""
        from hfcompress.pruning.latency_table import table_of

        budget = self.options.budget
        if budget is None or budget.latency is None:
            return None
        found: list[Table] = []
        on_main_process(lambda: found.append(table_of(self.whole(), budget.setting)))
        return agreed(found[0] if found else None)  # type: ignore[no-any-return]

    def latency(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """What a budget of latency asked for, foretold and came to; None where it is none."""
        budget, found = self.options.budget, list[dict[str, Any]]()
        if budget is None or self.table is None:
            return None
        table = self.table
        on_main_process(lambda: found.append(latency_note(budget, table, self.whole(), model)))
        return found[0] if found else None

    def whole(self) -> PreTrainedModel:
        """The model as the stage gets it."""
        return load_model(self.parent.path, self.context.task.auto_class)

    def closing(self, schedule: Gradual, model: PreTrainedModel) -> TrainingOverlay:
        """Masks that close as the schedule says; the model is scored anew each time."""
        from hfcompress.pruning.masks import units as masks
        from hfcompress.pruning.masks import weights as weight_masks

        criterion = self.options.criterion
        due = masks.Due(schedule.begin, schedule.end, schedule.every, schedule.curve)

        def rescore(masked: PreTrainedModel, done: float) -> list[Keep]:
            return self.chosen(criterion.scores(masked, self.calibration), masked, done)

        if self.options.weights is not None:
            scores = partial(criterion.weight_scores, calibration=self.calibration)
            return weight_masks.GradualWeights(model, self.options.weights, scores, due)
        return masks.Gradual(model, rescore, due)

    def _rearranged(self, model: PreTrainedModel, keep: list[Keep]) -> list[Keep]:
        """As many units of each block, of which some are swapped for others that go better together."""
        import torch

        from hfcompress.models.architectures import unit_counts
        from hfcompress.pruning.gradients import unit_gradients
        from hfcompress.pruning.mask_tuning import rearrange

        calibration = self.calibration
        # A process without rows has matrices without rows, and sums up with the others.
        none = partial(torch.zeros, 0, device=model.device)
        found = [[[none(units)] for units in counts] for counts in unit_counts(model)]
        for batch in unit_gradients(model, calibration.batches(self._rows), calibration.loss):
            for rows, gradients in zip(found, batch, strict=True):
                for layer, gradient in zip(rows, gradients, strict=True):
                    layer.append(gradient)
        heads, neurons = ([torch.cat(layer) for layer in rows] for rows in found)
        return rearrange(keep, (heads, neurons), calibration.total)

    def _scale(self, model: PreTrainedModel, keep: list[Keep]) -> None:
        """Scales what stays, in place; notes each block's error before and after."""
        from hfcompress.pruning.gates import fold
        from hfcompress.pruning.mask_tuning import tune

        log.info("prune: scaling what stays")
        gates = tune(model, keep, self.calibration.batches(self._rows), total=self.calibration.total)
        fold(model, gates.heads, gates.neurons)
        self.facts["tuned"] = [[round(error, 6) for error in pair] for pair in gates.errors]

    @property
    def _rows(self) -> int:
        """Rows that masks are rearranged and tuned on: as many as the criterion looks at."""
        criterion = self.options.criterion
        return criterion.rows if isinstance(criterion, DataCriterion) else ROWS

    def _look_at_sensitivity(self, model: PreTrainedModel, scores: Scores) -> None:
        """Notes how the metric falls with each block's units, the first time that there are scores."""
        from hfcompress.pruning.sensitivity import sensitivity

        wanted = self.options.sensitivity
        if wanted is None:
            return

        def look() -> dict[str, Any]:
            rows = self.context.encoded("dev", self.tokenizer, self.labels).shuffle(seed=self.context.seed)
            rows = rows.select(range(min(wanted.rows, len(rows))))
            group = self.options.multiple_of if self.options.ffn or self.options.budget else 1
            return sensitivity(model, scores, rows, self.tokenizer, self.context.task, wanted.shares, group)

        self.facts["sensitivity"] = self.context.remember("sensitivity", look)

    def sparsity(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the zeros of a model come to, for its card."""
        from hfcompress.pruning.sparsity import share_of_zeros, sparse_bytes

        dense = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
        found = {"share": share_of_zeros(model), "dense_bytes": dense, "sparse_bytes": sparse_bytes(model)}
        log.info(
            f"prune: {found['share']:.0%} of the layers' weights are zero: {dense / 1e6:.1f} MB, "
            f"{found['sparse_bytes'] / 1e6:.1f} MB in sparse storage; dense runtimes are no faster for it"
        )
        return found

    @cached_property
    def calibration(self) -> Calibration:
        """Rows for a criterion: the processes share the batches and sum up what they see."""
        state = process_state()

        def batches(count: int) -> Iterable[Mapping[str, Tensor]]:
            return self._batches(count)[state.process_index :: state.num_processes]

        def total(tensors: Sequence[Tensor]) -> None:
            if state.num_processes > 1:
                from accelerate.utils import reduce

                for tensor in tensors:
                    tensor.copy_(reduce(tensor, "sum"))

        return Calibration(batches, self.context.task.row_loss, self._seed, total)

    def _batches(self, count: int) -> list[dict[str, Tensor]]:
        """At most so many rows of the train split, in batches."""
        from hfcompress.training.batches import make_batches

        if count not in self._kept:
            rows = self.context.sample(count, self.tokenizer, self.labels, self._seed)
            criterion = self.options.criterion
            size = criterion.batch_size if isinstance(criterion, DataCriterion) else BATCH
            self._kept[count] = list(make_batches(rows, self.tokenizer, self.context.task, size))
        return self._kept[count]

    @property
    def _seed(self) -> int:
        seed: int | None = getattr(self.options.criterion, "seed", None)
        return self.context.seed if seed is None else seed

    @cached_property
    def _kept(self) -> dict[int, list[dict[str, Tensor]]]:
        return {}
