"""Runs that differ only in the seed: mean and deviation of each model's figures, and a paired test over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.statistics.several import compare_seeds, summarize_seeds
from hfcompress.utils.files import read_json
from hfcompress.utils.hashing import hash_json

if TYPE_CHECKING:
    from rich.table import Table

    from hfcompress.recipe.schema import Recipe


@dataclass(frozen=True)
class SeedGroup:
    """The reports of runs that differ only in the seed.

    Attributes:
        reports: The report of each seed, in ascending order of seeds.
    """

    reports: Mapping[int, Mapping[str, Any]]

    @property
    def stages(self) -> list[str]:
        """The models that each of the runs has, the source first."""
        first, *others = [[row["stage"] for row in content["rows"]] for content in self.reports.values()]
        return [stage for stage in first if all(stage in other for other in others)]

    def find_rows(self, stage: str) -> list[Mapping[str, Any]]:
        """Finds the row of a model in each report."""
        return [row for content in self.reports.values() for row in content["rows"] if row["stage"] == stage]


def read_recipe(directory: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Reads the recipe that a report follows from; None if the directory is no run, or its run is not finished."""
    held = (read_json(directory / "recipe.lock.json") or {}).get("recipe")
    if not isinstance(held, dict) or content.get("recipe", hash_json(held)) != hash_json(held):
        return None
    return held


def group_by_seed(
    contents: Mapping[str, Mapping[str, Any]], recipes: Mapping[str, Mapping[str, Any] | None]
) -> list[SeedGroup]:
    """Groups runs that differ only in the seed; of runs with the same seed, the first counts.

    Args:
        contents: The reports, by the name of the run.
        recipes: Their recipes.

    Returns:
        The groups of two seeds or more.
    """
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, content in contents.items():
        if (recipe := recipes.get(name)) is not None:
            groups.setdefault(hash_json(_leave_out_seed(recipe)), {}).setdefault(recipe["seed"], content)
    return [SeedGroup(dict(sorted(group.items()))) for group in groups.values() if len(group) > 1]


def _leave_out_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides the figures of each seed."""
    kept = {key: value for key, value in recipe.items() if key not in ("name", "hub", "seed")}
    return {**kept, "measure": {key: value for key, value in recipe["measure"].items() if key != "seeds"}}


def add_seeds(content: Mapping[str, Any], recipe: Recipe, scores: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Adds `seeds` to the rows of a report, and removes those of an earlier recipe.

    Args:
        content: The report of the recipe's own seed.
        recipe: The recipe. A source that none of its stages trains is the same with each seed, and gets none.
        scores: By other seed, the score of each model.
    """
    rows = [{key: value for key, value in row.items() if key != "seeds"} for row in content["rows"]]
    if not scores:
        return {**content, "rows": rows}
    metric, lower = find_metric(content), not recipe.task.greater_is_better
    values = {
        row["stage"]: [row["quality"][metric], *(found[row["stage"]] for found in scores.values())] for row in rows
    }
    seeds, source = [recipe.seed, *scores], values[rows[0]["stage"]]
    described = {stage: describe_row(seeds, source, found, lower) for stage, found in values.items()}
    described[rows[0]["stage"]] = describe_row(seeds, source, None, lower)
    untrained = {rows[0]["stage"]} if all(stage.compresses for stage in recipe.stages) else set()
    return {
        **content,
        "rows": [row if row["stage"] in untrained else {**row, "seeds": described[row["stage"]]} for row in rows],
    }


def describe_row(
    seeds: Sequence[int], source: Sequence[float], result: Sequence[float] | None, lower_is_better: bool
) -> dict[str, Any]:
    """Describes a model's scores with several seeds: `seeds`, `values`, `mean`, `sd`, and `change` against the source.

    Args:
        seeds: The seeds.
        source: The source's score with each.
        result: The model's; None for the source itself.
        lower_is_better: True for an error.
    """
    found = {"seeds": list(seeds), **asdict(summarize_seeds(source if result is None else result))}
    return found if result is None else {**found, "change": asdict(compare_seeds(source, result, lower_is_better))}


def describe_seeds(row: Mapping[str, Any]) -> str:
    """Describes the `seeds` of a row in a sentence; empty if it has none."""
    found = row.get("seeds")
    if not found:
        return ""
    told = f"{len(found['seeds'])} seeds score {format_spread(found)} (mean ± standard deviation)"
    change = describe_seed_change(found)
    return f"{told}, a mean change of {change}." if change else f"{told}."


def describe_seed_change(found: Mapping[str, Any]) -> str:
    """Describes the `change` in the `seeds` of a row: mean, interval and reading; empty for the source."""
    change = found.get("change")
    if not change:
        return ""
    if change["low"] is None:
        return f"{change['mean']:+.4f}, the same with each seed"
    interval = format_seed_interval(change)
    return f"{change['mean']:+.4f} ({interval}), {change['reading']} (paired t-test over seeds)"


def format_spread(found: Mapping[str, Any], digits: int = 4, unit: str = "") -> str:
    """Formats mean and standard deviation: `0.9100 ± 0.0100`."""
    spread = "" if found["sd"] is None else f" ± {found['sd']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}{unit}"


def format_seed_interval(change: Mapping[str, Any]) -> str:
    """Formats the interval of a mean change; empty if each seed gives the same change."""
    return "" if change["low"] is None else f"{change['low']:+.4f} to {change['high']:+.4f}"


def render_group(group: SeedGroup) -> Table:
    """Renders the quality and the speed-ups of each model of a group as a table for the terminal."""
    from rich import box
    from rich.table import Table

    contents = list(group.reports.values())
    metric, busy = find_metric(contents[0]), any(map(was_busy, contents))
    seeds = ", ".join(map(str, group.reports))
    title = f"{len(contents)} seeds ({seeds}): mean ± standard deviation, change by a paired t-test over seeds"
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, collapse_padding=True, show_edge=False
    )
    sizes = [entry["batch_size"] for entry in contents[0]["rows"][0]["latency"]]
    table.add_column("model")
    for heading in (metric, "change (95%)", "", *(f"speed @{size}" for size in sizes)):
        table.add_column(heading, justify="right", no_wrap=True)
    source = _list_scores(group, group.stages[0], metric)
    for stage in group.stages:
        rows = group.find_rows(stage)
        lower = any(row.get("against_source", {}).get("lower_is_better", False) for row in rows)
        scores = None if stage == group.stages[0] else _list_scores(group, stage, metric)
        found = describe_row(list(group.reports), source, scores, lower)
        change = found.get("change")
        told = ["-", ""] if change is None else [f"{change['mean']:+.4f}", _mark(change)]
        if change and (interval := format_seed_interval(change)):
            told[0] += f" ({interval})"
        speeds = [_format_speeds([row["latency"][n]["speedup"] for row in rows], busy) for n in range(len(sizes))]
        fixed = scores is None and len(set(source)) == 1  # no stage trains the source
        table.add_row(stage, f"{source[0]:.4f}" if fixed else format_spread(found), *told, *speeds)
    return table


def _list_scores(group: SeedGroup, stage: str, metric: str) -> list[float]:
    return [row["quality"][metric] for row in group.find_rows(stage)]


def _mark(change: Mapping[str, Any]) -> str:
    return "noise" if change["reading"] == "within noise" else str(change["reading"])


def _format_speeds(speedups: Sequence[float | None], busy: bool) -> str:
    if busy:
        return "busy"
    known = [value for value in speedups if value is not None]
    return format_spread(asdict(summarize_seeds(known)), 2, "x") if len(known) == len(speedups) else "-"
