"""What a quantization backend is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from hfcompress.base.component import Component, Drawer
from hfcompress.base.shape import Shape
from hfcompress.model.probe import Probe

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Backend(Component):
    """A way to store and run a model in fewer bits."""

    runs_on: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Device kinds that can run what it writes."""

    def plan(self, shape: Shape) -> Shape:
        """The shape with the bits that this backend stores."""
        raise NotImplementedError

    def quantize(self, source: Path, target: Path, auto_class: str, probe: Probe) -> NDArray[Any]:
        """Writes the quantized model into `target`, tokenizer excepted.

        Args:
            source: A directory with a float32 model.
            target: An empty directory.
            auto_class: Such as `AutoModelForSequenceClassification`.
            probe: A padded batch.

        Returns:
            The quantized model's logits on the probe, in this process; the saved one must give the same.
        """
        raise NotImplementedError


BACKENDS: Drawer[Backend] = Drawer("hfcompress.backends", Backend)
AnyBackend = Annotated[SerializeAsAny[Backend], BeforeValidator(BACKENDS.parse)]
