"""Margins as users write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hfcompress.utils.margin import AnyMargin, Margin, parse_margin
from hfcompress.utils.strict_model import StrictModel


class Options(StrictModel):
    margin: AnyMargin = Margin(0.01, relative=True)


@pytest.mark.parametrize(
    ("written", "margin", "shown"),
    [
        ("1%", Margin(0.01, True), "1%"),
        (" 2.5 %", Margin(0.025, True), "2.5%"),
        ("0.5%", Margin(0.005, True), "0.5%"),
        (0.01, Margin(0.01, False), "0.01"),
        ("0.01", Margin(0.01, False), "0.01"),
        (".005", Margin(0.005, False), "0.005"),
        ("1e-3", Margin(0.001, False), "0.001"),
    ],
)
def test_a_margin_is_relative_with_a_percent_sign_and_absolute_without(
    written: Any, margin: Margin, shown: str
) -> None:
    assert parse_margin(written) == margin
    assert str(margin) == shown
    assert parse_margin(str(margin)) == margin


def test_a_relative_margin_is_a_share_of_the_score() -> None:
    assert parse_margin("1%").of(0.9) == pytest.approx(0.009)
    assert parse_margin("1%").of(-0.5) == pytest.approx(0.005)
    assert parse_margin(0.01).of(0.9) == 0.01


@pytest.mark.parametrize("written", [1, "1", 1.0, 2, "3"])
def test_a_bare_number_of_1_or_more_is_ambiguous(written: Any) -> None:
    with pytest.raises(ValueError, match=r"is ambiguous, .*% of the score or .* of the metric; write '1%'"):
        parse_margin(written)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "a margin of 0 can never be shown"),
        ("0%", "a margin of 0 can never be shown"),
        ("100%", "a margin of 100% is 100% or more of the score"),
        ("-1%", "a share or a number, not '-1%'"),
        (-0.01, "a share or a number, not -0.01"),
        ("one", "a share or a number, not 'one'"),
        ("", "a share or a number, not ''"),
        ("1%%", "a share or a number, not '1%%'"),
        (True, "a share or a number, not True"),
        (None, "a share or a number, not None"),
        (float("nan"), "a share or a number, not nan"),
        (float("inf"), "a share or a number, not inf"),
        ([0.01], r"a share or a number, not \[0.01\]"),
    ],
)
def test_what_is_no_margin_is_refused(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_margin(written)


def test_options_take_a_margin_and_write_it_as_it_was_written() -> None:
    assert Options(margin="1%").margin == Margin(0.01, True)  # type: ignore[arg-type]
    for written in ("1%", 0.02):
        assert Options.model_validate({"margin": written}).model_dump(mode="json") == {"margin": written}
    with pytest.raises(ValidationError, match="ambiguous"):
        Options.model_validate({"margin": 1})
