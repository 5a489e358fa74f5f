"""The estimators on simulated data: what they cover, how often tests reject under the null, bias."""

from __future__ import annotations

import numpy as np
import pytest

from peftree.bench import expected, intervals, paired, ranks
from peftree.bench.intervals import Array

ROUNDS = 2000  # a coverage of .95 then has a standard error of .005
pytestmark = pytest.mark.slow


def crossed(rng: np.random.Generator, seeds: int, items: int, between: float, item: float, noise: float) -> Array:
    """Return normal scores with mean 0; `between` is in standard errors of the mean without seed effects."""
    error = np.sqrt((item**2 + noise**2 / seeds) / items)
    out: Array = (
        rng.normal(0, item, (1, items))
        + rng.normal(0, between * error, (seeds, 1))
        + rng.normal(0, noise, (seeds, items))
    )
    return out


def covered(seeds: int, items: int, between: float, item: float = 1.0, noise: float = 1.0) -> float:
    """Return how often the t interval over crossed effects holds the truth."""
    rng = np.random.default_rng(17)
    drawn = (crossed(rng, seeds, items, between, item, noise) for _ in range(ROUNDS))
    return float(np.mean([intervals.mean_interval(data).holds(0.0) for data in drawn]))


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("items", [60, 250])
@pytest.mark.parametrize("between", [0.0, 1.0, 4.0])
def test_from_five_seeds_the_interval_covers_93_to_97_percent(seeds: int, items: int, between: float) -> None:
    assert 0.93 <= covered(seeds, items, between) <= 0.97


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.87), (3, 0.92), (5, 0.94), (10, 0.95)])
def test_the_documented_coverage_under_the_widest_spread_is_the_measured_one(seeds: int, share: float) -> None:
    assert covered(seeds, 100, 4.0, noise=0.3) == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize("level", [0.6, 0.86, 0.97])
def test_proportions_are_covered(level: float) -> None:
    rng = np.random.default_rng(5)
    held = []
    for _ in range(ROUNDS):
        # The chance of each item, the same for all seeds, and a shift of each seed, averaging to `level`.
        chance = np.clip(rng.beta(4 * level, 4 * (1 - level), (1, 250)) + rng.normal(0, 0.005, (5, 1)), 0, 1)
        held.append(intervals.mean_interval(rng.random((5, 250)) < chance).holds(level))
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("between", [0.0, 2.0])
@pytest.mark.parametrize("exponential", [False, True])
def test_differences_and_relative_scores_are_covered(between: float, exponential: bool) -> None:
    rng = np.random.default_rng(23)
    levels = (1.0, 0.6, 0.5)  # baseline, method, full
    truth = [np.exp(level) if exponential else level for level in levels]
    gap, share = truth[1] - truth[2], (truth[1] - truth[0]) / (truth[2] - truth[0])
    held, parts = [], []
    for _ in range(ROUNDS):
        shared = rng.normal(0, 0.5, (1, 120))
        base, method, full = (level + shared + crossed(rng, 5, 120, between, 0.3, 0.3) for level in levels)
        held.append(intervals.difference(method, full, exponential=exponential).holds(float(gap)))
        part = intervals.relative_score(method, base, full, exponential=exponential)
        assert part is not None
        parts.append(part.holds(float(share)))
    assert 0.93 <= np.mean(held) <= 0.97 and 0.93 <= np.mean(parts) <= 0.97


def test_tests_reject_a_true_null_at_most_as_often_as_they_say() -> None:
    rng = np.random.default_rng(29)
    mcnemar, permuted, signed = [], [], []
    for number in range(ROUNDS):
        one, two = (rng.random((1, 200)) < 0.7).astype(float), (rng.random((1, 200)) < 0.7).astype(float)
        mcnemar.append(paired.mcnemar(one[0], two[0]))
        permuted.append(
            paired.permutation_test(rng.normal(size=(3, 50)), rng.normal(size=(3, 50)), draws=500, seed=number)
        )
        signed.append(paired.signed_rank(rng.normal(size=10).tolist()))
    sizes = {
        name: float(np.mean(np.array(found) <= 0.05))
        for name, found in (("mcnemar", mcnemar), ("permuted", permuted), ("signed", signed))
    }
    # Discrete tests stay below 5 %: McNemar's on about 84 discordant pairs, 1024 sign patterns.
    assert 0.025 <= sizes["mcnemar"] <= 0.06 and 0.04 <= sizes["permuted"] <= 0.065
    assert 0.035 <= sizes["signed"] <= 0.06


def test_a_test_over_items_alone_takes_luck_with_seeds_for_a_difference_and_the_interval_does_not() -> None:
    rng = np.random.default_rng(31)
    rejected, shown = [], []
    for _ in range(ROUNDS // 4):
        one, two = (crossed(rng, 5, 100, 3.0, 0.3, 0.3) for _ in range(2))
        rejected.append(paired.permutation_test(one, two, draws=400) <= 0.05)
        shown.append(not intervals.difference(one, two).holds(0.0))
    assert np.mean(rejected) > 0.15 and np.mean(shown) <= 0.09


def test_holm_and_friedman_keep_the_family_at_five_percent() -> None:
    rng = np.random.default_rng(37)
    family = [min(paired.holm(rng.random(8).tolist())) <= 0.05 for _ in range(ROUNDS)]
    assert 0.035 <= np.mean(family) <= 0.06
    found = [ranks.mean_ranks({f"m{i}": rng.normal(size=10).tolist() for i in range(6)}) for _ in range(ROUNDS // 4)]
    assert 0.025 <= np.mean([each.p <= 0.05 for each in found]) <= 0.08
    apart = [each.means[-1] - each.means[0] > each.critical for each in found]
    assert np.mean(apart) <= 0.07


def test_the_expected_maximum_has_no_bias_where_the_plug_in_has() -> None:
    rng = np.random.default_rng(41)
    draws = rng.random((20_000, 12))  # uniform: the maximum of B draws is B / (B + 1) on average
    found = expected.expected_maximum(draws, 6).mean(axis=0)
    truth = np.arange(1, 7) / np.arange(2, 8)
    assert np.abs(found - truth).max() < 0.004
    ordered = np.sort(draws, axis=1)
    steps = (np.arange(1, 13) / 12) ** 6 - (np.arange(12) / 12) ** 6
    assert float((ordered * steps).sum(axis=1).mean()) < truth[5] - 0.01


def test_the_band_of_the_expected_maximum_covers_most_of_the_time() -> None:
    rng = np.random.default_rng(43)
    held = np.zeros(4)
    for _ in range(ROUNDS // 4):
        curve = expected.expected(rng.random(16))
        truth = np.arange(1, 5) / np.arange(2, 6)
        held += (np.array(curve.low[:4]) <= truth) & (truth <= np.array(curve.high[:4]))
    shares = held / (ROUNDS // 4)
    assert shares[0] >= 0.91 and shares.min() >= 0.85  # short of 95 %: a resample never beats the best trial
