"""The parts of report.html as plain values: headline, table, bars, maps and intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfcompress.report.conditions import describe_batch_sensitivity, find_metric, was_busy
from hfcompress.report.names import list_names
from hfcompress.report.plain_runtime import describe_plain_speedup
from hfcompress.report.tables import split_columns
from hfcompress.report.verdicts import describe_verdict
from hfcompress.utils.margin import parse_margin
from hfcompress.utils.wording import format_ratio, significant

_NUMBER = re.compile(r"([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(M?)")
_BADGES = {"shown": "loss within {}: shown", "not shown": "loss within {}: not shown", "worse": "loses more than {}"}


@dataclass(frozen=True)
class Cell:
    """A cell of a sortable table: its text, and the number that it is sorted by; None sorts by the text."""

    text: str
    value: float | None


@dataclass(frozen=True)
class SortableTable:
    """The table of all models; `constant` are the headings and cells of columns with one value for all models."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    constant: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tile:
    """A figure of the headline."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Bar:
    """A model's bar in a waterfall, in percent of the longest: what is left, and what was saved or added.

    Attributes:
        name: The model.
        left: The length that it has in common with the model before.
        saved: The length by which it is shorter.
        added: The length by which it is longer.
        value: Its figure.
        change: The factor against the model before.
    """

    name: str
    left: float
    saved: float
    added: float
    value: str
    change: str


@dataclass(frozen=True)
class Waterfall:
    """The bars of one figure."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Interval:
    """An interval around a change, in percent of the width of its track, on which 50 is no change."""

    low: float
    high: float
    middle: float
    margin: float | None


