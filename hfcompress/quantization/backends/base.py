"""What a quantization backend is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, SerializeAsAny

from hfcompress.measure.process import Batch
from hfcompress.models.dummy_inputs import Probe
from hfcompress.models.shape import Shape
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import Problem
from hfcompress.utils.logging import log
from hfcompress.utils.registry import Component, Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


def _no_rows(_count: int) -> Sequence[Any]:
    return []


@dataclass(frozen=True)
class Work:
    """One model to quantize.

    Attributes:
        source: A directory with a float32 model and its tokenizer.
        target: An empty directory.
        auto_class: Such as `AutoModelForSequenceClassification`.
        probe: A padded batch.
        rows: At most so many rows of the train split, in batches of like length, padded: arrays by input name, with
            their `attention_mask`. The same on any number of processes.
        texts: At most so many raw texts of the train split.
        keep: Paths of linear layers of the model that stay in float32.
        ranges: What quantization-aware training came to; None where nothing was trained.
        facts: What is kept in stage.json.
    """

    source: Path
    target: Path
    auto_class: str
    probe: Probe
    rows: Callable[[int], Sequence[Batch]] = _no_rows
    texts: Callable[[int], Sequence[str]] = _no_rows
    keep: frozenset[str] = frozenset()
    ranges: Ranges | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Backend(Component):
    """A way to store and run a model in fewer bits."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Device kinds that can run what it writes."""
    mixed: ClassVar[bool] = False
    """Whether it leaves in float32 what `Work.keep` names; it then has `rounded`."""
    fuses: ClassVar[bool] = False
    """Whether layers that read the same (queries, keys and values; an FFN and its gate) are one to it."""
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = ""
    """What training it takes: of the model under its `masks`, of LoRA adapters on the quantized model, or none."""

    def untrainable(self) -> str:
        """Why these options take no training though the backend does; empty where they do."""
        return ""

    @property
    def trained_ranges(self) -> tuple[str, ...]:
        """How the ranges of a layer's inputs can be found while the model trains; none where it has no fixed ones."""
        return ()

    def plan(self, shape: Shape) -> Shape:
        """The shape with the bits that this backend stores."""
        raise NotImplementedError

    def problems(self, shape: Shape) -> list[str]:
        """Why a model of this shape cannot be quantized so; told before anything runs."""
        return []

    def module_problems(self, model: nn.Module, head_modules: Sequence[str]) -> list[Problem]:
        """Why these options do not fit a model of this class; key paths inside the backend.

        Args:
            model: A model without weights, on the meta device.
            head_modules: Those of its head, where they are trained whole beside adapters; else none.
        """
        return []

    def unavailable(self) -> tuple[str, str] | None:
        """Why it cannot run on this machine, and the repair; None where it can."""
        missing = self.missing_modules()
        return (
            (f"{', '.join(missing)} is not installed", f"pip install 'hfcompress[{self.extra}]'") if missing else None
        )

    def quantize(self, work: Work) -> NDArray[Any]:
        """Writes the quantized model into `work.target`, tokenizer excepted.

        Returns:
            The quantized model's logits on the probe, in this process; the saved one must give the same.
        """
        raise NotImplementedError

    def note_odd_weights(self, layers: Mapping[str, nn.Linear], work: Work) -> None:
        """Notes and says what is odd about the weights of linear layers, by path, but those to keep.

        Raises:
            HfcompressError: for a layer with weights that are not finite.
        """
        from hfcompress.models.odd_weights import ODD, odd_weights

        found = odd_weights({path: layer for path, layer in layers.items() if path not in work.keep}, self.rounded)
        if found:
            work.facts["odd_weights"] = found
        for odd in found:
            log.info(f"{self.name}: {odd['layer']} has output channels that {ODD[odd['what']]}: {odd['channels']}")

    def rounded(self, weight: Tensor) -> Tensor:
        """A linear layer's weights `(out_features, in_features)` as they are stored, made floats again."""
        raise NotImplementedError

    @contextmanager
    def simulated(self, model: PreTrainedModel, paths: Collection[str], work: Work) -> Iterator[None]:
        """While the context lasts, the linear layers at these paths answer as they would once quantized."""
        import torch

        layers: list[Any] = [model.get_submodule(path) for path in paths]
        before = [layer.weight.data for layer in layers]
        try:
            for layer in layers:
                with torch.no_grad():
                    layer.weight.data = self.rounded(layer.weight.data)
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.data = weight

    def masks(
        self, model: PreTrainedModel, work: Work, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        """Fake quantization for `model` while it trains; where `trains` says so.

        Its `settle` leaves in the model the weights that `quantize` is to store, and its `ranges()` gives what goes
        with them.

        Args:
            model: The float model, on its device.
            work: Its `rows` are for the first ranges.
            ranges: Followed by a moving average, or learned (LSQ, Esser et al. 2020, arXiv:1902.08153).
            freeze: Share of the steps after which ranges stay as they are.
        """
        raise NotImplementedError


BACKENDS: Registry[Backend] = Registry("hfcompress.quantization.backends", Backend)
AnyBackend = Annotated[SerializeAsAny[Backend], BeforeValidator(BACKENDS.parse)]
