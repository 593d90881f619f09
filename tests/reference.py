"""Slow, obvious twins of the library's numeric routines: exact arithmetic, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction


def relaxed_ranks(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, Fraction]:
    """Return clip(λ w, lo, hi) with Σ c clip(λ w, lo, hi) = budget, exactly; the maximum where the budget allows it.

    λ rises from one point at which some target starts or stops growing to the next, until the budget is spent.
    """
    exact = {m: Fraction(w) for m, w in weights.items()}
    if not any(exact.values()):
        exact = dict.fromkeys(exact, Fraction(1))

    def at(scale: Fraction) -> dict[str, Fraction]:
        return {m: min(max(scale * w, Fraction(minimum[m])), Fraction(maximum[m])) for m, w in exact.items()}

    def spent(scale: Fraction) -> Fraction:
        return sum((costs[m] * rank for m, rank in at(scale).items()), Fraction(0))

    scale = Fraction(0)
    for point in sorted({Fraction(bound[m]) / w for m, w in exact.items() if w for bound in (minimum, maximum)}):
        if spent(point) > budget:  # between `scale` and `point` the spending is a straight line
            return at(scale + (point - scale) * (budget - spent(scale)) / (spent(point) - spent(scale)))
        scale = point
    return at(scale)


def proportional(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, int]:
    """Floor the relaxed ranks; then, while anything fits, add a component to the target furthest below its share."""
    shares = relaxed_ranks(weights, costs, budget, minimum, maximum)
    ranks = {m: int(share) for m, share in shares.items()}
    while True:
        rest = budget - sum(costs[m] * rank for m, rank in ranks.items())
        fitting = [m for m in costs if ranks[m] < maximum[m] and costs[m] <= rest]
        if not fitting:
            return ranks
        ranks[max(fitting, key=lambda m: (shares[m] - ranks[m], weights[m]))] += 1
