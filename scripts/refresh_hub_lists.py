"""Refreshes the Hub's lists of licences, languages, tasks and libraries in hfcompress/utils/*.txt.

    python scripts/refresh_hub_lists.py               # from the Hub's documentation and its JavaScript client
    python scripts/refresh_hub_lists.py --from DIR    # from copies of these files in a directory, without a network

A list that shrinks to less than half is refused: its source then has another form.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfcompress.utils import card_metadata

DOCS = "https://raw.githubusercontent.com/huggingface/hub-docs/main/docs/hub"
CLIENT = "https://raw.githubusercontent.com/huggingface/huggingface.js/main/packages"


def read_licenses(text: str) -> set[str]:
    """Reads the ids from the second column of the table in the documentation."""
    return set(re.findall(r"^\|[^|\n]*\|\s*`([^`\s]+)`\s*\|", text, re.MULTILINE))


def read_languages(text: str) -> set[str]:
    """Reads the codes of the client's languages."""
    return set(re.findall(r'^\t\tcode: "([a-z]{2,3})"', text, re.MULTILINE))


def read_keys(text: str) -> set[str]:
    """Reads the keys of the first object whose name is exported in capitals and whose values are objects."""
    found = re.search(r"^export const [A-Z_]+_(?:DATA|UI_ELEMENTS) = \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    body = found[1] if found else ""
    return {a or b for a, b in re.findall(r'^\t(?:"([^"\n]+)"|([A-Za-z0-9_]+)): \{', body, re.MULTILINE)}


@dataclass(frozen=True)
class List:
    """One file.

    Attributes:
        name: The file in hfcompress/utils/.
        about: Its content, in a few words.
        urls: Its sources.
        read: Reads the words from the text of a source.
        keeps: True if words that the sources do not have stay.
    """

    name: str
    about: str
    urls: tuple[str, ...]
    read: Callable[[str], set[str]]
    keeps: bool = False


LISTS = (
    List("licenses.txt", "Licence ids of the Hub", (f"{DOCS}/repositories-licenses.md",), read_licenses),
    List(
        "languages.txt",
        "Language codes of the Hub (with ISO 639-2 and 639-5)",
        (f"{CLIENT}/languages/src/languages_iso_639_1.ts", f"{CLIENT}/languages/src/languages_iso_639_3.ts"),
        read_languages,
        keeps=True,
    ),
    List("pipelines.txt", "Pipeline tags of the Hub", (f"{CLIENT}/tasks/src/pipelines.ts",), read_keys),
    List("libraries.txt", "Library names of the Hub", (f"{CLIENT}/tasks/src/model-libraries.ts",), read_keys),
)


def fetch(url: str) -> str:
    """Fetches a source."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode("utf-8"))


def refresh(read: Callable[[str], str], folder: Path, date: str) -> list[str]:
    """Writes all lists, or none of them.

    Args:
        read: Returns the text of a source.
        folder: The directory of the lists.
        date: The day on which the sources were read.

    Returns:
        A sentence about each list.

    Raises:
        ValueError: if a source does not hold what it did before.
    """
    texts, told = {}, []
    for entry in LISTS:
        path = folder / entry.name
        before = card_metadata.read_words(path) if path.is_file() else frozenset[str]()
        found = set[str]().union(*(entry.read(read(url)) for url in entry.urls))
        if not found or 2 * len(found) < len(before):
            raise ValueError(f"{entry.name}: {len(found)} words found, {len(before)} before; did the source change?")
        words = sorted(found | before if entry.keeps else found)
        head = [f"# {entry.about} on {date}, by scripts/refresh_hub_lists.py from:"]
        head += [f"# {url}" for url in entry.urls]
        texts[path] = "\n".join([*head, *textwrap.wrap(" ".join(words), 118, break_on_hyphens=False)]) + "\n"
        new, gone = sorted(set(words) - before), sorted(before - set(words))
        told.append(f"{entry.name}: {len(words)} words; new: {' '.join(new) or '-'}; gone: {' '.join(gone) or '-'}")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return told


def main() -> None:
    """Refreshes the lists of this checkout."""
    parser = argparse.ArgumentParser(description="Refreshes the Hub's lists in hfcompress/utils/.")
    parser.add_argument("--from", dest="source", type=Path, help="a directory with copies of the sources")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="the day of the sources")
    options = parser.parse_args()
    folder = Path(card_metadata.__file__).parent

    def read_copy(url: str) -> str:
        return str((options.source / url.rpartition("/")[2]).read_text(encoding="utf-8"))

    try:
        told = refresh(read_copy if options.source else fetch, folder, options.date)
    except (OSError, ValueError) as error:
        sys.exit(f"nothing was written: {error}")
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
