"""Checks the metadata of recipes and finished model cards by the Hub's rules."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from hfcompress.utils.errors import did_you_mean

_PART = r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_MAX_ID = 96
"""Largest number of characters of an owner, and of a name, on the Hub."""


@cache
def licenses() -> frozenset[str]:
    """Reads the licence ids that the Hub accepts."""
    return _read_list("licenses.txt")


@cache
def languages() -> frozenset[str]:
    """Reads the codes of ISO 639-1, 639-2, 639-3 and 639-5, and the Hub's own `multilingual` and `code`."""
    return _read_list("languages.txt")


@cache
def pipelines() -> frozenset[str]:
    """The pipeline tags of the Hub."""
    return _read_list("pipelines.txt")


@cache
def libraries() -> frozenset[str]:
    """The library names of the Hub."""
    return _read_list("libraries.txt")


def _read_list(name: str) -> frozenset[str]:
    return read_words(Path(__file__).with_name(name))


def read_words(path: Path) -> frozenset[str]:
    """Reads the words of a list; lines that begin with `#` say where it comes from."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def require_pipeline(tag: str) -> str:
    """Requires a pipeline tag of the Hub.

    Raises:
        ValueError: if the Hub does not know it.
    """
    if tag not in pipelines():
        raise ValueError(f"'{tag}' is no pipeline tag of the Hub; {did_you_mean(tag, pipelines())}")
    return tag


def require_library(name: str) -> str:
    """Requires a library name of the Hub.

    Raises:
        ValueError: if the Hub does not know it.
    """
    if name not in libraries():
        raise ValueError(f"'{name}' is no library of the Hub; a file format such as onnx is a tag")
    return name


EMISSIONS = ("emissions", "source", "training_type", "geographical_location", "hardware_used")
"""The keys of `co2_eq_emissions`: the first a number of grams, the others texts."""


def require_emissions(found: Any) -> Any:
    """Requires `co2_eq_emissions` as the Hub reads it: grams of CO2, or a mapping with them and texts.

    Raises:
        ValueError: for another key, grams that are no finite number of at least 0, and an empty text.
    """
    entries = found if isinstance(found, dict) else {"emissions": found}
    if unknown := [key for key in entries if key not in EMISSIONS]:
        raise ValueError(f"it has no key '{unknown[0]}'; it has {', '.join(EMISSIONS)}")
    grams = entries.get("emissions")
    if isinstance(grams, bool) or not isinstance(grams, int | float) or not math.isfinite(grams) or grams < 0:
        raise ValueError(f"emissions are grams of CO2, 0 or more, not {grams!r}")
    for key, text in entries.items():
        if key != "emissions" and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"{key} is a text, not {text!r}")
    return found


def require_license(license_id: str) -> str:
    """Requires a licence id that the Hub knows.

    Raises:
        ValueError: if the Hub does not know it.
    """
    if license_id not in licenses():
        hint = did_you_mean(license_id.lower(), licenses())
        hint = hint if hint.startswith("did you mean") else "write `other` for a licence that is not on the Hub's list"
        raise ValueError(f"'{license_id}' is no licence id of the Hub; {hint}")
    return license_id


def require_language(code: object) -> str:
    """Requires a language code that the Hub accepts.

    Raises:
        ValueError: if the Hub does not accept it.
    """
    if code is False:
        raise ValueError('YAML reads an unquoted no as false; quote it: "no" is Norwegian')
    if not isinstance(code, str) or code not in languages():
        word = re.split(r"[-_]", str(code).lower())[0]
        hint = f"did you mean '{word}'?" if word in languages() else "write one such as en, or multilingual, or code"
        raise ValueError(f"{str(code)!r} is no language code (ISO 639, in small letters) that the Hub takes; {hint}")
    return code


def require_hub_id(name: str, owner: bool = False) -> str:
    """Requires the id of a repository on the Hub.

    Args:
        name: `user/name`, or `name` alone for a few old repositories.
        owner: True to require the owner.

    Raises:
        ValueError: for a name that no repository can have.
    """
    parts = name.split("/")
    if name.startswith(("./", "../", "/", "~")) or "\\" in name:
        raise ValueError(f"'{name}' is a place on this machine, not an id on the Hub such as user/name")
    if len(parts) > 2 or name.endswith(".git") or not all(re.fullmatch(_PART, part) for part in parts):
        rules = (
            f"one / at most, parts of up to {_MAX_ID} letters, digits, - _ and ., with neither -- nor .., not at an end"
        )
        raise ValueError(f"'{name}' is no repository name such as user/name: {rules}")
    if owner and len(parts) == 1:
        raise ValueError(f"'{name}' does not say whose repository it is; write user/{name}")
    return name
