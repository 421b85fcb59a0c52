r"""Shortens paths on a machine (`/home/ada/model`, `~/model`, `C:\model`) to their last part before publishing."""

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
"""Largest size, in bytes, of a JSON file of settings; vocabularies are larger, and contain no paths."""


def local_path(spec: str) -> Path:
    """Makes a path of what a user wrote, and expands `~`; a `~name` without a home directory stays as it is."""
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        return Path(spec)


def is_directory(spec: str) -> bool:
    """True if it is a directory; False also for a name that no file system can have."""
    try:
        return local_path(spec).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """True if it is a file; False also for a name that no file system can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_place(text: str) -> bool:
    """True if a text is an absolute path, or a path from a home directory, on any system."""
    return "\n" not in text and _PLACE.match(text) is not None


def last_part(place: str) -> str:
    """Returns the last part of a path."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    return parts[-1] if parts else ""


def shorten_places(text: str) -> str:
    """Shortens each path in a YAML text to its last part, in values and in comments; the rest stays as it is."""
    places = _values(text)
    for start, end, value in reversed(places):
        name = last_part(value)
        text = text[:start] + (name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)) + text[end:]
    # Comments repeat values, and so also paths with spaces.
    if known := sorted({value for _, _, value in places}, key=len, reverse=True):
        text = re.sub(_NOT_INSIDE + f"({'|'.join(map(re.escape, known))})", lambda found: last_part(found[0]), text)
    return _IN_TEXT.sub(lambda found: last_part(found[0]), text)


def _values(text: str) -> list[tuple[int, int, str]]:
    """Finds start, end and value of each scalar that is a path, in the order of the text; none if it is not YAML."""
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


def shorten_settings(folder: Path) -> None:
    """Shortens each path in the settings of a model directory (`_name_or_path`, …) to its last part."""
    for path in folder.rglob("*.json"):
        if path.stat().st_size > MAX_SETTINGS:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        changed = _shorten(content)
        if changed != content:
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shorten(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _shorten(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_shorten(entry, key) for entry in value]
    if isinstance(value, str) and _SETTING.search(key) and is_place(value):
        return last_part(value)
    return value
