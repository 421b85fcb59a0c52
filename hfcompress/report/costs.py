"""What the rows of a report cost: money at the price of an hour, and CO2 in the country of the electricity.

Both follow from measured figures and the recipe alone, so another price or country needs no new measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from hfcompress.measure.energy import find_country
from hfcompress.measure.measure import Measure
from hfcompress.utils.wording import join, significant

Format = Callable[[Mapping[str, Any]], str]
"""Formats a figure of a row as the cell of a table."""
BUSY = "busy"
"""The cell of a figure that other work of the machine falsified."""
COST = "cost"
"""The unit of a cost whose currency is not known."""
BY_CODECARBON = "codecarbon's estimate"
"""The source of the energy in reports of earlier versions."""


def add_costs(content: Mapping[str, Any], options: Measure) -> dict[str, Any]:
    """Adds cost and CO2 to a report, or removes those of an earlier price or country.

    Args:
        content: The report.
        options: The price and the country.

    Returns:
        The report with `price` and `electricity`; in each row `cost_per_million` (rows) of each batch size and
        `co2_g_per_1k` and `country` of its energy; and `co2_g` of each stage in `made`.
    """
    country = options.energy.country if options.energy else None
    electricity = None
    if country is not None:
        name, intensity = find_country(country)
        electricity = {"country": country, "name": name, "co2_g_per_kwh": intensity}
    price = None
    if options.price is not None:
        price = {"per_hour": options.price.amount, "currency": options.price.currency}
    return put_costs(content, price, electricity)


def put_costs(
    content: Mapping[str, Any], price: Mapping[str, Any] | None, electricity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Does what `add_costs` does, with the report's entries for price and electricity."""
    found = {key: value for key, value in content.items() if key not in ("price", "electricity")}
    found |= {key: value for key, value in (("price", price), ("electricity", electricity)) if value}
    found["rows"] = [_add_to_row(row, price, electricity) for row in content["rows"]]
    if "made" in content:
        made = {stage: {k: v for k, v in effort.items() if k != "co2_g"} for stage, effort in content["made"].items()}
        for effort in made.values():
            if electricity and "energy_wh" in effort:
                effort["co2_g"] = round(effort["energy_wh"] * electricity["co2_g_per_kwh"] / 1000, 4)
        found["made"] = made
    return found


def _add_to_row(
    row: Mapping[str, Any], price: Mapping[str, Any] | None, electricity: Mapping[str, Any] | None
) -> dict[str, Any]:
    latency = [{key: value for key, value in entry.items() if key != "cost_per_million"} for entry in row["latency"]]
    for entry in latency:
        if price:
            entry["cost_per_million"] = float(f"{price['per_hour'] / 3600 / entry['samples_per_s'] * 1e6:.6g}")
    found = {**row, "latency": latency}
    if "energy" in row:
        energy = {key: value for key, value in row["energy"].items() if key not in ("co2_g_per_1k", "country")}
        if electricity:
            energy["co2_g_per_1k"] = energy["wh_per_1k"] * electricity["co2_g_per_kwh"] / 1000
            energy["country"] = electricity["country"]
        found["energy"] = energy
    return found


def list_cost_columns(content: Mapping[str, Any], busy: bool) -> list[tuple[str, Format]]:
    """Lists the columns about energy, CO2 and money, as headings and functions that format the cells.

    Args:
        content: The report; a figure that it lacks gets no column.
        busy: True if the machine was busy when the models were timed; a cost then is `busy`. So is the energy of a
            model that was measured while the machine did other work.
    """
    rows, columns = content["rows"], list[tuple[str, Format]]()
    if any(row["energy_wh_per_1k"] is not None for row in rows):
        columns.append(("Wh / 1k", partial(_format_energy, "wh_per_1k")))
    if any("co2_g_per_1k" in row.get("energy", {}) for row in rows):
        columns.append(("g CO2 / 1k", partial(_format_energy, "co2_g_per_1k")))
    if "price" in content:
        sizes = [entry["batch_size"] for entry in rows[0]["latency"]]
        unit = content["price"]["currency"] or COST
        columns += [
            (f"{unit} / M, batch {size}", partial(_format_cost, number, busy)) for number, size in enumerate(sizes)
        ]
    return columns


