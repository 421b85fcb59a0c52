"""The latency table: how it is made, kept and read, and what it foretells."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.data.source import cache_home
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.models.surgery import cut
from hfcompress.pruning import latency_table as blocks
from hfcompress.pruning.allocation import keep_best_sum
from hfcompress.pruning.budget import Budget, compare_latency, target_of
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.latency_table import LatencyTable, Setting, costs_in_time, find_table, predict, time_models
from hfcompress.utils.errors import HfcompressError
from tests import factories

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = sorted(ARCHITECTURES)
SMALL = Setting(batch_size=2, length=8, threads=1)
TABLE = LatencyTable(2e-3, ((0, 0.0), (2, 3e-3), (4, 4e-3)), ((0, 0.0), (32, 1e-3), (64, 4e-3)))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, on a quiet machine."""
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path))
    with factories.machine_state():
        yield cache_home() / "latency"


def shape_from(model: Any) -> Shape:
    return shape_of(model.config.to_dict())


def layered(shape: Shape, *layers: tuple[int, int]) -> Shape:
    return replace(shape, layers=tuple(Layer(*sizes) for sizes in layers))


def clock(model: Any) -> float:
    """The time of a machine on which everything takes as long as it has units."""
    shape = shape_from(model)
    return 1e-6 * shape.vocab + 0.5 + sum(1e-3 + 2e-2 * x.heads + 3e-4 * x.ffn for x in shape.layers)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """That machine in place of this one; the list counts what was timed."""
    counted: list[int] = []

    def measured(models: Sequence[Any], setting: Setting, rounds: int = 0) -> list[float]:
        counted.append(len(models))
        return [clock(model) for model in models]

    monkeypatch.setattr(blocks, "time_models", measured)
    return counted


# What is foretold


@pytest.mark.parametrize("layers", [[(4, 64), (1, 8), (0, 50)], [(3, 1), (0, 0), (2, 64)], [(4, 64)] * 3])
def test_the_table_foretells_what_the_layers_add(home: Path, machine: list[int], layers: list[tuple[int, int]]) -> None:
    model = factories.model(layers=3)
    shape = layered(shape_from(model), *layers)
    expected = 1e-6 * shape.vocab + 0.5 + sum(1e-3 + 2e-2 * heads + 3e-4 * ffn for heads, ffn in layers)
    assert predict(find_table(model, SMALL), shape) == pytest.approx(expected)


def test_time_is_interpolated_between_what_was_timed() -> None:
    shape = layered(shape_from(factories.model()), (3, 48), (1, 16))
    assert predict(TABLE, shape) == pytest.approx(2e-3 + (3.5e-3 + 2.5e-3) + (1.5e-3 + 0.5e-3))


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_costs_are_the_foretold_time_rounded_up(family: str) -> None:
    shape = shape_from(factories.model(family, layers=4))
    costs = costs_in_time(TABLE, shape, 8)
    runs = 4 if family == "albert" else 1
    assert len(costs.heads) == len(costs.neurons) == 4 // runs
    assert costs.heads[0][0] == costs.neurons[0][0] == 0
    assert costs.heads[0][2] == pytest.approx(runs * 3e6, rel=1e-3)
    assert costs.neurons[0][6] == pytest.approx(runs * 2.5e6, rel=1e-3)
    whole = predict(TABLE, shape) * 1e9
    assert whole <= costs.whole <= whole * (1 + 9 / blocks.STEPS)
    step = math.gcd(*(int(cost) for block in (*costs.heads, *costs.neurons) for cost in block))
    assert step >= whole / blocks.STEPS


def isotonic(values: list[float]) -> list[float]:
    """The min-max formula of isotonic regression (Barlow et al. 1972): `max over j≤i of min over k≥i of mean(j…k)`."""
    count = len(values)

    def mean(j: int, k: int) -> float:
        return sum(values[j : k + 1]) / (k + 1 - j)

    return [max(min(mean(j, k) for k in range(i, count)) for j in range(i + 1)) for i in range(count)]


