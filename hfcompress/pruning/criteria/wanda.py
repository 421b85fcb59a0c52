"""Wanda: scores weights by their magnitude times the norm of their input."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze
from hfcompress.models.linears import layer_linears
from hfcompress.pruning.criteria.base import Calibration, DataCriterion, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Wanda(DataCriterion):
    """`I_ij = |W_ij| ‖X_j‖₂`, where X_j is input j of a linear module over all real tokens.

    The paper compares weights within an output row (`scope: row`). A unit's score is the sum over its columns of the
    next linear module, `Σ_{j ∈ unit} Σ_i |W_ij| ‖X_j‖₂`.
    """

    source: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695, eq. 1"
    scored: ClassVar[frozenset[str]] = frozenset({"units", "weights"})

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        modules, weights = spec_of(model).modules, self.weight_scores(model, calibration)
        names = {id(module): name for name, module in layer_linears(model).items()}

        def of(layer: nn.Module, path: str, count: int) -> Tensor:
            if not count:
                return torch.zeros(0, device=model.device)
            columns = weights[f"{names[id(layer.get_submodule(path))]}.weight"].sum(0)
            return columns.unflatten(0, (count, -1)).sum(-1)

        layers = list(zip(layers_of(model), *unit_counts(model), strict=True))
        return Scores(
            [of(layer, modules.attention_output, heads) for layer, heads, _ in layers],
            [of(layer, modules.ffn_out, neurons) for layer, _, neurons in layers],
        )

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        norms = _input_norms(model, calibration, self.rows)
        linears = layer_linears(model).items()
        return {f"{name}.weight": module.weight.detach().float().abs() * norms[name] for name, module in linears}


def _input_norms(model: PreTrainedModel, calibration: Calibration, rows: int) -> dict[str, Tensor]:
    """Computes `‖X_j‖₂` over the real tokens of all processes, `(inputs,)`, by the name of the linear module."""
    import torch

    linears = layer_linears(model)
    squares = {
        name: torch.zeros(module.in_features, dtype=torch.float64, device=model.device)
        for name, module in linears.items()
    }
    seen: set[str] = set()
    masks: list[Tensor] = []

    def add(name: str, _module: Any, args: tuple[Tensor, ...]) -> None:
        # The first call in a layer counts: DeBERTa sends its relative positions through some modules after the text.
        if name not in seen:
            seen.add(name)
            squares[name] += (args[0].float() * masks[-1]).square().sum((0, 1), dtype=torch.float64)

    handles: list[Any] = [layer.register_forward_pre_hook(lambda *_: seen.clear()) for layer in layers_of(model)]
    handles += [module.register_forward_pre_hook(partial(add, name)) for name, module in linears.items()]
    try:
        with freeze(model):
            for batch in calibration.batches(rows):
                inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                masks[:] = [inputs["attention_mask"].unsqueeze(-1)]
                observe(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    calibration.all_reduce_sum(list(squares.values()))
    return {name: total.sqrt().float() for name, total in squares.items()}
