"""Statistics against published worked examples, which each test names, and against what must hold for any data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss

from hfcompress.data.metrics import (
    CLASSIFICATION,
    REGRESSION,
    SPANS,
    TOKENS,
    RowMetric,
    bootstrap_differences,
    object_array,
)  # fmt: skip
from hfcompress.report.statistics.classes import compare_classes, compare_entities, compare_tags
from hfcompress.report.statistics.comparison import compare_answers, non_inferiority, paired_difference
from hfcompress.report.statistics.confidence import expected_calibration_error, measure_confidence
from hfcompress.report.statistics.draws import Draws
from hfcompress.report.statistics.flips import find_flips, logit_margins, mean_divergence, share_agreement
from hfcompress.report.statistics.power import (
    describe_power,
    describe_test_size,
    find_power,
    rows_needed,
    smallest_margin,
    smallest_margin_of_deviation,
    units_needed,
)
from hfcompress.report.statistics.proportions import (
    Pairs,
    count_pairs,
    mcnemar_exact,
    score_of_difference,
    score_of_ratio,
)
from hfcompress.report.statistics.several import Seeds, compare_seeds, holm, summarize_seeds
from hfcompress.report.statistics.slices import bin_lengths, compare_slices, group_column
from hfcompress.utils.margin import Margin

QUICK = settings(derandomize=True, deadline=None, database=None)
COUNTS = st.integers(0, 40)
PAIRS = st.builds(Pairs, COUNTS, COUNTS, COUNTS, st.integers(1, 40))
SIGNED = st.floats(-0.9, 0.9)


def published(both: int, repaired: int, broken: int, neither: int) -> Pairs:
    """A table as papers give it: the result in the rows, the source in the columns."""
    return Pairs(both, broken, repaired, neither)


CONTACT_LENSES = published(43, 0, 1, 0)
"""Miyanaga 1994: two ways to disinfect soft contact lenses, 44 pairs."""
HYPERRESPONSIVE = published(1, 1, 7, 12)
"""Bentur et al. 2009: 21 children before and after stem cell transplantation."""
COMPLETE_RESPONSE = published(59, 6, 16, 80)
"""Cavo et al. 2012: 161 patients before and after consolidation therapy."""
HIV_SCREENING = published(446, 5, 16, 690)
"""Two screening tests, the larger example of Tang et al. 2003."""


# McNemar


@pytest.mark.parametrize(
    ("broken", "repaired", "p_value"),
    [
        (7, 1, 0.0703),  # Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91, Table 1
        (16, 6, 0.052479),  # Fagerland et al. 2017, Statistical Analysis of Contingency Tables, chapter 8
        (9, 2, 0.06543),  # Fay 2010, the vignette of R's exact2x2
        (150, 86, 3.716e-5),  # the poll of Agresti 1990, p. 350, and of R's mcnemar.test; value: statsmodels 0.15
    ],
)
def test_mcnemar_s_exact_test(broken: int, repaired: int, p_value: float) -> None:
    assert mcnemar_exact(broken, repaired) == pytest.approx(p_value, rel=1e-3)
    assert mcnemar_exact(broken, repaired) == pytest.approx(scipy.stats.binomtest(broken, broken + repaired).pvalue)


@QUICK
@given(COUNTS, COUNTS)
def test_mcnemar_is_symmetric_and_sees_nothing_in_equal_counts(broken: int, repaired: int) -> None:
    assert mcnemar_exact(broken, repaired) == pytest.approx(mcnemar_exact(repaired, broken))
    assert mcnemar_exact(broken, broken) == 1.0
    assert 0 < mcnemar_exact(broken, repaired) <= 1


def test_no_flipped_row_is_no_evidence() -> None:
    assert mcnemar_exact(0, 0) == 1.0


def test_counts_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match="flipped rows are counts of 0 or more, not -1 and 2"):
        mcnemar_exact(-1, 2)
    with pytest.raises(ValueError, match="pairs are counts of at least one row"):
        Pairs(1, -1, 0, 0)
    with pytest.raises(ValueError, match="pairs are counts of at least one row"):
        Pairs(0, 0, 0, 0)


# Score tests of paired proportions


def test_tango_s_test_of_his_example() -> None:
    # Tango 1998, Statistics in Medicine 17:891-908: Z = 1.709, one-sided p = 0.044 at a margin of 0.1
    assert score_of_difference(CONTACT_LENSES, -0.1) == pytest.approx(1.709, abs=5e-4)
    assert CONTACT_LENSES.p_above(-0.1) == pytest.approx(0.044, abs=5e-4)


@pytest.mark.parametrize(
    ("pairs", "level", "low", "high"),
    [
        (CONTACT_LENSES, 0.90, -0.096, 0.037),  # Tango 1998, Table V
        (published(4, 9, 3, 16), 0.95, -0.027, 0.390),  # Tango 1998, Table VII
        (published(53, 16, 8, 9), 0.95, -0.020, 0.207),  # Agresti and Min 2005, Statistics in Medicine 24:729-740
        (HYPERRESPONSIVE, 0.95, -0.517, -0.026),  # Fagerland et al. 2014, Statistics in Medicine 33:2850-2875
        (COMPLETE_RESPONSE, 0.95, -0.124, -0.0054),  # Fagerland et al. 2017, chapter 8
        (published(8, 3, 1, 2), 0.95, -0.167, 0.4327),  # Tang et al. 2010, as the tests of R's ratesci 1.1 cite it
        (published(0, 3, 0, 0), 0.95, -0.123, 1.0),  # the tests of R's contingencytables 3.0, of Fagerland et al.
        (published(0, 0, 3, 0), 0.95, -1.0, 0.123),
    ],
)
def test_tango_s_interval(pairs: Pairs, level: float, low: float, high: float) -> None:
    assert pairs.interval(level) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(
    ("pairs", "level", "low", "high"),
    [
        (HIV_SCREENING, 0.90, 0.958, 0.992),  # Tang et al. 2003, Statistics in Medicine 22:1217-1233, Table II
        (CONTACT_LENSES, 0.90, 0.904, 1.039),  # Tang et al. 2003, Table II
        (COMPLETE_RESPONSE, 0.95, 0.7476, 0.9876),  # Fagerland et al. 2017, chapter 8
        (published(8, 3, 1, 2), 0.95, 0.776, 2.033),  # the tests of R's ratesci 1.1
    ],
)
def test_the_interval_of_a_ratio(pairs: Pairs, level: float, low: float, high: float) -> None:
    assert [1 + end for end in pairs.interval(level, relative=True)] == pytest.approx((low, high), abs=6e-4)


def test_at_no_difference_both_score_tests_are_mcnemar_s() -> None:
    # Fagerland et al. 2017, chapter 8: the asymptotic McNemar test of this table has Z = -2.132
    assert score_of_difference(COMPLETE_RESPONSE, 0.0) == pytest.approx(-2.132, abs=5e-4)
    assert score_of_ratio(COMPLETE_RESPONSE, 1.0) == pytest.approx(-2.132, abs=5e-4)


@QUICK
@given(PAIRS, SIGNED)
def test_swapped_models_change_the_sign(pairs: Pairs, change: float) -> None:
    swapped = Pairs(pairs.both, pairs.repaired, pairs.broken, pairs.neither)
    low, high = pairs.interval()
    assert swapped.interval() == pytest.approx((-high, -low), abs=1e-7)
    assert swapped.p_above(-change) == pytest.approx(pairs.p_below(change), abs=1e-9)


@QUICK
@given(PAIRS.filter(lambda pairs: pairs.source > 0), st.booleans())
def test_an_interval_holds_what_its_test_does_not_reject(pairs: Pairs, relative: bool) -> None:
    low, high = pairs.interval(0.9, relative)
    assert low <= pairs.change(relative) <= high
    if low > -0.99:
        assert pairs.p_above(low, relative) == pytest.approx(0.05, abs=1e-4)
        assert pairs.p_above(low - 0.005, relative) < 0.05 < pairs.p_above(low + 0.005, relative)
    if high < 0.99:
        assert pairs.p_below(high, relative) == pytest.approx(0.05, abs=1e-4)


@QUICK
@given(COUNTS.filter(bool))
def test_an_interval_has_a_width_where_no_row_flips(rows: int) -> None:
    # the closed form: z² / (n + z²), as of Wilson's interval of no event in n
    bound = 1.959964**2 / (rows + 1.959964**2)
    assert Pairs(rows, 0, 0, 0).interval() == pytest.approx((-bound, bound), abs=1e-6)


def _tables(rows: int, broken: float, repaired: float) -> Any:
    """All likely tables of so many rows, with their probabilities."""
    for b in _likely(rows, broken):
        for r in _likely(rows - b, repaired / (1 - broken)):
            p = scipy.stats.binom.pmf(b, rows, broken) * scipy.stats.binom.pmf(r, rows - b, repaired / (1 - broken))
            yield Pairs(rows - b - r, b, r, 0), p


def _likely(rows: int, share: float) -> range:
    low, high = scipy.stats.binom.interval(1 - 1e-7, rows, share)
    return range(int(low), int(high) + 1)


def test_the_interval_covers_the_truth_in_95_of_100_cases() -> None:
    # exact, over all tables of 150 rows: no simulation
    covered = 0.0
    for pairs, p in _tables(150, 0.12, 0.05):
        low, high = pairs.interval()
        covered += p * (low <= -0.07 <= high)
    assert 0.945 <= covered <= 0.96


@pytest.mark.parametrize("relative", [False, True])
def test_a_drop_of_the_margin_is_called_shown_in_5_of_100_cases(relative: bool) -> None:
    shown = sum(p for pairs, p in _tables(80, 0.15, 0.05) if pairs.p_above(-0.10, relative) <= 0.05)
    # all rows are right in one model or both: the drop is 0.1, and of the source's score 0.95 it is more
    assert 0.035 <= shown <= 0.06 if not relative else shown < 0.05


def test_a_source_that_is_never_right_has_no_relative_drop() -> None:
    for call in (Pairs(0, 0, 2, 3).change, Pairs(0, 0, 2, 3).interval):
        assert call()
        with pytest.raises(ValueError, match="no drop relative to it is defined; use an absolute one"):
            call(relative=True)


def test_rows_are_counted() -> None:
    pairs = count_pairs(np.array([1, 1, 1, 0, 0, 0]), np.array([1, 0, 0, 1, 0, 0]))
    assert pairs == Pairs(both=1, broken=2, repaired=1, neither=2)
    assert (pairs.source, pairs.result, pairs.discordance) == pytest.approx((3 / 6, 2 / 6, 3 / 6))
    with pytest.raises(ValueError, match="both models answer the same rows"):
        count_pairs(np.ones(3), np.ones(4))


# The paired bootstrap

LSAT = [576, 635, 558, 578, 666, 580, 555, 661, 651, 605, 653, 575, 545, 572, 594]
GPA = [3.39, 3.30, 2.81, 3.03, 3.44, 3.07, 3.00, 3.43, 3.36, 3.13, 3.12, 2.74, 2.76, 2.88, 2.96]


def _scored(units: int = 120, seed: int = 0) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=units)
    return truth + generator.normal(size=units), truth + 1.2 * generator.normal(size=units), truth


def test_the_standard_error_of_the_law_schools_correlation() -> None:
    # Efron and Tibshirani 1993, An Introduction to the Bootstrap, Table 6.1: r = 0.776, error 0.132 from 3,200 draws
    lsat, gpa = np.array(LSAT, dtype=float), np.array(GPA)
    evidence = compare_answers(REGRESSION["pearson"], np.zeros(15), lsat, gpa, samples=3200)
    assert isinstance(evidence, Draws)
    assert evidence.change() == pytest.approx(0.776, abs=5e-4)
    assert evidence.error == pytest.approx(0.132, abs=0.004)


def test_the_interval_agrees_with_scipy_s_paired_bootstrap() -> None:
    source, result, truth = _scored()
    metric = REGRESSION["mse"]
    difference = paired_difference(compare_answers(metric, source, result, truth, samples=4000))

    def change(one: Any, other: Any, right: Any) -> float:
        return metric(other, right) - metric(one, right)

    theirs = scipy.stats.bootstrap(
        (source, result, truth), change, paired=True, vectorized=False, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    assert (difference.low, difference.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)
    assert difference.change == pytest.approx(change(source, result, truth))


def test_both_models_are_scored_on_the_same_draws() -> None:
    source, result, truth = _scored()
    evidence = compare_answers(REGRESSION["mse"], source, result, truth, samples=200, seed=3)
    assert isinstance(evidence, Draws)
    expected = bootstrap_differences(REGRESSION["mse"], result, source, truth, samples=200, seed=3)
    assert np.array_equal(evidence.result_draws - evidence.source_draws, expected)
    assert (
        compare_answers(REGRESSION["mse"], source, result, truth, samples=200, seed=3).interval() == evidence.interval()
    )


def test_the_ends_of_an_interval_are_draws_of_known_ranks() -> None:
    # Davison and Hinkley 1997, section 5.3.1: with R = 999, the 95% limits are the 25th and the 975th of the draws
    draws = np.random.default_rng(0).permutation(np.arange(1.0, 1000.0))
    evidence = Draws(0.0, 500.0, np.zeros(999), draws, units=50)
    assert evidence.interval(0.95) == (25.0, 975.0)
    assert evidence.p_above(0.5) == 1 / 1000  # equation 4.11: never 0
    assert evidence.p_above(50.0) == 51 / 1000
    assert evidence.p_below(950.0) == 51 / 1000


def test_swapped_models_swap_the_bootstrap() -> None:
    source, result, truth = _scored()
    one = compare_answers(REGRESSION["spearman"], source, result, truth, samples=100)
    other = compare_answers(REGRESSION["spearman"], result, source, truth, samples=100)
    low, high = one.interval()
    assert other.interval() == pytest.approx((-high, -low))
    assert one.p_above(-0.05) == other.p_below(0.05)


def test_the_bootstrap_covers_the_truth_in_about_95_of_100_cases() -> None:
    # the difference of two mean squared errors whose true values are 1 and 1.44
    inside = 0
    for trial in range(200):
        low, high = compare_answers(REGRESSION["mse"], *_scored(80, trial), samples=200, seed=trial).interval()
        inside += low <= 0.44 <= high
    assert 0.90 <= inside / 200 <= 0.98


def _objects(*values: Any) -> Any:
    return object_array([*values] * 9)


@pytest.mark.parametrize(
    ("metric", "source", "result", "references"),
    [
        (CLASSIFICATION["f1"], np.array([0, 1, 2] * 10), np.array([0, 1, 1] * 10), np.array([0, 1, 2] * 10)),
        (TOKENS["f1"], _objects(["B-X"], ["B-X"]), _objects(["O"], ["B-X"]), _objects(["B-X"], ["B-X"])),
        (SPANS["f1"], _objects("a cat", "a cat"), _objects("a cat", "a cat sat"), _objects(["cat"], ["cat"])),
    ],
)
def test_units_may_be_rows_sentences_or_questions(metric: Any, source: Any, result: Any, references: Any) -> None:
    evidence = compare_answers(metric, source, result, references)
    assert isinstance(evidence, Draws)
    assert evidence.units == len(references)
    assert (evidence.source, evidence.result) == (metric(source, references), metric(result, references))
    assert paired_difference(evidence).reading == "worse"
    same = paired_difference(compare_answers(metric, source, source, references))
    assert (same.change, same.reading) == (0, "within noise")


def test_a_bootstrap_of_equal_answers_is_not_certain() -> None:
    truth = np.tile([0, 1, 1], 40)
    answers = np.where(np.arange(120) % 5, truth, 1 - truth)
    evidence = compare_answers(CLASSIFICATION["f1"], answers, answers, truth)
    assert evidence.interval() == Pairs(120, 0, 0, 0).interval()
    assert evidence.p_above(-0.01) == pytest.approx(1 - evidence.p_below(-0.01))
    verdicts = [non_inferiority(evidence, Margin(value, relative=False)) for value in (0.01, 0.03)]
    assert [each.verdict for each in verdicts] == ["not shown", "shown"]
    assert verdicts[0].test == "score test, Tango 1998: no draw differs"
    assert find_power(evidence, Margin(0.01, relative=False)).needed == rows_needed(0.0, 0.01)
    far = compare_answers(REGRESSION["mse"], 500 * answers, 500 * answers, truth, lower_is_better=True)
    assert find_power(far, Margin(0.01, relative=True)).sentence == "120 rows can show 2.3%, not 1%; 268 rows could"


@pytest.mark.parametrize("name", ["mse", "pearson"])
def test_clusters_are_drawn_whole(name: str) -> None:
    source, result, truth = _scored(60)
    alone = compare_answers(REGRESSION[name], source, result, truth, samples=200)
    each = compare_answers(REGRESSION[name], source, result, truth, samples=200, clusters=np.arange(60))
    assert each.interval() == pytest.approx(alone.interval())
    # every unit twice tells no more than once
    documents = [f"document {number:02}" for number in range(60) for _ in range(2)]
    twice = [np.repeat(values, 2) for values in (source, result, truth)]
    clustered = compare_answers(REGRESSION[name], *twice, samples=200, clusters=documents)
    assert clustered.interval() == pytest.approx(alone.interval())
    assert clustered.units == 60
    low, high = compare_answers(REGRESSION[name], *twice, samples=200).interval()
    assert high - low < 0.85 * (clustered.interval()[1] - clustered.interval()[0])
    with pytest.raises(ValueError, match="60 units, 3 clusters"):
        compare_answers(REGRESSION[name], source, result, truth, clusters=[0, 1, 2])


def test_right_and_wrong_answers_of_clusters_are_drawn_and_not_counted() -> None:
    truth = np.zeros(8, int)
    found = compare_answers(CLASSIFICATION["accuracy"], truth, truth, truth, clusters=[0, 0, 1, 1, 2, 2, 3, 3])
    assert isinstance(found, Draws)
    assert (found.units, found.source) == (4, 1.0)


@pytest.mark.parametrize("metric", [CLASSIFICATION["accuracy"], SPANS["exact_match"]])
def test_right_and_wrong_answers_are_counted(metric: RowMetric) -> None:
    if metric is SPANS["exact_match"]:
        source, result, truth = (
            object_array(["a", "b", "c"]),
            object_array(["a", "x", "x"]),
            object_array([["a"], ["b"], ["c", "x"]]),
        )
    else:
        source, result, truth = np.array([0, 1, 2]), np.array([0, 0, 2]), np.array([0, 1, 2])
    evidence = compare_answers(metric, source, result, truth)
    assert evidence == Pairs(both=2, broken=1, repaired=0, neither=0)
    assert (evidence.source, evidence.result) == (metric(source, truth), metric(result, truth))


@pytest.mark.parametrize(
    ("broken", "repaired", "reading"), [(30, 5, "worse"), (5, 30, "better"), (12, 10, "within noise")]
)
def test_a_difference_is_read_as_better_worse_or_noise(broken: int, repaired: int, reading: str) -> None:
    difference = paired_difference(Pairs(500, broken, repaired, 50))
    assert difference.reading == reading
    assert difference.test == "score test, Tango 1998"
    assert difference.low < difference.change < difference.high


def test_a_larger_error_is_worse() -> None:
    source, result, truth = _scored(400)
    worse = compare_answers(REGRESSION["mse"], source, result, truth, lower_is_better=True)
    assert paired_difference(worse).reading == "worse"
    assert paired_difference(worse).test == "paired bootstrap, 1,000 draws"
    better = compare_answers(REGRESSION["mse"], result, source, truth, lower_is_better=True)
    assert paired_difference(better).reading == "better"


def test_answers_to_other_units_are_refused() -> None:
    with pytest.raises(ValueError, match="3 answers of the source, 2 of the result and 3 references"):
        compare_answers(CLASSIFICATION["accuracy"], np.zeros(3), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="0 answers of the source, 0 of the result and 0 references"):
        compare_answers(CLASSIFICATION["accuracy"], np.zeros(0), np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="the same 100 or more draws of both models, not 10 and 10"):
        Draws(0.5, 0.5, np.zeros(10), np.zeros(10), units=3)


# Verdicts


def test_tango_s_example_is_shown_at_his_margin_and_not_at_a_narrower_one() -> None:
    # Tango 1998: p = 0.044 at 0.1, and the lower end of the 90% interval is -0.096
    wide, narrow = (non_inferiority(CONTACT_LENSES, Margin(value, relative=False)) for value in (0.1, 0.09))
    assert (wide.verdict, narrow.verdict) == ("shown", "not shown")
    assert wide.p_value == pytest.approx(0.044, abs=5e-4)
    assert (wide.drop, wide.largest) == pytest.approx((1 / 44, 0.096), abs=5e-4)
    assert wide.test == "score test, Tango 1998"


def test_tang_s_example_is_shown_at_5_percent_and_not_at_4() -> None:
    # Tang et al. 2003, Table II: the 90% interval of the ratio begins at 0.958
    wide, narrow = (non_inferiority(HIV_SCREENING, Margin(value, relative=True)) for value in (0.05, 0.04))
    assert (wide.verdict, narrow.verdict) == ("shown", "not shown")
    assert (wide.drop, wide.largest) == pytest.approx((11 / 462, 0.042), abs=5e-4)
    assert wide.test == "score test, Nam and Blackwelder 2002"


def _evidence() -> list[Any]:
    source, result, truth = _scored(300)
    return [
        Pairs(850, 30, 20, 100),
        compare_answers(REGRESSION["pearson"], source, result, truth),
        compare_answers(REGRESSION["mse"], source, result, truth, lower_is_better=True),
    ]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("evidence", _evidence(), ids=["proportions", "bootstrap", "error"])
def test_the_verdict_turns_at_the_bounds(evidence: Any, relative: bool) -> None:
    found = non_inferiority(evidence, Margin(0.5, relative))
    assert non_inferiority(evidence, Margin(found.largest + 1e-6, relative)).verdict == "shown"
    assert non_inferiority(evidence, Margin(found.largest - 1e-6, relative)).verdict == "not shown"
    assert found.least < found.drop < found.largest
    if found.least > 0:
        assert non_inferiority(evidence, Margin(found.least - 1e-6, relative)).verdict == "worse"
        assert non_inferiority(evidence, Margin(found.least + 1e-6, relative)).verdict == "not shown"


def test_a_large_drop_is_worse_than_the_margin() -> None:
    assert non_inferiority(Pairs(700, 100, 5, 67), Margin(0.01, relative=True)).verdict == "worse"
    source, result, truth = _scored(400)
    evidence = compare_answers(REGRESSION["mse"], source, result, truth, lower_is_better=True)
    found = non_inferiority(evidence, Margin(0.01, relative=True))
    assert (found.verdict, found.p_value > 0.95, found.drop > 0.1) == ("worse", True, True)


def test_a_better_result_is_shown_and_its_drop_is_negative() -> None:
    found = non_inferiority(Pairs(800, 5, 40, 55), Margin(0.01, relative=False))
    assert found.verdict == "shown"
    assert max(found.largest, found.drop) < 0


def test_a_verdict_is_said_in_a_sentence() -> None:
    said = [
        non_inferiority(pairs, margin).sentence
        for pairs, margin in (
            (CONTACT_LENSES, Margin(0.1, relative=False)),
            (HIV_SCREENING, Margin(0.04, relative=True)),
            (Pairs(700, 100, 5, 67), Margin(0.01, relative=True)),
        )
    ]
    assert said == [
        "the drop is below 0.1: it is at most 0.0957 (p = 0.044)",
        "the drop is not shown to be below 4%: it is at most 4.19% (p = 0.068)",
        "the drop is above 1%: it is at least 10%",
    ]


def test_too_few_rows_show_nothing_even_if_none_flips() -> None:
    assert non_inferiority(Pairs(100, 0, 0, 0), Margin(0.01, relative=False)).verdict == "not shown"
    assert non_inferiority(Pairs(300, 0, 0, 0), Margin(0.01, relative=False)).verdict == "shown"


def test_a_bootstrap_relative_to_0_is_refused() -> None:
    evidence = Draws(0.0, 0.1, np.zeros(100), np.ones(100), units=5)
    with pytest.raises(ValueError, match="the source scores 0, so no drop relative to it is defined"):
        non_inferiority(evidence, Margin(0.01, relative=True))


# Power


def test_units_of_one_mean() -> None:
    # Chow, Shao and Wang 2008, page 52, as powerandsamplesize.com computes it: distance 1, deviation 1, n = 7
    assert units_needed(1.0, 1.0) == 7
    # statpsych's size.supinf.prop.ps(.05, .9, .35, .20, .45, .05): 227 pairs, at a distance of 0.1 and two-sided 5%
    variance = 0.35 * 0.65 + 0.2 * 0.8 - 2 * 0.45 * math.sqrt(0.35 * 0.65 * 0.2 * 0.8)
    assert units_needed(math.sqrt(variance), 0.1, power=0.9, alpha=0.025) == 227


def test_rows_where_none_flips_follow_the_closed_form() -> None:
    # z² (1 - margin) / margin with z = 1.645; the rule of three (Hanley and Lippman-Hand 1983) says 300 for 1%
    assert rows_needed(0.0, 0.01) == math.ceil(1.6448536**2 * 99)


@pytest.mark.parametrize(("discordance", "margin"), [(0.1, 0.04), (0.2, 0.05)])
def test_the_rows_that_are_needed_give_the_power_that_is_asked_for(discordance: float, margin: float) -> None:
    # exact, over all tables: Nam 1997 finds the formula close to the true power
    rows = rows_needed(discordance, margin)
    shown = sum(p for pairs, p in _tables(rows, discordance / 2, discordance / 2) if pairs.p_above(-margin) <= 0.05)
    assert shown == pytest.approx(0.8, abs=0.01)


@QUICK
@given(st.floats(0, 0.5), st.floats(0.005, 0.3))
def test_the_smallest_margin_is_the_inverse_of_the_rows(discordance: float, margin: float) -> None:
    rows = rows_needed(discordance, margin)
    assert smallest_margin(rows, discordance) <= margin * 1.0001
    if rows > 2:
        assert smallest_margin(rows - 1, discordance) >= margin * 0.9999
    assert rows_needed(discordance, margin / 2) >= rows


def test_more_rows_show_a_smaller_margin_and_one_row_shows_none() -> None:
    margins = [smallest_margin(rows, 0.04) for rows in (1, 100, 872, 10_000)]
    assert margins == sorted(margins, reverse=True)
    assert smallest_margin(0, 0.04) == smallest_margin(1, 1.0, power=0.999) == 1.0
    assert smallest_margin_of_deviation(units_needed(0.3, 0.02), 0.3) == pytest.approx(0.02, rel=1e-3)


def test_power_is_said_in_a_sentence() -> None:
    pairs = Pairs(872 - 35 - 40, 18, 17, 40)
    power = find_power(pairs, Margin(0.01, relative=False))
    assert power.needed == rows_needed(pairs.discordance, 0.01)
    assert power.sentence == f"872 rows can show 1.8 points, not 1; {power.needed:,} rows could"
    assert power.smallest == pytest.approx(0.0174, abs=5e-4)
    assert find_power(pairs, Margin(0.05, relative=False)).sentence == "872 rows can show 1.8 points"
    relative = find_power(pairs, Margin(0.01, relative=True))
    assert relative.sentence == f"872 rows can show 1.9%, not 1%; {relative.needed:,} rows could"
    assert relative.smallest == pytest.approx(power.smallest / pairs.source)
    points, percent = Margin(0.012, relative=False), Margin(0.012, relative=True)
    assert describe_power(1, 2473, 0.25, points, "question") == (
        "1 question can show 25 points, not 1.2; 2,473 questions could"
    )
    assert (
        describe_power(9, 10, 0.0521, percent, "sentence") == "9 sentences can show 5.3%, not 1.2%; 10 sentences could"
    )
    assert describe_power(9, 9, 0.0, percent) == "9 rows can show 0%"


def test_power_of_a_bootstrap_comes_from_its_standard_error() -> None:
    source, result, truth = _scored(300)
    evidence = compare_answers(REGRESSION["pearson"], source, result, truth)
    power = find_power(evidence, Margin(0.01, relative=True))
    assert power.smallest == pytest.approx(2.4865 * evidence.error / evidence.source, rel=1e-4)  # z of 95% and of 80%
    assert power.needed == pytest.approx(300 * (power.smallest / 0.01) ** 2, rel=1e-3)


def test_what_is_no_share_is_refused() -> None:
    for call, message in (
        (lambda: rows_needed(0.1, 1.0), "a margin lies between 0 and 1, not 1"),
        (lambda: rows_needed(0.1, 0.01, power=1.0), "a power lies between 0 and 1, not 1"),
        (lambda: rows_needed(0.1, 0.01, alpha=0.0), "a level lies between 0 and 1, not 0"),
        (lambda: rows_needed(1.5, 0.01), "a discordance is a share of the rows, from 0 to 1, not 1.5"),
        (lambda: units_needed(1.0, 0.0), "a margin is more than 0, not 0"),
        (lambda: find_power(Pairs(0, 0, 2, 2), Margin(0.01, relative=True)), "the source scores 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Several models, several seeds


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # Wikipedia, "Holm–Bonferroni method": two of four are rejected at 5%; statsmodels 0.15 gives these values
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # R: p.adjust(c(0.01, 0.04, 0.20, 0.03, 0.005, 0.07), "holm")
        ([0.01, 0.04, 0.20, 0.03, 0.005, 0.07], [0.05, 0.12, 0.20, 0.12, 0.03, 0.14]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_the_values_and_bonferroni_s(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, larger in zip(p_values, adjusted, strict=True):
        assert p <= larger <= min(1, p * len(p_values)) + 1e-12
    assert np.array_equal(np.array(adjusted)[np.argsort(p_values, kind="stable")], np.sort(adjusted))


def test_what_is_no_p_value_is_refused() -> None:
    with pytest.raises(ValueError, match="p-values lie between 0 and 1"):
        holm([0.1, 1.2])
    with pytest.raises(ValueError, match="p-values lie between 0 and 1"):
        holm([float("nan")])


def test_seeds_are_summarized_by_mean_and_sample_deviation() -> None:
    # Wikipedia, "Standard deviation": eight marks with mean 5; the sum of squares is 32, so the sample's is √(32 / 7)
    marks = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    assert summarize_seeds(marks) == Seeds(marks, 5.0, pytest.approx(math.sqrt(32 / 7)))
    assert summarize_seeds([0.9]).sd is None
    with pytest.raises(ValueError, match="there is no score to summarize"):
        summarize_seeds([])


# R's `sleep`: the hours that ten patients slept longer with each of two drugs (Student 1908). R's help page of t.test
# has the paired test: t = -4.0621, p = 0.002833, 95% interval -2.4598858 to -0.7001142.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def test_seeds_are_compared_by_student_s_paired_test() -> None:
    found = compare_seeds(*SLEEP)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    assert found.p_value == pytest.approx(0.002833, abs=1e-6)
    assert found.reading == "better"
    assert compare_seeds(*SLEEP, lower_is_better=True).reading == "worse"
    assert compare_seeds(SLEEP[1], SLEEP[0]).reading == "worse"


@QUICK
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_seeds_agree_with_the_formula_of_one_sample(scores: list[tuple[float, float]]) -> None:
    source, result = map(list, zip(*scores, strict=True))
    changes = np.subtract(result, source)
    found = compare_seeds(source, result)
    assert found.mean == pytest.approx(changes.mean())
    if np.ptp(changes) > 1e-6:
        half = scipy.stats.t.ppf(0.975, len(changes) - 1) * changes.std(ddof=1) / math.sqrt(len(changes))
        assert (found.low, found.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=1e-9)
        assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(changes, 0).pvalue)


def test_the_same_change_with_each_seed_has_no_interval() -> None:
    found = compare_seeds([0.9, 0.8], [0.9 - 0.1, 0.8 - 0.1])  # which differ by rounding
    assert (found.low, found.high, found.p_value, found.reading) == (None, None, None, "no spread")


def test_one_seed_is_not_compared() -> None:
    with pytest.raises(ValueError, match="two seeds or more"):
        compare_seeds([0.9], [0.8])


# Flips, agreement, divergence


def _logits(rows: int = 50, classes: int = 3, seed: int = 0) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(rows, classes)) * 3
    return source, source + generator.normal(size=(rows, classes)) * 2, generator.integers(0, classes, rows)


def test_margins_are_by_how_much_the_right_class_leads() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, 4.0]])
    assert logit_margins(logits, np.array([0, 2, 0])).tolist() == [1.5, -2.0, -3.0]


def test_flips_are_counted_and_the_worst_come_first() -> None:
    source, result, truth = _logits()
    right = [(logits.argmax(1) == truth) for logits in (source, result)]
    ours, theirs = (logit_margins(logits, truth) for logits in (source, result))
    assert np.array_equal(ours > 0, right[0])
    flips = find_flips(*right, ours - theirs, worst=4)
    assert flips.pairs.source == accuracy_score(truth, source.argmax(1))
    assert flips.pairs.result == accuracy_score(truth, result.argmax(1))
    broken = [row for row in range(50) if right[0][row] and not right[1][row]]
    repaired = [row for row in range(50) if right[1][row] and not right[0][row]]
    assert (flips.pairs.broken, flips.pairs.repaired) == (len(broken), len(repaired))
    assert flips.broken == sorted(broken, key=lambda row: theirs[row] - ours[row])[:4]
    assert flips.repaired == sorted(repaired, key=lambda row: ours[row] - theirs[row])[:4]
    assert find_flips(*right).broken == broken[:10]


def test_swapped_models_swap_their_flips() -> None:
    source, result, truth = _logits()
    right = [(logits.argmax(1) == truth) for logits in (source, result)]
    fall = logit_margins(source, truth) - logit_margins(result, truth)
    one, other = find_flips(right[0], right[1], fall), find_flips(right[1], right[0], -fall)
    assert (one.broken, one.repaired) == (other.repaired, other.broken)


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    assert share_agreement(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    assert share_agreement(object_array([["O"], ["B-X"]]), object_array([["O"], ["O"]])) == 0.5
    with pytest.raises(ValueError, match="2 answers of the source, 3 of the result"):
        share_agreement(np.zeros(2), np.zeros(3))


def test_the_divergence_of_kullback_s_example() -> None:
    # Kullback 1959, Information Theory and Statistics, Table 2.1: 0.0853 nats one way, 0.0975 the other
    p, q = np.log([[9 / 25, 12 / 25, 4 / 25]]), np.log([[1 / 3, 1 / 3, 1 / 3]])
    assert mean_divergence(p, q) == pytest.approx(0.0852996, abs=1e-6)
    assert mean_divergence(q, p) == pytest.approx(0.0974550, abs=1e-6)


def test_the_divergence_agrees_with_scipy_and_is_0_for_equal_probabilities() -> None:
    source, result, _ = _logits()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (source, result))
    assert mean_divergence(source, result) == pytest.approx(float(scipy.stats.entropy(p, q, axis=1).mean()))
    assert mean_divergence(source, source + 5.0) == pytest.approx(0.0, abs=1e-12)
    assert mean_divergence(np.array([[900.0, 0.0]]), np.array([[0.0, 0.0]])) == pytest.approx(math.log(2))


def test_logits_that_do_not_fit_are_refused() -> None:
    for logits, truth, message in (
        (np.zeros((2, 3)), np.zeros(3, int), r"not \(2, 3\) for 3 references"),
        (np.zeros((2, 1)), np.zeros(2, int), r"not \(2, 1\) for 2 references"),
        (np.full((2, 2), np.nan), np.zeros(2, int), "logits are finite numbers"),
        (np.zeros((2, 2)), np.array([0, 2]), "references are class ids from 0 to 1"),
        (np.zeros((2, 2)), np.array([0, -1]), "references are class ids from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            logit_margins(logits, truth)
    with pytest.raises(ValueError, match="logits of both models are alike"):
        mean_divergence(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="there are 3 rows and 2 margins"):
        find_flips(np.ones(3), np.ones(3), np.zeros(2))


# Confidence


def test_the_calibration_error_of_torchmetrics_example() -> None:
    # the docstring of torchmetrics' MulticlassCalibrationError: 0.2 with three bins
    probabilities = np.array([[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]])
    found = measure_confidence(np.log(probabilities), np.array([0, 1, 2, 0]), bins=3)
    assert found.ece == pytest.approx(0.2)
    assert found.bins == 3


def test_the_calibration_error_by_hand() -> None:
    # bins (0.4, 0.6] and (0.8, 1]: |1/2 - 0.55| · 2/5 + |2/3 - 0.9| · 3/5
    confidences, right = np.array([0.5, 0.6, 0.85, 0.85, 1.0]), np.array([True, False, True, True, False])
    assert expected_calibration_error(confidences, right, bins=5) == pytest.approx(0.05 * 0.4 + (0.9 - 2 / 3) * 0.6)
    assert expected_calibration_error(np.ones(4), np.ones(4, bool)) == 0.0
    assert expected_calibration_error(np.zeros(2), np.zeros(2, bool)) == 0.0


def test_the_likelihood_and_brier_s_score_of_scikit_learn_s_examples() -> None:
    # the docstring of log_loss: spam, ham, ham, spam → 0.21616
    p = np.array([[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
    assert measure_confidence(np.log(p), np.array([1, 0, 0, 1])).nll == pytest.approx(0.21616, abs=1e-5)
    # the docstring of brier_score_loss: 0.0375, which for two classes is half of Brier's own sum
    positive = np.array([0.1, 0.9, 0.8, 0.3])
    found = measure_confidence(np.log(np.stack([1 - positive, positive], axis=1)), np.array([0, 1, 1, 0]))
    assert found.brier == pytest.approx(2 * 0.0375)


@pytest.mark.parametrize("classes", [2, 5])
def test_confidence_agrees_with_scikit_learn(classes: int) -> None:
    logits, _, truth = _logits(80, classes)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = measure_confidence(logits, truth)
    assert found.nll == pytest.approx(log_loss(truth, p, labels=list(range(classes))))
    one_hot = np.eye(classes)[truth]
    assert found.brier == pytest.approx(sum(brier_score_loss(one_hot[:, c], p[:, c]) for c in range(classes)))
    assert found.bins == 15
    assert 0 <= found.ece <= 1


def test_there_is_at_least_one_bin() -> None:
    with pytest.raises(ValueError, match="there is at least one bin, not 0"):
        measure_confidence(np.zeros((2, 2)), np.array([0, 1]), bins=0)


# Classes


def test_f1_of_each_class_as_in_scikit_learn_s_example() -> None:
    # the docstring of f1_score: 0.8, 0 and 0
    truth, predictions = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]
    found = {each.name: each for each in compare_classes(truth, predictions, truth, ["a", "b", "c"])}
    assert [found[name].result_f1 for name in "abc"] == pytest.approx([0.8, 0, 0])
    assert [found[name].source_f1 for name in "abc"] == [1, 1, 1]
    assert [(found[name].broken, found[name].repaired, found[name].items) for name in "abc"] == [
        (0, 0, 2),
        (2, 0, 2),
        (2, 0, 2),
    ]
    assert found["b"].change == -1
    assert all(each.rare for each in found.values())


def test_classes_agree_with_scikit_learn_and_the_largest_loss_comes_first() -> None:
    generator = np.random.default_rng(0)
    truth = generator.choice(4, 400, p=[0.5, 0.3, 0.18, 0.02])
    source, result = (
        np.where(generator.random(400) < share, truth, generator.integers(0, 4, 400)) for share in (0.9, 0.8)
    )
    changes = compare_classes(source, result, truth)
    for answers, attribute in ((source, "source_f1"), (result, "result_f1")):
        expected = dict(enumerate(f1_score(truth, answers, average=None)))
        assert {int(each.name): getattr(each, attribute) for each in changes} == pytest.approx(expected)
    assert [each.change for each in changes] == sorted(each.change for each in changes)
    assert {each.name for each in changes if each.rare} == {"3"}
    pairs = count_pairs(source == truth, result == truth)
    assert (sum(each.broken for each in changes), sum(each.repaired for each in changes)) == (
        pairs.broken,
        pairs.repaired,
    )
    assert changes[0].p_value == mcnemar_exact(changes[0].broken, changes[0].repaired)


def test_entities_as_in_seqeval_s_example() -> None:
    # the README of seqeval: MISC 0, PER 1
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predictions = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    misc, per = compare_entities(truth, predictions, truth)
    assert (misc.name, misc.source_f1, misc.result_f1, misc.broken, misc.items) == ("MISC", 1, 0, 1, 1)
    assert (per.name, per.source_f1, per.result_f1, per.broken) == ("PER", 1, 1, 0)
    tags = {each.name: each for each in compare_tags(truth, predictions, truth)}
    assert tags["B-MISC"].result_f1 == 0
    assert tags["I-MISC"].result_f1 == pytest.approx(2 * 2 / (3 + 2))
    assert tags["O"].items == 5


def test_a_class_that_is_only_predicted_is_a_class() -> None:
    changes = compare_classes([0, 0], [0, 1], [0, 0])
    assert {each.name: (each.items, each.result_f1) for each in changes} == {
        "0": (2, pytest.approx(2 / 3)),
        "1": (0, 0),
    }
    with pytest.raises(ValueError, match="2, 1 and 2 entries are given"):
        compare_classes([0, 0], [0], [0, 0])


# Slices


def test_lengths_are_divided_at_quantiles() -> None:
    lengths = np.array([3, 9, 4, 8, 5, 7, 6, 10])
    masks = bin_lengths(lengths, 4)
    assert list(masks) == ["3-4", "5-6", "7-8", "9-10"]
    assert [mask.sum() for mask in masks.values()] == [2, 2, 2, 2]
    assert list(bin_lengths(np.array([5, 5, 5, 9]), 4)) == ["5", "9"]
    with pytest.raises(ValueError, match="0 rows cannot be divided into 4 ranges"):
        bin_lengths(np.array([]))


@QUICK
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 6))
def test_each_row_is_in_one_range_that_holds_its_length(lengths: list[int], bins: int) -> None:
    masks = bin_lengths(np.array(lengths), bins)
    assert np.array_equal(sum(mask.astype(int) for mask in masks.values()), np.ones(len(lengths)))
    assert len(masks) <= bins
    for name, mask in masks.items():
        ends = [int(end) for end in name.split("-")]
        assert (min(np.array(lengths)[mask]), max(np.array(lengths)[mask])) == (ends[0], ends[-1])


def test_a_column_is_divided_by_its_most_frequent_values() -> None:
    masks = group_column(["b", "a", "b", None])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "None": [False, False, False, True],
        "a": [False, True, False, False],
        "b": [True, False, True, False],
    }
    many = [str(n) for n in range(30)] + ["29", "28"]
    assert len(group_column(many)) == 20
    assert {"28", "29"} <= set(group_column(many))


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_slices_are_scored_as_their_rows_alone(name: str) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, 200)
    source = np.where(generator.random(200) < 0.9, truth, 1 - truth)
    result = np.where(generator.random(200) < 0.8, truth, 1 - truth)
    lengths = generator.integers(1, 40, 200)
    metric = CLASSIFICATION[name]
    slices = compare_slices(metric, source, result, truth, bin_lengths(lengths, 3), samples=200)
    assert sum(each.difference.units for each in slices) == 200
    low, high = map(int, slices[0].name.split("-"))
    few = (low <= lengths) & (lengths <= high)
    assert slices[0].source == metric(source[few], truth[few])
    assert slices[0].difference.change == pytest.approx(metric(result[few], truth[few]) - slices[0].source)
    pairs = compare_slices(metric, source, result, truth, {"few": few}, clusters=np.arange(200) // 2, samples=200)
    assert pairs[0].difference.units == len(set((np.arange(200) // 2)[few]))
    with pytest.raises(ValueError, match="there are 200 units, and 3 in the division 'x'"):
        compare_slices(metric, source, result, truth, {"x": np.ones(3, bool)})


def test_the_loss_that_a_test_split_can_rule_out_is_told_beforehand() -> None:
    assert describe_test_size(872) == (
        "872 rows can rule out a loss above 1.8 points of accuracy; 2,562 rows could rule out 1 point "
        "(if compression changes 4% of the answers)"
    )
    assert "could" not in describe_test_size(rows_needed(0.04, 0.01))
