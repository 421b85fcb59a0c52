"""Reads and writes the YAML of a recipe with `ruamel.yaml`: plain values, the line of each, and limits on size."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import BaseResolver

from hfcompress.utils.errors import HfcompressError, Key, Problem

MAX_NODES = 100_000
"""The most values in a recipe; each counts as often as an alias repeats it."""
MAX_DEPTH = 32
"""The deepest nesting of lists and mappings, and the most parts of a key of `--set`."""
MAX_BITS = 64
"""The most bits of an integer; no option needs more."""
SHOWN = 60
"""The most characters of a value that an error shows."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
    "int": "[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    "null": "~|null|Null|NULL|",
    "merge": "<<",
}
"""The meaning of unquoted words: `5e-5` is a number, as in YAML 1.2; `yes` and `off` are booleans, as in YAML 1.1."""
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no file name and no UTF-8 text can hold; YAML can spell them as escapes."""


class _Resolver(BaseResolver):
    """Distinguishes numbers, booleans and null from text. A date is text."""

    processing_version = (1, 2)

    def __init__(self, version: Any = None, loader: Any = None, loadumper: Any = None) -> None:
        super().__init__(loader if loader is not None else loadumper)


for _kind, _shape in _PLAIN.items():
    _Resolver.add_implicit_resolver_base(_TAG + _kind, re.compile(f"(?:{_shape})\\Z"), None)


def _make_yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    return yaml


class _Representer(SafeRepresenter):
    """Writes a list of numbers or words on one line, and a value that stands twice twice, without an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list[Any]) -> Any:
        short = all(value is None or isinstance(value, bool | int | float | str) for value in data)
        return self.represent_sequence(f"{_TAG}seq", data, flow_style=short)


_Representer.add_representer(list, _Representer.represent_list)


def dump_yaml(value: Any) -> str:
    """Writes plain values as YAML, in their order."""
    yaml, text = _make_yaml(), io.StringIO()
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = False, 120, False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, text)
    return text.getvalue()


