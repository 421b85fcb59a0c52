"""Matches the labels of a data set with those of a task head: by name if both have names, else by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hfcompress.data.values import is_integer, show_value
from hfcompress.utils.errors import HfcompressError

LISTED = 20
"""The most labels that a message lists."""
_UNKNOWN = -1
_DIGITS = 18
_LETTERS = 60
_PARTS = str.maketrans("_-", "  ")


def normalize_label(name: str) -> str:
    """Removes from a label what may differ in spelling: case, surrounding space, and `_` or `-` for a space."""
    return " ".join(name.translate(_PARTS).split()).casefold()


def has_names(names: Iterable[str]) -> bool:
    """True if labels, in the order of their ids, are more than numbers (`0`, `LABEL_0`)."""
    return any(name not in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def names_by_id(labels: Mapping[str, int]) -> list[str]:
    """Returns the label names in the order of their ids."""
    return sorted(map(str, labels), key={str(name): index for name, index in labels.items()}.__getitem__)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Sorts labels as a new task head numbers them: whole numbers by value, all else by their letters."""
    found = set(labels)
    return sorted(found, key=int if all(map(_is_id, found)) else None)


def _is_id(text: str) -> bool:
    """True if a text is a whole number that is short enough for an id."""
    return len(text) <= _DIGITS and is_integer(text)


def make_name_finder(labels: Mapping[str, int]) -> Callable[[str], int | None]:
    """Returns a function that finds the id of a name: of the equal label, else of the only one spelled otherwise."""
    ids = {str(name): index for name, index in labels.items()}
    counted = Counter(map(normalize_label, ids))
    alike = {
        normalize_label(name): index
        for name, index in ids.items()
        if normalize_label(name) and counted[normalize_label(name)] == 1
    }

    def find(name: str) -> int | None:
        return ids.get(name, alike.get(normalize_label(name)))

    return find


def match_one_to_one(names: Sequence[str], labels: Mapping[str, int]) -> bool:
    """True if each name matches one label, and each label one name."""
    find = make_name_finder(labels)
    found = {find(name) for name in names}
    return None not in found and len(found) == len(names) == len(labels)


def make_label_finder(labels: Mapping[str, int] | None, names: Sequence[str] | None) -> Callable[[Any], int]:
    """Returns a function that turns a label of the data into an id of the task head; -1 for an unknown label.

    A text is a label name of the head, or a whole number: this is an id, unless the head's names are numbers too. A
    number in a data set that names its classes stands for the name; if either side has no names, it is an id.

    Args:
        labels: The head's label names and ids.
        names: The class names of the data, in the order of their ids; None if its labels are texts.
    """
    ids = {str(name): index for name, index in (labels or {}).items()}
    find_name = make_name_finder(ids)
    named = has_names(names_by_id(ids))
    numbers_are_ids = not (named and any(map(_is_numeric, ids)))

    def find_text(value: str) -> int:
        found = find_name(value)
        if found is None and numbers_are_ids and _is_id(value):
            found = int(value)
        return found if found is not None and 0 <= found < len(ids) else _UNKNOWN

    by_number = _match_numbers(ids, list(names or []), find_text, named)

    @lru_cache(maxsize=4096, typed=True)
    def find(value: Any) -> int:
        return by_number.get(value, _UNKNOWN) if isinstance(value, int) else find_text(str(value))

    return find


def _is_numeric(name: str) -> bool:
    """True if a label is a number in any spelling: `3`, `003`, `1.0`."""
    try:
        float(name)
    except ValueError:
        return False
    return True


def _match_numbers(
    ids: Mapping[str, int], names: list[str], find: Callable[[str], int], head_has_names: bool
) -> dict[int, int]:
    """Finds the head's id for each id of the data."""
    same = {number: number for number in range(len(ids))}
    if not names or (not has_names(names) and not (head_has_names and any(map(_is_numeric, ids)))):
        return same
    if not head_has_names and not set(names) <= set(ids):
        return same
    found = {number: find(name) for number, name in enumerate(names)}
    counted = Counter(found.values())
    return {number: index for number, index in found.items() if counted[index] == 1}


def unknown_label_error(
    number: int, value: Any, column: str, labels: Mapping[str, int] | None, names: Sequence[str] | None = None
) -> HfcompressError:
    """Makes the error for a label that the task head does not have.

    Args:
        number: The number of the row.
        value: Its label.
        column: The column with the label.
        labels: The head's label names and ids.
        names: The class names of the data, in the order of their ids.
    """
    ids = labels or {}
    known = isinstance(value, int) and names and 0 <= value < len(names)
    text = names[value] if known and names else value
    head = f"the model's {len(ids)} labels ({list_names(names_by_id(ids))})"
    message = f"row {number} has the label {show_value(text)} in column '{column}', outside {head}"
    alike = [name for name in ids if isinstance(text, str) and normalize_label(name) == normalize_label(text)]
    if len(alike) > 1:
        return HfcompressError(f"{message}: it matches {len(alike)} of them", "spell it exactly as one of them")
    if not names or not has_names(names):
        return HfcompressError(message, "fix the row, or use a model whose head has that label")
    return HfcompressError(
        f"{message}; the data names its classes {list_names(names)}",
        "give each class the same name in the data and in the model (the order does not matter): change `id2label` and "
        "`label2id` in the model's config.json, or the data. A `finetune` stage at the start makes a new task head",
    )


def require_same_labels(who: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Refuses a teacher whose label ids mean something else than the student's, as far as names show it.

    Args:
        who: The name of the teacher, for errors.
        theirs, ours: The label names and ids of the teacher and of the student.

    Raises:
        HfcompressError: if a label has two ids, or one side lacks a name of the other.
    """
    fix = "rename id2label and label2id in one of the two config.json, or fine-tune the teacher on this data"
    find = make_name_finder(theirs)
    found = {name: find(str(name)) for name in ours}
    for name, index in ours.items():
        if found[name] not in (None, index):
            raise HfcompressError(f"{who} gives '{name}' the id {found[name]}, the student {index}", fix)
    lists = names_by_id(theirs), names_by_id(ours)
    if all(map(has_names, lists)) and None in found.values():
        message = f"{who} has the labels {list_names(lists[0])}, the student {list_names(lists[1])}"
        raise HfcompressError(message, fix)


def find_label_warnings(found: set[int], labels: Mapping[str, int]) -> list[str]:
    """Returns warnings about labels that no row of train has, and about labels that look alike.

    Args:
        found: The ids that occur in train.
        labels: The head's label names and ids.
    """
    names, warnings = names_by_id(labels), list[str]()
    absent = [name for name in names if labels[name] not in found]
    if absent:
        warnings.append(
            f"the head's label {list_names(absent)} occurs in no row of the train split, so the model cannot learn it"
        )
    counted = Counter(map(normalize_label, names))
    alike = [name for name in names if normalize_label(name) and counted[normalize_label(name)] > 1]
    if alike:
        warnings.append(
            f"the labels {list_names(list(map(repr, alike)))} differ only in spelling, but are separate classes"
        )
    return warnings


def list_names(names: Sequence[str]) -> str:
    """Lists the first label names for a message, long ones cut."""
    short = [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…" for name in map(str, names[:LISTED])]
    return ", ".join(short) + (f", … ({len(names)} in all)" if len(names) > LISTED else "")