@pytest.mark.parametrize("values", [[1, 2, 3], [3, 1, 2], [1, 5, 4, 3, 6], [4, 3, 2, 1], [1, 1, 0, 2, 1, 3]])
def test_noise_does_not_make_more_seem_faster(values: list[float]) -> None:
    assert blocks._make_monotone(values) == pytest.approx([0, *isotonic(values)])


def test_no_time_is_negative() -> None:
    assert blocks._make_monotone([-1.0, -0.5, 2.0]) == [0, 0, 0, 2]


def test_the_table_is_made_on_the_threads_that_the_whole_model_is_fastest_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []

    def measured(models: Sequence[Any], setting: Setting, rounds: int = 0) -> list[float]:
        asked.append((len(models), setting.threads))
        return [clock(model) * {1: 3.0, 2: 1.0, 3: 2.0}[setting.threads or 0] for model in models]

    monkeypatch.setattr(blocks, "time_models", measured)
    monkeypatch.setattr(blocks, "default_threads", lambda: 3)
    model, setting = factories.model(), replace(SMALL, threads=None)
    table = find_table(model, setting)
    assert asked[:3] == [(1, 1), (1, 2), (1, 3)]
    assert [threads for count, threads in asked[3:]] == [2]
    assert (table.threads, find_table(model, setting)) == (2, table)
    assert find_table(model, replace(SMALL, threads=3)).threads == 3  # what is asked for is kept to


@pytest.mark.usefixtures("machine")
def test_a_table_of_a_busy_machine_is_told_each_time_that_it_is_used(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = factories.model()
    find_table(model, SMALL)
    assert "busy" not in capsys.readouterr().err
    (path,) = home.iterdir()
    path.unlink()
    with factories.machine_state(factories.BUSY):
        first = find_table(model, SMALL)
    for _ in range(2):
        told = capsys.readouterr().err
        assert f"made on a busy machine (other work took 50% of the processors' time): delete {path}" in told
        assert find_table(model, SMALL) == first


# The cache


def test_a_table_is_made_once_for_each_setting_and_kind_of_model(home: Path, machine: list[int]) -> None:
    model = factories.model()
    first = find_table(model, SMALL)
    assert find_table(factories.model(seed=1), SMALL) == first
    assert len(machine) == 1
    others = [(model, replace(SMALL, batch_size=3)), (model, replace(SMALL, length=9)),
              (model, replace(SMALL, threads=2)), (model, replace(SMALL, dtype="bfloat16")),
              (factories.model(hidden=48), SMALL), (factories.model(heads=2), SMALL),
              (factories.model(layers=3), SMALL),
              (factories.model("distilbert"), SMALL), (factories.model(head="token"), SMALL)]  # fmt: skip
    for number, (other, setting) in enumerate(others, start=2):
        find_table(other, setting)
        assert len(machine) == number
    assert len(list(home.iterdir())) == len(machine)
    assert {path.suffix for path in home.iterdir()} == {".json"}


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_text(path.read_text()[:80])


def other_torch(path: Path) -> None:
    record = json.loads(path.read_text())
    record["identity"]["torch"] = "1.0"
    path.write_text(json.dumps(record))


def no_heads(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["heads"]
    path.write_text(json.dumps(record))


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [no_bytes, half, other_torch, no_heads, a_list], ids=lambda f: f.__name__)
def test_a_damaged_or_stale_table_is_made_anew(home: Path, machine: list[int], damage: Any) -> None:
    model = factories.model()
    first = find_table(model, SMALL)
    (path,) = home.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert find_table(model, SMALL) == first
    assert len(machine) == 2
    assert path.read_bytes() == whole


# Real timings


def test_models_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, float]] = []
    times = {2: iter([9.0, 9.0, 1.0, 7.0, 2.0]), 3: iter([9.0, 9.0, 5.0, 4.0, 6.0])}

    def turn(run: blocks.TimedModel) -> float:
        depth = run.model.config.num_hidden_layers
        turns.append((depth, next(times[depth])))
        return turns[-1][1]

    monkeypatch.setattr(blocks.TimedModel, "turn", turn)
    assert time_models([factories.model(layers=2), factories.model(layers=3)], SMALL, rounds=3) == [2.0, 5.0]
    assert [depth for depth, _ in turns] == [2, 2, 3, 3, *[2, 3] * 3]


