"""Fake quantization: a float model that rounds as its quantized self will, and learns with it."""

from __future__ import annotations

from hfcompress.model.masks import Masks
from hfcompress.model.ranges import Ranges


class FakeQuantization(Masks):
    """Lies over a model's linear layers (and embeddings) while it trains; a backend makes it, see `Backend.masks`."""

    def ranges(self) -> Ranges | None:
        """What the training came to; None where the weights alone are rounded."""
        return None
