"""Measures energy with codecarbon, and says what measured it: a meter of the processor or GPU, or an estimate."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from hfcompress.measure.machine import read_counters, state
from hfcompress.utils.errors import HfcompressError, Key, Problem
from hfcompress.utils.strict_model import StrictModel
from hfcompress.utils.wording import join

if TYPE_CHECKING:
    from hfcompress.measure.process import ModelProcess

SECONDS = 10.0
"""Seconds that each model answers while its energy is measured."""
PARTS = {"processor": "cpu_energy", "memory": "ram_energy", "gpu": "gpu_energy"}
"""The parts of a machine, and codecarbon's name for the energy of each, in kWh."""
METERS = {"intel_rapl": "RAPL", "windows_emi": "the Windows Energy Meter", "intel_power_gadget": "Intel Power Gadget"}
"""What measures a processor, by codecarbon's name of the mode; its other modes are estimates."""
BY_SIZE, BY_TDP = "codecarbon's estimate from its size", "codecarbon's estimate from the processor's TDP"


class Energy(StrictModel):
    """Options of measuring energy."""

    country: Annotated[str, Field(min_length=2, max_length=60)] | None = None
    """The country whose electricity this machine uses, by its code of three letters (ISO 3166), such as `DEU`; the
    report then also has grams of CO2, at codecarbon's figure for this country."""


def _read_energy(value: Any) -> Any:
    """Reads `true` as the default options, and `false` as None.

    Raises:
        ValueError: for a country without its key.
    """
    if isinstance(value, str):
        raise ValueError(f"energy is true, false or options, not {value!r}; write true, or country: DEU below it")
    return (Energy() if value else None) if isinstance(value, bool) else value


def _spell_energy(value: Energy | None) -> Any:
    """Spells the options as a recipe does: without a country as `true` or `false`."""
    return value is not None if value is None or value == Energy() else value.model_dump()


AnyEnergy = Annotated[
    Energy | None,
    BeforeValidator(_read_energy, json_schema_input_type=bool | Energy | None),
    PlainSerializer(_spell_energy),
]
"""A field of options that takes `true`, `false`, or options."""


@dataclass(frozen=True)
class Consumption:
    """The energy that this machine took.

    Attributes:
        watt_hours: By part: `processor`, `memory` and `gpu`; a part that was not counted is missing.
        sources: What measured each of these parts.
        tdp_w: The processor's thermal design power, in watts, if the processor's energy is an estimate; codecarbon
            guesses it for a processor that it does not know.
    """

    watt_hours: Mapping[str, float]
    sources: Mapping[str, str]
    tdp_w: float | None = None

    @property
    def total(self) -> float:
        """The watt-hours of all parts."""
        return sum(self.watt_hours.values())

    @property
    def source(self) -> str:
        """What measured the GPU and the processor; the memory is nearly always an estimate."""
        return name_sources(self.sources[part] for part in ("gpu", "processor") if part in self.sources)


def name_sources(sources: Iterable[str]) -> str:
    """Names each source once: `NVML and RAPL`."""
    return join(list(dict.fromkeys(sources)))


class Meter:
    """Measures the energy of the whole machine, from `start` on, with codecarbon.

    Args:
        gpu: Count the GPUs. The energy of an idle GPU would hide that of a model that runs on the processor.
    """

    def __init__(self, gpu: bool) -> None:
        import codecarbon

        # Its messages are about set-up; what they say of the source, the report says.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._last = _Last()
        self._parts = [part for part in PARTS if gpu or part != "gpu"]
        self._tracker = codecarbon.OfflineEmissionsTracker(
            measure_power_secs=1,
            save_to_file=False,
            save_to_api=False,
            log_level="error",
            allow_multiple_runs=True,
            output_handlers=[self._last],
            api_call_interval=-1,
        )

    def start(self) -> None:
        """Starts the measurement, once codecarbon has found out how to measure."""
        self._tracker.start()

    def read(self) -> Consumption | None:
        """Returns the energy since the start; None if codecarbon failed, which it says in a message of its own."""
        self._tracker.flush()
        return self._summarize()

    def stop(self) -> Consumption | None:
        """Ends the measurement, and returns the energy since the start; None if codecarbon failed."""
        self._tracker.stop()
        return self._summarize()

    def _summarize(self) -> Consumption | None:
        if self._last.total is None:
            return None
        # codecarbon tells the method of each part to its log alone.
        hardware = getattr(self._tracker, "_hardware", ())
        sources = dict(map(_name_source, hardware))
        found = {part: float(getattr(self._last.total, PARTS[part])) * 1000 for part in self._parts if part in sources}
        tdp_w = next((float(h._tdp) for h in hardware if _name_source(h)[1] == BY_TDP), None)
        return Consumption(found, {part: sources[part] for part in found}, tdp_w)


