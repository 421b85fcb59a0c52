"""Scores as records of Every Eval Ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hfcompress.recipe.loader import Loaded, load
from hfcompress.recipe.schema import spell_out
from hfcompress.report.every_eval_ever import make_record, write_records
from hfcompress.utils.hashing import hash_json
from tests import factories

BOUND = {"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity"]}]}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**properties}}


def _const(value: str) -> dict[str, Any]:
    return {"properties": {"source_type": {"const": value}}}


# What a record must have, by eval.schema.json, version 0.3.0, of https://github.com/evaleval/every_eval_ever
FACTS = {
    **_object(
        "schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library",
        "evaluation_results",
        schema_version={"type": "string"},
        evaluation_id={"type": "string"},
        retrieved_timestamp={"type": "string"},
        source_metadata=_object(
            "source_type", "source_organization_name", "evaluator_relationship",
            source_type={"enum": ["documentation", "evaluation_run"]},
            source_organization_name={"type": "string"},
            evaluator_relationship={"enum": ["first_party", "third_party", "collaborative", "other"]},
            additional_details=STRINGS,
        ),
        eval_library=_object("name", "version", name={"type": "string"}, version={"type": "string"}),
        model_info=_object(
            "name", "id", "additional_details",
            name={"type": "string"}, id={"type": "string"}, developer={"type": "string"},
            inference_engine=_object(name={"type": "string"}, version={"type": "string"}),
            additional_details={**STRINGS, "required": ["deployment_type", "model_availability"]},
        ),
        evaluation_results={
            "type": "array",
            "items": _object(
                "evaluation_name", "source_data", "metric_config", "score_details",
                source_data={
                    **_object(
                        "dataset_name", "source_type", hf_repo={"type": "string"}, hf_split={"type": "string"},
                        samples_number={"type": "integer"}, additional_details=STRINGS,
                    ),
                    "oneOf": [_const("hf_dataset"), _const("other")],
                },
                metric_config=_object(
                    "lower_is_better", "score_type", "min_score", "max_score",
                    lower_is_better={"type": "boolean"}, score_type={"const": "continuous"},
                    min_score=BOUND, max_score=BOUND,
                ),
                score_details=_object(
                    "score", score={"type": "number"}, details=STRINGS,
                    uncertainty=_object(
                        confidence_interval=_object(
                            "lower", "upper", lower={"type": "number"}, upper={"type": "number"},
                            confidence_level={"type": "number", "minimum": 0, "maximum": 1},
                        ),
                        num_samples={"type": "integer"}, num_bootstrap_samples={"type": "integer"},
                    ),
                ),
            ),
        },
    ),
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture
def loaded(tmp_path: Path, teacher: Path, data: Path) -> Loaded:
    hub = {"repo": "user/small", "base_model": "org/large", "dataset": "org/films"}
    return load(factories.recipe(tmp_path / "r.yaml", teacher, data, hub=hub))


def _content(loaded: Loaded, **result: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "environment": {"cpu": "A processor", "versions": {"torch": "2.13.0"}},
        "task": {"dataset": "data", "split": "test", "config": None},
        "dataset_split": None,
        "rows": [factories.report_row("source"), factories.report_row("03-quantize", quality=0.8, **result)],
        "recipe": hash_json(spell_out(loaded.recipe)),
    }


def test_each_model_has_a_record_that_the_schema_takes(loaded: Loaded, tmp_path: Path) -> None:
    compared = {"change": -0.1, "low": -0.2, "high": 0.0, "reading": "worse", "margin": "1%", "verdict": "not shown"}
    seeds = {"seeds": [1, 2], "values": [0.8, 0.9], "mean": 0.85, "sd": 0.07}
    paths = write_records(
        loaded, _content(loaded, against_source=compared, seeds=seeds), tmp_path, created=1_700_000_000
    )

    source, result = (json.loads(path.read_text()) for path in paths)
    for record in (source, result):
        jsonschema.validate(record, FACTS)
    assert [path.name for path in paths] == ["source.json", "03-quantize.json"]
    assert (source["model_info"]["id"], result["model_info"]["id"]) == ("org/large", "user/small")
    assert (result["model_info"]["name"], result["model_info"]["developer"]) == ("small", "user")
    relations = [record["source_metadata"]["evaluator_relationship"] for record in (source, result)]
    assert relations == ["third_party", "first_party"]
    (scored,) = result["evaluation_results"]
    assert scored["source_data"]["hf_repo"] == "org/films"
    assert scored["score_details"]["score"] == 0.8
    assert scored["score_details"]["details"]["verdict"] == "not shown"
    assert scored["score_details"]["details"]["mean_of_seeds"] == "0.85"
    assert (scored["metric_config"]["min_score"], scored["metric_config"]["max_score"]) == (0, 1)
    assert result["evaluation_id"] == "films/user_small/1700000000"


def test_data_and_models_of_this_machine_have_names_alone(tmp_path: Path, teacher: Path, data: Path) -> None:
    loaded = load(factories.recipe(tmp_path / "r.yaml", teacher, data))
    content = _content(loaded)
    record = make_record(loaded, content, content["rows"][0], 1)
    jsonschema.validate(record, FACTS)
    assert str(tmp_path) not in json.dumps(record)
    assert record["evaluation_results"][0]["source_data"]["source_type"] == "other"
    assert record["model_info"]["id"] == teacher.name


def test_report_writes_the_records_of_a_run(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = {"recipe": spell_out(loaded.recipe), "overrides": [], "revisions": {}, "license": None}
    (run / "recipe.yaml").write_text(loaded.document.text)
    (run / "recipe.lock.json").write_text(json.dumps(lock))
    (run / "report.json").write_text(json.dumps(_content(loaded)))

    assert factories.run_cli("report", run, "--format", "every-eval-ever") == 0

    said = capsys.readouterr().out.replace("\n", "")
    assert "every_eval_ever/03-quantize.json" in said
    jsonschema.validate(json.loads((run / "every_eval_ever" / "03-quantize.json").read_text()), FACTS)
    assert factories.run_cli("report", run, "--format", "csv") == 2
    assert "there is no format 'csv'" in capsys.readouterr().err
    assert factories.run_cli("report", run, run, "--format", "every-eval-ever") == 2
