"""The YAML of a recipe: plain values with the line of each, within limits. `ruamel.yaml` reads and writes it."""

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
from ruamel.yaml.resolver import BaseResolver

from hfcompress.utils.errors import HfcompressError, Key, Problem

MAX_NODES = 100_000
"""Values of a recipe, each counted as often as an alias repeats it."""
MAX_DEPTH = 32
"""Lists and mappings inside one another, and parts of a key that `--set` takes."""
MAX_BITS = 64
"""Bits of an integer: nothing in a recipe counts further."""
SHOWN = 60
"""Characters of a value that an error shows."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
    "int": "[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    "null": "~|null|Null|NULL|",
    "merge": "<<",
}
"""What an unquoted word means. As in YAML 1.2 `5e-5` is a number; as in YAML 1.1 `yes` and `off` are booleans."""
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no file name and no UTF-8 text can hold; YAML can spell them as escapes."""


class _Resolver(BaseResolver):
    """Tells numbers, booleans and null from texts. A date stays a text."""

    processing_version = (1, 2)

    def __init__(self, version: Any = None, loader: Any = None, loadumper: Any = None) -> None:
        super().__init__(loader if loader is not None else loadumper)


for _kind, _shape in _PLAIN.items():
    _Resolver.add_implicit_resolver_base(_TAG + _kind, re.compile(f"(?:{_shape})\\Z"), None)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    return yaml


def dump_yaml(value: Any) -> str:
    """Writes plain values as YAML, in the order that they have."""
    yaml, text = _yaml(), io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = False, 120, False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, text)
    return text.getvalue()


def parse_yaml(text: str, path: Path) -> tuple[Any, dict[Key, str]]:
    """Reads plain values and the line of each.

    Args:
        text: One YAML document.
        path: What errors call it.

    Returns:
        The value, and file and line by key path.

    Raises:
        HfcompressError: for a text that is no YAML, builds objects, repeats a key, or is too deep or too large.
    """
    yaml = _yaml()
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    reader = _Reader(yaml, path)
    try:
        node = yaml.compose(text)
        return None if node is None else reader.read(node), reader.lines
    except MaxDepthExceededError as error:
        raise _too_deep(_place(path, error.problem_mark)) from None
    except MarkedYAMLError as error:
        tagged = isinstance(error, ConstructorError)
        fix = "recipes hold plain values only: tags that build objects are refused" if tagged else ""
        fix = fix or "check the indentation, the colons and the quotes on that line"
        place = _place(path, error.problem_mark or error.context_mark)
        raise HfcompressError(Problem(f"not YAML: {error.problem or error}", fix, where=place)) from None
    except (YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HfcompressError(Problem(f"not YAML: {reason}", where=str(path))) from None


def _place(path: Path, mark: Any) -> str:
    return str(path) if mark is None else f"{path}:{mark.line + 1}"


def _too_deep(place: str) -> HfcompressError:
    return HfcompressError(Problem("not a recipe: the brackets are nested too deep", where=place))


class _Reader:
    """Makes values of nodes; the keys of a mapping are the words that stand there, also `no`, `null` and `1.0`."""

    def __init__(self, yaml: YAML, path: Path) -> None:
        self.constructor, self.path = yaml.constructor, path
        self.lines: dict[Key, str] = {}
        self.nodes = 0

    def read(self, node: Node, key: Key = (), above: tuple[Node, ...] = ()) -> Any:
        """The value of a node; `above` are the nodes that it lies in."""
        self.lines.setdefault(key, self._place(node))
        self._enter(node, above)
        if isinstance(node, MappingNode):
            named = self._pairs(node, key, (*above, node))
            for name, (spelled, _) in named.items():
                self.lines[(*key, name)] = self._place(spelled)
            return {name: self.read(value, (*key, name), (*above, node)) for name, (_, value) in named.items()}
        if isinstance(node, SequenceNode):
            return [self.read(value, (*key, index), (*above, node)) for index, value in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node)

    def _enter(self, node: Node, above: tuple[Node, ...]) -> None:
        """Refuses a node that no recipe can have: an alias can repeat one without end."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise HfcompressError(f"{self.path} has more than {MAX_NODES:,} values once its aliases are followed")
        if any(node is other for other in above):
            raise HfcompressError(Problem("an alias that contains itself", where=self._place(node)))
        if len(above) >= MAX_DEPTH:
            raise _too_deep(self._place(node))
        _require_kind(node)

    def _pairs(self, node: MappingNode, key: Key, above: tuple[Node, ...]) -> dict[str, tuple[Node, Node]]:
        """The keys and values of a mapping, by name: those that it merges (`<<`) first, then its own."""
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for name, value in node.value:
            if not isinstance(name, ScalarNode):
                raise HfcompressError(Problem("a key is a word, not a list or a mapping", "", key, self._place(name)))
            self._require_writable(name)
            if name.value in own:
                first = own[name.value][0].start_mark.line + 1
                message = f"the key '{name.value}' stands twice (first on line {first})"
                raise HfcompressError(Problem(message, "keep one of them", (*key, name.value), self._place(name)))
            own[name.value] = (name, value)
            if name.tag == f"{_TAG}merge":
                merged = self._merged(value, key, above)
        return merged | {name: pair for name, pair in own.items() if pair[0].tag != f"{_TAG}merge"}

    def _merged(self, node: Node, key: Key, above: tuple[Node, ...]) -> dict[str, tuple[Node, Node]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, tuple[Node, Node]] = {}
        for source in reversed(sources):  # the first of several counts
            if not isinstance(source, MappingNode):
                reason = "expected a mapping or list of mappings for merging"
                raise ConstructorError(None, None, reason, source.start_mark)
            self._enter(source, above)
            merged |= self._pairs(source, key, (*above, source))
        return merged

    def _scalar(self, node: ScalarNode) -> Any:
        """The value of a scalar; `!!int x` and an integer of 5,000 digits are refused at their line."""
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
            message = "a value holds a character that no file can hold"
            raise HfcompressError(Problem(message, "leave it out", where=self._place(node)))

    def _place(self, node: Node) -> str:
        return _place(self.path, node.start_mark)


_KINDS = {"map": MappingNode, "seq": SequenceNode, **dict.fromkeys(("str", "int", "float", "bool", "null"), ScalarNode)}
_NAMES = {MappingNode: "mapping", SequenceNode: "sequence", ScalarNode: "scalar"}


def _require_kind(node: Node) -> None:
    """Refuses a tag that is none of plain values, or of another kind of node."""
    kind = _KINDS.get(str(node.tag).removeprefix(_TAG))
    if kind is None:
        reason = f"could not determine a constructor for the tag {str(node.tag)!r}"
        raise ConstructorError(None, None, reason, node.start_mark)
    if not isinstance(node, kind):
        reason = f"expected a {_NAMES[kind]} node, but found a {_NAMES[type(node)]}"
        raise ConstructorError(None, None, reason, node.start_mark)