def make_headline(content: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the verdict on the last model: a badge, a sentence, and the figures that matter most."""
    rows, names = content["rows"], list_names(content)
    if len(rows) == 1:
        return {"name": names[0], "sentence": "Only the source was measured.", "tiles": []}
    found = rows[-1].get("against_source", {})
    if "verdict" in found:
        badge = {"kind": found["verdict"].replace(" ", "-"), "text": _BADGES[found["verdict"]].format(found["margin"])}
    else:
        badge = None
    sentence = describe_verdict(content, rows[-1]) if found else _describe_old(content)
    return {"name": names[-1], "badge": badge, "sentence": sentence, "tiles": list(_list_tiles(content))}


def _describe_old(content: Mapping[str, Any]) -> str:
    return "This report is of an earlier version, which did not compare the answers row by row: no verdict."


def _list_tiles(content: Mapping[str, Any]) -> Iterator[Tile]:
    (source, *_, row), metric = content["rows"], find_metric(content)
    base, value = source["quality"][metric], row["quality"][metric]
    share = f"{value / base:.1%} of the source's {base:.4f}; " if base else ""
    interval = "{:.3f} to {:.3f}".format(*row["quality_interval"])
    yield Tile(metric, f"{value:.4f}", f"{share}95% interval {interval}")
    before, after = (significant(each["disk_bytes"] / 1e6) for each in (source, row))
    yield Tile("size", _compare(row["compression"], "smaller", "larger"), f"{before} MB, now {after} MB")
    if was_busy(content):
        yield Tile("speed", "busy", "The machine was busy when it timed the models, so no speed-up is reported.")
        return
    for entry, old in zip(row["latency"], source["latency"], strict=True):
        if entry["speedup"]:
            ends = [format_ratio(end) for end in entry.get("speedup_interval") or ()]
            interval = f"95% interval {ends[0]} to {ends[1]}" if len(set(ends)) > 1 else ""
            times = f"{significant(old['p50_ms'])} ms, now {significant(entry['p50_ms'])} ms"
            note = "; ".join(filter(None, (times, interval, describe_plain_speedup(entry))))
            yield Tile(f"speed at batch {entry['batch_size']}", _compare(entry["speedup"], "faster", "slower"), note)


def _compare(factor: float, more: str, less: str) -> str:
    return f"{format_ratio(factor)}x {more}" if factor >= 1 else f"{format_ratio(1 / factor)}x {less}"


def make_table(content: Mapping[str, Any]) -> SortableTable:
    """Makes the table of all columns; columns with one value for all models are taken out, and listed beside it.

    That no speed-up is known of a busy machine is said elsewhere.
    """
    shown, constant = split_columns(content)
    source = content["rows"][0]
    return SortableTable(
        [column.name for column in shown],
        [
            [Cell(name, None), *(Cell(text, read_number(text)) for text in (c.format(row) for c in shown[1:]))]
            for name, row in zip(list_names(content), content["rows"], strict=True)
        ],
        [(column.name, column.format(source)) for column in constant if column.format(source) != "busy"],
    )


def read_number(text: str) -> float | None:
    """Reads the number that a cell begins with; `1.2M` is 1,200,000."""
    found = _NUMBER.match(text)
    return None if found is None else float(found[1].replace(",", "")) * (1e6 if found[2] else 1)


def make_waterfalls(content: Mapping[str, Any]) -> list[Waterfall]:
    """Makes the bars of size, and of the time at each batch size unless the machine was busy.

    Each stage of a run is held against the one before, each model of a comparison against the source.
    """
    rows = content["rows"]
    sizes = [row["disk_bytes"] / 1e6 for row in rows]
    found = [_make_waterfall(content, "size, MB", sizes, ("smaller", "larger"), "the same", 0.005)]
    for number, entry in enumerate([] if was_busy(content) else rows[0]["latency"]):
        times = [row["latency"][number]["p50_ms"] for row in rows]
        title = f"time of a batch of {entry['batch_size']}, ms (median)"
        found.append(_make_waterfall(content, title, times, ("faster", "slower"), "about the same", 0.05))
    return found


def is_run(content: Mapping[str, Any]) -> bool:
    """True if the models are the stages of one run; False if they were only compared."""
    return "key" in content


def _make_waterfall(
    content: Mapping[str, Any], title: str, values: Sequence[float], words: tuple[str, str], same: str, within: float
) -> Waterfall:
    """Makes the bars of a figure; `same` is what is said of a change that is smaller than the share `within`."""
    names, longest = list_names(content), max(values) or 1
    bars = []
    for n, (name, value) in enumerate(zip(names, values, strict=True)):
        before = values[0] if n < 2 or not is_run(content) else values[n - 1]
        factor = before / value if n and value else 1.0
        change = "" if n == 0 else same if abs(factor - 1) < within else _compare(factor, *words)
        left, saved, added = (
            round(100 * part / longest, 2)
            for part in (min(before, value), max(before - value, 0), max(value - before, 0))
        )
        bars.append(Bar(name, left, saved, added, significant(value), change))
    return Waterfall(title, bars)


def list_changes(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists how each model that was compared with the source differs: figures, interval, flips, classes, slices."""
    rows, metric = content["rows"], find_metric(content)
    names = list_names(content)
    compared = [n for n, row in enumerate(rows) if "change" in row.get("against_source", {})]
    every = [rows[n]["against_source"] for n in compared]
    margins = [_find_margin(found, rows[0]["quality"][metric]) for found in every]
    extent = _find_extent(every, [margin for margin in margins if margin is not None])
    return [
        {
            "name": names[n],
            "found": found,
            "badge": {"kind": found["verdict"].replace(" ", "-"), "text": found["verdict"]},
            "change": format_change(found),
            "interval": _place_interval(found, extent, margin),
            "slices": {name: _make_slices(parts) for name, parts in found.get("slices", {}).items() if len(parts) > 1},
            "batch": describe_batch_sensitivity(rows[n]),
            "last": n == len(rows) - 1,
        }
        for n, found, margin in zip(compared, every, margins, strict=True)
    ]


def format_change(found: Mapping[str, Any]) -> str:
    """Formats a change with its interval."""
    return f"{found['change']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _make_slices(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    extent = _find_extent([part["difference"] for part in parts], [])
    return [
        {**part, "change": format_change(part["difference"]),
         "interval": _place_interval(part["difference"], extent, None)}
        for part in parts
    ]  # fmt: skip


def _find_margin(found: Mapping[str, Any], source: float) -> float | None:
    """Finds the change that loses as much as the margin."""
    if "margin" not in found:
        return None
    return (1 if found.get("lower_is_better") else -1) * parse_margin(found["margin"]).of(source)


def _find_extent(found: Sequence[Mapping[str, Any]], more: Sequence[float]) -> float:
    ends = [abs(value) for each in found for value in (each["low"], each["high"])]
    return 1.08 * max([*ends, *map(abs, more)], default=0) or 1.0


def _place_interval(found: Mapping[str, Any], extent: float, margin: float | None) -> Interval:
    low, high, middle = (round(50 + 50 * found[key] / extent, 2) for key in ("low", "high", "change"))
    return Interval(low, high, middle, None if margin is None else round(50 + 50 * margin / extent, 2))


def make_kept_map(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Makes the map of what each layer keeps; a layer that was cut has no `cells`.

    Args:
        kept: `heads` and `ffn`, `[[kept, of], …]` of the layers that are left; `layers`, their numbers.
    """
    places = {number: place for place, number in enumerate(kept["layers"]["kept"])}
    return [
        {
            "layer": number,
            "cells": [
                {"text": f"{left:,} of {of:,}", "share": round(100 * left / of, 1) if of else 0}
                for left, of in (kept[block][places[number]] for block in ("heads", "ffn"))
            ]
            if number in places
            else [],
        }
        for number in range(1, kept["layers"]["of"] + 1)
    ]


def make_sensitivity_maps(sensitivity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Makes, for heads and for FFN neurons, the map of the metric when one layer alone loses a share of its units."""
    whole, blocks = sensitivity["whole"], {"heads": "attention heads", "ffn": "FFN neurons"}
    most = max((abs(whole - v) for b in blocks for values in sensitivity[b] for v in values), default=0) or 1
    return [
        {
            "title": title,
            "rows": [
                [{"text": f"{v:.4f}", "share": round(100 * abs(whole - v) / most, 1)} for v in values]
                for values in sensitivity[block]
            ],
        }
        for block, title in blocks.items()
    ]
