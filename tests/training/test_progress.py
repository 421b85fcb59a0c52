"""A training shows one bar on a terminal, and lines without control characters elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hfcompress.training import progress

LOGS = {"loss": 0.28134, "loss_cosine": 0.1, "grad_norm": 2.0, "learning_rate": 1e-3, "epoch": 1.0}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(progress, "log", SimpleNamespace(info=found.append))
    return found


def _log(shown: progress.Progress, logs: dict[str, float], first: bool = True) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=first, global_step=50, max_steps=1200)
    shown.on_train_begin(None, state, None)
    shown.on_log(None, state, None, logs)


def test_a_pipe_gets_a_line_with_what_matters(lines: list[str]) -> None:
    _log(progress.Progress(), LOGS)
    _log(progress.Progress(), {"eval_accuracy": 0.91, "eval_runtime": 3.0, "epoch": 1.0})
    _log(progress.Progress(), {"train_runtime": 3.0, "train_loss": 0.2})
    _log(progress.Progress(), LOGS, first=False)
    assert lines == ["step 50 of 1,200: loss 0.2813, loss_cosine 0.1", "step 50 of 1,200: dev accuracy 0.91"]


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = progress.Progress()
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=10, max_steps=20)
    shown.on_train_begin(None, state, None)
    bar = shown.bar
    shown.on_log(None, state, None, LOGS)
    shown.on_log(None, state, None, {"eval_accuracy": 0.91})
    state.global_step = 12
    shown.on_step_end(None, state, None)
    assert (bar.n, bar.total) == (12, 20)
    line = str(bar)
    assert "step 12 of 20, " in line
    assert line.endswith(" left, loss 0.2813, dev accuracy 0.91")
    assert len(line) < 80
    shown.on_train_end(None, state, None)
    assert lines == []
    assert shown.bar is None
