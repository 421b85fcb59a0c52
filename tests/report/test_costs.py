"""What rows and models cost: money, CO2, hours."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace
from typing import Any

import pytest

from hfcompress.measure.energy import Energy
from hfcompress.measure.measure import Measure
from hfcompress.report import tables
from hfcompress.report.card_table import render_comparison
from hfcompress.report.conditions import describe_conditions
from hfcompress.report.costs import add_costs, list_row_costs
from hfcompress.report.effort import describe_effort, sum_emissions
from hfcompress.report.gate import Limits, check_limits
from hfcompress.report.side_by_side import join_reports
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.price import Price
from tests import factories

RAPL = {"hours": 0.5, "attempts": 1, "hardware": "A processor", "energy_wh": 40.0, "measured_hours": 0.5,
        "source": "RAPL"}  # fmt: skip


def _energy(wh: float, **changes: Any) -> dict[str, Any]:
    parts = {
        "processor": {"wh_per_1k": wh * 0.75, "source": "codecarbon's estimate from the processor's TDP"},
        "memory": {"wh_per_1k": wh * 0.25, "source": "codecarbon's estimate from its size"},
    }
    return {
        "energy_wh_per_1k": wh,
        "energy": {"wh_per_1k": wh, "source": parts["processor"]["source"], "parts": parts, "tdp_w": 65.0,
                   "seconds": 10.0, "rows": 5_000, "batch_size": 8, "busy": [], **changes},
    }  # fmt: skip


@pytest.fixture
def content() -> dict[str, Any]:
    rows = [
        factories.report_row("source", p50=10.0, **_energy(0.4)),
        factories.report_row("02-prune", "prune", p50=2.5, **_energy(0.1)),
    ]
    return {
        "name": "tiny",
        "task": {"metric": "accuracy", "split": "test", "max_length": 16},
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None},
        "machine": factories.QUIET,
        "rows": rows,
        "made": {"01-distill": {**RAPL}, "02-prune": {**RAPL, "hours": 0.1, "measured_hours": 0.1, "energy_wh": 10.0}},
    }


@pytest.fixture
def in_germany(monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.setattr("hfcompress.report.costs.find_country", lambda _: ("Germany", 400.0))
    return Measure(energy=Energy(country="DEU"), price=Price(0.36, "EUR"))


def test_a_price_becomes_the_cost_of_a_million_rows(content: dict[str, Any], in_germany: Measure) -> None:
    found = add_costs(content, in_germany)
    # 100 rows a second are 360,000 an hour.
    assert [entry["cost_per_million"] for entry in found["rows"][0]["latency"]] == [1.0, 1.0]
    assert [entry["cost_per_million"] for entry in found["rows"][1]["latency"]] == [0.25, 0.25]
    assert found["price"] == {"per_hour": 0.36, "currency": "EUR"}
    (row, *_) = csv.DictReader(io.StringIO(tables.render_csv(found)))
    assert float(row["batch_1_cost_per_million"]) == 1.0
    assert row["energy_source"] == "codecarbon's estimate from the processor's TDP"


def test_co2_is_told_only_in_a_country(content: dict[str, Any], in_germany: Measure) -> None:
    there = add_costs(content, in_germany)
    assert there["rows"][0]["energy"]["co2_g_per_1k"] == pytest.approx(0.16)
    assert there["rows"][0]["energy"]["country"] == "DEU"
    assert [effort["co2_g"] for effort in there["made"].values()] == [16.0, 4.0]
    nowhere = add_costs(there, Measure(energy=Energy()))
    assert nowhere == content
    for said in (tables.render_markdown(nowhere), describe_conditions(nowhere), describe_effort(nowhere)):
        assert "CO2" not in said


def test_the_line_below_the_table_names_the_sources(content: dict[str, Any], in_germany: Measure) -> None:
    found = add_costs(content, in_germany)
    headings = tables.list_headings(found)
    assert headings[-4:] == ["Wh / 1k", "g CO2 / 1k", "EUR / M, batch 1", "EUR / M, batch 8"]
    assert tables.format_cells(found)[1][-4:] == ["0.1", "0.04", "0.25", "0.25"]
    text = tables.render_markdown(found)
    for part in (
        "75% is the processor's (codecarbon's estimate from the processor's TDP, taken as 65 W) and 25% is",
        "400 g/kWh (Germany)",
        "at 0.36 EUR an hour",
    ):
        assert part in text.replace("\\", "")


def test_energy_and_cost_of_a_busy_machine_are_not_told(content: dict[str, Any], in_germany: Measure) -> None:
    content["machine"] = factories.BUSY
    for row, wh in zip(content["rows"], (0.4, 0.1), strict=True):
        row |= _energy(wh, busy=["other work took 50% of the processors' time"])
    found = add_costs(content, in_germany)
    assert [row[-4:] for row in tables.format_cells(found)] == [["busy"] * 4] * 2
    assert "busy when energy was measured (other work took 50%" in describe_conditions(found)
    assert list(list_row_costs(found, found["rows"][1])) == []


def test_the_card_names_the_source_in_its_table(content: dict[str, Any], in_germany: Measure) -> None:
    found = add_costs(content, in_germany)
    task: Any = SimpleNamespace(greater_is_better=True)
    table = render_comparison(task, found, found["rows"][1])
    for line in (
        "| energy for 1,000 rows (codecarbon's estimate from the processor's TDP) | 0.4 Wh | 0.1 Wh | 4.00x less |",
        "| CO2 for 1,000 rows (Germany) | 0.16 g | 0.04 g | 4.00x less |",
        "| cost of a million rows, batch 8 | 1 EUR | 0.25 EUR | 4.00x less |",
    ):
        assert line in table


def test_making_a_model_took_hours_and_energy(content: dict[str, Any], in_germany: Measure) -> None:
    found = add_costs(content, in_germany)
    assert describe_effort(found) == (
        "Making it took 36 min 0 s on A processor (01-distill 30 min 0 s, 02-prune 6 min 0 s). The machine used 50 Wh "
        "meanwhile (source: RAPL), which is 20.0 g of CO2 at 400 g/kWh (Germany)."
    )
    assert describe_effort(found, "01-distill").startswith("Making it took 30 min 0 s on A processor. ")
    assert describe_effort({**content, "made": {}}) == ""


def test_attempts_and_unmeasured_hours_are_told(content: dict[str, Any]) -> None:
    content["made"]["02-prune"] = {"hours": 1.0, "attempts": 3}
    said = describe_effort(content)
    assert "02-prune took 3 attempts, all of which are counted" in said
    assert "used 40 Wh in the 30 min 0 s that were measured" in said


def test_emissions_are_known_only_if_all_hours_were_measured(content: dict[str, Any], in_germany: Measure) -> None:
    made = add_costs(content, in_germany)["made"]
    assert sum_emissions(made) == 20.0
    assert sum_emissions({**made, "03-quantize": {"hours": 0.1, "attempts": 1}}) is None
    assert sum_emissions(content["made"]) is None


def test_reports_at_different_prices_share_no_cost(content: dict[str, Any], in_germany: Measure) -> None:
    content["rows"][0]["quality"] = {"accuracy": 0.9, "n": 48}
    here, dearer = add_costs(content, in_germany), add_costs(content, in_germany.model_copy(update={"price": Price(9)}))
    assert "EUR / M, batch 1" in tables.list_headings(join_reports({"a": here, "b": here}))
    joined = join_reports({"a": here, "b": dearer})
    assert "price" not in joined
    assert not any("cost_per_million" in entry for row in joined["rows"] for entry in row["latency"])
    assert "g CO2 / 1k" in tables.list_headings(joined)


@pytest.mark.parametrize(("limit", "busy", "verdict"), [(0.1, [], "pass"), (0.09, [], "fail"), (1, ["x"], "not shown")])
def test_a_gate_limits_the_energy(content: dict[str, Any], limit: float, busy: list[str], verdict: str) -> None:
    content["rows"][1]["energy"]["busy"] = busy
    (check,) = check_limits(content, Limits(max_wh=limit))
    assert check.verdict == verdict


def test_a_gate_needs_measured_energy(content: dict[str, Any]) -> None:
    content["rows"][1] = factories.report_row("02-prune", "prune")
    with pytest.raises(HfcompressError, match="energy was not measured"):
        check_limits(content, Limits(max_wh=1.0))
