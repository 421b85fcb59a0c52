"""The metadata at the top of a card, which the Hub reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hfcompress.context import Stage
from hfcompress.data.license import UnknownLicenseError
from hfcompress.data.source import is_local
from hfcompress.data.task import Task
from hfcompress.measure.energy import name_sources
from hfcompress.models.artifact import Artifact
from hfcompress.recipe.license import find_license
from hfcompress.recipe.loader import Loaded
from hfcompress.report.conditions import find_metric
from hfcompress.report.effort import select_effort, sum_emissions
from hfcompress.utils.card_metadata import (
    require_emissions,
    require_hub_id,
    require_language,
    require_library,
    require_license,
    require_pipeline,
)
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import one_line
from hfcompress.utils.places import last_part
from hfcompress.utils.wording import join

METRIC_NAMES = {
    "accuracy": "Accuracy", "f1": "F1", "matthews_correlation": "Matthews correlation", "pearson": "Pearson",
    "spearman": "Spearman", "mse": "Mean squared error", "precision": "Precision", "recall": "Recall",
    "exact_match": "Exact match", "perplexity": "Perplexity",
}  # fmt: skip
_PIPELINES = {"regression": "text-classification"}
"""The Hub's name for a task type that it does not have itself."""

_FORMATS = {"onnx": ("onnx",), "openvino": ("openvino",)}
"""The Hub's tag for the file format, by runtime."""


def make_metadata(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], artifact: Artifact) -> Any:
    """Makes the metadata of a model's card.

    Args:
        loaded: The recipe.
        content: The report.
        row: The model's row of the report.
        artifact: The model.

    Returns:
        A `ModelCardData` of `huggingface_hub`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    recipe, metric = loaded.recipe, find_metric(content)
    pipeline, languages = _PIPELINES.get(recipe.task.type, recipe.task.type), recipe.hub.language
    base, dataset = find_base_model(loaded), find_dataset(loaded)
    split = content.get("dataset_split") or content["task"]["split"]
    if is_local(recipe.task.dataset) and recipe.hub.dataset:
        split = None  # local files called `test` need not be the Hub's test split
    result = EvalResult(
        task_type=pipeline,
        dataset_type=dataset or "local",
        dataset_name=one_line(" ".join(filter(None, [dataset or last_part(recipe.task.dataset), recipe.task.config]))),
        dataset_config=recipe.task.config and one_line(recipe.task.config),
        dataset_split=split,
        dataset_revision=content.get("revisions", {}).get(f"datasets/{recipe.task.dataset}"),
        metric_type=metric,
        metric_name=METRIC_NAMES.get(metric, metric),
        metric_value=round(float(row["quality"][metric]), 6),
    )
    stages = list_stages(loaded, artifact)
    return ModelCardData(
        language=(languages[0] if len(languages) == 1 else languages) or None,
        **_read_license(loaded, content),
        library_name="transformers",  # the Hub has no library `onnx`: a graph is a tag
        pipeline_tag=pipeline,
        base_model=base,
        base_model_relation=stages[-1].relation if base else None,
        datasets=[dataset] if dataset else None,
        metrics=[metric],
        tags=[
            "hfcompress",
            *_FORMATS.get(artifact.runtime, ()),
            *dict.fromkeys(stage.participle for stage in stages if stage.compresses),
        ],
        model_name=recipe.name,
        eval_results=[result],
        **_find_emissions(content, row["stage"], stages, recipe.task),
    )


def _find_emissions(content: Mapping[str, Any], stage: str, stages: Sequence[Stage], task: Task) -> dict[str, Any]:
    """Finds the grams of CO2 of making a model, by the Hub's key; empty unless all of it was measured in a country."""
    efforts = select_effort(content, stage)
    grams = sum_emissions(efforts)
    if grams is None:
        return {}
    # The Hub knows two types; to learn from raw text is the first.
    raw = {each.task_of(task).type == "fill-mask" for each in stages}
    types = [name for name, found in (("pre-training", True in raw), ("fine-tuning", False in raw)) if found]
    hardware = dict.fromkeys(effort["hardware"] for effort in efforts.values() if "hardware" in effort)
    sources = name_sources(effort["source"] for effort in efforts.values() if "source" in effort)
    emissions = {
        "emissions": float(f"{grams:.4g}"),
        "source": f"codecarbon, energy by {sources}",
        "training_type": join(types),
        "geographical_location": content["electricity"]["name"],
        "hardware_used": join(list(hardware)),
    }
    return {"co2_eq_emissions": emissions}


