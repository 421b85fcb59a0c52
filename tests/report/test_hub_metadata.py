"""The metadata of a card, as huggingface_hub reads it back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfcompress.recipe.loader import load
from hfcompress.report.hub_metadata import make_metadata
from tests import factories

REVISION = "0123456789abcdef0123456789abcdef01234567"
ON_THE_HUB = {"type": "text-classification", "dataset": "nyu-mll/glue", "config": "sst2", "text": ["sentence"]}


def _read_back(tmp_path: Path, data: Path, content: dict[str, Any], **changes: Any) -> Any:
    (tmp_path / "source").mkdir()
    loaded = load(factories.recipe(tmp_path / "r.yaml", tmp_path / "source", data, **changes))
    row = factories.report_row("03-quantize", "quantize", 0.875)
    model: Any = SimpleNamespace(stage="03-quantize", runtime="onnx")
    made = make_metadata(loaded, {"task": {"split": "dev"}, "rows": [row], **content}, row, model)
    return ModelCard(f"---\n{made.to_yaml()}\n---\n# tiny\n").data


def test_a_result_names_data_set_configuration_split_and_revision(tmp_path: Path, data: Path) -> None:
    content = {
        "revisions": {"datasets/nyu-mll/glue": REVISION},
        "dataset_split": "validation",
        "license": {"license": "other", "license_name": "tiny-terms", "license_link": "https://example.org/terms"},
    }
    card = _read_back(tmp_path, data, content, task=ON_THE_HUB)
    (result,) = card.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-classification", "nyu-mll/glue", "nyu-mll/glue sst2",
    )  # fmt: skip
    assert (result.dataset_config, result.dataset_split, result.dataset_revision) == ("sst2", "validation", REVISION)
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert (card.license, card.license_name, card.license_link) == (
        "other", "tiny-terms", "https://example.org/terms",
    )  # fmt: skip
    assert card.library_name == "transformers"
    assert card.tags[:2] == ["hfcompress", "onnx"]
    assert "co2_eq_emissions" not in card.to_dict()


@pytest.mark.parametrize(("hub", "split"), [({}, "dev"), ({"dataset": "nyu-mll/glue"}, None)])
def test_local_rows_have_no_revision(tmp_path: Path, data: Path, hub: dict[str, str], split: str | None) -> None:
    card = _read_back(tmp_path, data, {"revisions": {}, "dataset_split": None, "license": None}, hub=hub)
    (result,) = card.eval_results
    assert (result.dataset_split, result.dataset_revision) == (split, None)
    assert "license" not in card.to_dict()


def test_a_report_of_an_earlier_version_has_no_revision(tmp_path: Path, data: Path) -> None:
    (result,) = _read_back(tmp_path, data, {}, task=ON_THE_HUB).eval_results
    assert (result.dataset_split, result.dataset_revision) == ("dev", None)
