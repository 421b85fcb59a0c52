"""How many rows a verdict needs, and what the rows that there are can show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import ndtri

from hfcompress.report.statistics.comparison import ALPHA, Evidence
from hfcompress.report.statistics.proportions import Pairs, null_variance
from hfcompress.utils.margin import Margin

POWER = 0.8


@dataclass(frozen=True)
class Power:
    """The power of a number of units for a result that is in truth as good as its source.

    Attributes:
        units: Number of units.
        needed: How many units show, with 80% power, that the drop is below the margin.
        smallest: The smallest margin that these units show with 80% power, in the margin's unit.
        sentence: Both in words.
    """

    units: int
    needed: int
    smallest: float
    sentence: str


def find_power(evidence: Evidence, margin: Margin, unit: str = "row") -> Power:
    """Computes what the verdict of `non_inferiority` needs, at the discordance or the error that is seen.

    Args:
        evidence: What both models answered.
        margin: A relative one is taken of the score that the source has here.
        unit: What a unit is called: `row`, `question`, `sentence`.
    """
    units, accepted = evidence.units, margin.of(evidence.source)
    if not accepted:
        raise ValueError("the source scores 0, so no drop relative to it is defined; use an absolute one")
    scale = margin.value / accepted
    if isinstance(evidence, Pairs):
        needed = rows_needed(evidence.discordance, accepted)
        smallest = scale * smallest_margin(units, evidence.discordance)
    elif evidence.error:
        deviation = evidence.error * math.sqrt(units)
        needed = units_needed(deviation, accepted)
        smallest = scale * smallest_margin_of_deviation(units, deviation)
    else:  # no draw differs: as rows of which none flips
        needed, smallest = rows_needed(0.0, margin.value), smallest_margin(units, 0.0)
    return Power(units, needed, smallest, describe_power(units, needed, smallest, margin, unit))


def rows_needed(discordance: float, margin: float, power: float = POWER, alpha: float = ALPHA) -> int:
    """Counts the rows with which the score test shows that the drop is below a margin, if the true change is 0.

    `n = ((z_alpha √v0 + z_power √v1) / margin)²` (Nam 1997, Biometrics 53:1422-1430). `v1`, the variance of a row's
    change, is the discordance; `v0` is the `null_variance` at the margin. If no row flips, `n` is
    `z_alpha² (1 - margin) / margin`.

    Args:
        discordance: The share of rows that only one of the models answers right.
        margin: The absolute margin, between 0 and 1.
        power: How often the test shall succeed.
        alpha: Its one-sided level.
    """
    _require_shares(power, alpha, margin)
    if not 0 <= discordance <= 1:
        raise ValueError(f"a discordance is a share of the rows, from 0 to 1, not {discordance:g}")
    return max(1, math.ceil(_rows(discordance, margin, power, alpha) - 1e-9))


def smallest_margin(rows: int, discordance: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Finds the smallest absolute margin that a number of rows can show: the inverse of `rows_needed`; at most 1."""
    _require_shares(power, alpha)
    least, most = 1e-9, 1 - 1e-9
    if rows < 1 or _rows(discordance, most, power, alpha) >= rows:
        return 1.0
    return float(brentq(lambda margin: _rows(discordance, margin, power, alpha) - rows, least, most, xtol=1e-12))


def _rows(discordance: float, margin: float, power: float, alpha: float) -> float:
    half, z_alpha, z_power = discordance / 2, -ndtri(alpha), ndtri(power)
    at_margin = max(0.0, null_variance(half, half, -margin))
    return float(((z_alpha * math.sqrt(at_margin) + z_power * math.sqrt(discordance)) / margin) ** 2)


def units_needed(deviation: float, margin: float, power: float = POWER, alpha: float = ALPHA) -> int:
    """Counts the units that show, of any metric, that the drop is below a margin, if the true change is 0.

    `n = ((z_alpha + z_power) deviation / margin)²` (Julious 2004, Statistics in Medicine 23:1921-1986).

    Args:
        deviation: The standard deviation of one unit's change: the standard error times the root of the units.
        margin, power, alpha: See `rows_needed`.
    """
    _require_shares(power, alpha)
    if not margin > 0:
        raise ValueError(f"a margin is more than 0, not {margin:g}")
    return max(1, math.ceil((_quantiles(power, alpha) * deviation / margin) ** 2 - 1e-9))


def smallest_margin_of_deviation(units: int, deviation: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Finds the smallest absolute margin that a number of units can show: the inverse of `units_needed`."""
    return _quantiles(power, alpha) * deviation / math.sqrt(units)


def _quantiles(power: float, alpha: float) -> float:
    return float(ndtri(power) - ndtri(alpha))


def describe_power(units: int, needed: int, smallest: float, margin: Margin, unit: str = "row") -> str:
    """Says what the units can show: `872 rows can show 1.8 points, not 1; 2,570 rows could`.

    A point is one hundredth of the metric; a relative margin is said in percent. What can be shown is rounded up, since
    less cannot.
    """
    can = f"{_format_count(units, unit)} can show {_round_up(100 * smallest)}{'%' if margin.relative else ' points'}"
    if needed <= units:
        return can
    return (
        f"{can}, not {margin if margin.relative else f'{100 * margin.value:.10g}'}; {_format_count(needed, unit)} could"
    )


def describe_test_size(rows: int, discordance: float = 0.04) -> str:
    """Says which loss of accuracy a number of test rows can rule out, before any model is compared.

    Args:
        rows: Rows of the split that a run is judged on.
        discordance: The share of rows that only one of the two models is expected to answer right.
    """
    smallest, needed = smallest_margin(rows, discordance), rows_needed(discordance, 0.01)
    found = f"{_format_count(rows, 'row')} can rule out a loss above {_round_up(100 * smallest)} points of accuracy"
    could = "" if needed <= rows else f"; {needed:,} rows could rule out 1 point"
    return f"{found}{could} (if compression changes {100 * discordance:g}% of the answers)"


def _format_count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" + ("" if number == 1 else "s")


def _round_up(value: float) -> str:
    """Two digits, rounded up."""
    if not value:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step - 1e-9) * step:.10g}"


def _require_shares(power: float, alpha: float, margin: float = 0.5) -> None:
    for name, value in (("power", power), ("level", alpha), ("margin", margin)):
        if not 0 < value < 1:
            raise ValueError(f"a {name} lies between 0 and 1, not {value:g}")
