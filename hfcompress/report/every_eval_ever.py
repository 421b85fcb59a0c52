"""The scores of a run as records of Every Eval Ever, a shared format of evaluation results.

The format is that of https://github.com/evaleval/every_eval_ever (`eval.schema.json`, version 0.3.0): one JSON object
for each model, in which details are strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfcompress.recipe.loader import Loaded
from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.hub_metadata import METRIC_NAMES, find_base_model, find_dataset
from hfcompress.utils.files import write_text
from hfcompress.utils.places import last_part

SCHEMA_VERSION = "0.3.0"
FOLDER = "every_eval_ever"
_SIGNED = ("matthews_correlation", "pearson", "spearman")
_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match")


def write_records(loaded: Loaded, content: Mapping[str, Any], directory: Path, created: int) -> list[Path]:
    """Writes the record of each model of a report into `every_eval_ever/` of a run directory.

    Args:
        loaded: The recipe.
        content: The report.
        directory: The run directory.
        created: The time, in seconds since 1970.

    Returns:
        The files.
    """
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for row in content["rows"]:
        record = make_record(loaded, content, row, created)
        paths.append(folder / f"{row['stage']}.json")
        write_text(paths[-1], json.dumps(record, indent=2, allow_nan=False) + "\n")
    return paths


def make_record(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], created: int) -> dict[str, Any]:
    """Makes the record of one model.

    Args:
        loaded, content, created: See `write_records`.
        row: The model's row of the report.
    """
    from hfcompress import __version__

    model, data = _name_model(loaded, content, row), _describe_data(loaded, content)
    owner = (loaded.recipe.hub.repo or "").partition("/")[0]
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{data['dataset_name']}/{model.replace('/', '_')}/{created}",
        "retrieved_timestamp": str(created),
        "source_metadata": {
            "source_name": "hfcompress",
            "source_type": "evaluation_run",
            "source_organization_name": owner or "unknown",
            "evaluator_relationship": "third_party" if _is_foreign(loaded, row) else "first_party",
        },
        "eval_library": {"name": "hfcompress", "version": __version__},
        "model_info": _describe_model(loaded, content, row, model),
        "evaluation_results": [
            {
                "evaluation_name": data["dataset_name"],
                "source_data": data,
                "metric_config": _describe_metric(loaded, find_metric(content)),
                "score_details": _describe_score(loaded, content, row),
            }
        ],
    }


def _is_foreign(loaded: Loaded, row: Mapping[str, Any]) -> bool:
    """True for a source that the run did not train."""
    return row["stage"] == "source" and all(stage.compresses for stage in loaded.recipe.stages)


def _name_model(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Names a model as the Hub does, where it has such a name."""
    ours = loaded.recipe.hub.repo or loaded.recipe.name
    if _is_foreign(loaded, row):
        return find_base_model(loaded) or last_part(loaded.recipe.model)
    return ours if row is content["rows"][-1] else f"{ours}/{row['stage']}"


def _describe_model(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], name: str) -> dict[str, Any]:
    runtime, versions = row["latency"][0]["runtime"], content["environment"].get("versions", {})
    engine = {"torch": "torch", "onnx": "onnxruntime"}.get(runtime, runtime)
    published = find_base_model(loaded) if _is_foreign(loaded, row) else loaded.recipe.hub.repo
    details = {
        "deployment_type": "self_deployed",
        "model_availability": "open_weights" if published else "unknown",
        "base_model": find_base_model(loaded) or last_part(loaded.recipe.model),
        "stage": row["stage"],
        "dtype": row["latency"][0].get("stored", row["latency"][0]["dtype"]),
        "parameters": row["parameters"],
        "disk_bytes": row["disk_bytes"],
        "compression": row["compression"],
        **({} if was_busy(content) else {f"p50_ms_batch_{e['batch_size']}": e["p50_ms"] for e in row["latency"]}),
        "processor": content["environment"].get("cpu"),
    }
    return {
        "name": last_part(name),
        "id": name,
        **({"developer": name.partition("/")[0]} if "/" in name else {}),
        "inference_engine": {"name": engine, "version": str(versions.get(engine, "unknown"))},
        "additional_details": _as_strings(details),
    }


def _describe_data(loaded: Loaded, content: Mapping[str, Any]) -> dict[str, Any]:
    id_, task = find_dataset(loaded), content["task"]
    split = content.get("dataset_split") or task["split"]
    if id_ is None:
        place = last_part(task["dataset"])
        return {"dataset_name": place, "source_type": "other", "additional_details": {"split": str(split)}}
    details = _as_strings({"config": task.get("config")})
    return {
        "dataset_name": last_part(id_),
        "source_type": "hf_dataset",
        "hf_repo": id_,
        "hf_split": str(split),
        "samples_number": int(content["rows"][0]["quality"]["n"]),
        **({"additional_details": details} if details else {}),
    }


def _describe_metric(loaded: Loaded, metric: str) -> dict[str, Any]:
    least = 0 if metric in (*_SHARES, "mse", "perplexity") else -1 if metric in _SIGNED else "-Infinity"
    return {
        "metric_id": metric,
        "metric_name": METRIC_NAMES.get(metric, metric),
        "lower_is_better": not loaded.recipe.task.greater_is_better,
        "score_type": "continuous",
        "min_score": least,
        "max_score": 1 if metric in (*_SHARES, *_SIGNED) else "Infinity",
    }


def _describe_score(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    found, seeds = row.get("against_source", {}), row.get("seeds", {})
    told = {
        "change_against_source": found.get("change"),
        "change_low_95": found.get("low"),
        "change_high_95": found.get("high"),
        "reading": found.get("reading"),
        "margin": found.get("margin"),
        "verdict": found.get("verdict"),
        "seeds": len(seeds["seeds"]) if seeds else None,
        "mean_of_seeds": seeds.get("mean"),
        "standard_deviation_of_seeds": seeds.get("sd"),
    }
    low, high = row["quality_interval"]
    return {
        "score": row["quality"][find_metric(content)],
        "details": _as_strings(told),
        "uncertainty": {
            "confidence_interval": {
                "lower": low, "upper": high, "confidence_level": 0.95, "method": "percentile bootstrap",
            },
            "num_samples": int(row["quality"]["n"]),
            "num_bootstrap_samples": loaded.recipe.measure.bootstrap,
        },
    }  # fmt: skip


def _as_strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}
