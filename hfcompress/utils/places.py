r"""Places on a machine (`/home/ada/model`, `~/model`, `C:\model`), left out of what is published: the name stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import ScalarEvent

_START = r"(?:file:/+|~[\w.-]*[/\\]|[A-Za-z]:[\\/]|\\\\(?=\w)|/)"
_PLACE = re.compile(_START + r"(?=[^\s/\\])")
_NOT_INSIDE = r"(?<![\w.~/\\:@<-])"
_IN_TEXT = re.compile(_NOT_INSIDE + _START + r"""(?=[\w.])[^\s'"`,;\]})>|]+""")
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*")
_SETTING = re.compile(r"(path|file|dir|folder|directory|name)$", re.IGNORECASE)
MAX_SETTINGS = 1_000_000
"""Bytes up to which a JSON file holds settings; vocabularies are larger, and their entries are no places."""


def local_path(spec: str) -> Path:
    """A place that a user wrote, `~` and all, as a path; one in the home of nobody stays as it is written."""
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        return Path(spec)


def is_directory(spec: str) -> bool:
    """Whether a directory lies there; of a name that no file system can hold: no."""
    try:
        return local_path(spec).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file lies there; of a name that no file system can hold: no."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_place(text: str) -> bool:
    """Whether a text is the place of a file on some machine, from a root or a home."""
    return "\n" not in text and _PLACE.match(text) is not None


def name_of(place: str) -> str:
    """The last part of a place."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    return parts[-1] if parts else ""


def without_places(text: str) -> str:
    """A YAML text in which each place is its name alone, in values and in comments; everything else stays."""
    places = _values(text)
    for start, end, value in reversed(places):
        name = name_of(value)
        text = text[:start] + (name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)) + text[end:]
    # Comments repeat what is commented out, places with spaces among it.
    if known := sorted({value for _, _, value in places}, key=len, reverse=True):
        text = re.sub(_NOT_INSIDE + f"({'|'.join(map(re.escape, known))})", lambda found: name_of(found[0]), text)
    return _IN_TEXT.sub(lambda found: name_of(found[0]), text)


def _values(text: str) -> list[tuple[int, int, str]]:
    """Start, end and value of each scalar that is a place, in the order of the text; none where it is no YAML."""
    found = []
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, ScalarEvent) and is_place(event.value) and event.style not in ("|", ">"):
                start, end = event.start_mark.index, event.end_mark.index
                properties = re.match(r"(?:[&!]\S*\s+)*", text[start:end])[0]  # type: ignore[index]
                found.append((start + len(properties), end, event.value))
    except YAMLError:
        return []
    return found


def forget_places(folder: Path) -> None:
    """Makes each setting of a model directory that names a place (`_name_or_path`, …) name its last part alone."""
    for path in folder.rglob("*.json"):
        if path.stat().st_size > MAX_SETTINGS:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        changed = _forgotten(content)
        if changed != content:
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forgotten(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _forgotten(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_forgotten(entry, key) for entry in value]
    if isinstance(value, str) and _SETTING.search(key) and is_place(value):
        return name_of(value)
    return value