class _Last:
    """An output of codecarbon that keeps the last totals."""

    total: Any = None

    def out(self, total: Any, _delta: Any) -> None:
        self.total = total

    def live_out(self, total: Any, _delta: Any) -> None:
        self.total = total

    def task_out(self, *_: Any) -> None:
        """Does nothing: no tasks are used."""

    def exit(self) -> None:
        """Does nothing: nothing is open."""


def _name_source(hardware: Any) -> tuple[str, str]:
    """Names the part of the machine that an object of codecarbon stands for, and what measures it."""
    kind, part = type(hardware).__name__, str(getattr(hardware, "chip_part", "CPU"))
    if kind == "RAM":
        return "memory", BY_SIZE
    if kind == "GPU":
        names = {type(device).__name__ for device in hardware.devices.devices}
        return "gpu", "AMD SMI" if any("AMD" in name for name in names) else "NVML"
    if kind != "CPU":
        source = "powermetrics" if kind == "AppleSiliconChip" else "the board's own meter"
        return {"CPU": "processor", "RAM": "memory", "GPU": "gpu"}[part], source
    mode = str(getattr(hardware, "_mode", ""))
    return "processor", METERS.get(mode, BY_TDP)


def measure_energy(process: ModelProcess, seconds: float = SECONDS) -> dict[str, Any]:
    """Measures the energy of this machine while a model answers its prepared batches.

    Args:
        process: The model.
        seconds: Seconds that it answers.

    Returns:
        `wh_per_1k`, watt-hours for 1,000 rows; `source`, what measured them; `parts`, the same for each part of the
        machine; `tdp_w`, the TDP of an estimate; `seconds`, `rows` and `batch_size` of the measurement; `busy`, the
        signs of other work on the machine.

    Raises:
        HfcompressError: if codecarbon gives no figure.
    """
    meter, before = Meter(process.device != "cpu"), read_counters([process.pid])
    meter.start()
    rows, took = process.run_for(seconds)
    used, span = meter.stop(), read_counters([process.pid]).since(before)
    if used is None:
        raise HfcompressError("codecarbon measured no energy", "run without `measure: {energy: …}`")
    scale = 1000 / rows
    return {
        "wh_per_1k": used.total * scale,
        "source": used.source,
        "parts": {
            part: {"wh_per_1k": watt_hours * scale, "source": used.sources[part]}
            for part, watt_hours in used.watt_hours.items()
        },
        **({"tdp_w": used.tdp_w} if used.tdp_w is not None else {}),
        "seconds": round(took, 1),
        "rows": rows,
        "batch_size": process.batch_size,
        "busy": state([span], [])["why"],
    }


def find_country(code: str) -> tuple[str, float]:
    """Finds the name of a country, and the grams of CO2 of a kilowatt-hour of its electricity, by codecarbon's data.

    Args:
        code: The country's code of three letters.

    Raises:
        HfcompressError: if codecarbon has no data for it; codecarbon itself would take the mean of the world.
    """
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy as Amount
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    countries = DataSource().get_global_energy_mix_data()
    if code not in countries:
        alike = [key for key, mix in countries.items() if code.lower() in (key.lower(), mix["country_name"].lower())]
        fix = f"did you mean '{alike[0]}'?" if alike else "name a country by its code of three letters (ISO 3166)"
        raise HfcompressError(f"codecarbon has no data for the electricity of '{code}'", fix)
    geography = GeoMetadata(country_iso_code=code)
    kilograms = Emissions(DataSource()).get_country_emissions(Amount.from_energy(kWh=1), geography)
    return str(countries[code]["country_name"]), round(kilograms * 1000, 2)


def require_energy(options: Energy | None) -> None:
    """Requires what measuring energy needs, before minutes of measuring; None needs nothing.

    Raises:
        HfcompressError: if codecarbon is not installed, or has no data for the country.
    """
    if options is None:
        return
    key: Key = ("measure", "energy")
    if importlib.util.find_spec("codecarbon") is None:
        raise HfcompressError([Problem("codecarbon is not installed", "pip install 'hfcompress[energy]'", key)])
    try:
        if options.country is not None:
            find_country(options.country)
    except HfcompressError as error:
        raise HfcompressError(replace(p, key=(*key, "country")) for p in error.problems) from None