def _read_license(loaded: Loaded, content: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the licence, by the Hub's keys; empty if it is not known."""
    recipe = loaded.recipe
    if recipe.hub.license is None and "license" in content:
        return dict(content["license"] or {})
    try:
        return asdict(find_license(recipe))
    except UnknownLicenseError:
        return {}


def list_stages(loaded: Loaded, artifact: Artifact) -> list[Stage]:
    """Lists the stages that made a model; a run with `--only` does not reach the recipe's last stage."""
    stages = dict(zip(loaded.recipe.stage_names(), loaded.recipe.stages, strict=True))
    return [stages[name] for name in list_stage_names(loaded, artifact)]


def list_stage_names(loaded: Loaded, artifact: Artifact) -> list[str]:
    """Lists the names of the stages that made a model."""
    names, stages = loaded.recipe.stage_names(), loaded.recipe.stages
    if artifact.stage in names:
        return names[: names.index(artifact.stage) + 1]
    return [name for name, stage in zip(names, stages, strict=True) if not stage.compresses]


def find_base_model(loaded: Loaded) -> str | None:
    """Finds the Hub id of the model that the recipe starts from; None if it has none."""
    return loaded.recipe.hub.base_model or _find_hub_id(loaded.recipe.model)


def find_dataset(loaded: Loaded) -> str | None:
    """Finds the Hub id of the data set; None if it has none."""
    return loaded.recipe.hub.dataset or _find_hub_id(loaded.recipe.task.dataset)


def _find_hub_id(spec: str) -> str | None:
    """Finds the Hub id in the name of a model or a data set; None for a directory, even if it no longer exists."""
    try:
        return None if is_local(spec) else require_hub_id(spec.partition("@")[0])
    except ValueError:
        return None


def validate(text: str) -> None:
    """Checks that the Hub would accept a card, without asking the Hub.

    Raises:
        HfcompressError: for a licence, language, Hub id or metric value that the Hub refuses, and an empty section.
    """
    from huggingface_hub import ModelCard

    data: Any = ModelCard(text).data
    problems = []
    languages = data.language if isinstance(data.language, list) else [data.language]
    datasets = data.datasets or []
    checks: list[tuple[str, Callable[[Any], object], list[Any]]] = [
        ("license", require_license, [data.license] if data.license else []),
        ("library_name", require_library, [data.library_name] if data.library_name else []),
        ("pipeline_tag", require_pipeline, [data.pipeline_tag] if data.pipeline_tag else []),
        ("language", require_language, languages if data.language else []),
        ("base_model", require_hub_id, [data.base_model] if data.base_model else []),
        ("dataset", require_hub_id, [datasets] if isinstance(datasets, str) else datasets),
    ]
    for key, require, values in checks:
        for value in values:
            try:
                require(str(value))
            except ValueError as error:
                problems.append(f"hub.{key}: {error}")
    for result in data.eval_results or []:
        if type(result.metric_value) is not float or not math.isfinite(result.metric_value):
            problems.append(f"the metric {result.metric_type} has the value {result.metric_value!r}")
    if (emissions := data.to_dict().get("co2_eq_emissions")) is not None:
        try:
            require_emissions(emissions)
        except ValueError as error:
            problems.append(f"co2_eq_emissions: {error}")
    if "[More Information Needed]" in text:
        problems.append("the card has an empty section")
    if problems:
        raise HfcompressError("the Hub would refuse the model card: " + "; ".join(problems), "fix `hub:` in the recipe")
