"""GPTQ: what is planned, refused and asked of Optimum everywhere; the rounding itself where gptqmodel is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.measure.hardware import Abilities, Gpu
from hfcompress.models.artifact import open_artifact
from hfcompress.models.shape import Shape, shape_of
from hfcompress.quantization.backends import gptq
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.utils.errors import HfcompressError
from tests import factories

AUTO = "AutoModelForSequenceClassification"
LLAMA = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}


def backend(**options: Any) -> Any:
    return BACKENDS.parse({"use": "gptq", **options})


def shape(**changes: Any) -> Shape:
    return shape_of({**LLAMA, **changes})


def rows(count: int) -> Sequence[Any]:
    return [{k: v.numpy() for k, v in factories.batch(4, 12, seed).items()} for seed in range(count // 4)]


def test_the_plan_counts_a_scale_and_a_zero_point_a_group() -> None:
    for group, bits in ((128, 4.15625), (32, 4.625)):
        planned = backend(group_size=group).plan(shape())
        assert planned.linear_bits == bits
        assert (planned.head_bits, planned.embedding_bits, planned.other_bits) == (16, 16, 16)


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({}, {}, []),
        ({"model_type": "bert"}, {}, ["gptq is for decoders, and bert is an encoder: use bnb_4bit or onnx_int4"]),
        ({"intermediate_size": 448}, {}, ["a linear layer has 448 inputs, and gptq packs them in multiples of"]),
        ({"intermediate_size": 448}, {"group_size": 64}, []),
        (
            {"num_attention_heads": 16, "num_key_value_heads": 1},
            {},
            ["a linear layer has 16 outputs, and gptq packs them in multiples of"],
        ),
        ({"hidden_size": 96}, {"group_size": 32, "desc_act": True}, ["a linear layer has 24 outputs"]),
    ],
)
def test_shapes_that_cannot_be_packed_are_refused(
    changes: dict[str, Any], options: dict[str, Any], why: list[str]
) -> None:
    if "hidden_size" in changes:
        changes = {**changes, "num_key_value_heads": 1}
    found = backend(**options).problems(shape(**changes))
    assert len(found) == len(why)
    assert all(message.startswith(start) for message, start in zip(found, why, strict=True))


def test_widths_that_a_budget_decides_later_are_not_judged() -> None:
    uneven = replace(shape(intermediate_size=448), even=False)
    assert backend().problems(uneven) == []


def test_a_group_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="`group_size` is 48, and weights are packed by 32"):
        backend(group_size=48)


@pytest.mark.parametrize(
    ("gpus", "missing", "why"),
    [
        ((), [], "needs an NVIDIA GPU"),
        ((), ["gptqmodel"], "needs an NVIDIA GPU"),
        ((Gpu("H100", (9, 0)),), ["gptqmodel"], "gptqmodel is not installed"),
        ((Gpu("H100", (9, 0)),), [], ""),
    ],
)
def test_a_gpu_and_the_package_are_needed(
    gpus: tuple[Gpu, ...], missing: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "abilities", lambda: Abilities("", frozenset(), gpus))
    monkeypatch.setattr(gptq.Gptq, "missing_modules", lambda _: missing)
    found = backend().unavailable()
    assert (why in found[0]) if why else found is None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return factories.save(factories.model("llama", hidden=128, heads=4, ffn=128), tmp_path / "float")


def test_what_optimum_is_asked_for_and_that_no_row_is_stored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs

    asked: dict[str, Any] = {}

    def load(path: Path, quantization_config: Any, **options: Any) -> Any:
        asked.update(options, path=path, quantization=quantization_config, rows=list(quantization_config.dataset))
        asked["model"] = factories.model("llama", hidden=128, heads=4, ffn=128)
        asked["model"].config.quantization_config = quantization_config
        return asked["model"]

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", load)
    target, probe = tmp_path / "out", make_dummy_inputs(source)
    logits = (
        backend(group_size=64, desc_act=True, rows=8)
        .quantize(QuantizationJob(source, target, AUTO, probe, rows))
        .logits
    )

    config = asked["quantization"]
    assert (config.bits, config.group_size, config.desc_act) == (4, 64, True)
    assert (asked["path"], asked["dtype"]) == (source, torch.float16)
    assert asked["use_safetensors"]
    assert asked["local_files_only"]
    lengths = [int(length) for batch in rows(8) for length in batch["attention_mask"].sum(1)]
    assert [row["input_ids"].shape for row in asked["rows"]] == [(1, length) for length in lengths]
    assert all(set(row) == {"input_ids", "attention_mask"} for row in asked["rows"])
    stored = json.loads((target / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stored["dataset"] is None
    assert open_artifact(target).dtype == "int4"
    assert np.array_equal(logits, logits_of(asked["model"], probe))


def test_no_rows_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(HfcompressError, match="no rows to fit the rounding to"):
        backend().quantize(QuantizationJob(source, tmp_path / "out", AUTO, {}))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
@pytest.mark.parametrize("layout", ["stock", "uneven"])
def test_the_rounded_model_reloads_in_a_fresh_process(layout: str, source: Path, tmp_path: Path) -> None:
    from hfcompress.measure.verify import verify
    from hfcompress.models.artifact import load_model, save_model
    from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
    from hfcompress.models.surgery import Keep, cut

    model = load_model(source, AUTO)
    if layout == "uneven":
        model = cut(model, [Keep((1,), tuple(range(64))), Keep((0, 1), tuple(range(128)))])
        save_model(model, factories.tokenizer(), source)
    target, probe = tmp_path / "out", make_dummy_inputs(source)
    logits = backend(group_size=32).quantize(QuantizationJob(source, target, AUTO, probe, rows)).logits
    assert 0 < np.abs(logits - logits_of(model, probe)).max() <= 0.4 * max(1.0, np.abs(logits).max())
    assert set(verify(open_artifact(target), logits, AUTO).values()) == {0}
