"""The metadata of a card, as huggingface_hub reads it back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfcompress.recipe.loader import load
from hfcompress.report.hub_metadata import make_metadata, validate
from hfcompress.utils.errors import HfcompressError
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


EFFORT = {"hours": 0.5, "attempts": 1, "hardware": "A processor", "energy_wh": 40.0, "measured_hours": 0.5,
          "source": "RAPL", "co2_g": 16.004}  # fmt: skip
GERMANY = {"country": "DEU", "name": "Germany", "co2_g_per_kwh": 400.1}


def test_the_emissions_of_all_stages_are_told_in_grams(tmp_path: Path, data: Path) -> None:
    made = dict.fromkeys(("01-distill", "02-prune", "03-quantize"), EFFORT)
    card = _read_back(tmp_path, data, {"made": made, "electricity": GERMANY})
    assert card.to_dict()["co2_eq_emissions"] == {
        "emissions": 48.01,
        "source": "codecarbon, energy by RAPL",
        "training_type": "fine-tuning",
        "geographical_location": "Germany",
        "hardware_used": "A processor",
    }
    validate(f"---\n{card.to_yaml()}\n---\n# tiny\n")


@pytest.mark.parametrize("missing", ["co2_g", "energy_wh"])
def test_emissions_of_a_part_are_not_told(tmp_path: Path, data: Path, missing: str) -> None:
    part = {key: value for key, value in EFFORT.items() if key not in (missing, "co2_g")}
    card = _read_back(tmp_path, data, {"made": {"01-distill": EFFORT, "03-quantize": part}, "electricity": GERMANY})
    assert "co2_eq_emissions" not in card.to_dict()


@pytest.mark.parametrize(
    ("emissions", "said"),
    [
        ("{emissions: -1}", "grams of CO2"),
        ("{emissions: .nan}", "grams of CO2"),
        ("{emissions: '12 g'}", "grams of CO2"),
        ("{emissions: 1, hardware: x}", "no key 'hardware'"),
        ("{emissions: 1, source: ''}", "source is a text"),
        ("true", "grams of CO2"),
    ],
)
def test_emissions_that_the_hub_cannot_read_are_refused(emissions: str, said: str) -> None:
    with pytest.raises(HfcompressError, match=said):
        validate(f"---\nco2_eq_emissions: {emissions}\n---\n# tiny\n")
