"""Allocation rules: scores and a budget in parameters -> a rank pattern. Pure and exact; no torch.

Symbols: m a target, c_m = I + O the parameters one component of m costs, r_m its rank, b the budget.
Every rule returns ranks with lo_m <= r_m <= hi_m and Σ r_m c_m <= b, and leaves less of b unspent than the cheapest
component that could still be added (design: budgets are met exactly).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaptive_lora.errors import InputError

RankPattern = dict[str, int]


def parameters(pattern: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Return Σ r_m c_m, the trainable LoRA parameters of `pattern`.

    >>> parameters({"q": 8, "v": 4}, {"q": 128, "v": 128})
    1536
    """
    return sum(rank * costs[name] for name, rank in pattern.items())


def check_bounds(
    costs: Mapping[str, int], budget: int, minimum: Mapping[str, int], maximum: Mapping[str, int]
) -> None:
    """Raise `InputError` with the numbers unless 0 <= lo <= hi for every target and Σ lo_m c_m <= budget."""
    for name in costs:
        if not 0 <= minimum[name] <= maximum[name]:
            raise InputError(
                f"rank bounds of {name!r} are {minimum[name]}..{maximum[name]}; "
                "expected 0 <= min_rank <= max_rank <= min(in_features, out_features)"
            )
    least = parameters(minimum, costs)
    if least > budget:
        raise InputError(
            f"a budget of {budget:,} parameters is below the minimum: the smallest allowed ranks already cost "
            f"{least:,}. Raise the budget, lower min_rank, or choose fewer targets"
        )


def proportional(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    *,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> RankPattern:
    """Ranks in proportion to `weights`, scaled so that the parameters spent are `budget`.

    r_m = round(clip(λ w_m, lo_m, hi_m)) with λ from Σ c_m clip(λ w_m, lo_m, hi_m) = budget; the rounding gives the
    parameters left over by the floor to the largest remainders that still fit.

    Args:
        weights: non-negative finite weight of each target; only ratios matter. All zero means equal weights.
        costs: parameters per component, I + O, of each target. Its order breaks ties.
        budget: Σ r_m c_m allowed, in parameters.
        minimum, maximum: rank bounds of each target; 0 is allowed.

    Raises `InputError` when the bounds contradict each other or the budget, or a weight is negative or not finite.

    >>> proportional({"a": 3, "b": 1}, {"a": 10, "b": 10}, 80, minimum={"a": 1, "b": 1}, maximum={"a": 8, "b": 8})
    {'a': 6, 'b': 2}
    """
    check_bounds(costs, budget, minimum, maximum)
    for name in costs:
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise InputError(f"weight of {name!r} is {weights[name]}; expected a finite number >= 0")
    if not any(weights[name] > 0 for name in costs):
        weights = dict.fromkeys(costs, 1.0)

    def relaxed(scale: float) -> dict[str, float]:
        return {m: min(max(scale * weights[m], minimum[m]), maximum[m]) for m in costs}

    def spent(scale: float) -> float:
        return sum(costs[m] * rank for m, rank in relaxed(scale).items())

    # λ by bisection: `spent` never falls as λ rises. At `high` every weighted target has reached its maximum.
    low, high = 0.0, max(maximum[m] / weights[m] for m in costs if weights[m] > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    ideal = relaxed(low if spent(high) > budget else high)
    # 1e-9: λ is exact to a few ulp, so a rank meant to be 8 may stand at 8 - 1e-15.
    pattern = {m: math.floor(ideal[m] + 1e-9) for m in costs}
    return _spend_rest(pattern, {m: ideal[m] - pattern[m] for m in costs}, costs, budget, maximum)


def _spend_rest(
    pattern: RankPattern,
    claim: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    maximum: Mapping[str, int],
) -> RankPattern:
    """Add one component at a time to the target with the largest open claim that fits, until nothing fits."""
    rest = budget - parameters(pattern, costs)
    open_claim = dict(claim)
    while True:
        fitting = [m for m in costs if pattern[m] < maximum[m] and costs[m] <= rest]
        if not fitting:
            return pattern
        chosen = max(fitting, key=lambda m: open_claim[m])
        pattern[chosen] += 1
        open_claim[chosen] -= 1
        rest -= costs[chosen]
