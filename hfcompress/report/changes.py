"""What compression changed in a model's answers, as the Markdown of the card: flips, classes, slices, confidence.

No text of a row is shown: a card is public, and the data need not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.utils.escape import Markdown, markdown

MOST = 8
"""Classes that are shown, those with the largest loss first."""


def describe_changes(content: Mapping[str, Any], row: Mapping[str, Any]) -> list[Markdown]:
    """Renders paragraphs and tables on what changed against the source; nothing for a report of an earlier version."""
    found = row.get("against_source", {})
    parts = [
        _describe_answers(found),
        _describe_confidence(content["rows"][0].get("confidence"), row.get("confidence")),
        _render_classes(found.get("classes", ())),
        *(_render_slices(name, parts) for name, parts in found.get("slices", {}).items()),
    ]
    return [part for part in parts if part]


def _describe_answers(found: Mapping[str, Any]) -> Markdown:
    sentences = []
    if "agreement" in found:
        sentences.append(f"{found['agreement']:.1%} of the answers are the same as the source's.")
    if "broken" in found:
        sentences.append(f"{found['broken']} of {found['units']:,} became wrong, {found['repaired']} became right.")
    if "divergence" in found:
        sentences.append(f"The mean Kullback-Leibler divergence from the source is {found['divergence']:.2g} nats.")
    return Markdown(markdown(" ".join(sentences)))


def _describe_confidence(source: Mapping[str, Any] | None, result: Mapping[str, Any] | None) -> Markdown:
    if source is None or result is None:
        return Markdown("")
    figures = [("expected calibration error", "ece"), ("negative log-likelihood", "nll"), ("Brier's score", "brier")]
    changes = ", ".join(f"{name} {source[key]:.3f} before, {result[key]:.3f} now" for name, key in figures)
    return Markdown(markdown(f"How far its probabilities can be trusted (less is better): {changes}."))


def _render_classes(classes: Sequence[Mapping[str, Any]]) -> Markdown:
    worst = [each for each in classes if each["change"] < 0][:MOST]
    if not worst:
        return Markdown("")
    head = ("class", "items", "F1, source", "F1, this model", "became wrong", "became right")
    rows = [
        (
            each["name"] + _mark(each),
            f"{each['items']:,}",
            f"{each['source_f1']:.3f}",
            f"{each['result_f1']:.3f}",
            str(each["broken"]),
            str(each["repaired"]),
        )
        for each in worst
    ]
    return _render_table(head, rows)


def _mark(each: Mapping[str, Any]) -> str:
    """Marks a class of which fewer items are found, beyond noise, and one that is rare."""
    marks = [mark for mark, holds in (("worse", each.get("reading") == "worse"), ("rare", each["rare"])) if holds]
    return f" ({', '.join(marks)})" if marks else ""


def _render_slices(name: str, parts: Sequence[Mapping[str, Any]]) -> Markdown:
    if len(parts) < 2:
        return Markdown("")
    head = (name, "rows", "source", "this model", "change (95%)")
    rows = [
        (
            part["name"],
            f"{part['difference']['units']:,}",
            f"{part['source']:.4f}",
            f"{part['result']:.4f}",
            "{change:+.4f} ({low:+.4f} to {high:+.4f})".format(**part["difference"]),
        )
        for part in parts
    ]
    return _render_table(head, rows)


def _render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    first, *others = ("| " + " | ".join(map(markdown, cells)) + " |" for cells in (head, *rows))
    return Markdown("\n".join([first, "|" + "---|" * len(head), *others]))
