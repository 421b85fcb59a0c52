"""Reads and validates a recipe: the YAML file, `--set`, and every mistake of the schema with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hfcompress.data.metrics import OF_TASK
from hfcompress.data.task import Task
from hfcompress.data.tasks import AnyTask
from hfcompress.recipe.schema import Recipe, spell_out
from hfcompress.recipe.yaml_text import MAX_DEPTH, SHOWN, dump_yaml, parse_yaml
from hfcompress.utils.errors import HfcompressError, Key, Problem, did_you_mean

MAX_BYTES = 1_000_000
"""The largest recipe file, in bytes."""


@dataclass(frozen=True)
class Document:
    """A recipe file, read but not yet validated.

    Attributes:
        path: The file.
        text: Its text, verbatim.
        data: Its content as plain Python values.
        lines: The file and line of each key path, or the `--set` that gave its value.
        overrides: The `--set` assignments that were applied, verbatim.
    """

    path: Path
    text: str
    data: dict[str, Any]
    lines: dict[Key, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def where(self, key: Key) -> str:
        """Returns the file and line of a key path, or of the nearest path above it in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, str(self.path))


@dataclass(frozen=True)
class Loaded:
    """A recipe and the file it came from."""

    recipe: Recipe
    document: Document

    @property
    def headline(self) -> str:
        """The first comment of the file, which describes the recipe."""
        return read_headline(self.document.text)


