"""These tests need Optimum's ONNX half, and so an older transformers: `make test-optimum` runs them."""

from __future__ import annotations

from hfcompress.quantization.backends.base import BACKENDS

collect_ignore_glob = ["test_*.py"] if BACKENDS.get("optimum_onnx")().unavailable() else []
