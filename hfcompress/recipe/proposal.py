"""Writes a first recipe for a model and a data file: `hfcompress init`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from hfcompress.data.files import data_file
from hfcompress.data.hub import hub_calls
from hfcompress.data.profile import SAMPLE, Columns, Profile, guess_columns, profile
from hfcompress.data.source import SUFFIXES, is_local, model_config, model_directory, split_file
from hfcompress.data.split import split_rows, write_splits
from hfcompress.data.tasks import AnyTask
from hfcompress.models.artifact import label_ids, load_tokenizer
from hfcompress.models.shape import Shape, shape_of
from hfcompress.recipe.loader import parse, validate
from hfcompress.recipe.validate import check
from hfcompress.recipe.yaml_text import dump_yaml
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import remove, write_text

if TYPE_CHECKING:
    from hfcompress.data.task import Task

INT8_SPEEDUP = 3.0
"""How much faster ONNX int8 alone is than float32 PyTorch on a CPU: 3.1 to 3.9 times in docs/results.md."""
LEAST_MACS = 0.25
"""`obs` kept 98.6% of the accuracy at this share of the MACs (docs/results.md); below it, a student with half of the
layers is distilled first."""
OBS_ROWS = 2048
"""Rows that `obs` scores on, as in those measurements."""
SHORTEST, LONGEST = 16, 512
"""Bounds of the proposed `max_length`, in tokens."""


@dataclass(frozen=True)
class Proposal:
    """The recipe that was written, and the facts that it follows from.

    Attributes:
        path: The recipe file.
        columns: The columns that it reads.
        profile: The facts of the data.
        split: The directory that the data was split into; None if it had its splits.
    """

    path: Path
    columns: Columns
    profile: Profile
    split: Path | None


def propose(
    model: str,
    data: str,
    path: Path | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    type: str | None = None,
    target_speedup: float = INT8_SPEEDUP,
    seed: int = 42,
) -> Proposal:
    """Looks at the data and writes a commented recipe for it, which `check` finds sound.

    One data file is split into train, dev and test; so is the train file of a directory without a dev split.

    Args:
        model: A directory or Hub id.
        data: A data file, or a directory with splits.
        path: The recipe file; by default `NAME.yaml` here, named after the data.
        text, label: Columns; by default they are guessed.
        type: The type of the task; by default it follows from the columns.
        target_speedup: How much faster the model should get on a CPU.
        seed: Decides the split, and is the recipe's.

    Raises:
        HfcompressError: if a file is there already, or the data or the model cannot be used.
    """
    place = Path(data)
    name = re.sub(r"[^\w.-]+", "-", place.resolve().stem).strip("-.") or "mine"
    path = path or Path(f"{name}.yaml")
    _require_free(path)
    columns = guess_columns(_read_samples(place), text, label, type)
    folder, made = _split_data(place, columns, path.with_name(f"{path.stem}-data"), seed)
    try:
        facts = _write_recipe(model, path, columns, folder, target_speedup, seed)
    except BaseException:
        if made is not None:  # nothing is left in the way of the next try
            remove(made)
        raise
    return Proposal(path, columns, facts, made)


def _write_recipe(model: str, path: Path, columns: Columns, folder: Path, target: float, seed: int) -> Profile:
    config = model_config(model)
    shape = shape_of(config)
    limit = min(shape.usable_positions, LONGEST)
    facts = profile(_make_task(columns, folder, limit), _load_tokenizer(model))
    task = _make_task(columns, folder, _choose_length(facts, limit), _choose_metric(columns, facts))
    trained = _answers(config, shape, task)
    recipe = {
        "name": path.stem,
        "model": model,
        "task": _task_keys(task, columns),
        "stages": _choose_stages(shape, facts, target, trained),
        "measure": {"latency": {"device": "cpu", "batch_sizes": [1, 32]}},
        "seed": seed,
    }
    text = _comment(recipe, facts, trained, target) + _comment_stages(dump_yaml(recipe))
    check(validate(parse(text, path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return facts


def _require_free(path: Path) -> None:
    if path.exists():
        raise HfcompressError(f"{path} exists, and is left as it is", "name another file with --output")


def _read_samples(place: Path) -> list[dict[str, Any]]:
    """The first rows of a data file, or of the train file of a directory."""
    if place.is_dir():
        file = split_file(str(place), "train", {})
        if file is None:
            raise HfcompressError(f"{place} has no train file", f"name it train with one of {', '.join(SUFFIXES)}")
        return data_file(file).samples(SAMPLE)
    if not place.is_file():
        raise HfcompressError(f"no such data: {place}", "give a file, or a directory with train, dev and test files")
    if place.suffix not in SUFFIXES:
        raise HfcompressError(f"{place} is no data file", f"its name ends with one of {', '.join(SUFFIXES)}")
    return data_file(place).samples(SAMPLE)


def _split_data(place: Path, columns: Columns, folder: Path, seed: int) -> tuple[Path, Path | None]:
    """The directory with the splits of the data, and the same if it was made here, else None."""
    if place.is_dir() and split_file(str(place), "dev", {}) is not None:
        return place, None
    if folder.exists():
        raise HfcompressError(f"{folder} exists, and is left as it is", "name another recipe with --output")
    train = split_file(str(place), "train", {}) if place.is_dir() else place
    assert train is not None
    rows = data_file(train).samples(2**31 - 1)
    texts = ["\n".join(str(row.get(name)) for name in columns.text) for row in rows]
    classes = [row.get(columns.label or "") if columns.type == "text-classification" else None for row in rows]
    numbers = split_rows(texts, classes, seed)
    test = split_file(str(place), "test", {}) if place.is_dir() else None
    if test is not None:
        numbers = {"train": sorted(numbers["train"] + numbers.pop("test")), "dev": numbers["dev"]}
    folder.mkdir(parents=True)
    write_splits(train, numbers, folder)
    if test is not None:
        reader = data_file(test)
        write_splits(test, {"test": list(range(reader.count()))}, folder)
    return folder, folder


def _make_task(columns: Columns, folder: Path, max_length: int, metric: str | None = None) -> Task:
    keys: dict[str, Any] = {"type": columns.type, "dataset": str(folder), "text": list(columns.text)}
    keys |= {"label": columns.label} if columns.label else {}
    keys |= {"metric": metric} if metric else {}
    try:
        return TypeAdapter(AnyTask).validate_python({**keys, "max_length": max_length})  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise HfcompressError(f"{columns.type}: {first['msg'].removeprefix('Value error, ')}", "see --task") from None


def _load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, without its weights."""
    if is_local(model) or model.startswith("builtin:"):
        return load_tokenizer(model_directory(model))
    from transformers import AutoTokenizer

    repo, _, revision = model.partition("@")
    with hub_calls(f"model '{model}'"):
        return AutoTokenizer.from_pretrained(repo, revision=revision or None)