def list_row_costs(
    content: Mapping[str, Any], row: Mapping[str, Any]
) -> Iterator[tuple[str, str, float | None, float | None]]:
    """Lists energy, CO2 and money of the source and of another model: a label, the unit, and both figures.

    A figure that the report lacks, or that other work of the machine falsified, is left out.

    Args:
        content: The report.
        row: The model's row.
    """
    pair = [content["rows"][0], row]
    energies = [each.get("energy") or {"wh_per_1k": each["energy_wh_per_1k"]} for each in pair]
    if not any(energy.get("busy") for energy in energies):
        before, after = (energy["wh_per_1k"] for energy in energies)
        yield f"energy for 1,000 rows ({energies[1].get('source', BY_CODECARBON)})", "Wh", before, after
        before, after = (energy.get("co2_g_per_1k") for energy in energies)
        yield f"CO2 for 1,000 rows ({content.get('electricity', {}).get('name')})", "g", before, after
    if "price" in content and not content.get("machine", {}).get("busy"):
        for ours, own in zip(*(each["latency"] for each in pair), strict=True):
            costs = [entry.get("cost_per_million") for entry in (ours, own)]
            yield f"cost of a million rows, batch {own['batch_size']}", content["price"]["currency"], *costs


def _format_energy(key: str, row: Mapping[str, Any]) -> str:
    energy = row.get("energy") or {"wh_per_1k": row["energy_wh_per_1k"]}  # a report of an earlier version
    if energy.get("busy"):
        return BUSY
    return "-" if energy.get(key) is None else f"{energy[key]:.4g}"


def _format_cost(number: int, busy: bool, row: Mapping[str, Any]) -> str:
    cost = row["latency"][number].get("cost_per_million")
    return BUSY if busy else "-" if cost is None else significant(cost)


def describe_costs(content: Mapping[str, Any]) -> list[str]:
    """Says what measured the energy, and what price the costs are at; empty if the report has neither."""
    sentences, known = [], [row["energy"] for row in content["rows"] if "energy" in row]
    if known:
        electricity = content.get("electricity")
        sentences.append(_describe_energy(content["rows"][0]["stage"], known[0]))
        if electricity:
            sentences.append(f"CO2 is counted at {electricity['co2_g_per_kwh']:g} g/kWh ({electricity['name']}).")
        if why := list(dict.fromkeys(reason for energy in known for reason in energy.get("busy", ()))):
            sentences.append(f"The machine was busy when energy was measured ({why[0]}), so it is not reported.")
    if "price" in content and not content.get("machine", {}).get("busy"):
        amount, currency = content["price"]["per_hour"], content["price"]["currency"]
        price = f"{amount:.2f}" if round(amount, 2) == amount else f"{amount:g}"
        sentences.append(f"The cost is that of a million rows at {f'{price} {currency}'.rstrip()} an hour.")
    return sentences


def _describe_energy(stage: str, energy: Mapping[str, Any]) -> str:
    """Says how the energy of a model was measured, and what measured each part of it."""
    whole, tdp = energy["wh_per_1k"] or 1.0, f", taken as {energy['tdp_w']:g} W" if "tdp_w" in energy else ""
    parts = [
        f"{part['wh_per_1k'] / whole:.0%} is the {name}'s ({part['source']}{tdp if name == 'processor' else ''})"
        for name, part in energy["parts"].items()
    ]
    return (
        f"Energy is that of the whole machine while a model answers batches of {energy['batch_size']} for "
        f"{energy['seconds']:.0f} seconds. Of the energy of {stage}, {join(parts)}."
    )
