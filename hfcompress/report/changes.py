"""What compression changed in a model's answers, as the Markdown of the card: flips, classes, slices, confidence.

No text of a row is shown: a card is public, and the data need not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.report.card_table import render_table
from hfcompress.report.conditions import describe_batch_sensitivity
from hfcompress.report.verdicts import format_change
from hfcompress.utils.escape import Markdown, code, markdown

MOST = 8
"""Classes that are shown, those with the largest loss first."""
_CONFIDENCE = (("expected calibration error", "ece"), ("negative log-likelihood", "nll"), ("Brier's score", "brier"))


def describe_changes(content: Mapping[str, Any], row: Mapping[str, Any]) -> list[Markdown]:
    """Renders paragraphs and tables on what changed against the source; nothing for a report of an earlier version."""
    found = row.get("against_source", {})
    parts = [
        _describe_answers(found),
        Markdown(markdown(describe_batch_sensitivity(row))),
        *_render_classes(found.get("classes", ())),
        *(part for name, slices in found.get("slices", {}).items() for part in _render_slices(name, slices)),
        *_render_confidence(content["rows"][0].get("confidence"), row.get("confidence")),
    ]
    return [part for part in parts if part]


def _describe_answers(found: Mapping[str, Any]) -> Markdown:
    sentences = []
    if "broken" in found:
        sentences.append(f"{found['broken']} of {found['units']:,} became wrong, {found['repaired']} became right.")
    if "agreement" in found:
        sentences.append(f"{found['agreement']:.1%} of the answers are the same as the source's.")
    if "divergence" in found:
        sentences.append(f"The mean Kullback-Leibler divergence from the source is {found['divergence']:.2g} nats.")
    return Markdown(markdown(" ".join(sentences)))


def _render_classes(classes: Sequence[Mapping[str, Any]]) -> list[Markdown]:
    if not classes:
        return []
    worst = [each for each in classes if each["change"] < 0]
    if not worst:
        return [Markdown("No class has a lower F1 than before.")]
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
        for each in worst[:MOST]
    ]
    shown = f"{len(worst)} of {len(classes)} classes have a lower F1 than before"
    told = f"{shown}{f'; the {MOST} with the largest loss' if len(worst) > MOST else ''}:"
    return [Markdown(told), render_table(head, rows), *_explain_marks(worst)]


def _explain_marks(classes: Sequence[Mapping[str, Any]]) -> list[Markdown]:
    """Explains how classes are marked; reports of earlier versions do not tell noise apart."""
    sentences, test = [], "McNemar's exact test, Holm's correction over all classes"
    if any(each.get("reading") == "worse" for each in classes):
        sentences.append(f"Of a class marked *worse*, fewer items are found than by the source, beyond noise ({test}).")
    elif any("reading" in each for each in classes):
        sentences.append(f"In none of them is the number of items that are found lower beyond noise ({test}).")
    if any(each["rare"] for each in classes):
        sentences.append("A *rare* class has fewer than 30 items, so its change says little.")
    return [Markdown(" ".join(sentences))] if sentences else []


def _mark(each: Mapping[str, Any]) -> str:
    """Marks a class of which fewer items are found, beyond noise, and one that is rare."""
    marks = [mark for mark, holds in (("worse", each.get("reading") == "worse"), ("rare", each["rare"])) if holds]
    return f" ({', '.join(marks)})" if marks else ""


def _render_slices(name: str, parts: Sequence[Mapping[str, Any]]) -> list[Markdown]:
    """Renders the change for each value of a column, or for each length of the texts; `tokens` is the length."""
    if len(parts) < 2:
        return []
    head = (name, "rows", "source", "this model", "change (95%)")
    rows = [
        (
            part["name"],
            f"{part['difference']['units']:,}",
            f"{part['source']:.4f}",
            f"{part['result']:.4f}",
            format_change(part["difference"]),
        )
        for part in parts
    ]
    by = "the length of the text, in tokens" if name == "tokens" else code(name)
    return [Markdown(f"By {by}:"), render_table(head, rows)]


def _render_confidence(source: Mapping[str, Any] | None, result: Mapping[str, Any] | None) -> list[Markdown]:
    if source is None or result is None:
        return []
    rows = [(name, f"{source[key]:.3f}", f"{result[key]:.3f}") for name, key in _CONFIDENCE]
    told = "How far the probabilities can be trusted; less is better:"
    return [Markdown(told), render_table(("", "source", "this model"), rows)]