def _choose_length(facts: Profile, limit: int) -> int:
    """The smallest multiple of 8 that holds 99 of 100 rows whole, within what the model can read."""
    return max(min(-(-facts.length_of(0.99) // 8) * 8, limit), min(SHORTEST, limit))


def _choose_metric(columns: Columns, facts: Profile) -> str | None:
    """Matthews' correlation for two classes of which one is rare, the mean F1 of more; else the task's default."""
    if columns.type != "text-classification" or not facts.rare_classes:
        return None
    return "f1" if len(facts.classes) > 2 else "matthews_correlation"


def _task_keys(task: Task, columns: Columns) -> dict[str, Any]:
    keys = {"type": columns.type, "dataset": task.dataset, "text": list(columns.text)}
    keys |= {"label": columns.label} if columns.label else {}
    return {**keys, "metric": task.metric_name, "max_length": task.max_length}


def _choose_stages(shape: Shape, facts: Profile, target: float, trained: bool) -> list[dict[str, Any]]:
    """The stages that reach a speed-up on a CPU, as far as our measurements tell.

    int8 alone gives about `INT8_SPEEDUP`. For more, MACs are pruned; for much more, a student with half of the layers
    is distilled first.
    """
    finetune = {"kind": "finetune", "train": {"epochs": 3, "learning_rate": 2e-5, "batch_size": 32, "keep_best": True}}
    distilled = {"losses": [{"use": "soft_labels", "temperature": 2.0}]}
    stages: list[dict[str, Any]] = [] if trained else [finetune]
    macs = min(INT8_SPEEDUP / target, 1.0)
    if macs < LEAST_MACS and len(shape.layers) > 1:
        layers = len(shape.layers) // 2
        train = {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32}
        stages.append({"kind": "distill", "student": {"layers": layers}, **distilled, "train": train})
        macs = min(macs * len(shape.layers) / layers, 1.0)
    if macs < 0.95:
        stages.append(
            {
                "kind": "prune",
                "criterion": {"use": "obs", "rows": min(OBS_ROWS, facts.rows["train"])},
                "budget": {"macs": round(max(macs, 0.05), 2)},
                "empty_blocks": True,
                "recover": {"teacher": "source", "epochs": 1, "learning_rate": 3e-5, **distilled},
            }
        )
    return [*stages, {"kind": "quantize", "backend": "onnx_int8"}]


def _answers(config: dict[str, Any], shape: Shape, task: Task) -> bool:
    """True if the model's own head answers the task, with the labels of the data."""
    fits = has_task_head(config, task) and task.outputs in (None, shape.labels) and not task.head_problems(config)
    return fits and not task.label_problems(label_ids(config))


STAGE_COMMENTS = {
    "finetune": "trains the source model, which the others are compared with",
    "distill": "a smaller student learns from the source",
    "prune": "removes the heads and neurons that matter least, and trains what is left",
    "quantize": "int8 weights and activations, in a graph for ONNX Runtime",
}


def _comment_stages(text: str) -> str:
    """Adds to each stage of a dumped recipe what it does."""
    for kind, comment in STAGE_COMMENTS.items():
        text = text.replace(f"- kind: {kind}\n", f"- kind: {kind}  # {comment}\n")
    return text


def _comment(recipe: dict[str, Any], facts: Profile, trained: bool, target: float) -> str:
    """The head of the recipe: what it makes, what is known of the data, and what to run next."""
    kinds = [stage["kind"] for stage in recipe["stages"]]
    head = (
        "the model answers this task already, so no `finetune` stage is needed"
        if trained
        else "the model has no head for these labels, so `finetune` trains one first"
    )
    lines = [
        f"{recipe['name']}: {', '.join(kinds)}, for about {target:g} times the speed on a CPU.",
        "",
        *facts.describe(),
        *(f"mind: {warning}" for warning in facts.warnings()),
        head,
        "",
        f"check: hfcompress check {recipe['name']}.yaml        plan: hfcompress plan {recipe['name']}.yaml",
        f"run:   hfcompress run {recipe['name']}.yaml",
        "more speed: --target-speedup; every key: docs/recipes.md",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
