"""Optimal Brain Surgeon: scores by the loss increase after the remaining weights are refitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.pruning.criteria.base import Calibration, DataCriterion, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.layerwise import LayerInputs
    from hfcompress.pruning.obs.solver import Moments
    from hfcompress.pruning.sparsity_pattern import SparsityPattern


class Obs(DataCriterion):
    """The increase of the loss if a part is removed and the rest is refitted by least squares, in closed form.

    For units: they are removed one at a time, and a unit's score is the squared error that it adds to the output of the
    next linear layer. A bias corrects the mean. The error is weighted by the second moment of the loss's gradient at
    this output, so that blocks can be compared, with each other and with `fisher`. (If the error were divided by the
    size of the output instead, a block with large outputs would count, even if it does not matter to the task.)

    For weights: SparseGPT, layer by layer, on the outputs of the layers already pruned. With `scope: global`, each
    matrix gets the share of zeros that the scores `w² G_ii / (H⁻¹)_jj` give it.
    """

    scored: ClassVar[frozenset[str]] = frozenset({"units", "weights"})
    comparable: ClassVar[bool] = True
    refits: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Kurtic et al. 2023, arXiv:2302.04089, eq. 2 and 3; weights: Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1"
    )

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        from hfcompress.models.architectures import unit_counts

        modules, counts = spec_of(model).modules, unit_counts(model)
        paths = (modules.attention_output, modules.ffn_out)
        hessians = self._find_hessians(model, calibration, [paths] * len(counts[0]))
        heads: list[Tensor] = []
        neurons: list[Tensor] = []
        for index, rows in self._walk_layers(model, calibration):
            seen = _sum_moments(model, index, rows, calibration, paths, advance=True)
            for scores, moments, units in zip((heads, neurons), seen.values(), counts, strict=True):
                scores.append(_unit_scores(moments, hessians[moments.module], units[index]))
        return Scores(heads, neurons)

    def refit(self, model: PreTrainedModel, keep: Sequence[Keep], calibration: Calibration) -> None:
        """Refits the columns that stay, and sets the others to 0, on the inputs that the refitted earlier layers give.

        `W ← W H[:,K] (H[K,K])⁻¹`, the least-squares solution; the bias corrects the mean.
        """
        from hfcompress.models.architectures import unit_counts

        modules, counts = spec_of(model).modules, unit_counts(model)
        for index, rows in self._walk_layers(model, calibration):
            for path, kept, units in (
                (modules.attention_output, keep[index].heads, counts[0][index]),
                (modules.ffn_out, keep[index].neurons, counts[1][index]),
            ):
                if len(kept) < units:
                    _refit(_sum_moments(model, index, rows, calibration, (path,))[path], kept, units)
            _advance_inputs(model, index, rows)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        """Computes `w² G_ii / (H⁻¹)_jj`, the cost of one weight if the others of its row are refitted."""
        from hfcompress.models.linears import layer_linears

        names = {module: f"{name}.weight" for name, module in layer_linears(model).items()}
        paths = [_linear_paths(layer) for layer in layers_of(model)]
        hessians = self._find_hessians(model, calibration, paths)
        found: dict[str, Tensor] = {}
        for index, rows in self._walk_layers(model, calibration):
            seen = _sum_moments(model, index, rows, calibration, paths[index], advance=True)
            found |= {names[m.module]: _weight_scores(m, hessians[m.module]) for m in seen.values()}
        return found

    def sparsify(self, model: PreTrainedModel, pattern: SparsityPattern, calibration: Calibration) -> None:
        import torch

        from hfcompress.models.linears import layer_linears
        from hfcompress.pruning.obs.solver import sparsify_weight
        from hfcompress.pruning.sparsity import require_tiling, select_zeros

        require_tiling(model, pattern)
        names = {module: f"{name}.weight" for name, module in layer_linears(model).items()}
        shares = dict.fromkeys(names.values(), pattern.zeros)
        if pattern.scope == "global":
            gone = select_zeros(model, pattern, self.weight_scores(model, calibration))
            shares = {name: float(mask.double().mean()) for name, mask in gone.items()}
        for index, rows in self._walk_layers(model, calibration):
            paths = _linear_paths(layers_of(model)[index])
            for moments in _sum_moments(model, index, rows, calibration, paths).values():
                own = pattern if pattern.n_of_m else pattern.model_copy(update={"share": shares[names[moments.module]]})
                with torch.no_grad():
                    moments.module.weight.copy_(sparsify_weight(moments.module.weight, moments.second_moment(), own))
            _advance_inputs(model, index, rows)

    def _find_hessians(
        self, model: PreTrainedModel, calibration: Calibration, paths: Sequence[Sequence[str]]
    ) -> dict[nn.Linear, Tensor]:
        """Computes the output Hessian of each module."""
        from hfcompress.pruning.obs.output_hessian import output_hessian

        stack = layers_of(model)
        modules: Any = [layer.get_submodule(p) for layer, own in zip(stack, paths, strict=True) for p in own]
        found = output_hessian(
            model, modules, calibration.batches(self.rows), calibration.loss, calibration.all_reduce_sum
        )
        return dict(zip(modules, found, strict=True))

    def _walk_layers(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[tuple[int, list[LayerInputs]]]:
        from hfcompress.models.freezing import freeze
        from hfcompress.pruning.layerwise import capture_layer_inputs

        rows = capture_layer_inputs(model, calibration.batches(self.rows))
        with freeze(model):
            for index in range(len(layers_of(model))):
                yield index, rows


def _linear_paths(layer: nn.Module) -> tuple[str, ...]:
    from torch import nn

    return tuple(path for path, module in layer.named_modules() if isinstance(module, nn.Linear))


def _sum_moments(
    model: PreTrainedModel,
    index: int,
    rows: list[LayerInputs],
    calibration: Calibration,
    paths: Sequence[str],
    advance: bool = False,
) -> dict[str, Moments]:
    """Sums the second moments of the inputs of a layer's modules over the real tokens of all processes.

    If `advance` is true, the rows are moved on to the next layer.
    """
    from hfcompress.pruning.layerwise import run_layer
    from hfcompress.pruning.obs.solver import Moments

    layer = layers_of(model)[index]
    found = {path: Moments(layer.get_submodule(path)) for path in paths}  # type: ignore[arg-type]
    stop = paths[0] if len(paths) == 1 else ""
    for batch in rows:
        for run in run_layer(model, index, batch, paths, stop):
            for path, inputs in run.inputs.items():
                found[path].add(batch.tokens(inputs))
            if advance:
                batch.hidden = run.result
    calibration.all_reduce_sum([tensor for moments in found.values() for tensor in moments.tensors])
    return found


def _advance_inputs(model: PreTrainedModel, index: int, rows: list[LayerInputs]) -> None:
    from hfcompress.pruning.layerwise import run_layer

    for batch in rows:
        for run in run_layer(model, index, batch):
            batch.hidden = run.result


def _unit_scores(moments: Moments, hessians: Tensor, units: int) -> Tensor:
    from hfcompress.pruning.obs.solver import removal_costs

    weight = moments.module.weight.detach().double()
    return removal_costs(weight.T @ hessians @ weight, moments.centred_second_moment(), units).float()


def _weight_scores(moments: Moments, hessians: Tensor) -> Tensor:
    import torch

    weight = moments.module.weight.detach().double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.second_moment()))
    return (weight**2 * hessians.diagonal()[:, None] / inverse.diagonal()).float()


def _refit(moments: Moments, kept: Sequence[int], units: int) -> None:
    import torch

    from hfcompress.pruning.obs.solver import refit_columns

    module, width = moments.module, moments.module.in_features // units
    columns = torch.tensor(kept, dtype=torch.long, device=module.weight.device)
    columns = (columns[:, None] * width + torch.arange(width, device=columns.device)).flatten()
    fitted = refit_columns(module.weight, moments.centred_second_moment(), columns)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.add_((module.weight.double() - fitted) @ moments.mean)
        module.weight.copy_(fitted)