def test_timing_leaves_the_models_and_the_process_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TURN", 1e-4)
    model, threads = factories.model().train(), torch.get_num_threads()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.get_num_threads())))
    (seconds,) = time_models([model], replace(SMALL, threads=threads + 1), rounds=2)
    assert seconds > 0
    assert set(seen) == {(False, threads + 1)}
    assert model.training
    assert torch.get_num_threads() == threads
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert time_models([model], replace(SMALL, dtype="bfloat16"), rounds=1)[0] > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_deeper_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TURN", 1e-3)
    models = [factories.model(layers=1), factories.model(layers=12)]
    trials = (time_models(models, SMALL) for _ in range(5))  # other work on the machine can spoil some
    assert any(deep > 2 * shallow for shallow, deep in trials)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_timed(home: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(blocks, "TURN", 1e-4)
    monkeypatch.setattr(blocks, "POINTS", 2)
    model = factories.model(family)
    shape = shape_from(model)
    table = blocks.measure_table(model, shape, SMALL, rounds=1)
    groups = shape.layers[0].heads // shape.group
    assert [count for count, _ in table.heads] == [0, groups // 2 * shape.group, groups * shape.group]
    assert [count for count, _ in table.neurons] == [0, 32, 64]
    assert predict(table, shape) >= table.empty > 0


def test_a_latency_is_reached_by_the_table_and_noted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TURN", 1e-3)
    heads, neurons = (tuple((n, n * 1e-6) for n in range(0, most + 1, most // 4)) for most in (8, 512))
    monkeypatch.setattr(blocks, "measure_table", lambda *_: blocks.LatencyTable(1e-4, heads, neurons))  # no noise
    model = factories.model(layers=4, hidden=64, heads=8, ffn=512)
    shape, budget = shape_from(model), Budget(latency=0.6, batch_size=4, length=32, threads=1)
    table = find_table(model, budget.setting)
    generator = torch.Generator().manual_seed(0)
    scores = Scores([torch.rand(8, generator=generator) for _ in range(4)],
                    [torch.rand(512, generator=generator) for _ in range(4)])  # fmt: skip
    target = target_of(budget, shape, shape, 8, 20, table, empty_blocks=True)
    small = cut(model, keep_best_sum(scores, target, normalise=True))
    assert predict(table, shape_from(small)) <= 0.6 * target.costs.whole * 1e-9
    note = compare_latency(budget, table, model, small)
    assert note["target_ms"] == pytest.approx(0.6 * note["source_ms"], rel=1e-3)
    foretold = predict(table, shape_from(small)) / predict(table, shape)
    assert note["predicted_ms"] == pytest.approx(foretold * note["source_ms"], rel=1e-3)
    assert min(note["measured_ms"], note["source_ms"]) > 0
    assert (note["batch_size"], note["length"], note["threads"], note["dtype"]) == (4, 32, 1, "float32")
    assert "busy" not in note
    with factories.machine_state(factories.BUSY):
        assert compare_latency(budget, table, model, small)["busy"] is True


def test_rows_that_the_model_cannot_take_are_refused() -> None:
    with pytest.raises(HfcompressError, match="the budget is a latency at 41 tokens, and the model takes 40"):
        time_models([factories.model()], replace(SMALL, length=41))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(HfcompressError, match="there is no GPU"):
        find_table(factories.model(), replace(SMALL, device="cuda"))
