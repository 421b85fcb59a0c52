"""What can be said of the Optimum backend where Optimum is not: its options, its plan, and why it will not run."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from pydantic import ValidationError

from hfcompress.models.shape import shape_of
from hfcompress.quantization.backends.base import BACKENDS
from tests import factories


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 8}, "`rows` is for `mode: static`"),
        ({"calibration": "entropy"}, "`calibration` is for `mode: static`"),
        ({"mode": "static", "percentile": 99.0}, "`percentile` is for `calibration: percentile`"),
        ({"instructions": "vnni"}, "'auto', 'avx2', 'avx512', 'avx512_vnni' or 'arm64'"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BACKENDS.parse({"use": "optimum_onnx", **options})


def test_the_plan_tells_tables_from_layers() -> None:
    shape = shape_of(factories.model().config.to_dict())
    both, layers = (BACKENDS.parse({"use": "optimum_onnx", "embeddings": x}).plan(shape) for x in (True, False))
    assert (both.linear_bits, both.embedding_bits) == (8, 8)
    assert (layers.linear_bits, layers.embedding_bits) == (8, 32)
    assert both.other_bits == 32


@pytest.mark.parametrize(("version", "too_new"), [("4.57.6", False), ("4.58.0.dev0", True), ("5.23.0", True)])
def test_a_transformers_that_optimum_cannot_stand_is_told(
    version: str, too_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    why = BACKENDS.parse("optimum_onnx").unavailable()
    told = why is not None and f"needs transformers below 4.58, and {version} is installed" in why[0]
    assert told == too_new
    if too_new:
        assert why is not None
        assert "'transformers==4.57.6'" in why[1]
        assert "onnx_int8" in why[1]


def test_a_head_that_reads_a_cache_is_refused() -> None:
    backend = BACKENDS.parse("optimum_onnx")
    assert backend.problems(shape_of(factories.model().config.to_dict())) == []
    (problem,) = backend.problems(shape_of(factories.model("llama", head="causal").config.to_dict(), head="causal"))
    assert "causal task head" in problem
    assert "onnx_int8" in problem
