"""Reads the licence of a model from the metadata of its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.data.source import BUILTIN, fetch_file
from hfcompress.utils.card_metadata import require_license
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import one_line
from hfcompress.utils.places import is_directory, local_path

HUB = "https://huggingface.co"
MAX_CARD_BYTES = 2_000_000
MAX_NAME = 96
MAX_LINK = 500


@dataclass(frozen=True)
class License:
    """A licence, by the Hub's keys.

    Attributes:
        license: An id of the Hub's list.
        license_name: The name of a licence that is not on the list.
        license_link: The address of that licence.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None


class UnknownLicenseError(Exception):
    """A model does not tell its licence; the message says why."""


def read_license(spec: str, commit: str | None = None) -> License:
    """Reads the licence of a model.

    Args:
        spec: A directory, a Hub id (`id@revision` picks a revision), or `builtin:quickstart`.
        commit: The commit of the Hub repository that is used, if it is known.

    Raises:
        UnknownLicenseError: if there is no card, or it names no licence of the Hub's list.
    """
    if spec == BUILTIN:
        return License("apache-2.0")  # it is part of this package
    metadata = _read_metadata(_find_card(spec, commit))
    found = metadata.get("license")
    if found is None or found == "unknown":
        raise UnknownLicenseError("its card names no licence")
    if not isinstance(found, str):
        raise UnknownLicenseError("its card does not name exactly one licence")
    try:
        require_license(found)
    except ValueError:
        raise UnknownLicenseError(f"its card names '{one_line(found)[:MAX_NAME]}', no licence id of the Hub") from None
    if found != "other":
        return License(found)
    name = _as_text(metadata.get("license_name"), MAX_NAME)
    return License(found, name, _as_address(metadata.get("license_link"), spec, commit))


def _find_card(spec: str, commit: str | None) -> Path:
    if is_directory(spec):
        path = local_path(spec) / "README.md"
    else:
        try:
            path = fetch_file(spec, "README.md", commit)
        except HfcompressError as error:
            raise UnknownLicenseError(f"its card cannot be read ({error.problems[0].message})") from None
    if not path.is_file():
        raise UnknownLicenseError("it has no card (README.md)")
    return path


def _read_metadata(card: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import metadata_load

    try:
        if card.stat().st_size > MAX_CARD_BYTES:
            raise ValueError("too large")
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        raise UnknownLicenseError("the metadata of its card cannot be read") from None


def _as_text(value: object, longest: int) -> str | None:
    return one_line(value) if isinstance(value, str) and 0 < len(value) <= longest else None


def _as_address(link: object, spec: str, commit: str | None) -> str | None:
    """Makes the link of a card one that also holds in another repository; None if there is no such link."""
    text = _as_text(link, MAX_LINK)
    if text is None or text.startswith("https://"):
        return text
    if ":" in text or text.startswith(("/", ".")) or is_directory(spec):
        return None
    repo, _, revision = spec.partition("@")
    return f"{HUB}/{repo}/blob/{commit or revision or 'main'}/{text}"
