"""Several runs in one table: `hfcompress report RUN RUN …`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.report.costs import put_costs
from hfcompress.report.sections import REPORTED
from hfcompress.utils.errors import HfcompressError

SAME = ("type", "dataset", "config", "text", "split", "max_length", "metric")
"""Keys of a report's task that must agree: other rows or another metric give figures that cannot be compared."""
OF_ONE_RUN = {"key", "recipe", "weights", "seconds", "made", *(cls.report_key for cls in REPORTED)}
"""What a report says of the stages of its run, and of nothing else."""
DERIVED = ("price", "electricity")
"""Keys of a report that costs and CO2 follow from."""


def join_reports(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the reports of several runs: the source of the first, then the last model of each.

    Args:
        contents: The reports, by the name of the run.

    Raises:
        HfcompressError: if the runs were judged on other rows, by another metric, or timed at other batch sizes.
    """
    (first, content), *others = contents.items()
    for name, other in others:
        if different := [key for key in SAME if content["task"].get(key) != other["task"].get(key)]:
            raise HfcompressError(
                f"{first} and {name} differ in {', '.join(f'task.{key}' for key in different)}",
                "only figures on the same rows, by the same metric, can stand side by side; `hfcompress evaluate` "
                "measures models anew",
            )
        if _batch_sizes(content) != _batch_sizes(other):
            raise HfcompressError(
                f"{first} was timed at batch sizes {_batch_sizes(content)}, {name} at {_batch_sizes(other)}",
                "`hfcompress evaluate` measures models anew",
            )
    rows = [{**each["rows"][-1], "stage": name} for name, each in contents.items()]
    busy = next((each["machine"] for each in contents.values() if each.get("machine", {}).get("busy")), None)
    machine = {"machine": busy} if busy is not None else {}
    # Costs at different prices, and CO2 of different countries, cannot stand in one column.
    differing = {key for key in DERIVED if any(each.get(key) != content.get(key) for each in contents.values())}
    shared = {key: value for key, value in content.items() if key not in OF_ONE_RUN | differing}
    joined = {**shared, "name": f"{len(contents)} runs", **machine, "rows": [content["rows"][0], *rows]}
    return put_costs(joined, shared.get("price"), shared.get("electricity"))


def _batch_sizes(content: Mapping[str, Any]) -> Sequence[int]:
    return [entry["batch_size"] for entry in content["rows"][0]["latency"]]
