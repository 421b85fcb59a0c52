"""Sentences on how each model compares with the source: the change, the verdict at the margin, and its power."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfcompress.report.conditions import find_metric
from hfcompress.report.seeds import describe_seeds

MOST_CLASSES = 5
"""Classes that a sentence names."""


def describe_verdicts(content: Mapping[str, Any]) -> list[str]:
    """Says of each model but the source how it compares; empty for a report of an earlier version."""
    rows = content["rows"]
    return [describe_verdict(content, row) for row in rows[1:] if "against_source" in row]


def describe_verdict(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Says how a model of the report compares with the source."""
    found = row["against_source"]
    if "not_compared" in found:
        return f"{row['stage']} is not compared with the source: {found['not_compared']}."
    metric = find_metric(content)
    before, after = content["rows"][0]["quality"][metric], row["quality"][metric]
    sentences = [
        f"{row['stage']}: {metric} {after:.4f} against {before:.4f}, a change of {format_change(found)}, "
        f"{found['reading']}.",
        describe_margin(found),
        *_describe_flips(found),
        *_describe_classes(found),
        *filter(None, [describe_seeds(row)]),
    ]
    return " ".join(sentences)


def describe_margin(found: Mapping[str, Any]) -> str:
    """Says whether a loss of more than the margin is ruled out; if not, how small a loss the rows can show.

    Args:
        found: The comparison of a model with the source.
    """
    margin = found["margin"]
    if found["verdict"] == "shown":
        return f"A loss of more than {margin} is ruled out (p {format_p(found['p_margin'])})."
    if found["verdict"] == "worse":
        return f"It loses more than {margin}."
    why = found.get("power") or found["why"]
    return f"A loss of more than {margin} is not ruled out: {why}."


def format_change(found: Mapping[str, Any]) -> str:
    """Formats a change with its 95% interval: `-0.0090 (-0.0237 to +0.0052)`."""
    return "{change:+.4f} ({low:+.4f} to {high:+.4f})".format(**found)


def _describe_flips(found: Mapping[str, Any]) -> list[str]:
    if "broken" not in found:
        return []
    return [f"{found['broken']} answers became wrong and {found['repaired']} right ({describe_mcnemar(found)})."]


def describe_mcnemar(found: Mapping[str, Any]) -> str:
    """Names the test of the flipped rows and its p-value, which is adjusted if several models were compared."""
    p_value = found.get("p_value_holm", found["p_value"])
    adjusted = ", Holm's correction" if "p_value_holm" in found else ""
    return f"McNemar's exact test, p {format_p(p_value)}{adjusted}"


def _describe_classes(found: Mapping[str, Any]) -> list[str]:
    """Names the classes that are worse beyond noise, those with the largest loss of F1 first."""
    worse = [each["name"] for each in found.get("classes", ()) if each.get("reading") == "worse"]
    if not worse:
        return []
    more = f" and {len(worse) - MOST_CLASSES} more" if len(worse) > MOST_CLASSES else ""
    of, are = ("Class", "is") if len(worse) == 1 else ("Classes", "are")
    return [f"{of} {', '.join(worse[:MOST_CLASSES])}{more} {are} worse beyond noise (Holm's correction over classes)."]


def format_p(value: float) -> str:
    """Formats a p-value after the letter p: `= 0.36`, `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
