"""What can be cut, told from the config alone, and held against what really happens when it is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfcompress.models.architectures import ARCHITECTURES, PRUNED, unit_counts
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.hidden_dimensions import cut_hidden
from hfcompress.pruning.layer_dropping import drop_layers
from hfcompress.report.doctor import GRANULARITIES, PRUNED_CLASS, STOCK, Finding, examine
from hfcompress.utils.errors import HfcompressError
from tests import factories


def findings(config: dict[str, Any]) -> dict[str, Finding]:
    return {finding.granularity: finding for finding in examine(config).findings}


def loads_as(model: Any) -> str:
    return PRUNED_CLASS if str(model.config.model_type).startswith(PRUNED) else STOCK


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_it_says_is_what_surgery_does(family: str) -> None:
    model = factories.model(family, layers=3)
    told = findings(model.config.to_dict())
    assert tuple(told) == GRANULARITIES
    heads, neurons = unit_counts(model)
    every = [Keep(tuple(range(h)), tuple(range(n))) for h, n in zip(heads, neurons, strict=True)]
    narrow = [replace(keep, neurons=keep.neurons[1:]) for keep in every]
    one_head = [replace(keep, heads=keep.heads[:1]) for keep in every]

    assert loads_as(cut_hidden(model, range(28))) == told["hidden dimensions"].reload.partition(",")[0]
    assert loads_as(drop_layers(model, (0, 2))) == told["whole layers"].reload.partition(",")[0]
    for name, keep in (("FFN neurons", narrow), ("attention heads", one_head)):
        reload = told[name].reload
        even, _, rest = reload.removeprefix("even: ").partition("; uneven: ")
        assert loads_as(cut(model, keep)) == even.partition(",")[0]
        assert bool(rest) == (len(every) > 1 and even == STOCK)
        if rest:
            assert loads_as(cut(model, [*keep[:1], *every[1:]])) == rest.partition(";")[0] == PRUNED_CLASS
    for name, empty in (("attention blocks", {"heads": ()}), ("FFN blocks", {"neurons": ()})):
        if len(every) == 1:
            assert not told[name].possible
            assert "all layers share their weights" in told[name].note
        else:
            assert loads_as(cut(model, [replace(every[0], **empty), *every[1:]])) == told[name].reload.partition(",")[0]


def test_the_facts_of_a_grouped_decoder_and_of_a_fused_encoder() -> None:
    grouped = factories.model("llama", heads=4, num_key_value_heads=2).config.to_dict()
    assert "4 of 8, 2 queries to a key and value; three linear layers" in examine(grouped).facts["attention heads"]
    assert "groups of heads" in findings(grouped)["attention heads"].note
    fused = examine(factories.model("modernbert").config.to_dict()).facts
    assert "one linear layer for queries, keys and values" in fused["attention heads"]
    assert fused["FFN neurons"] == "64 (multiples of 64), gated"
    assert "all with the same weights" in examine(factories.model("albert").config.to_dict()).facts["layers"]


def test_the_stock_proportion_of_hidden_width_and_heads() -> None:
    config = {"model_type": "bert"}  # every size as transformers has it: 768 wide, 12 heads of 64
    assert "704 with 11" in findings(config)["hidden dimensions"].note
    assert "hidden width" in findings(config)["attention heads"].note


@pytest.mark.parametrize(
    ("changes", "granularity", "reason"),
    [
        ({"num_attention_heads": 1}, "attention heads", "only one of its heads"),
        ({"num_hidden_layers": 1}, "whole layers", "only one"),
        ({"intermediate_size": 1}, "FFN neurons", "one neuron"),
        ({"intermediate_size": 66}, "2:4 weights", "66 is not a multiple of 4"),
    ],
)
def test_why_not(changes: dict[str, int], granularity: str, reason: str) -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, **changes}
    told = findings(config)
    assert not told[granularity].possible
    assert reason in told[granularity].note
    refused = [name for name, finding in told.items() if not finding.possible]
    assert refused == [granularity, *(["2:4 weights"] if changes == {"intermediate_size": 1} else [])]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "bert", "quantization_config": {"load_in_4bit": True}}, "quantized"),
        ({"model_type": "bert", "pruned_heads": {"0": [1]}}, "hfcompress convert"),
    ],
)
def test_a_model_of_which_nothing_can_be_cut_says_why(config: dict[str, Any], reason: str) -> None:
    told = findings(config)
    assert tuple(told) == GRANULARITIES
    assert not any(finding.possible for finding in told.values())
    assert all(reason in finding.note for finding in told.values())


def test_a_config_without_its_sizes_is_refused() -> None:
    with pytest.raises(HfcompressError, match="no number above 0 for hidden_size"):
        examine({"model_type": "bert", "hidden_size": None})


def test_the_command_needs_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}), encoding="utf-8")
    assert factories.run_cli("doctor", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "mpnet, stock class" in shown
    for granularity in GRANULARITIES:
        assert granularity in shown


def test_the_command_names_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli("doctor", tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err
