"""Writes a first recipe for a model and a data file: `hfcompress init`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, get_args

from pydantic import TypeAdapter, ValidationError

from hfcompress.data.files import data_file
from hfcompress.data.hub import hub_calls
from hfcompress.data.hub_rows import is_hub_id, read_samples, save_splits
from hfcompress.data.profile import SAMPLE, Columns, Profile, guess_columns, profile
from hfcompress.data.source import SUFFIXES, is_local, model_config, model_directory, read_hub_rows, split_file
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.split import split_rows, write_splits
from hfcompress.data.tasks import AnyTask
from hfcompress.models.artifact import label_ids, load_tokenizer
from hfcompress.models.shape import Shape, shape_of
from hfcompress.recipe.json_schema import FILE, MODELINE
from hfcompress.recipe.loader import parse, validate
from hfcompress.recipe.validate import check
from hfcompress.recipe.yaml_text import dump_yaml
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError, did_you_mean
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
TYPES = [task.model_fields["type"].default for task in get_args(get_args(AnyTask)[0])]
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
        left_out: Rows without a text or a label, which stand in none of these splits.
        stages: The kinds of the proposed stages.
    """

    path: Path
    columns: Columns
    profile: Profile
    split: Path | None
    left_out: int
    stages: tuple[str, ...]


def propose(
    model: str,
    data: str,
    path: Path | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    type: str | None = None,
    target_speedup: float = INT8_SPEEDUP,
    seed: int = 42,
    encoding: str = "utf-8",
    subset: str | None = None,
) -> Proposal:
    """Looks at the data and writes a commented recipe for it, which `check` finds sound.

    One data file is split into train, dev and test. The train split of a directory or of a data set on the Hub is split
    if there is no dev split.

    Args:
        model: A directory or Hub id.
        data: A data file, a directory with splits, or a data set on the Hub, such as `owner/name`.
        path: The recipe file; by default `NAME.yaml` here, named after the data.
        text, label: Columns; by default they are guessed.
        type: The type of the task; by default it follows from the columns.
        target_speedup: How much faster the model should get on a CPU.
        seed: Decides the split, and is the recipe's.
        encoding: The encoding of text files; the files of a split are written in UTF-8.
        subset: The configuration of a data set on the Hub, such as `sst2` of `nyu-mll/glue`.

    Raises:
        HfcompressError: if a file is there already, or the data or the model cannot be used.
    """
    place, is_hub = Path(data), is_hub_id(data)
    if subset is not None and not is_hub:
        raise HfcompressError("--config names a part of a data set on the Hub, and --data names none", "leave it out")
    path = path or name_recipe(data, subset)
    _require_free(path)
    if type is not None and type not in TYPES:
        raise HfcompressError(f"there is no type of task '{type}'", did_you_mean(type, TYPES))
    samples = read_samples(data, subset, SAMPLE) if is_hub else _read_samples(place, encoding)
    columns = guess_columns(samples, text, label, type)
    config = model_config(model)
    has_dev = read_hub_rows(data, subset, "dev") is not None if is_hub else _has_dev(place)
    made = None if has_dev else path.with_name(f"{path.stem}-data")
    left_out = 0
    if made is not None:
        with tempfile.TemporaryDirectory() as scratch:
            if is_hub:
                place = save_splits(data, subset, columns.label, Path(scratch))
            left_out = _split_data(place, columns, made, seed, encoding)
    keys = {"dataset": str(made or data)}
    if made is None:
        keys |= {"config": subset} if subset else {"encoding": encoding} if encoding != "utf-8" else {}
    hub = {"hub": {"dataset": data.partition("@")[0]}} if is_hub and made is not None else {}
    try:
        recipe, facts = _write_recipe(model, config, path, columns, keys, target_speedup, seed, hub)
    except BaseException:
        if made is not None:  # nothing is left in the way of the next try
            remove(made)
        raise
    return Proposal(path, columns, facts, made, left_out, tuple(stage["kind"] for stage in recipe["stages"]))


def name_recipe(data: str, subset: str | None = None) -> Path:
    """The recipe file for data: `NAME.yaml` here, named after the file, the directory, or the data set on the Hub."""
    stem = "-".join([data.partition("@")[0].split("/")[-1], *([subset] if subset else [])])
    name = re.sub(r"[^\w.-]+", "-", stem if is_hub_id(data) else Path(data).resolve().stem).strip("-.") or "mine"
    return Path(f"{name}.yaml")


