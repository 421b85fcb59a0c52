"""Energy: what measured it is told, and a country is never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfcompress.measure import energy
from hfcompress.measure.energy import Consumption, Energy, Meter, find_country, measure_energy, require_energy
from hfcompress.measure.measure import Measure
from hfcompress.utils.errors import HfcompressError

pytest.importorskip("codecarbon")


@pytest.fixture
def _found_anew() -> Iterator[None]:
    """codecarbon finds the meters of the machine once for each process; here it finds them anew."""
    from codecarbon.core import hardware_cache

    hardware_cache.clear_cache()
    yield
    hardware_cache.clear_cache()


def _read_until(meter: Meter, watt_hours: float) -> Consumption:
    """Reads a meter until the processor has used something: codecarbon does not read twice within 50 ms."""
    for _ in range(100_000):
        used = meter.read()
        assert used is not None
        if used.watt_hours["processor"] >= watt_hours:
            return used
    raise AssertionError(f"the processor never used {watt_hours} Wh")


@pytest.mark.usefixtures("_found_anew")
def test_the_counter_of_the_processor_is_read_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codecarbon.core import cpu, resource_tracker
    from codecarbon.external.hardware import CPU

    package = tmp_path / "intel-rapl" / "intel-rapl:0"
    package.mkdir(parents=True)
    counter = package / "energy_uj"
    for name, content in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
        (package / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(cpu, "is_rapl_available", lambda *_: True)
    monkeypatch.setattr(resource_tracker, "is_linux_os", lambda: True)
    monkeypatch.setattr(
        CPU,
        "from_utils",
        lambda output_dir, mode, **_: CPU(output_dir, mode, "a processor", 65, rapl_dir=str(package.parent)),
    )
    meter = Meter(gpu=False)
    meter.start()
    counter.write_text(str(1_000_000 + 3_600_000_000), encoding="utf-8")  # 3,600 joules are a watt-hour
    used = _read_until(meter, 0.5)
    meter.stop()
    assert used.source == "RAPL"
    assert used.watt_hours["processor"] == pytest.approx(1.0)
    assert used.sources["memory"] == energy.BY_SIZE
    assert used.tdp_w is None


@pytest.mark.usefixtures("_found_anew")
def test_an_estimate_is_called_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from codecarbon.core import cpu, resource_tracker

    monkeypatch.setattr(cpu, "is_rapl_available", lambda *_: False)
    monkeypatch.setattr(resource_tracker, "is_linux_os", lambda: True)
    meter = Meter(gpu=False)
    meter.start()
    used = _read_until(meter, 1e-9)
    meter.stop()
    assert used.source == "codecarbon's estimate from the processor's TDP"
    assert used.tdp_w is not None
    assert used.tdp_w > 0
    assert used.total == pytest.approx(sum(used.watt_hours.values()))
    assert "gpu" not in used.watt_hours
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("device", "source"), [("NvidiaGPUDevice", "NVML"), ("AMDGPUDevice", "AMD SMI")])
def test_a_gpu_is_measured_by_the_library_of_its_maker(device: str, source: str) -> None:
    gpu: Any = type("GPU", (), {})()
    gpu.devices = SimpleNamespace(devices=[type(device, (), {})()])
    cpu: Any = type("CPU", (), {})()
    cpu._mode = "intel_rapl"
    sources = dict(map(energy._name_source, (cpu, gpu)))
    assert sources == {"processor": "RAPL", "gpu": source}
    assert Consumption({"gpu": 3.0, "processor": 1.0}, sources).source == f"{source} and RAPL"


class _Process:
    """A model on the processor that answers a known number of rows."""

    device, batch_size = "cpu", 32

    def __init__(self) -> None:
        import os

        self.pid = os.getpid()

    def run_for(self, seconds: float) -> tuple[int, float]:
        return 4_000, seconds


class _Meter:
    """A meter whose figures are known."""

    used: Consumption | None = Consumption(
        {"processor": 6.0, "memory": 2.0}, {"processor": "RAPL", "memory": "an estimate"}
    )

    def __init__(self, gpu: bool) -> None:
        assert not gpu, "the energy of an idle GPU is none of a model's that runs on the processor"

    def start(self) -> None:
        pass

    def stop(self) -> Consumption | None:
        return self.used


def test_the_energy_is_that_of_a_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "Meter", _Meter)
    process: Any = _Process()
    found = measure_energy(process, seconds=10.0)
    assert found.pop("busy") is not None
    assert found == {
        "wh_per_1k": 2.0,
        "source": "RAPL",
        "parts": {
            "processor": {"wh_per_1k": 1.5, "source": "RAPL"},
            "memory": {"wh_per_1k": 0.5, "source": "an estimate"},
        },
        "seconds": 10.0,
        "rows": 4_000,
        "batch_size": 32,
    }
    monkeypatch.setattr(_Meter, "used", None)
    with pytest.raises(HfcompressError, match="codecarbon measured no energy"):
        measure_energy(process, seconds=10.0)


def test_a_country_has_its_own_electricity() -> None:
    (name, germany), (_, france) = find_country("DEU"), find_country("FRA")
    assert name == "Germany"
    assert germany > 2 * france > 0


@pytest.mark.parametrize(
    ("code", "fix"), [("XXX", "name a country by"), ("deu", "did you mean 'DEU'"), ("Germany", "did you mean 'DEU'")]
)
def test_a_country_without_data_is_refused(code: str, fix: str) -> None:
    with pytest.raises(HfcompressError, match=f"no data for the electricity of '{code}'") as error:
        require_energy(Energy(country=code))
    (problem,) = error.value.problems
    assert problem.fix.startswith(fix)
    assert problem.key == ("measure", "energy", "country")


@pytest.mark.parametrize(
    ("written", "read", "spelled"),
    [
        (True, Energy(), True),
        (False, None, False),
        ({}, Energy(), True),
        ({"country": "DEU"}, Energy(country="DEU"), {"country": "DEU"}),
    ],
)
def test_the_options_are_true_false_or_a_country(written: Any, read: Energy | None, spelled: Any) -> None:
    options = Measure(energy=written)
    assert options.energy == read
    assert options.model_dump(mode="json")["energy"] == spelled


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"country": 1}, "string"),
        ({"contry": "DEU"}, "did you mean 'country'"),
        ("DEU", "write true, or country: DEU"),
    ],
)
def test_other_options_are_refused(written: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Measure(energy=written)


@pytest.mark.parametrize(
    ("written", "amount", "currency", "spelled"),
    [(0.4, 0.4, "", 0.4), ("0.40 EUR", 0.4, "EUR", "0.4 EUR"), ("2$", 2.0, "$", "2 $"), (3, 3.0, "", 3.0)],
)
def test_a_price_has_an_amount_and_may_have_a_currency(
    written: Any, amount: float, currency: str, spelled: Any
) -> None:
    options = Measure(price=written)
    assert options.price is not None
    assert (options.price.amount, options.price.currency) == (amount, currency)
    assert options.model_dump(mode="json")["price"] == spelled
    assert Measure(price=spelled).price == options.price


@pytest.mark.parametrize("written", [-1, "-0.4 EUR", float("nan"), "nan", "inf", 0, True, "EUR", "0.4 per hour", "1 2"])
def test_a_price_that_is_none_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="a price is an amount above 0"):
        Measure(price=written)
