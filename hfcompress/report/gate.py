"""A gate for pipelines: does a model of a report keep within given limits?

A limit on quality passes if a larger loss is ruled out on the judged rows (one-sided, 5%), a limit on speed if the 95%
interval of the speed-up lies above it at every batch size and length that was timed, or at the one that is named. What
the rows or the rounds cannot show does not pass; `by_estimate` takes the measured figures themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.costs import BY_CODECARBON
from hfcompress.utils.errors import HfcompressError, did_you_mean
from hfcompress.utils.margin import Margin

Verdict = Literal["pass", "fail", "not shown"]
EXIT = 3
"""The exit code of a gate that is not passed."""


@dataclass(frozen=True)
class Limits:
    """The limits that a model must keep to; None for those that are not given.

    Attributes:
        max_drop: The largest loss of quality against the source.
        per_class: The largest loss of F1 of any class that has at least 30 items.
        min_speedup: How many times faster it must be, in each cell that was timed: at each batch size, and at each
            length of `measure.latency.lengths`.
        at: Judge the speed-up in this cell alone: `32` for batch size 32 with the judged rows as they are, `1x64` for
            batch size 1 with rows of 64 tokens.
        max_mb: The largest size of its weights, in MB (10^6 bytes).
        max_wh: The largest energy of 1,000 rows, in watt-hours.
        by_estimate: Judge by the measured figures, without regard to how sure they are.
    """

    max_drop: Margin | None = None
    per_class: Margin | None = None
    min_speedup: float | None = None
    max_mb: float | None = None
    max_wh: float | None = None
    by_estimate: bool = False
    at: str | None = None

    def __bool__(self) -> bool:
        return (self.max_drop, self.per_class, self.min_speedup, self.max_mb, self.max_wh) != (None,) * 5


@dataclass(frozen=True)
class Check:
    """One limit, and whether the model keeps to it.

    Attributes:
        limit: The name of the limit, as the command line spells it, and its value.
        verdict: `not shown` if the rows or the rounds cannot tell.
        sentence: The figures, for people.
        value: The measured figure.
        bound: The figure that was judged: the end of an interval, or the same as `value`.
    """

    limit: str
    verdict: Verdict
    sentence: str
    value: float | None
    bound: float | None


def check_limits(content: Mapping[str, Any], limits: Limits, model: str | None = None) -> list[Check]:
    """Judges a model of a report.

    Args:
        content: The report.
        limits: The limits.
        model: The name of its row; by default the last one.

    Raises:
        HfcompressError: if the report has no such model, or lacks the comparison that a limit is about.
    """
    row = _find_row(content, model)
    checks = []
    if limits.max_drop is not None:
        checks.append(_check_drop(content, row, limits.max_drop, limits.by_estimate))
    if limits.per_class is not None:
        checks.append(_check_classes(row, limits.per_class, limits.by_estimate))
    if limits.min_speedup is not None:
        checks.append(_check_speedup(content, row, limits))
    if limits.max_mb is not None:
        size = row["disk_bytes"] / 1e6
        sentence = f"{size:.1f} MB, at most {limits.max_mb:g} allowed"
        checks.append(Check(f"--max-mb {limits.max_mb:g}", _make_verdict(size <= limits.max_mb), sentence, size, size))
    if limits.max_wh is not None:
        checks.append(_check_energy(row, limits.max_wh))
    return checks


def as_json(content: Mapping[str, Any], checks: Sequence[Check], model: str | None = None) -> dict[str, Any]:
    """The verdict for programs: `passed`, and every check."""
    row = _find_row(content, model)
    return {
        "report": content["name"],
        "model": row["stage"],
        "passed": all(check.verdict == "pass" for check in checks),
        "checks": [vars(check) for check in checks],
    }


def _find_row(content: Mapping[str, Any], model: str | None) -> Mapping[str, Any]:
    rows = {row["stage"]: row for row in content["rows"][1:]}
    if not rows:
        raise HfcompressError("the report holds no model beside the source", "measure one with `hfcompress evaluate`")
    if model is not None and model not in rows:
        raise HfcompressError(f"the report has no model '{model}'", did_you_mean(model, rows))
    found: Mapping[str, Any] = rows[model] if model is not None else content["rows"][-1]
    return found


def _comparison(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row.get("against_source", {})
    if "not_compared" in found:
        raise HfcompressError(f"{row['stage']} was not compared with the source: {found['not_compared']}")
    if not found:
        raise HfcompressError(
            "the report is of an earlier version, which compared no answers", "the same `hfcompress run` measures again"
        )
    return found


def _check_drop(content: Mapping[str, Any], row: Mapping[str, Any], limit: Margin, by_estimate: bool) -> Check:
    found, kind = _comparison(row), "relative" if limit.relative else "absolute"
    name, metric, source = f"--max-drop {limit}", find_metric(content), content["rows"][0]
    before, after = (each["quality"][metric] for each in (source, row))
    bounds = found["drop_bounds"][kind]
    if bounds is None:
        return Check(name, "not shown", "the source scores 0, so no relative loss is defined", None, None)
    drop = (-1 if found["lower_is_better"] else 1) * (before - after) / (abs(before) if limit.relative else 1)
    least, largest = bounds
    told = f"{metric} {after:.4f} against {before:.4f}, a loss of {_loss(drop, limit)}"
    if by_estimate:
        return Check(name, _make_verdict(drop <= limit.value), told, drop, drop)
    told += f", with 95% confidence at most {_loss(largest, limit)}"
    if largest <= limit.value:
        return Check(name, "pass", told, drop, largest)
    if least > limit.value:
        return Check(name, "fail", told, drop, largest)
    return Check(name, "not shown", f"{told}: {found['units']:,} rows are too few to show less", drop, largest)


def _loss(value: float, limit: Margin) -> str:
    return f"{100 * value:.2f}%" if limit.relative else f"{value:.4f}"


def _check_classes(row: Mapping[str, Any], limit: Margin, by_estimate: bool) -> Check:
    """Judges the measured F1 of each class: intervals of many classes at once would show next to nothing.

    A loss beyond the limit never passes. It fails if the class is worse beyond noise, else it is not shown.
    """
    found, name = _comparison(row), f"--per-class {limit}"
    if "classes" not in found:
        raise HfcompressError("--per-class: the task has no classes", "leave the option out")
    losses = {
        each["name"]: -each["change"] / (each["source_f1"] if limit.relative else 1)
        for each in found["classes"]
        if not each["rare"] and each["source_f1"]
    }
    rare = sum(each["rare"] for each in found["classes"])
    left_out = f"; {rare} with fewer than 30 items are left out" if rare else ""
    if not losses:
        return Check(name, "not shown", f"no class has 30 items or more{left_out}", None, None)
    worst, noise = max(losses, key=losses.__getitem__), ""
    verdict: Verdict = "pass"
    if losses[worst] > limit.value:
        # reports of earlier versions do not tell noise apart
        shown = {each["name"] for each in found["classes"] if each.get("reading", "worse") == "worse"}
        beyond = [each for each in losses if losses[each] > limit.value and (by_estimate or each in shown)]
        worst = max(beyond or [worst], key=losses.__getitem__)
        verdict, noise = ("fail", "") if beyond else ("not shown", ", within noise")
    sentence = f"the largest loss of F1 is {_loss(losses[worst], limit)}, of class {worst}{noise}{left_out}"
    return Check(name, verdict, sentence, losses[worst], losses[worst])


def _check_speedup(content: Mapping[str, Any], row: Mapping[str, Any], limits: Limits) -> Check:
    """Judges the speed-up in each cell, or in the named one; that in which it is worst is told.

    All cells must show it, so none needs a correction for their number (an intersection-union test).
    """
    limit = limits.min_speedup or 0.0
    name = f"--min-speedup {limit:g}" + (f" --at {limits.at}" if limits.at else "")
    cells = _list_speedups(row, limits.at)
    if was_busy(content):
        return Check(name, "not shown", "the machine was busy, so no speed-up is known", None, None)
    unknown = next((cell for cell, entry in cells if entry["speedup"] is None), None)
    if unknown:
        return Check(name, "not shown", f"no speed-up is known at batch {unknown}: the devices differ", None, None)
    checks = [_check_cell(name, cell, entry, limits) for cell, entry in cells]
    worst = min(checks, key=lambda check: (_SEVERITY[check.verdict], check.bound))
    others = f"; the worst of {len(checks)} cells" if len(checks) > 1 else ""
    return replace(worst, sentence=worst.sentence + others)


_SEVERITY: Mapping[str, int] = {"fail": 0, "not shown": 1, "pass": 2}


def _check_cell(name: str, cell: str, entry: Mapping[str, Any], limits: Limits) -> Check:
    limit, speedup = limits.min_speedup or 0.0, entry["speedup"]
    low, high = entry.get("speedup_interval") or (speedup, speedup)
    told = f"{speedup:.2f}x at batch {cell}"
    if limits.by_estimate:
        return Check(name, _make_verdict(speedup >= limit), told, speedup, speedup)
    told += f", 95% interval {low:.2f}-{high:.2f}"
    verdict: Verdict = "pass" if low >= limit else "fail" if high < limit else "not shown"
    return Check(name, verdict, told, speedup, low)


def _check_energy(row: Mapping[str, Any], limit: float) -> Check:
    name, used = f"--max-wh {limit:g}", row.get("energy_wh_per_1k")
    if used is None:
        raise HfcompressError("--max-wh: energy was not measured", "set `measure: {energy: true}` and run again")
    energy = row.get("energy", {})
    if energy.get("busy"):
        return Check(name, "not shown", "the machine was busy when energy was measured", None, None)
    told = f"{used:.4g} Wh for 1,000 rows ({energy.get('source', BY_CODECARBON)}), at most {limit:g} allowed"
    return Check(name, _make_verdict(used <= limit), told, used, used)


def _list_speedups(row: Mapping[str, Any], at: str | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Lists the cells that were timed, `32` or `1x64`, with the times of each; with `at`, that cell alone."""
    cells = {str(entry["batch_size"]): entry for entry in row["latency"]}
    cells |= {f"{entry['batch_size']}x{entry['sequence_length']}": entry for entry in row.get("latency_grid") or ()}
    if at is None:
        return list(cells.items())
    if at not in cells:
        raise HfcompressError(
            f"--at {at}: that was not timed",
            f"one of {', '.join(cells)}; `measure.latency` names batch sizes and lengths",
        )
    return [(at, cells[at])]


def _make_verdict(value: bool) -> Verdict:
    return "pass" if value else "fail"