def _write_recipe(
    model: str,
    config: dict[str, Any],
    path: Path,
    columns: Columns,
    keys: dict[str, str],
    target: float,
    seed: int,
    hub: dict[str, Any],
) -> tuple[dict[str, Any], Profile]:
    shape = shape_of(config)
    limit = min(shape.usable_positions, LONGEST)
    facts = profile(_make_task(columns, keys, limit), _load_tokenizer(model))
    task = _make_task(columns, keys, _choose_length(facts, limit), _choose_metric(columns, facts))
    trained = _answers(config, shape, task)
    recipe = {
        "name": re.sub(r"[^\w.-]+", "-", path.stem),
        "model": model,
        "task": _task_keys(task, columns, keys),
        "stages": _choose_stages(shape, facts, target, trained),
        "measure": {"latency": {"device": "cpu", "batch_sizes": [1, 32]}, "margin": "1%"},
        **hub,
        "seed": seed,
    }
    editor = f"{MODELINE}\n" if (path.parent / FILE).is_file() else ""
    text = editor + _comment(path, recipe, facts, trained, target) + _comment_lines(dump_yaml(recipe), facts)
    check(validate(parse(text, path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return recipe, facts


def _require_free(path: Path) -> None:
    if path.exists():
        raise HfcompressError(f"{path} exists, and is left as it is", "name another file with --output")


def _has_dev(place: Path) -> bool:
    return place.is_dir() and split_file(str(place), "dev", {}) is not None


def _read_samples(place: Path, encoding: str) -> list[dict[str, Any]]:
    """The first rows of a data file, or of the train file of a directory."""
    if place.is_dir():
        file = split_file(str(place), "train", {})
        if file is None:
            raise HfcompressError(f"{place} has no train file", f"name it train with one of {', '.join(SUFFIXES)}")
        return data_file(file, encoding).samples(SAMPLE)
    if not place.is_file():
        raise HfcompressError(
            f"no such data: {place}",
            "give a file, a directory with train, dev and test files, or a data set on the Hub as owner/name",
        )
    if place.suffix not in SUFFIXES:
        raise HfcompressError(f"{place} is no data file", f"its name ends with one of {', '.join(SUFFIXES)}")
    return data_file(place, encoding).samples(SAMPLE)


def _split_data(place: Path, columns: Columns, folder: Path, seed: int, encoding: str) -> int:
    """Writes the splits of the data into a new directory; returns how many rows without text or label it left out."""
    if folder.exists():
        raise HfcompressError(f"{folder} exists, and is left as it is", "name another recipe with --output")
    train = split_file(str(place), "train", {}) if place.is_dir() else place
    assert train is not None
    rows = data_file(train, encoding).samples(2**31 - 1)
    kept = [number for number, row in enumerate(rows) if _is_whole(row, columns)]
    texts = ["\n".join(str(rows[number].get(name)) for name in columns.text) for number in kept]
    by_class = columns.label if columns.type == "text-classification" else None
    found = split_rows(texts, [rows[number][by_class] if by_class else None for number in kept], seed)
    numbers = {split: [kept[place] for place in places] for split, places in found.items()}
    test = split_file(str(place), "test", {}) if place.is_dir() else None
    if test is not None:
        numbers = {"train": sorted(numbers["train"] + numbers.pop("test")), "dev": numbers["dev"]}
    folder.mkdir(parents=True)
    write_splits(train, numbers, folder, encoding)
    if test is not None:
        reader = data_file(test, encoding)
        write_splits(test, {"test": list(range(reader.count()))}, folder, encoding)
    return len(rows) - len(kept)


def _is_whole(row: dict[str, Any], columns: Columns) -> bool:
    """True if a row has a text in each text column, and a label if the task has one."""
    needed = [row.get(name) for name in (*columns.text, *([columns.label] if columns.label else []))]
    return not any(value is None or value == [] or (isinstance(value, str) and not value.strip()) for value in needed)


def _make_task(columns: Columns, place: dict[str, str], max_length: int, metric: str | None = None) -> Task:
    keys: dict[str, Any] = {"type": columns.type, **place, "text": list(columns.text)}
    keys |= {"label": columns.label} if columns.label else {}
    keys |= {"metric": metric} if metric else {}
    keys |= {"stride": max_length // 4} if _needs_stride(columns, max_length) else {}
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


def _task_keys(task: Task, columns: Columns, place: dict[str, str]) -> dict[str, Any]:
    keys: dict[str, Any] = {"type": columns.type, **place, "text": list(columns.text)}
    keys |= {"label": columns.label} if columns.label else {}
    keys |= {"metric": task.metric_name, "max_length": task.max_length}
    return keys | ({"stride": task.max_length // 4} if _needs_stride(columns, task.max_length) else {})


def _needs_stride(columns: Columns, max_length: int) -> bool:
    """True if windows of a context are too short for the default overlap."""
    return columns.type == "question-answering" and 2 * QuestionAnswering.model_fields["stride"].default > max_length


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


LINE_COMMENTS = {
    "- kind: finetune": "trains the source model, which the others are compared with",
    "- kind: distill": "a smaller student learns from the source",
    "- kind: prune": "removes the heads and neurons that matter least, and trains what is left",
    "- kind: quantize": "int8 weights and activations, in a graph for ONNX Runtime",
    "  margin: 1%": "the loss that you accept; the report says whether a larger one is ruled out",
}


METRIC_COMMENTS = {
    "  metric: matthews_correlation": "unlike accuracy, it sees the rare class",
    "  metric: f1": "the mean over classes: unlike accuracy, it sees the rare ones",
}
"""For classes of which some are rare."""


def _comment_lines(text: str, facts: Profile) -> str:
    """Adds to some lines of a dumped recipe what they do."""
    for line, comment in {**LINE_COMMENTS, **(METRIC_COMMENTS if facts.rare_classes else {})}.items():
        text = text.replace(f"{line}\n", f"{line}  # {comment}\n")
    return text


def _comment(path: Path, recipe: dict[str, Any], facts: Profile, trained: bool, target: float) -> str:
    """The head of the recipe: what it makes, what is known of the data, and what to run next."""
    kinds = [stage["kind"] for stage in recipe["stages"]]
    head = (
        "the model answers this task already, so no `finetune` stage is needed"
        if trained
        else "the model has no task head for these labels, so `finetune` trains one first"
    )
    lines = [
        f"{', '.join(kinds)}, to make the model about {target:g} times as fast on a CPU (a run measures it).",
        "",
        *facts.describe(),
        *(line for warning in facts.warnings() for line in wrap(f"warning: {warning}", 118, subsequent_indent="  ")),
        head,
        "",
        f"check: hfcompress check {path}        plan: hfcompress plan {path}",
        f"run:   hfcompress run {path}",
        "more speed: --target-speedup; every key: docs/recipes.md",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
