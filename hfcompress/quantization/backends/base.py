"""The base class of quantization backends, with the job that they get and the model that they return."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, SerializeAsAny

from hfcompress.measure.process import Batch
from hfcompress.models.dummy_inputs import DummyInputs
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import Note
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import Problem
from hfcompress.utils.logging import log
from hfcompress.utils.registry import Component, Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.measure.hardware import Abilities
    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


def _no_rows(_count: int) -> Sequence[Batch]:
    return []


@dataclass(frozen=True)
class QuantizationJob:
    """One model to quantize.

    Attributes:
        source: A directory with a float32 model and its tokenizer.
        target: An empty directory.
        auto_class: The class that loads the model, such as `AutoModelForSequenceClassification`.
        dummy_inputs: A padded batch.
        rows: Returns at most so many rows of the train split, in padded batches of similar length: arrays by input
            name, with their `attention_mask`. They do not depend on the number of processes.
        keep: Paths of the linear layers that stay in float32.
        ranges: The ranges that `calibrate` or quantization-aware training found; None if they are not known yet.
    """

    source: Path
    target: Path
    auto_class: str
    dummy_inputs: DummyInputs
    rows: Callable[[int], Sequence[Batch]] = _no_rows
    keep: frozenset[str] = frozenset()
    ranges: Ranges | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """The result of `Backend.quantize`.

    Attributes:
        logits: The quantized model's logits on the dummy inputs, in this process. The saved model must give the same.
        odd_weights: The layers with output channels that the backend stores badly.
    """

    logits: NDArray[Any]
    odd_weights: tuple[OddWeights, ...] = ()


class Backend(Component):
    """A way to store a model in fewer bits, and a runtime that runs it."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """The devices that run the quantized model."""
    keeps_layers: ClassVar[bool] = False
    """True if it can leave the layers of `QuantizationJob.keep` in float32. It then has `fake_quantize`."""
    fuses: ClassVar[bool] = False
    """True if it joins layers that read the same tensor (queries, keys and values; an FFN and its gate)."""
    searched: ClassVar[bool] = False
    """True if `hfcompress search` tries it by default."""
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = ""
    """The training that it supports: of all weights under `training_overlay`, of LoRA adapters on the quantized model,
    or none."""
    notes: ClassVar[tuple[Note, ...]] = ()
    """Advice about its speed and accuracy, by machine; empty if it was measured to be faster than float32."""

    @property
    def rounds_by_batch(self) -> bool:
        """True if layer inputs are rounded by the range of the whole batch, so that an answer depends on the batch."""
        return False

    @property
    def training_ranges(self) -> tuple[str, ...]:
        """The ways to find fixed ranges for layer inputs while training; empty if the backend has no fixed ranges."""
        return ()

    def untrainable(self) -> str:
        """Returns the reason why these options rule out a training that `trains` allows; empty if they do not."""
        return ""

    def plan(self, shape: Shape) -> Shape:
        """Returns the shape with the bits that this backend stores."""
        raise NotImplementedError

    def problems(self, shape: Shape) -> list[str]:
        """Returns the reasons why a model of this shape cannot be quantized; called before anything runs."""
        return []

    def module_problems(self, model: nn.Module, head_modules: Sequence[str]) -> list[Problem]:
        """Returns the problems of these options with a model of this class; their keys are paths inside the backend.

        Args:
            model: A model without weights, on the meta device.
            head_modules: The modules of its task head, if they are trained beside adapters; else empty.
        """
        return []

    def unavailable(self) -> tuple[str, str] | None:
        """Returns the reason why the backend cannot run here, and a fix; None if it can run."""
        missing = self.missing_modules()
        if not missing:
            return None
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} not installed", f"pip install 'hfcompress[{self.extra}]'"

    def advice(self, machine: Abilities) -> list[str]:
        """Returns a sentence for each thing that is slow or inaccurate on such a machine."""
        return [note.sentence for note in self.notes if note.holds(machine)]

    def calibrate(self, job: QuantizationJob) -> Ranges | None:
        """Finds the ranges that all quantizations of one source share: mixed precision calibrates only once."""
        return job.ranges

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        """Writes the quantized model into `job.target`, without the tokenizer.

        Raises:
            HfcompressError: if a weight is not finite, or cannot be stored.
        """
        raise NotImplementedError

    def find_odd_weights(self, layers: Mapping[str, nn.Linear], job: QuantizationJob) -> tuple[OddWeights, ...]:
        """Finds and logs output channels that the backend stores badly, except in the layers that it keeps.

        Args:
            layers: Linear layers by path.
            job: The layers in its `keep` are skipped.

        Raises:
            HfcompressError: for a layer with weights that are not finite.
        """
        from hfcompress.models.odd_weights import find_odd_weights

        found = find_odd_weights({p: layer for p, layer in layers.items() if p not in job.keep}, self.fake_quantize)
        for odd in found:
            log.info(f"{self.name}: {odd.layer} has output channels that {odd.description}: {odd.channels}")
        return tuple(found)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Quantizes and dequantizes a linear layer's weights `(out_features, in_features)`."""
        raise NotImplementedError

    @contextmanager
    def simulate(self, model: PreTrainedModel, paths: Collection[str], job: QuantizationJob) -> Iterator[None]:
        """Makes the linear layers at these paths compute as if quantized, while the context lasts."""
        layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        with swap_weights(layers, {path: self.fake_quantize(layer.weight.data) for path, layer in layers.items()}):
            yield

    def training_overlay(
        self, model: PreTrainedModel, job: QuantizationJob, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        """Makes the fake quantization that lies over `model` while it trains, if `trains` is `fake_quantization`.

        Its `settle` leaves the weights in the model that `quantize` stores, and its `ranges()` gives their ranges.

        Args:
            model: The float model, on its device.
            job: Its `rows` give the first ranges.
            ranges: `ema` follows them by a moving average, `learned` trains step sizes (LSQ, Esser et al. 2020,
                arXiv:1902.08153).
            freeze: The share of the steps after which ranges no longer change.
        """
        raise NotImplementedError


@contextmanager
def swap_weights(layers: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives linear layers other weights while the context lasts.

    `torch.func.functional_call` would give them for a single call of the model; here the model predicts many batches
    with weights that are computed once. `torch.nn.utils.parametrize` would compute them again in each forward pass. A
    task head that shares its weights with the embeddings changes both, as `functional_call` does.

    Args:
        layers: The layers by path.
        weights: Their weights by path, `(out_features, in_features)`.
    """
    before = {path: layer.weight.data for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.weight.data = weights[path]
        yield
    finally:
        for path, layer in layers.items():
            layer.weight.data = before[path]


BACKENDS: Registry[Backend] = Registry("hfcompress.quantization.backends", Backend)
AnyBackend = Annotated[SerializeAsAny[Backend], BeforeValidator(BACKENDS.parse)]
