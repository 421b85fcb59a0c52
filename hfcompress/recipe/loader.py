"""YAML with line numbers: safe tags only, no duplicate keys, and a size that a recipe can have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hfcompress.utils.errors import HfcompressError, Key, Problem

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
BITS = 64
"""Of an integer: nothing in a recipe counts further."""
MAX_DEPTH = 32
"""Brackets inside one another, and parts of a key that `--set` takes."""
SHOWN = 60
"""Characters of a value that an error shows."""
_TAG = "tag:yaml.org,2002:"
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""What no file name and no UTF-8 text can hold; YAML lets it be spelled as an escape."""


@dataclass(frozen=True)
class Document:
    """A recipe file as read.

    Attributes:
        path: The file.
        text: Its text, verbatim.
        data: What it says, as plain Python values.
        lines: Where each key path stands: file and line, or the `--set` that gave it.
        overrides: The `--set` assignments applied, as they were spelled.
    """

    path: Path
    text: str
    data: dict[str, Any]
    lines: dict[Key, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def where(self, key: Key) -> str:
        """File and line of a key path, or of the nearest one above it that the file spells out."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, str(self.path))


class _Loader(yaml.SafeLoader):
    """Plain values: texts, numbers, booleans, lists and mappings whose keys are words.

    As in YAML 1.2, `5e-5` is a number and `2024-01-01` a text.
    """

    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] not in ("timestamp", "binary", "set", "omap", "pairs")
    }
    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """An opening bracket, unless it is one of hundreds: PyYAML's time grows with the square of their number."""
        if self.flow_level >= MAX_DEPTH:
            reason = "the brackets are nested too deep"
            raise yaml.scanner.ScannerError(None, None, reason, self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What a node says; what it cannot say (`!!int x`, an integer of 5,000 digits) is refused at its line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > BITS:
                raise ValueError(f"it has more than {BITS} bits")
            return value
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            kind = node.tag.removeprefix(_TAG)
            reason = f"not {'an' if kind[0] in 'aeiou' else 'a'} {kind}: {str(node.value)[:SHOWN]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are words, also where YAML reads them as something else: `no`, `null`, `1.0`."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            for key, _ in node.value:
                key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path) -> Document:
    """Read a recipe file.

    Raises:
        HfcompressError: a file that is missing, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no regular file"
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
    """The document that `text` holds; `path` is named in errors."""
    data, lines = _constructed(text, path)
    if data is None:
        raise HfcompressError(Problem("the recipe is empty", "`hfcompress copy quickstart` gives one", where=str(path)))
    if not isinstance(data, dict):
        raise HfcompressError(
            Problem(
                f"a recipe is a mapping (name, model, task, stages), this is a {type(data).__name__}", where=str(path)
            )
        )
    return Document(path, text, data, lines)


def _constructed(text: str, path: Path) -> tuple[Any, dict[Key, str]]:
    """What a YAML text says, and the line of each key path."""
    lines: dict[Key, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, path, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise HfcompressError(Problem(f"not YAML: {error.problem or error}", _yaml_fix(error), where=place)) from None
    except RecursionError:
        raise HfcompressError(Problem("not a recipe: the brackets are nested too deep", where=str(path))) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HfcompressError(Problem(f"not YAML: {reason}", where=str(path))) from None


def _yaml_fix(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, yaml.constructor.ConstructorError):
        return "recipes hold plain values only: tags that build objects are refused"
    return "check the indentation, the colons and the quotes on that line"


def _require_writable(text: str, place: str) -> None:
    if _UNWRITABLE.search(text):
        raise HfcompressError(Problem("a value holds a character that no file can hold", "leave it out", where=place))


def _walk(node: yaml.Node, key: Key, lines: dict[Key, str], path: Path, above: set[int]) -> None:
    lines[key] = f"{path}:{node.start_mark.line + 1}"
    if len(lines) > MAX_NODES:
        raise HfcompressError(f"{path} has more than {MAX_NODES:,} values once its aliases are followed")
    if id(node) in above:
        raise HfcompressError(Problem("an alias that contains itself", where=lines[key]))
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                place = f"{path}:{name.start_mark.line + 1}"
                raise HfcompressError(Problem("a key is a word, not a list or a mapping", "", key, place))
            _require_writable(name.value, f"{path}:{name.start_mark.line + 1}")
            if name.value in seen:
                raise HfcompressError(
                    Problem(
                        f"the key '{name.value}' stands twice (first on line {seen[name.value]})",
                        "keep one of them",
                        (*key, str(name.value)),
                        f"{path}:{name.start_mark.line + 1}",
                    )
                )
            seen[name.value] = name.start_mark.line + 1
            _walk(value, (*key, str(name.value)), lines, path, above)
            lines[(*key, str(name.value))] = f"{path}:{name.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*key, index), lines, path, above)
    else:
        _require_writable(node.value, lines[key])


def override(document: Document, assignment: str) -> Document:
    """The document with one `--set KEY.PATH=VALUE` applied; VALUE is read as YAML.

    Raises:
        HfcompressError: an assignment without `=`, or one that goes through something that is not there.
    """
    spelled, equals, text = assignment.partition("=")
    if not equals or not spelled:
        raise HfcompressError(f"--set {assignment}: not an assignment", "write --set stages.0.train.epochs=1")
    parts = spelled.split(".")
    if not all(parts) or len(parts) > MAX_DEPTH:
        why = f"it has {len(parts)} parts" if all(parts) else "a part of it is empty"
        raise HfcompressError(f"--set {spelled[:SHOWN]}: not a key: {why}", "write --set stages.0.train.epochs=1")
    key: Key = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts)
    value, _ = _constructed(text, Path(f"--set {spelled}"))
    lines = {k: v for k, v in document.lines.items() if k[: len(key)] != key} | {key: f"--set {spelled}"}
    data = _assigned(document.data, key, value, spelled)
    return Document(document.path, document.text, data, lines, (*document.overrides, assignment))


def _assigned(data: Any, key: Key, value: Any, spelled: str) -> Any:
    if not key:
        return value
    head, rest = key[0], key[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or head >= len(data):
            raise HfcompressError(f"--set {spelled}: '{head}' is not one of the {len(data)} entries counted from 0")
        return [_assigned(entry, rest, value, spelled) if i == head else entry for i, entry in enumerate(data)]
    if isinstance(data, str) and rest == () and head != "use":
        data = {"use": data}
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise HfcompressError(f"--set {spelled}: '{head}' cannot be set inside the value {data!r:.60}")
    return {**data, str(head): _assigned(data.get(str(head)), rest, value, spelled)}
