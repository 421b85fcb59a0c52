"""How the labels of a data set and those of a head are matched: by name where both have names, else by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hfcompress.data.values import is_integer, show_value
from hfcompress.utils.errors import HfcompressError

LISTED = 20
"""Labels that a message lists."""
_UNKNOWN = -1
_DIGITS = 18
_LETTERS = 60
_PARTS = str.maketrans("_-", "  ")


def normalize_label(name: str) -> str:
    """A label without what spelling may change: case, surrounding space, and `_` or `-` for a space."""
    return " ".join(name.translate(_PARTS).split()).casefold()


def has_names(names: Iterable[str]) -> bool:
    """Whether labels, in the order of their ids, say more than their ids do (`0`, `LABEL_0`)."""
    return any(name not in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def names_by_id(labels: Mapping[str, int]) -> list[str]:
    """Label names in the order of their ids."""
    return sorted(map(str, labels), key={str(name): index for name, index in labels.items()}.__getitem__)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Labels in the order in which a new head numbers them: whole numbers by value, anything else by its letters."""
    found = set(labels)
    return sorted(found, key=int if all(map(_is_id, found)) else None)


def _is_id(text: str) -> bool:
    """Whether a text is a whole number, and no longer than an id can be."""
    return len(text) <= _DIGITS and is_integer(text)


def make_name_finder(labels: Mapping[str, int]) -> Callable[[str], int | None]:
    """Finds the id of a name: of the label spelled alike, else of the one label that differs only in its spelling."""
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
    """Whether each name is that of a label of its own, and no label is left over."""
    find = make_name_finder(labels)
    found = {find(name) for name in names}
    return None not in found and len(found) == len(names) == len(labels)


def make_label_finder(labels: Mapping[str, int] | None, names: Sequence[str] | None) -> Callable[[Any], int]:
    """How a label of the data becomes an id of the head; -1 for one that the head does not have.

    A text is a name of the head's, or a whole number, which is the head's id unless the head's names are numbers
    themselves. A number of a data set that names its classes stands for its name; it is an id where either side has
    no names.

    Args:
        labels: The head's label names and ids.
        names: What the data calls its ids, in their order; None where its labels are texts.
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
    """Whether a label reads as a number in any spelling: `3`, `003`, `1.0`."""
    try:
        float(name)
    except ValueError:
        return False
    return True


def _match_numbers(
    ids: Mapping[str, int], names: list[str], find: Callable[[str], int], head_has_names: bool
) -> dict[int, int]:
    """The head's id for each of the data's."""
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
    """The error for a label that the head does not have.

    Args:
        number: The row.
        value: Its label.
        column: Where it stands.
        labels: The head's label names and ids.
        names: What the data calls its ids.
    """
    ids = labels or {}
    known = isinstance(value, int) and names and 0 <= value < len(names)
    text = names[value] if known and names else value
    head = f"the model's {len(ids)} labels ({list_names(names_by_id(ids))})"
    message = f"row {number} has the label {show_value(text)} in column '{column}', outside {head}"
    alike = [name for name in ids if isinstance(text, str) and normalize_label(name) == normalize_label(text)]
    if len(alike) > 1:
        return HfcompressError(f"{message}: it is like {len(alike)} of them", "spell it as one of them")
    if not names or not has_names(names):
        return HfcompressError(message, "fix the row, or use a model whose head has that label")
    return HfcompressError(
        f"{message}; the data names its classes {list_names(names)}",
        "give each class the same name on both sides (their order does not matter): in the data, or in `id2label` and "
        "`label2id` of the model's config.json; or put a `finetune` stage first, which makes a new head",
    )


def require_same_labels(who: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Passes where a teacher and its student mean the same by each id, as far as names tell.

    Args:
        who: The teacher, for errors.
        theirs, ours: Its label names and ids, and the student's.

    Raises:
        HfcompressError: for a label with two ids, and for names of which one side lacks some.
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
    """What to mind about the labels of a head: those that no row of train has, and those that look alike.

    Args:
        found: The ids that train has.
        labels: The head's label names and ids.
    """
    names, said = names_by_id(labels), list[str]()
    absent = [name for name in names if labels[name] not in found]
    if absent:
        said.append(f"the head's label {list_names(absent)} occurs in no row of the train split, so no row teaches it")
    counted = Counter(map(normalize_label, names))
    alike = [name for name in names if normalize_label(name) and counted[normalize_label(name)] > 1]
    if alike:
        said.append(f"the labels {list_names(list(map(repr, alike)))} differ in spelling only, and are classes apart")
    return said


def list_names(names: Sequence[str]) -> str:
    """Label names for a message, the first of many, each cut where it is long."""
    short = [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…" for name in map(str, names[:LISTED])]
    return ", ".join(short) + (f", … ({len(names)} in all)" if len(names) > LISTED else "")
