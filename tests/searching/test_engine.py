"""The search itself, on a landscape whose best point is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfcompress.recipe.target import Target
from hfcompress.searching.candidate import MACS, STEPS, Candidate, list_steps
from hfcompress.searching.engine import Ending, estimate_seconds, search
from hfcompress.searching.outcome import Outcome, choose_best, find_faults, list_front
from hfcompress.searching.policy import propose
from hfcompress.searching.trials import Trials
from hfcompress.utils.margin import Margin
from tests.searching.landscape import Landscape, find_loss, find_optimum, find_speed, names

BACKENDS = ["fast", "slow"]


def aim(margin: float = 0.02, **limits: object) -> Target:
    return Target(max_drop=Margin(margin, relative=False), **{"hours": 10.0, **limits})


def run(folder: Path, world: Landscape, target: Target | None = None) -> Ending:
    return search(world, Trials(folder, "a"), target or aim(world.margin), BACKENDS, STEPS, world.clock)


@pytest.mark.parametrize("margin", [0.004, 0.01, 0.02, 0.035, 0.5])
def test_the_best_model_keeps_to_the_limit_and_no_faster_one_on_the_ladder_does(tmp_path: Path, margin: float) -> None:
    ending = run(tmp_path, Landscape(margin))
    assert ending.done
    assert ending.best is not None
    assert ending.best.largest <= margin
    assert ending.best.speedup >= find_optimum(margin) - 1e-9


def test_it_takes_a_fraction_of_the_trials_of_an_exhaustive_search(tmp_path: Path) -> None:
    world = Landscape()
    run(tmp_path, world)
    assert len(world.made) <= 16
    assert len(set(world.made)) == len(world.made)


@pytest.mark.parametrize("stop", range(12))
def test_a_search_that_was_killed_tries_what_one_without_a_break_tries(tmp_path: Path, stop: int) -> None:
    whole, first, second = Landscape(), Landscape(stop_after=stop), Landscape()
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", first)
    found = run(tmp_path / "cut", second)
    assert first.made + second.made == whole.made
    assert (names(found.outcomes), found.best) == (names(expected.outcomes), expected.best)
    assert found.seconds == pytest.approx(expected.seconds)


def test_a_finished_search_tries_nothing_again(tmp_path: Path) -> None:
    before, again = run(tmp_path, Landscape()), Landscape()
    assert run(tmp_path, again).best == before.best
    assert not again.made


@pytest.mark.parametrize("hours", [0.01, 0.05, 0.2])
def test_the_time_is_kept_and_what_was_found_until_then_is_given(tmp_path: Path, hours: float) -> None:
    world = Landscape()
    ending = run(tmp_path, world, aim(hours=hours))
    assert ending.seconds <= max(hours * 3600, 20)  # one trial is always made
    assert not ending.done
    assert ending.chosen is not None


def test_the_time_of_earlier_calls_counts(tmp_path: Path) -> None:
    first, second = Landscape(stop_after=5), Landscape()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, aim(hours=0.1))
    assert run(tmp_path, second, aim(hours=0.1)).seconds <= 360


def test_a_failed_trial_is_a_row_and_cannot_win_and_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    deep = Candidate("fast", MACS[5], 0, "corpus")
    ending = run(tmp_path, Landscape(broken={deep: 1}))
    failed = next(outcome for outcome in ending.outcomes if outcome.candidate == deep)
    assert failed.error == "the disk is full"
    assert find_faults(failed, aim()) == ["it failed: the disk is full"]
    assert ending.best is not None
    again = Landscape()
    assert next(x for x in run(tmp_path, again).outcomes if x.candidate == deep).error == ""
    assert deep in again.made


def test_every_trial_fails_and_there_is_no_winner(tmp_path: Path) -> None:
    world = Landscape(broken=dict.fromkeys([Candidate("fast"), Candidate("slow")], 99))
    ending = run(tmp_path, world)
    assert (ending.best, ending.nearest) == (None, None)


def test_without_a_model_within_the_limits_the_nearest_attempt_is_told(tmp_path: Path) -> None:
    ending = run(tmp_path, Landscape(0.0005))
    assert ending.best is None
    assert ending.nearest is not None
    assert ending.nearest.largest == min(x.largest for x in ending.outcomes)


def test_a_limit_of_speed_or_size_that_no_model_keeps_to_leaves_no_winner(tmp_path: Path) -> None:
    assert run(tmp_path, Landscape(), aim(min_speedup=1000)).best is None
    assert run(tmp_path, Landscape(), aim(max_mb=1e-9)).best is None


def test_the_goal_of_size_finds_the_smallest(tmp_path: Path) -> None:
    ending = run(tmp_path, Landscape(), aim(goal="size"))
    assert ending.best is not None
    assert ending.best.bytes == min(x.bytes for x in ending.outcomes if x.holds)


@pytest.mark.parametrize("missing", [{"speedups": None}, {"speedups": {}}])
def test_a_model_without_a_figure_cannot_win(missing: dict[str, object]) -> None:
    outcome = Outcome(Candidate("fast"), 1.0, 0.0, 0.0, 0.0, True, 9, bytes=1, **missing)
    assert choose_best([outcome], aim()) is None
    assert find_faults(outcome, aim(min_speedup=2))


def test_the_front_holds_what_nothing_beats() -> None:
    def make(macs: float, drop: float, speed: float, size: int) -> Outcome:
        return Outcome(Candidate("fast", macs), 1.0, drop, 0, 0, True, 9, {1: (speed,)}, size)

    fast, good, beaten = make(0.1, 0.02, 9, 10), make(0.5, 0.0, 4, 20), make(0.4, 0.03, 4, 20)
    assert list_front([beaten, good, fast]) == [fast, good]


def test_the_plan_depends_on_the_outcomes_alone_not_on_their_order(tmp_path: Path) -> None:
    outcomes = list(run(tmp_path, Landscape(), aim(hours=0.1)).outcomes)
    assert propose(outcomes, aim(), BACKENDS, STEPS) == propose(outcomes[::-1], aim(), BACKENDS, STEPS)


def test_little_data_is_not_read_hundreds_of_times() -> None:
    assert list_steps(60_000) == [0, 150, 600, 2400]
    assert list_steps(1_000) == [0, 150, 600]
    assert list_steps(96) == [0, 90]
    assert list_steps(1) == [0, 1]


def test_a_trial_is_estimated_by_those_like_it() -> None:
    def make(steps: int, seconds: float) -> Outcome:
        return Outcome(Candidate("fast", steps=steps), seconds)

    assert estimate_seconds(Candidate("fast"), []) == 0
    assert estimate_seconds(Candidate("slow"), [make(0, 20)]) == 20
    assert estimate_seconds(Candidate("fast", steps=600), [make(0, 20), make(150, 50)]) == 140


def test_the_landscape_is_one_where_more_steps_repair_and_fewer_macs_are_faster() -> None:
    assert find_loss(Candidate("fast", 0.25)) > find_loss(Candidate("fast", 0.25, 150))
    assert find_speed(Candidate("fast", 0.25)) > find_speed(Candidate("fast", 0.5))
