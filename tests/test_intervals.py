"""The estimators of the benchmark: coverage in simulation, hand-worked cases, degenerate input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from peftree.bench import expected, intervals, paired, ranks, transfer
from peftree.bench.intervals import Array, Interval
from peftree.errors import DataError

MATRICES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-100, 100, allow_subnormal=False),
)


def half_width(found: Interval) -> float:
    """Return half the distance between the ends."""
    return (found.high - found.low) / 2


def crossed(rng: np.random.Generator, seeds: int, items: int, between_seeds: float, noise: float) -> Array:
    """Return normal scores with mean 0: item effect (sd 1) + seed effect + noise."""
    out: Array = (
        rng.normal(0, 1, (1, items)) + rng.normal(0, between_seeds, (seeds, 1)) + rng.normal(0, noise, (seeds, items))
    )
    return out


@pytest.mark.parametrize(("seeds", "items", "between"), [(1, 100, 0.0), (2, 100, 0.0), (5, 80, 0.3)])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int, items: int, between: float) -> None:
    rng = np.random.default_rng(7)
    held = [intervals.mean_interval(crossed(rng, seeds, items, between, 0.3)).holds(0.0) for _ in range(400)]
    # 400 rounds: three standard errors of a true coverage of 0.95 are 0.033.
    assert 0.917 <= np.mean(held) <= 0.983


def test_proportions_are_covered() -> None:
    rng = np.random.default_rng(3)
    held = [intervals.mean_interval(rng.random((1, 120)) < 0.85).holds(0.85) for _ in range(400)]
    assert 0.915 <= np.mean(held) <= 0.985


def test_the_paired_interval_is_shorter_than_the_unpaired_and_covers() -> None:
    rng = np.random.default_rng(11)
    held, paired, alone = 0, [], []
    for _ in range(300):
        shared = rng.normal(0, 1, (1, 100))
        one, two = (shared + rng.normal(0, 0.2, (5, 100)) for _ in range(2))
        found = intervals.difference(one + 0.1, two)
        held += found.holds(0.1)
        paired.append(half_width(found))
        alone.append(half_width(intervals.mean_interval(one)))
    assert held / 300 >= 0.915
    assert np.mean(paired) < 0.5 * np.mean(alone)


@settings(max_examples=60, deadline=None)
@given(data=MATRICES)
def test_any_finite_matrix_gives_an_ordered_interval_around_its_mean(data: Array) -> None:
    found = intervals.mean_interval(data)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(float(data.mean()), abs=1e-9)
    assert found == intervals.mean_interval(data)
    same = intervals.difference(data, data)
    assert same.value == 0 and same.holds(0.0)


@settings(max_examples=40, deadline=None)
@given(data=MATRICES, shift=st.floats(-50, 50))
def test_a_constant_shift_is_found_exactly(data: Array, shift: float) -> None:
    found = intervals.difference(data + shift, data)
    assert found.value == pytest.approx(shift, abs=1e-9)
    if found.known:
        assert half_width(found) <= 1e-9


def test_degenerate_samples() -> None:
    alone = intervals.mean_interval([[0.7]])
    assert not alone.known and alone.value == 0.7
    flat = intervals.mean_interval(np.full((2, 50), 0.4))
    assert (flat.low, flat.high) == pytest.approx((0.4, 0.4))
    right = intervals.mean_interval(np.ones((2, 50)))
    assert right.value == right.high == 1.0 and right.low == pytest.approx(1 / (1 + 1.96**2 / 50), rel=1e-3)
    wrong = intervals.mean_interval(np.zeros((1, 50)))
    assert wrong.low == 0.0 and 0.05 < wrong.high < 0.1
    assert paired.permutation_test([[1.0, 2.0]], [[1.0, 2.0]]) == 1.0


def test_proportions_stay_within_bounds() -> None:
    found = intervals.mean_interval([[1.0] * 40, [1.0] * 30 + [0.0] * 10])
    assert 0.0 <= found.low < found.value < found.high <= 1.0


def test_one_number_a_seed_gives_students_interval() -> None:
    values = np.array([[0.81], [0.83], [0.86], [0.80]])
    found = intervals.mean_interval(values)
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values[:, 0]))
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [[[]], [1.0, 2.0], [[math.nan, 1.0]], [[math.inf]], np.zeros((2, 2, 2))])
def test_a_sample_that_is_not_a_finite_matrix_is_refused(bad: object) -> None:
    with pytest.raises(DataError, match="not a finite matrix"):
        intervals.mean_interval(bad)  # type: ignore[arg-type]


def test_samples_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        intervals.difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_permutation_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(5)
    shape = (2, 60)
    found = [paired.permutation_test(rng.normal(size=shape), rng.normal(size=shape), draws=999) for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.085


def test_permutation_matches_enumeration_and_mcnemar() -> None:
    first = np.array([[3.0, 1.0, 4.0, 1.5, 9.0, 2.0]])
    second = np.array([[1.0, 1.2, 2.0, 1.0, 3.0, 2.5]])
    gaps = (first - second)[0]
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean(np.array(sums) >= abs(gaps.sum()) - 1e-12)
    assert paired.permutation_test(first, second) == pytest.approx(exact)
    # 0/1 results: the test is McNemar's exact test on the discordant pairs, here 30 against 14.
    one = np.array([[1.0] * 30 + [0.0] * 14 + [1.0] * 50])
    two = np.array([[0.0] * 30 + [1.0] * 14 + [1.0] * 50])
    mcnemar = stats.binomtest(14, 44, 0.5).pvalue
    assert paired.permutation_test(one, two, draws=200_000) == pytest.approx(mcnemar, rel=0.05)


def test_permutation_finds_a_real_difference() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(2, 200))
    assert paired.permutation_test(base + 0.1 + rng.normal(0, 0.1, base.shape), base) < 0.001


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; made monotone: .02 .03 .06 .06.
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_and_keeps_the_order(values: list[float]) -> None:
    adjusted = paired.holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    ordered = [adjusted[i] for i in order]
    assert ordered == sorted(ordered)


def test_verdicts() -> None:
    assert intervals.verdict(Interval(0.1, -0.1, 0.3)) == "no difference shown"
    assert intervals.verdict(Interval(0.1, 0.0, 0.3)) == "no difference shown"
    assert intervals.verdict(Interval(0.2, 0.1, 0.3)) == "higher"
    assert intervals.verdict(Interval(-0.2, -0.3, -0.1)) == "lower"
    assert intervals.verdict(Interval(0.2, -math.inf, math.inf)) == "no difference shown"


def test_relative_score() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0.5, 0.1, (3, 200))
    full, method = base + 0.2, base + 0.15 + rng.normal(0, 0.01, base.shape)
    found = intervals.relative_score(method, base, full)
    assert found is not None and found.low < 0.75 < found.high and half_width(found) < 0.05
    assert intervals.relative_score(full, base, full) == Interval(1.0, 1.0, 1.0)
    noise = base + rng.normal(0, 0.1, base.shape) * 0.1
    assert intervals.relative_score(method, base, noise - (noise - base).mean()) is None


def test_relative_score_of_perplexities_counts_from_the_base_downwards() -> None:
    rng = np.random.default_rng(4)
    items = rng.normal(0, 0.3, (2, 100))
    found = intervals.relative_score(items + 2.2, items + 3.0, items + 2.0, exponential=True)
    exact = (np.exp(2.2) - np.exp(3.0)) / (np.exp(2.0) - np.exp(3.0))
    assert found is not None and found.value == pytest.approx(exact, rel=1e-6)


def test_relative_score_covers_the_truth() -> None:
    rng = np.random.default_rng(9)
    held, rounds = 0, 300
    for _ in range(rounds):
        shared = rng.normal(0.5, 0.2, (1, 100))
        base, method, full = (shared + gain + rng.normal(0, 0.1, (5, 100)) for gain in (0.0, 0.16, 0.2))
        found = intervals.relative_score(method, base, full)
        assert found is not None
        held += found.holds(0.8)
    assert held / rounds >= 0.915


def test_wilson_by_hand() -> None:
    found = intervals.wilson(8, 10)  # textbook value: 0.490 to 0.943
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(DataError):
        intervals.wilson(3, 2)


def test_standard_errors_and_degrees_of_freedom_by_hand() -> None:
    # Rows 1 3 / 5 11: means 2 and 8, 3 and 7; mean squares 36 (seeds), 16 (items), 4 (rest).
    error, df = intervals.spread(np.array([[1.0, 3.0], [5.0, 11.0]]))
    assert error == pytest.approx(math.sqrt((32 + 12 + 4) / 4))
    assert df == pytest.approx(48**2 / (32 * 36 + 16**2))
    assert intervals.spread(np.array([[1.0, 2.0, 3.0]])) == (pytest.approx(1 / math.sqrt(3)), 2.0)
    assert intervals.spread(np.array([[1.0]])) == (math.inf, 1.0)


def test_the_detectable_difference_is_found_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    found, sizes, exact = 0, [], math.sqrt((1 + 0.3**2 / 5) / 100) * 2.83
    for _ in range(400):
        base = rng.normal(0, 1, (5, 100))
        method = base + exact + crossed(rng, 5, 100, 0.0, 0.3)
        sizes.append(intervals.detectable(method, base))
        found += not intervals.difference(method, base).holds(0.0)
    assert np.mean(sizes) == pytest.approx(exact, rel=0.03)
    assert 0.74 <= found / 400 <= 0.86


def test_retained_says_yes_and_no_only_where_the_interval_does() -> None:
    cases = {(0.9, 1.1): "yes", (0.89, 1.1): "not shown", (0.5, 0.89): "no", (0.5, 0.9): "not shown"}
    assert {ends: intervals.retained(Interval(0.89, *ends)) for ends in cases} == cases
    assert intervals.retained(None) == "not shown"
    assert intervals.retained(Interval(0.95, -math.inf, math.inf)) == "not shown"


def test_fieller_inverts_the_t_test_and_reaches_what_the_delta_method_misses() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(0, 0.3, (5, 80))
    full, method = base + rng.normal(1, 0.5, base.shape), base + rng.normal(0.5, 0.5, base.shape)
    found = intervals.relative_score(method, base, full)
    assert found is not None
    for end in (found.low, found.high):  # at both ends the t statistic of the rest is its quantile
        rest = (method - base) - end * (full - base)
        error, _ = intervals.spread(rest)
        at_centre = intervals.spread((method - base) - found.value * (full - base))[1]
        assert abs(rest.mean()) / error == pytest.approx(stats.t.ppf(0.975, at_centre), rel=1e-6)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    one = [1] * 8 + [0] * 2 + [1] * 10
    two = [0] * 8 + [1] * 2 + [1] * 10
    assert paired.mcnemar(one, two) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert paired.mcnemar(one, one) == 1.0
    p, test = paired.paired_p([one], [two])
    assert test == "McNemar" and p == paired.mcnemar(one, two)
    assert paired.paired_p([one, one], [two, two])[1] == "permutation"
    assert paired.paired_p([[0.5, 1.0]], [[0.0, 1.0]])[1] == "permutation"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10).filter(bool), min_size=1, max_size=9, unique_by=abs))
def test_the_signed_rank_test_is_scipys_where_there_are_no_ties(gaps: list[float]) -> None:
    assert paired.signed_rank(gaps) == pytest.approx(stats.wilcoxon(gaps, method="exact").pvalue)
    assert paired.signed_rank([*gaps, 0.0]) == paired.signed_rank(gaps) >= 2.0 ** (1 - len(gaps)) - 1e-12


def test_sign_test_by_hand() -> None:
    assert paired.sign_test([1, 2, 3, 0, 4, 5]) == pytest.approx(2 / 2**5)
    assert paired.sign_test([]) == paired.signed_rank([]) == 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.data())
def test_the_expected_maximum_is_the_mean_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    found = expected.expected_maximum(scores, size)
    subsets = [max(each) for each in itertools.combinations(scores, size)]
    assert found[-1] == pytest.approx(np.mean(subsets), abs=1e-9)
    assert list(found) == sorted(found) or np.allclose(found, sorted(found))


def test_the_expected_maximum_of_many_trials_does_not_overflow() -> None:
    found = expected.expected_maximum(np.linspace(0, 1, 2001), 1000)
    assert np.isfinite(found).all() and found[0] == pytest.approx(0.5) and 0.998 < found[-1] <= 1


def test_the_curve_stops_at_half_of_the_trials_and_may_go_down() -> None:
    scores = [3.0, 2.0, 9.0, 4.0, 2.5, 2.2, 2.1]
    curve = expected.expected(scores, 20.0, higher_is_better=False)
    assert curve.trials == (1, 2, 3) and curve.seconds == (20.0, 40.0, 60.0)
    assert curve.value == tuple(sorted(curve.value, reverse=True)) and min(curve.value) > 2.0
    assert all(low <= v <= high for low, v, high in zip(curve.low, curve.value, curve.high, strict=True))
    for bad in ([1.0], [], [1.0, math.nan]):
        with pytest.raises(DataError, match="no expected maximum"):
            expected.expected(bad)
    with pytest.raises(DataError, match="best of 3"):
        expected.expected_maximum([1.0, 2.0], 3)


def test_mean_ranks_by_hand() -> None:
    scores = {"a": [3.0, 3.0, 3.0, 9.0], "b": [2.0, 3.0, 2.0, 8.0], "c": [1.0, 1.0, 1.0, 7.0]}
    found = ranks.mean_ranks(scores)
    assert found.names == ("a", "b", "c") and found.means == (1.125, 1.875, 3.0)
    # Nemenyi's q for 3 groups is 2.343 (Demsar 2006, table 5).
    assert found.critical == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 4)), rel=1e-3)
    assert found.groups == ((0, 1), (1, 2)) and found.tasks == 4
    blocks = np.array([[1, 2, 3], [1.5, 1.5, 3], [1, 2, 3], [1, 2, 3]])
    statistic, _ = stats.friedmanchisquare(*blocks.T)
    tied = np.sum((blocks - 2) ** 2) / 8  # scipy's statistic carries the correction for ties already
    davenport = 3 * statistic / (4 * 2 - statistic)
    assert tied < 1 and found.p == pytest.approx(stats.f.sf(davenport, 2, 6))


def test_mean_ranks_of_what_cannot_be_ranked() -> None:
    assert ranks.mean_ranks({"a": [1.0, 1.0], "b": [1.0, 1.0]}).p == 1.0
    assert ranks.mean_ranks({"a": [2.0, 2.0], "b": [1.0, 1.0]}).p == 0.0
    for bad in ({"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}, {"a": [1.0, 2.0], "b": [1.0]}):
        with pytest.raises(DataError, match="Mean ranks need"):
            ranks.mean_ranks(bad)


def test_transfer_by_hand() -> None:
    after = [[0.9, 0.4, 0.3], [0.7, 0.8, 0.5], [0.6, 0.7, 0.9]]
    found = transfer.transfer(after)
    assert found.final == pytest.approx(2.2 / 3)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2) and found.forward is None
    found = transfer.transfer([[0.2, 0.3, 0.3], *after])
    assert found.forward == pytest.approx(((0.4 - 0.3) + (0.5 - 0.3)) / 2)
    assert transfer.transfer(after, higher_is_better=False).backward == pytest.approx(0.2)
    for bad in ([], [[1.0]], [[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0, 2.0]] * 4):
        with pytest.raises(DataError, match="has no transfer"):
            transfer.transfer(bad)
