"""Formats numbers and lists for sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence


def significant(value: float) -> str:
    """Formats a positive number with one decimal, or with three digits if it is small."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def format_ratio(value: float) -> str:
    """Formats a ratio with about three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def count(number: float, noun: str) -> str:
    """Formats a number and its noun, in the singular or the plural: `1 layer`, `2 layers`."""
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def join(parts: Sequence[str]) -> str:
    """Joins the parts of a list in a sentence: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def format_duration(seconds: float) -> str:
    """Formats a time as `12 s`, `5 min 12 s` or `3 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
