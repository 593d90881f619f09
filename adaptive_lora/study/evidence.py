"""Few seeds, honestly: intervals, paired comparisons, Holm's correction, the noise floor. Pure;
numpy and scipy only.

Everywhere x is one figure a seed. Non-finite values raise `InputError`: a run without a figure is
no observation.

What decides: a method is better (worse) than the baseline when Holm's p of the paired t test is at
most 0.05 *and* the difference is outside the noise floor. A t test keeps its 5 % with three pairs;
a percentile bootstrap over three pairs does not, and Wilcoxon's signed-rank test with n pairs can
never fall below 2^(1 - n), 0.25 with three: both are reported, neither decides.
`tests/study/test_evidence.py` holds the false-positive rates, with the power.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from adaptive_lora.errors import InputError
from adaptive_lora.study.records import Verdict

# All 5^5 resamples are fewer than so many draws, all 6^6 are more.
LEVEL, RESAMPLES, EXACT_UP_TO = 0.95, 10_000, 5
Array = NDArray[np.float64]


def summary(x: Sequence[float]) -> tuple[float, float | None, tuple[float, float] | None]:
    """Return (mean, sample standard deviation, x̄ ± t(0.975, n − 1) s / √n); the last two are None
    for a single value.

    >>> mean, sd, interval = summary([1.0, 2.0, 3.0])
    >>> mean, sd, [round(end, 3) for end in interval]
    (2.0, 1.0, [-0.484, 4.484])
    """
    values = _checked(x)
    mean = float(values.mean())
    if len(values) == 1:
        return mean, None, None
    sd = float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, (mean - half, mean + half)


def noise_floor(x: Sequence[float]) -> float | None:
    """Return f = t(0.975, n − 1) s √(2 / n): of the differences between the mean of the baseline
    over n seeds and its mean over n other seeds, 95 % lie within ± f. None for a single value.

    >>> round(noise_floor([1.0, 2.0, 3.0]), 3)
    3.513
    """
    values = _checked(x)
    if len(values) == 1:
        return None
    return float(
        stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
        * values.std(ddof=1)
        * math.sqrt(2 / len(values))
    )


def paired_t(d: Sequence[float]) -> float:
    """Return the two-sided p of Student's paired t test, d̄ √n / s with n − 1 degrees of freedom.

    Where all differences are equal and not 0 there is no noise to measure them by: the sign test's
    2^(1 − n) instead.

    >>> round(paired_t([1.0, 2.0, 3.0]), 4), paired_t([0.5, 0.5, 0.5]), paired_t([0.0, 0.0])
    (0.0742, 0.25, 1.0)
    """
    values = _checked(d, at_least=2)
    mean, n = values.mean(), len(values)
    if not values.any():
        return 1.0
    sd = values.std(ddof=1)
    if sd <= 1e-9 * abs(values).max():  # equal but for rounding
        return float(2.0 ** (1 - n))
    return float(2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1))


def paired_bootstrap(d: Sequence[float], *, seed: int = 0) -> float:
    """Return the two-sided p of the paired bootstrap: twice the share of resampled means on the
    other side of 0.

    All n^n resamples up to n = 5, else 10,000 drawn with `seed`; a mean of 0 counts for both sides,
    and with draws one is added to both counts. Too bold for few seeds: with n = 3 it calls a
    quarter of all ties a difference.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 16; Koehn 2004,
    EMNLP.

    >>> paired_bootstrap([1.0, 2.0, -0.5])
    0.2962962962962963
    """
    values = _checked(d, at_least=2)
    n = len(values)
    exact = n <= EXACT_UP_TO
    draws = (
        np.array(list(itertools.product(range(n), repeat=n)))
        if exact
        else np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    )
    means = values[draws].mean(axis=1)
    other_side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    count, total = (other_side, len(means)) if exact else (other_side + 1, len(means) + 1)
    return min(1.0, 2 * count / total)


def wilcoxon(d: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test, exact up to 25 pairs; 1 when every
    difference is 0. With n pairs it is at least 2^(1 − n).

    Source: Wilcoxon 1945, Biometrics Bulletin 1(6).

    >>> wilcoxon([1.0, 2.0, 3.0])
    0.25
    """
    values = _checked(d, at_least=2)
    values = values[values != 0]
    if not len(values):
        return 1.0
    ranks = stats.rankdata(abs(values))
    if len(values) > 25:
        return float(stats.wilcoxon(values, method="asymptotic").pvalue)
    # The distribution of the sum of ranks with signs drawn by coin, ties included: count the
    # subsets by their doubled sum.
    doubled = np.rint(2 * ranks).astype(int)
    counts = np.zeros(int(doubled.sum()) + 1)
    counts[0] = 1
    for rank in doubled:
        counts[rank:] = counts[rank:] + counts[:-rank]
    positive = int(doubled[values > 0].sum())
    tail = min(positive, int(doubled.sum()) - positive)
    return min(1.0, float(2 * counts[: tail + 1].sum() / counts.sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p: with p(1) ≤ … ≤ p(m), p̃(i) = max over j ≤ i of min(1, (m − j + 1)
    p(j)).

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    adjusted, highest = [0.0] * len(p), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * float(p[index])))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A method against the baseline on equal seeds, before Holm's correction."""

    difference: float
    ci95: tuple[float, float]
    p_t: float
    p_bootstrap: float
    p_wilcoxon: float


def compare(method: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Return the paired comparison of two rows of figures, seed by seed. Raises `InputError` below
    two pairs."""
    if len(method) != len(baseline):
        raise InputError(
            f"{len(method)} figures against {len(baseline)}; a paired comparison needs equal seeds"
        )
    difference = _checked(method, at_least=2) - _checked(baseline, at_least=2)
    d = [float(value) for value in difference]
    mean, _, interval = summary(d)
    assert interval is not None
    return Paired(
        difference=mean,
        ci95=interval,
        p_t=paired_t(d),
        # Reported, but not decided by: see the module for what it does with three pairs.
        p_bootstrap=paired_bootstrap(d),
        p_wilcoxon=wilcoxon(d),
    )


def verdict(difference: float, p_holm: float, floor: float, *, greater_is_better: bool) -> Verdict:
    """Return "tie" unless p̃ ≤ 0.05 and |difference| > the noise floor, else which of the two it
    is.

    >>> [verdict(0.02, 0.01, floor, greater_is_better=True) for floor in (0.015, 0.03)]
    ['better', 'tie']
    """
    # 1 - 0.95 is not 0.05 to the last bit.
    if p_holm > 1 - LEVEL + 1e-12 or abs(difference) <= floor:
        return "tie"
    return "better" if (difference > 0) == greater_is_better else "worse"


def _checked(x: Sequence[float], at_least: int = 1) -> Array:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or len(values) < at_least or not np.isfinite(values).all():
        raise InputError(f"got {x!r:.80}; expected at least {at_least} finite numbers, one a seed")
    return values