def parse_yaml(text: str, path: Path) -> tuple[Any, dict[Key, str]]:
    """Reads plain values and the line of each.

    Args:
        text: A YAML document.
        path: The path that errors name.

    Returns:
        The value, and the file and line by key path.

    Raises:
        HfcompressError: if the text is not YAML, builds objects, repeats a key, or is too deep or too large.
    """
    yaml = _make_yaml()
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    reader = _Reader(yaml, path)
    try:
        node = yaml.compose(text)
        return None if node is None else reader.read(node), reader.lines
    except MaxDepthExceededError as error:
        raise _make_depth_error(_format_place(path, error.problem_mark)) from None
    except MarkedYAMLError as error:
        tagged = isinstance(error, ConstructorError)
        fix = "recipes hold plain values only: tags that build objects are refused" if tagged else ""
        fix = fix or "check the indentation, the colons and the quotes on that line"
        place = _format_place(path, error.problem_mark or error.context_mark)
        raise HfcompressError(Problem(f"not YAML: {error.problem or error}", fix, where=place)) from None
    except (YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HfcompressError(Problem(f"not YAML: {reason}", where=str(path))) from None


def _format_place(path: Path, mark: Any) -> str:
    return str(path) if mark is None else f"{path}:{mark.line + 1}"


def _make_depth_error(place: str) -> HfcompressError:
    return HfcompressError(Problem("not a recipe: the brackets are nested too deep", where=place))


class _Reader:
    """Reads the values of nodes. The keys of a mapping are read as text, even `no`, `null` and `1.0`."""

    def __init__(self, yaml: YAML, path: Path) -> None:
        self.constructor, self.path = yaml.constructor, path
        self.lines: dict[Key, str] = {}
        self.nodes = 0

    def read(self, node: Node, key: Key = (), above: tuple[Node, ...] = ()) -> Any:
        """Reads the value of a node; `above` are the nodes that contain it."""
        self.lines.setdefault(key, self._format_place(node))
        self._enter(node, above)
        if isinstance(node, MappingNode):
            named = self._read_pairs(node, key, (*above, node))
            for name, (spelled, _) in named.items():
                self.lines[(*key, name)] = self._format_place(spelled)
            return {name: self.read(value, (*key, name), (*above, node)) for name, (_, value) in named.items()}
        if isinstance(node, SequenceNode):
            return [self.read(value, (*key, index), (*above, node)) for index, value in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._read_scalar(node)

    def _enter(self, node: Node, above: tuple[Node, ...]) -> None:
        """Refuses a node if there are too many nodes, or if an alias makes it contain itself."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise HfcompressError(f"{self.path} has more than {MAX_NODES:,} values once its aliases are followed")
        if any(node is other for other in above):
            raise HfcompressError(Problem("an alias contains itself", where=self._format_place(node)))
        if len(above) >= MAX_DEPTH:
            raise _make_depth_error(self._format_place(node))
        _require_kind(node)

    def _read_pairs(self, node: MappingNode, key: Key, above: tuple[Node, ...]) -> dict[str, tuple[Node, Node]]:
        """Reads the keys and values of a mapping, by name: first those that it merges (`<<`), then its own."""
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for name, value in node.value:
            if not isinstance(name, ScalarNode):
                raise HfcompressError(
                    Problem("a key is a word, not a list or a mapping", "", key, self._format_place(name))
                )
            self._require_writable(name)
            if name.value in own:
                first = own[name.value][0].start_mark.line + 1
                message = f"the key '{name.value}' occurs twice (first on line {first})"
                raise HfcompressError(
                    Problem(message, "keep one of them", (*key, name.value), self._format_place(name))
                )
            own[name.value] = (name, value)
            if name.tag == f"{_TAG}merge":
                merged = self._read_merged(value, key, above)
        return merged | {name: pair for name, pair in own.items() if pair[0].tag != f"{_TAG}merge"}

    def _read_merged(self, node: Node, key: Key, above: tuple[Node, ...]) -> dict[str, tuple[Node, Node]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, tuple[Node, Node]] = {}
        for source in reversed(sources):  # the first of several has priority
            if not isinstance(source, MappingNode):
                reason = "expected a mapping or list of mappings for merging"
                raise ConstructorError(None, None, reason, source.start_mark)
            self._enter(source, above)
            merged |= self._read_pairs(source, key, (*above, source))
        return merged

    def _read_scalar(self, node: ScalarNode) -> Any:
        """Reads the value of a scalar; `!!int x` and an integer of 5,000 digits are refused with their line."""
        self._require_writable(node)
        kind = str(node.tag).removeprefix(_TAG)
        if kind in ("str", "null"):
            return node.value if kind == "str" else None
        try:
            value = getattr(self.constructor, f"construct_yaml_{kind}")(node)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError(f"it has more than {MAX_BITS} bits")
            return value
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            reason = f"not {'an' if kind[0] in 'aeiou' else 'a'} {kind}: {str(node.value)[:SHOWN]} ({error})"
            raise ConstructorError(None, None, reason, node.start_mark) from None

    def _require_writable(self, node: ScalarNode) -> None:
        if _UNWRITABLE.search(node.value):
            message = "a value has a character that no file can hold"
            raise HfcompressError(Problem(message, "leave it out", where=self._format_place(node)))

    def _format_place(self, node: Node) -> str:
        return _format_place(self.path, node.start_mark)


_KINDS = {"map": MappingNode, "seq": SequenceNode, **dict.fromkeys(("str", "int", "float", "bool", "null"), ScalarNode)}
_NAMES = {MappingNode: "mapping", SequenceNode: "sequence", ScalarNode: "scalar"}


def _require_kind(node: Node) -> None:
    """Refuses a tag that is not for plain values, or not for this kind of node."""
    kind = _KINDS.get(str(node.tag).removeprefix(_TAG))
    if kind is None:
        reason = f"could not determine a constructor for the tag {str(node.tag)!r}"
        raise ConstructorError(None, None, reason, node.start_mark)
    if not isinstance(node, kind):
        reason = f"expected a {_NAMES[kind]} node, but found a {_NAMES[type(node)]}"
        raise ConstructorError(None, None, reason, node.start_mark)
