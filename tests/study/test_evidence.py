"""The statistics of studies: equal to scipy's where scipy has them, and honest by simulation.

Simulations are vectorised twins of `evidence` (checked against it below): 1,000 repetitions of a
whole study each.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from adaptive_lora.errors import InputError
from adaptive_lora.study import evidence as ours
from adaptive_lora.study.selection import RULES, BestMean, BestMedian, BestWorst

REPETITIONS = 1_000
RNG = np.random.default_rng(0)
Array = NDArray[np.float64]

# One figure a seed, as studies see them: bell-shaped, heavy tails, skewed, now and then a run that
# falls to chance, and an accuracy on so few records that it moves in steps of half a standard
# deviation.
NOISE = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size=size),
    "skewed": lambda rng, size: rng.exponential(size=size),
    "one run in ten collapses": lambda rng, size: (
        rng.normal(size=size) - 20.0 * (rng.random(size) < 0.1)
    ),
    "coarse": lambda rng, size: np.round(2 * rng.normal(size=size)) / 2,
}


def verdicts(x: Array) -> Array:
    """Return +1, 0, -1 for better, tie, worse: x is (repetitions, 1 + methods, seeds), the baseline
    first."""
    n = x.shape[2]
    d = x[:, 1:] - x[:, :1]
    mean, sd = d.mean(2), d.std(2, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1)
    p = np.where(sd <= 1e-9 * abs(d).max(2), np.where(d.any(2), 2.0 ** (1 - n), 1.0), p)
    order = np.argsort(p, axis=1, kind="stable")
    scaled = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    holm = np.empty_like(p)
    np.put_along_axis(holm, order, np.minimum(1, np.maximum.accumulate(scaled, axis=1)), 1)
    floor = stats.t.ppf(0.975, n - 1) * x[:, 0].std(1, ddof=1) * math.sqrt(2 / n)
    return np.where((holm <= 0.05) & (abs(mean) > floor[:, None]), np.sign(mean), 0.0)


def test_the_simulated_rule_is_the_rule() -> None:
    x = RNG.normal(size=(40, 4, 4)) + np.array([0.0, 0.0, 2.0, 8.0])[None, :, None]
    found = verdicts(x)
    assert {-1.0, 0.0, 1.0} >= set(found.ravel()) >= {0.0, 1.0}
    for study, row in zip(x, found, strict=True):
        compared = [ours.compare(method, study[0]) for method in study[1:]]
        adjusted = ours.holm([one.p_t for one in compared])
        floor = ours.noise_floor(study[0])
        assert floor is not None
        words = [
            ours.verdict(c.difference, p, floor, greater_is_better=True)
            for c, p in zip(compared, adjusted, strict=True)
        ]
        assert words == [{1.0: "better", 0.0: "tie", -1.0: "worse"}[value] for value in row]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("noise", list(NOISE))
def test_a_planted_tie_is_called_a_tie(noise: str, seeds: int) -> None:
    """At most 5 % of studies of four methods that are all the baseline call any of them better or
    worse.

    The rate itself is below 4 % (20,000 repetitions: 3.5 % at worst, ten seeds); 1,000 repetitions
    of 4 % stay below 6 % with probability 0.999, and these draws are fixed.
    """
    x = NOISE[noise](np.random.default_rng(seeds), (REPETITIONS, 5, seeds))
    assert (verdicts(x) != 0).any(1).mean() <= 0.05


# Share of studies that find a difference of so many standard deviations, among four methods of
# which one has it, seeds drawn apart (no gain from pairing): the power to be expected. Three seeds
# find only what is plain to see.
POWER = {(3, 4): 0.25, (3, 8): 0.69, (5, 2): 0.29, (5, 4): 0.90, (10, 1): 0.26, (10, 2): 0.87}


@pytest.mark.parametrize(("seeds", "difference"), list(POWER))
def test_a_planted_difference_is_found_and_its_sign_is_right(seeds: int, difference: int) -> None:
    x = np.random.default_rng(seeds).normal(size=(REPETITIONS, 5, seeds))
    x[:, 1] += difference
    found = verdicts(x)
    # Within four standard errors of the stated power; the wrong sign never.
    power = POWER[seeds, difference]
    assert (found[:, 0] == 1).mean() == pytest.approx(
        power, abs=4 * math.sqrt(power * (1 - power) / REPETITIONS)
    )
    assert (found[:, 0] == -1).sum() == 0
    assert (found[:, 1:] != 0).any(1).mean() <= 0.05


def test_the_percentile_bootstrap_is_too_bold_for_three_seeds() -> None:
    """Why it does not decide: with three pairs it calls a quarter of ties a difference, whenever
    all have one sign."""
    d = RNG.normal(size=(400, 3))
    assert np.mean([ours.paired_bootstrap(row) <= 0.05 for row in d]) == pytest.approx(
        0.25, abs=0.09
    )
    assert ours.paired_bootstrap([1.0, 2.0, 3.0]) == 0.0


def test_the_paired_t_test_and_the_interval_are_scipys() -> None:
    for n in (2, 3, 7):
        a, b = RNG.normal(size=(2, n))
        expected = stats.ttest_rel(a, b)
        found = ours.compare(a, b)
        # Two orders of summation: a few ulp.
        assert found.p_t == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.ci95 == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
        mean, sd, interval = ours.summary(a)
        assert (mean, sd) == pytest.approx((a.mean(), a.std(ddof=1)))
        assert interval == pytest.approx(
            stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
        )


def test_wilcoxon_is_scipys_and_equals_the_enumeration_with_ties() -> None:
    for n in (3, 6, 12):
        d = RNG.normal(size=n) + 0.4
        assert ours.wilcoxon(d) == pytest.approx(
            stats.wilcoxon(d, method="exact").pvalue, rel=1e-12
        )
    d = np.array([1.0, 1.0, -1.0, 2.0, 3.0, 0.0])
    ranks = stats.rankdata(abs(d[d != 0]))
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=5)
    ]
    observed = sum(ranks[d[d != 0] > 0])
    low, high = np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed)
    assert ours.wilcoxon(d) == pytest.approx(min(1.0, 2 * min(low, high)))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_wilcoxon_with_few_pairs_says_what_it_cannot_say(n: int) -> None:
    assert ours.wilcoxon(np.arange(1.0, n + 1)) == pytest.approx(2.0 ** (1 - n))


def test_the_bootstrap_with_five_pairs_is_the_enumeration_and_with_more_close_to_it() -> None:
    d = [0.3, -0.1, 0.5, 0.2, -0.4]
    means = [sum(draw) / 5 for draw in itertools.product(d, repeat=5)]
    low, high = np.mean(np.array(means) <= 1e-15), np.mean(np.array(means) >= -1e-15)
    # sums of 0 but for rounding
    assert ours.paired_bootstrap(d) == pytest.approx(2 * min(low, high), abs=2e-3)
    six = [*d, 0.1]
    exact = np.array([sum(draw) / 6 for draw in itertools.product(six, repeat=6)])
    # 10,000 draws: the standard error of 2 p is below 0.01.
    assert ours.paired_bootstrap(six) == pytest.approx(2 * np.mean(exact <= 0), abs=0.03)
    assert ours.paired_bootstrap(six) == ours.paired_bootstrap(six)


def test_holm_is_holms_example_and_never_below_the_raw_p() -> None:
    assert ours.holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    p = list(RNG.random(7))
    assert all(a >= b for a, b in zip(ours.holm(p), p, strict=True))
    assert ours.holm([]) == []


def test_equal_differences_are_no_proof() -> None:
    """One record more in each of three seeds: no spread to measure by, so the sign test's p, and a
    tie."""
    found = ours.compare([0.51, 0.61, 0.71], [0.50, 0.60, 0.70])
    assert found.p_t == 0.25


def test_the_noise_floor_holds_95_percent_of_the_baseline_against_itself() -> None:
    for n in (3, 5, 10):
        x = RNG.normal(size=(4_000, 2, n))
        floors = stats.t.ppf(0.975, n - 1) * x[:, 0].std(1, ddof=1) * math.sqrt(2 / n)
        assert ours.noise_floor(x[0, 0]) == pytest.approx(floors[0])
        # A binomial share of 4,000: standard error 0.0034.
        assert (abs(x[:, 0].mean(1) - x[:, 1].mean(1)) <= floors).mean() == pytest.approx(
            0.95, abs=0.014
        )


def test_what_is_no_observation_is_refused() -> None:
    for bad in ([], [math.nan, 1.0], [math.inf]):
        with pytest.raises(InputError, match="finite numbers"):
            ours.summary(bad)
    with pytest.raises(InputError, match="at least 2"):
        ours.paired_t([1.0])
    with pytest.raises(InputError, match="equal seeds"):
        ours.compare([1.0, 2.0], [1.0])
    assert ours.summary([3.0]) == (3.0, None, None)
    assert ours.noise_floor([3.0]) is None


def test_selection_rules() -> None:
    figures = {"even": [0.5, 0.5, 0.5], "high": [0.9, 0.8, 0.1], "fails": [0.99, 0.99, None]}
    assert BestMean().choose(figures, greater_is_better=True) == "high"  # 0.6
    assert BestMedian().choose(figures, greater_is_better=True) == "high"
    assert BestWorst().choose(figures, greater_is_better=True) == "even"
    assert BestMean().choose(figures, greater_is_better=False) == "even"
    # a setting with a failed run only where there is no other; the first of equals
    for rule in RULES.values():
        assert rule().choose({"a": [None, None], "b": [None, 0.1]}, greater_is_better=True) == "b"
        assert rule().choose({"a": [0.5], "b": [0.5]}, greater_is_better=True) == "a"
        assert rule().choose({"a": [None], "b": [None]}, greater_is_better=True) == "a"
