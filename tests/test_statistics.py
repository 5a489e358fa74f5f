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

from peftree.bench import statistics
from peftree.bench.statistics import Array, Interval
from peftree.errors import DataError

MATRICES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-100, 100, allow_subnormal=False),
)


def crossed(rng: np.random.Generator, seeds: int, items: int, between_seeds: float, noise: float) -> Array:
    """Return normal scores with mean 0: item effect (sd 1) + seed effect + noise."""
    out: Array = (
        rng.normal(0, 1, (1, items)) + rng.normal(0, between_seeds, (seeds, 1)) + rng.normal(0, noise, (seeds, items))
    )
    return out


def coverage(seeds: int, items: int, between_seeds: float, rounds: int = 400) -> float:
    """Return how often the 95 % interval of simulated data holds the true mean 0."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(rounds):
        data = crossed(rng, seeds, items, between_seeds, 0.3)
        held += statistics.mean_interval(data, draws=400).holds(0.0)
    return held / rounds


@pytest.mark.parametrize(("seeds", "items", "between"), [(1, 100, 0.0), (2, 100, 0.0), (5, 80, 0.05)])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int, items: int, between: float) -> None:
    # 400 rounds: three standard errors of a true coverage of 0.95 are 0.033.
    assert 0.917 <= coverage(seeds, items, between) <= 0.983


def test_intervals_cover_variance_between_seeds_that_a_bootstrap_of_items_misses() -> None:
    both = coverage(8, 60, 0.6, rounds=250)
    rng = np.random.default_rng(7)
    items_only = 0
    for _ in range(250):
        data = crossed(rng, 8, 60, 0.6, 0.3).mean(axis=0, keepdims=True)
        items_only += statistics.mean_interval(data, draws=400).holds(0.0)
    assert both >= 0.88 and items_only / 250 < 0.80


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.77), (3, 0.85), (5, 0.90), (10, 0.94)])
def test_the_documented_coverage_with_few_seeds_is_the_measured_one(seeds: int, share: float) -> None:
    # The documented shares come from 6000 rounds; 400 rounds have a standard error of 0.02.
    assert coverage(seeds, 200, 0.3) == pytest.approx(share, abs=0.06)


def test_proportions_are_covered() -> None:
    rng = np.random.default_rng(3)
    held = [statistics.mean_interval(rng.random((1, 120)) < 0.85, draws=400).holds(0.85) for _ in range(400)]
    assert 0.915 <= np.mean(held) <= 0.985


def test_the_paired_interval_is_shorter_than_the_unpaired_and_covers() -> None:
    rng = np.random.default_rng(11)
    held, paired, alone = 0, [], []
    for _ in range(300):
        shared = rng.normal(0, 1, (1, 100))
        one, two = (shared + rng.normal(0, 0.2, (2, 100)) for _ in range(2))
        found = statistics.difference(one + 0.1, two, draws=400)
        held += found.holds(0.1)
        paired.append(found.half_width)
        alone.append(statistics.mean_interval(one, draws=400).half_width)
    assert held / 300 >= 0.915
    assert np.mean(paired) < 0.5 * np.mean(alone)


@settings(max_examples=60, deadline=None)
@given(data=MATRICES)
def test_any_finite_matrix_gives_an_ordered_interval_around_its_mean(data: Array) -> None:
    found = statistics.mean_interval(data, draws=50)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(float(data.mean()), abs=1e-9)
    assert found == statistics.mean_interval(data, draws=50)
    same = statistics.difference(data, data, draws=50)
    assert same.value == 0 and same.holds(0.0)


@settings(max_examples=40, deadline=None)
@given(data=MATRICES, shift=st.floats(-50, 50))
def test_a_constant_shift_is_found_exactly(data: Array, shift: float) -> None:
    found = statistics.difference(data + shift, data, draws=50)
    assert found.value == pytest.approx(shift, abs=1e-9)
    if found.known:
        assert found.half_width <= 1e-9


def test_the_seed_decides_the_resampling() -> None:
    data = np.random.default_rng(0).normal(size=(3, 40))
    assert statistics.mean_interval(data, seed=1) != statistics.mean_interval(data, seed=2)


def test_degenerate_samples() -> None:
    alone = statistics.mean_interval([[0.7]])
    assert not alone.known and alone.value == 0.7
    flat = statistics.mean_interval(np.full((2, 50), 0.4))
    assert (flat.low, flat.high) == pytest.approx((0.4, 0.4))
    right = statistics.mean_interval(np.ones((2, 50)))
    assert right.value == right.high == 1.0 and right.low == pytest.approx(1 / (1 + 1.96**2 / 50), rel=1e-3)
    wrong = statistics.mean_interval(np.zeros((1, 50)))
    assert wrong.low == 0.0 and 0.05 < wrong.high < 0.1
    assert statistics.permutation_test([[1.0, 2.0]], [[1.0, 2.0]]) == 1.0


def test_proportions_stay_within_bounds() -> None:
    found = statistics.mean_interval([[1.0] * 40, [1.0] * 30 + [0.0] * 10])
    assert 0.0 <= found.low < found.value < found.high <= 1.0


def test_one_number_a_seed_gives_students_interval() -> None:
    values = np.array([[0.81], [0.83], [0.86], [0.80]])
    found = statistics.mean_interval(values)
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values[:, 0]))
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [[[]], [1.0, 2.0], [[math.nan, 1.0]], [[math.inf]], np.zeros((2, 2, 2))])
def test_a_sample_that_is_not_a_finite_matrix_is_refused(bad: object) -> None:
    with pytest.raises(DataError, match="not a finite matrix"):
        statistics.mean_interval(bad)  # type: ignore[arg-type]


def test_samples_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        statistics.difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_permutation_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(5)
    shape = (2, 60)
    found = [statistics.permutation_test(rng.normal(size=shape), rng.normal(size=shape), draws=999) for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.085


def test_permutation_matches_enumeration_and_mcnemar() -> None:
    first = np.array([[3.0, 1.0, 4.0, 1.5, 9.0, 2.0]])
    second = np.array([[1.0, 1.2, 2.0, 1.0, 3.0, 2.5]])
    gaps = (first - second)[0]
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean(np.array(sums) >= abs(gaps.sum()) - 1e-12)
    assert statistics.permutation_test(first, second) == pytest.approx(exact)
    # 0/1 results: the test is McNemar's exact test on the discordant pairs, here 30 against 14.
    one = np.array([[1.0] * 30 + [0.0] * 14 + [1.0] * 50])
    two = np.array([[0.0] * 30 + [1.0] * 14 + [1.0] * 50])
    mcnemar = stats.binomtest(14, 44, 0.5).pvalue
    assert statistics.permutation_test(one, two, draws=200_000) == pytest.approx(mcnemar, rel=0.05)


def test_permutation_finds_a_real_difference() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(2, 200))
    assert statistics.permutation_test(base + 0.1 + rng.normal(0, 0.1, base.shape), base) < 0.001


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; made monotone: .02 .03 .06 .06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_and_keeps_the_order(values: list[float]) -> None:
    adjusted = statistics.holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    ordered = [adjusted[i] for i in order]
    assert ordered == sorted(ordered)


def test_verdicts() -> None:
    assert statistics.verdict(Interval(0.1, -0.1, 0.3)) == "no difference shown"
    assert statistics.verdict(Interval(0.1, 0.0, 0.3)) == "no difference shown"
    assert statistics.verdict(Interval(0.2, 0.1, 0.3)) == "higher"
    assert statistics.verdict(Interval(-0.2, -0.3, -0.1)) == "lower"
    assert statistics.verdict(Interval(0.2, -math.inf, math.inf)) == "no difference shown"


def test_relative_score() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0.5, 0.1, (3, 200))
    full, method = base + 0.2, base + 0.15 + rng.normal(0, 0.01, base.shape)
    found = statistics.relative_score(method, base, full)
    assert found is not None and found.low < 0.75 < found.high and found.half_width < 0.05
    assert statistics.relative_score(full, base, full) == Interval(1.0, 1.0, 1.0)
    noise = base + rng.normal(0, 0.1, base.shape) * 0.1
    assert statistics.relative_score(method, base, noise - (noise - base).mean()) is None


def test_relative_score_of_perplexities_counts_from_the_base_downwards() -> None:
    rng = np.random.default_rng(4)
    items = rng.normal(0, 0.3, (2, 100))
    found = statistics.relative_score(items + 2.2, items + 3.0, items + 2.0, transform=np.exp)
    exact = (np.exp(2.2) - np.exp(3.0)) / (np.exp(2.0) - np.exp(3.0))
    assert found is not None and found.value == pytest.approx(exact, rel=1e-6)


def test_relative_score_covers_the_truth() -> None:
    rng = np.random.default_rng(9)
    held, rounds = 0, 300
    for _ in range(rounds):
        shared = rng.normal(0.5, 0.2, (1, 100))
        base, method, full = (shared + gain + rng.normal(0, 0.1, (2, 100)) for gain in (0.0, 0.16, 0.2))
        found = statistics.relative_score(method, base, full, draws=400)
        assert found is not None
        held += found.holds(0.8)
    assert held / rounds >= 0.915


def test_wilson_by_hand() -> None:
    found = statistics.wilson(8, 10)  # textbook value: 0.490 to 0.943
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(DataError):
        statistics.wilson(3, 2)
