"""What the rest cannot take over matters most; and the rest takes over what it can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from hfcompress.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.model.family import family_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.model.layerwise import Rows
    from hfcompress.model.pattern import Pattern
    from hfcompress.model.surgeon import Moments
    from hfcompress.model.surgery import Keep


class Obs(DataCriterion):
    """The squared error of a layer's output once what stays has taken over, by closed form, from what goes.

    Of units: the order in which they are removed one at a time, and what each adds to the error of the linear layer
    that they feed, divided by that layer's own mean squared output, so that blocks compare. A bias, where there is
    one, makes up for the mean of what goes. Of weights: SparseGPT's, layer by layer, on the inputs that the layers
    pruned so far give.
    """

    scored: ClassVar[frozenset[str]] = frozenset({"units", "weights"})
    comparable: ClassVar[bool] = True
    updates: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Kurtic et al. 2023, arXiv:2302.04089, eq. 2 and 3; weights: Frantar & Alistarh 2023, arXiv:2301.00774, alg. 1"
    )

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        from hfcompress.model.gates import unit_counts

        family, counts = family_of(model), unit_counts(model)
        heads, neurons = [], []
        for index, rows in self._layers(model, calibration):
            seen = _moments(model, index, rows, calibration, (family.attention_output, family.ffn_out), advance=True)
            for scores, moments, units in zip((heads, neurons), seen.values(), counts, strict=True):
                scores.append(_unit_scores(moments, units[index]))
        return Scores(heads, neurons)

    def refit(self, model: PreTrainedModel, keep: Sequence[Keep], calibration: Calibration) -> None:
        """Columns that stay take over from those that go, which become 0, on the inputs that earlier layers now give.

        `W ← W H[:,K] (H[K,K])⁻¹`, the least-squares solution, and the bias makes up for the change of the mean.
        """
        from hfcompress.model.gates import unit_counts

        family, counts = family_of(model), unit_counts(model)
        for index, rows in self._layers(model, calibration):
            for path, kept, units in (
                (family.attention_output, keep[index].heads, counts[0][index]),
                (family.ffn_out, keep[index].neurons, counts[1][index]),
            ):
                if len(kept) < units:
                    _refit(_moments(model, index, rows, calibration, (path,))[path], kept, units)
            _advance(model, index, rows)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        """`w² / (H⁻¹)_jj`, what a weight alone costs, divided by the layer's mean squared output."""
        from hfcompress.model.linears import layer_linears

        names = {module: f"{name}.weight" for name, module in layer_linears(model).items()}
        found = {}
        for index, rows in self._layers(model, calibration):
            paths = _linear_paths(family_of(model).stack(model)[index])
            seen = _moments(model, index, rows, calibration, paths, advance=True)
            found |= {names[moments.module]: _weight_scores(moments) for moments in seen.values()}
        return found

    def sparsify(self, model: PreTrainedModel, pattern: Pattern, calibration: Calibration) -> None:
        import torch

        from hfcompress.model.linears import layer_linears
        from hfcompress.model.sparsity import must_tile, zeros
        from hfcompress.model.surgeon import sparse_weight

        must_tile(model, pattern)
        names = {module: f"{name}.weight" for name, module in layer_linears(model).items()}
        shares = dict.fromkeys(names.values(), pattern.zeros)
        if pattern.scope == "global":
            gone = zeros(model, pattern, self.weight_scores(model, calibration))
            shares = {name: float(mask.double().mean()) for name, mask in gone.items()}
        for index, rows in self._layers(model, calibration):
            paths = _linear_paths(family_of(model).stack(model)[index])
            for moments in _moments(model, index, rows, calibration, paths).values():
                own = pattern if pattern.n_of_m else pattern.model_copy(update={"share": shares[names[moments.module]]})
                with torch.no_grad():
                    moments.module.weight.copy_(sparse_weight(moments.module.weight, moments.second(), own))
            _advance(model, index, rows)

    def _layers(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[tuple[int, list[Rows]]]:
        from hfcompress.model.frozen import frozen
        from hfcompress.model.layerwise import start

        rows = start(model, calibration.batches(self.rows))
        with frozen(model):
            for index in range(len(family_of(model).stack(model))):
                yield index, rows


def _linear_paths(layer: nn.Module) -> tuple[str, ...]:
    from torch import nn

    return tuple(path for path, module in layer.named_modules() if isinstance(module, nn.Linear))


def _moments(
    model: PreTrainedModel,
    index: int,
    rows: list[Rows],
    calibration: Calibration,
    paths: Sequence[str],
    advance: bool = False,
) -> dict[str, Moments]:
    """Second moments of the inputs of a layer's modules over the real tokens of all processes.

    Where `advance` says so, the rows are behind the layer afterwards.
    """
    from hfcompress.model.layerwise import runs
    from hfcompress.model.surgeon import Moments

    layer = family_of(model).stack(model)[index]
    found = {path: Moments(layer.get_submodule(path)) for path in paths}  # type: ignore[arg-type]
    stop = paths[0] if len(paths) == 1 else ""
    for batch in rows:
        for run in runs(model, index, batch, paths, stop):
            for path, inputs in run.inputs.items():
                found[path].add(batch.tokens(inputs))
            if advance:
                batch.hidden = run.result
    calibration.total([tensor for moments in found.values() for tensor in moments.tensors])
    return found


def _advance(model: PreTrainedModel, index: int, rows: list[Rows]) -> None:
    from hfcompress.model.layerwise import runs

    for batch in rows:
        for run in runs(model, index, batch):
            batch.hidden = run.result


def _unit_scores(moments: Moments, units: int) -> Tensor:
    from hfcompress.model.surgeon import removal_costs

    weight, moment = moments.module.weight, moments.around_mean()
    return (removal_costs(weight, moment, units) / _mean_square(weight, moment)).float()


def _weight_scores(moments: Moments) -> Tensor:
    import torch

    weight, moment = moments.module.weight.detach().double(), moments.second()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return (weight**2 / inverse.diagonal() / _mean_square(weight, moment)).float()


def _mean_square(weight: Tensor, moment: Tensor) -> Tensor:
    """`tr(W H Wᵀ)`, the mean over tokens of the squared norm of the output."""
    weight = weight.detach().double()
    return ((weight @ moment) * weight).sum().clamp(min=1e-30)


def _refit(moments: Moments, kept: Sequence[int], units: int) -> None:
    import torch

    from hfcompress.model.surgeon import refitted

    module, width = moments.module, moments.module.in_features // units
    columns = torch.tensor(kept, dtype=torch.long, device=module.weight.device)
    columns = (columns[:, None] * width + torch.arange(width, device=columns.device)).flatten()
    fitted = refitted(module.weight, moments.around_mean(), columns)
    with torch.no_grad():
        if module.bias is not None:
            module.bias += (module.weight.double() - fitted) @ moments.mean
        module.weight.copy_(fitted)