def read_headline(text: str) -> str:
    """Reads the first comment line of a recipe, but for the one that names its JSON Schema; empty if it has none."""
    first = next((line for line in text.lstrip().splitlines() if not line.startswith("# yaml-language-server")), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find_shipped() -> dict[str, Path]:
    """Finds the recipes that ship with hfcompress, by name: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    directory = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def find(name: str) -> Path:
    """Finds a recipe file by its path, or by the name of a shipped recipe."""
    path, shipped = Path(name), find_shipped()
    return path if name not in shipped or path.exists() else shipped[name]


def read(path: Path) -> Document:
    """Reads a recipe file.

    Raises:
        HfcompressError: for a file that is missing, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        if not path.is_file():
            what = "a directory" if path.is_dir() else "a special file"
            message = f"{path} is {what}, not a recipe" if path.exists() else f"no such recipe: {path}"
            raise HfcompressError(message, "`hfcompress list recipes` names those that ship")
        if path.stat().st_size > MAX_BYTES:
            raise HfcompressError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HfcompressError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise HfcompressError(f"{path} cannot be read: {error.strerror}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Document:
    """Parses the text of a recipe; errors name `path`."""
    data, lines = parse_yaml(text, path)
    if data is None:
        raise HfcompressError(Problem("the recipe is empty", "`hfcompress copy quickstart` gives one", where=str(path)))
    if not isinstance(data, dict):
        raise HfcompressError(
            Problem(
                f"a recipe is a mapping (name, model, task, stages), but this is a {type(data).__name__}",
                where=str(path),
            )
        )
    return Document(path, text, data, lines)


def override(document: Document, assignment: str) -> Document:
    """Applies one `--set KEY.PATH=VALUE` to a document; VALUE is read as YAML.

    Raises:
        HfcompressError: for an assignment without `=`, or for a path through a value that has no keys.
    """
    spelled, equals, text = assignment.partition("=")
    if not equals or not spelled:
        raise HfcompressError(f"--set {assignment}: not an assignment", "write --set stages.0.train.epochs=1")
    parts = spelled.split(".")
    if not all(parts) or len(parts) > MAX_DEPTH:
        why = f"it has {len(parts)} parts" if all(parts) else "one of its parts is empty"
        raise HfcompressError(f"--set {spelled[:SHOWN]}: not a key: {why}", "write --set stages.0.train.epochs=1")
    key: Key = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts)
    value, _ = parse_yaml(text, Path(f"--set {spelled}"))
    lines = {k: v for k, v in document.lines.items() if k[: len(key)] != key} | {key: f"--set {spelled}"}
    data = _assign(document.data, key, value, spelled)
    return Document(document.path, document.text, data, lines, (*document.overrides, assignment))


def _assign(data: Any, key: Key, value: Any, spelled: str) -> Any:
    if not key:
        return value
    head, rest = key[0], key[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or head >= len(data):
            raise HfcompressError(f"--set {spelled}: '{head}' is not one of the {len(data)} entries counted from 0")
        return [_assign(entry, rest, value, spelled) if i == head else entry for i, entry in enumerate(data)]
    if isinstance(data, str) and rest == () and head != "use":
        data = {"use": data}
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise HfcompressError(f"--set {spelled}: '{head}' cannot be set inside the value {data!r:.60}")
    return {**data, str(head): _assign(data.get(str(head)), rest, value, spelled)}


def load(path: Path, overrides: Sequence[str] | None = None) -> Loaded:
    """Reads and validates a recipe.

    Args:
        path: The file.
        overrides: `KEY.PATH=VALUE` assignments, applied in order.

    Raises:
        HfcompressError: with every mistake in it.
    """
    document = read(path)
    for assignment in overrides or ():
        document = override(document, assignment)
    return validate(document)


def load_with_target(name: str, overrides: Sequence[str] | None, target: Mapping[str, Any]) -> Loaded:
    """Reads and validates a recipe for a search.

    Args:
        name: The file, or the name of a shipped recipe.
        overrides: `KEY.PATH=VALUE` assignments.
        target: Keys of `search:` that replace those of the file; None for keys that are not given.
    """
    document = read(find(name))
    for assignment in overrides or ():
        document = override(document, assignment)
    held = document.data.get("search")
    given = {key: value for key, value in target.items() if value is not None}
    data = {**document.data, "search": {**(held if isinstance(held, dict) else {}), **given}}
    return validate(replace(document, data=data))


def validate(document: Document) -> Loaded:
    """Validates a document and makes a recipe of it.

    Raises:
        HfcompressError: with every mistake in it.
    """
    try:
        # A file has one spelling for each key: the names of Python's fields (`origin` for `from`) are refused.
        return Loaded(Recipe.model_validate(document.data, by_alias=True, by_name=False), document)
    except ValidationError as error:
        problems = [_make_problem(document, details) for details in error.errors(include_url=False)]
        raise HfcompressError([*problems, *_find_task_problems(document)]) from None


def load_objects(content: dict[str, Any]) -> Loaded:
    """Makes a recipe of Python values or objects; its file is written with every default.

    Raises:
        pydantic.ValidationError: for an option that does not exist or has a wrong value.
    """
    recipe = Recipe.model_validate(content)
    return Loaded(recipe, parse(dump_yaml(spell_out(recipe)), Path("recipe.yaml")))


def _find_task_problems(document: Document) -> list[Problem]:
    """Finds the problems of a valid task in a recipe with other mistakes, so that the user sees all at once."""
    try:
        task: Task = TypeAdapter(AnyTask).validate_python(document.data.get("task"))
    except ValidationError:
        return []
    return [replace(p, where=document.where(p.key)) for p in task.problems()]


_TAGS = {"finetune", "distill", "prune", "quantize", *OF_TASK, "named_metric", "evaluate_metric"}


def _make_problem(document: Document, details: Any) -> Problem:
    """Makes a problem of an error of pydantic."""
    key = _make_key(details["loc"], document.data)
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] == "union_tag_not_found":
        message = f"'{details['ctx']['discriminator'].strip(chr(39))}' is missing"
    elif details["type"] == "union_tag_invalid":
        name, tag = details["ctx"]["discriminator"].strip("'"), details["ctx"]["tag"]
        hint = did_you_mean(tag, re.findall(r"'([^']+)'", details["ctx"]["expected_tags"]))
        key, message = (*key, name), f"unknown {name} '{tag}'; {hint}"
    elif details["type"] == "missing":
        message = "this key is required"
    elif details["type"] not in ("unknown_key", "invalid", "value_error"):
        message = f"{message}, not {details['input']!r}" if _is_short(details["input"]) else message
    return Problem(message, "", key, document.where(key))


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None))) and len(repr(value)) < 60


def _make_key(location: tuple[Any, ...], data: Any) -> Key:
    """Makes a key path of pydantic's location: without the tags of its unions, which a recipe does not have."""
    key: list[str | int] = []
    for part in location:
        inside = isinstance(data, dict) and part in data
        if part in _TAGS and not inside:
            continue
        key.append(part)
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            data = None
    return tuple(key)
