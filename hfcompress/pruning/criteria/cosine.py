"""Block Influence: scores layers by the change of direction of the hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.architectures import layers_of
from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze
from hfcompress.pruning.criteria.base import Calibration, DataCriterion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Cosine(DataCriterion):
    """`I = 1 - mean over real tokens of cos(h_in, h_out)`, of a layer's input and output.

    Layers that share their weights are scored one by one.
    """

    source: ClassVar[str] = "ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1"
    scored: ClassVar[frozenset[str]] = frozenset({"layers"})

    def layer_scores(self, model: PreTrainedModel, calibration: Calibration) -> list[float]:
        import torch

        sums = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64, device=model.device)
        tokens = torch.zeros(1, dtype=torch.float64, device=model.device)
        similarities: list[Tensor] = []

        def compare(_layer: Any, args: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            similarities.append(torch.nn.functional.cosine_similarity(args[0].float(), after.float(), dim=-1))

        handles = [layer.register_forward_hook(compare) for layer in layers_of(model)]
        try:
            with freeze(model):
                for batch in calibration.batches(self.rows):
                    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                    similarities.clear()
                    observe(model, inputs)
                    mask = inputs["attention_mask"]
                    sums += (torch.stack(similarities) * mask).sum((1, 2), dtype=torch.float64)
                    tokens += mask.sum()
        finally:
            for handle in handles:
                handle.remove()
        calibration.all_reduce_sum([sums, tokens])
        return [float(score) for score in 1 - sums / tokens.clamp(min=1)]
