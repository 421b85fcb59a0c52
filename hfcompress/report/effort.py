"""What making a model took: hours, hardware, energy and CO2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfcompress.measure.energy import name_sources
from hfcompress.utils.wording import count, format_duration, join, significant

COVERED = 0.99
"""Energy of at least this share of the hours counts as the energy of all of them."""


def select_effort(content: Mapping[str, Any], stage: str) -> dict[str, Mapping[str, Any]]:
    """Selects the effort of the stages that made a model.

    Args:
        content: The report.
        stage: The name of the model's row; `source` for the result of `finetune`.

    Returns:
        Entries of the report's `made`, by stage; empty for a report of an earlier version.
    """
    made: Mapping[str, Mapping[str, Any]] = content.get("made", {})
    if stage not in made:
        return {name: effort for name, effort in made.items() if name.endswith("-finetune")}
    return {name: made[name] for name in list(made)[: list(made).index(stage) + 1]}


def sum_emissions(efforts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Sums the grams of CO2 of some stages; None unless the energy of all their hours was measured.

    Args:
        efforts: See `select_effort`.
    """
    hours = sum(effort["hours"] for effort in efforts.values())
    known = [effort for effort in efforts.values() if "co2_g" in effort]
    if not known or sum(effort["measured_hours"] for effort in known) < COVERED * hours:
        return None
    return float(sum(effort["co2_g"] for effort in known))


def describe_effort(content: Mapping[str, Any], stage: str | None = None) -> str:
    """Says in one to three sentences how long making a model took, on what hardware, and with how much energy.

    Args:
        content: The report.
        stage: The name of the model's row; by default the last one.

    Returns:
        The sentences; empty for a report of an earlier version, and for models that no run made.
    """
    efforts = select_effort(content, stage or content["rows"][-1]["stage"])
    if not efforts:
        return ""
    hours = sum(effort["hours"] for effort in efforts.values())
    hardware = list(dict.fromkeys(effort["hardware"] for effort in efforts.values() if "hardware" in effort))
    place = f" on {join(hardware)}" if hardware else ""
    each = ", ".join(f"{name} {_spell(effort['hours'])}" for name, effort in efforts.items())
    sentences = [f"Making it took {_spell(hours)}{place}" + (f" ({each})." if len(efforts) > 1 else ".")]
    if more := {name: effort["attempts"] for name, effort in efforts.items() if effort["attempts"] > 1}:
        told = join([f"{name} took {count(attempts, 'attempt')}" for name, attempts in more.items()])
        sentences.append(f"The run was interrupted, and {told}, all of which are counted.")
    return " ".join([*sentences, *_describe_energy(content, efforts, hours)])


def _describe_energy(content: Mapping[str, Any], efforts: Mapping[str, Mapping[str, Any]], hours: float) -> list[str]:
    known = [effort for effort in efforts.values() if "energy_wh" in effort]
    if not known:
        return []
    used, measured = (sum(effort[key] for effort in known) for key in ("energy_wh", "measured_hours"))
    when = "meanwhile" if measured >= COVERED * hours else f"in the {_spell(measured)} that were measured"
    source = name_sources(effort["source"] for effort in known)
    text = f"The machine used {format_watt_hours(used)} {when} (source: {source})"
    electricity = content.get("electricity")
    if electricity is None:
        return [f"{text}."]
    grams = sum(effort["co2_g"] for effort in known)
    return [
        f"{text}, which is {significant(grams)} g of CO2 at {electricity['co2_g_per_kwh']:g} g/kWh "
        f"({electricity['name']})."
    ]


def _spell(hours: float) -> str:
    return format_duration(3600 * hours)


def format_watt_hours(value: float) -> str:
    """Formats an energy: `12.3 Wh`, `4.56 kWh`."""
    return f"{value / 1000:.3g} kWh" if value >= 1000 else f"{value:.3g} Wh"
