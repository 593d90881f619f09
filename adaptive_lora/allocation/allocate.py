"""Allocation rules: scores and a budget in parameters -> a rank pattern. Pure and exact; no torch.

Symbols: m a target, c_m = I + O the parameters one component of m costs, r_m its rank, b the
budget. Every rule returns ranks with lo_m <= r_m <= hi_m and Σ r_m c_m <= b, and leaves less of b
unspent than the cheapest component that could still be added (design: budgets are met exactly).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

from adaptive_lora.errors import InputError

RankPattern = dict[str, int]


@dataclass(frozen=True)
class Resize:
    """Keep these components of an adapter, in this order, then add `grow` new ones.

    With `rotated`, `keep` counts the singular components of B A, the largest first, instead of the
    rows of A as they are.
    """

    keep: tuple[int, ...]
    grow: int = 0
    rotated: bool = False

    @property
    def rank(self) -> int:
        """The rank afterwards."""
        return len(self.keep) + self.grow


def parameters(pattern: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Return Σ r_m c_m, the trainable LoRA parameters of `pattern`.

    >>> parameters({"q": 8, "v": 4}, {"q": 128, "v": 128})
    1536
    """
    return sum(rank * costs[name] for name, rank in pattern.items())


def check_bounds(
    costs: Mapping[str, int], budget: int, minimum: Mapping[str, int], maximum: Mapping[str, int]
) -> None:
    """Raise `InputError` unless 0 <= lo <= hi for every target and Σ lo_m c_m <= budget."""
    for name in costs:
        if not 0 <= minimum[name] <= maximum[name]:
            raise InputError(
                f"rank bounds of {name!r} are {minimum[name]}..{maximum[name]}; expected 0 <= "
                "min_rank <= max_rank <= min(in_features, out_features)"
            )
    least = parameters(minimum, costs)
    if least > budget:
        raise InputError(
            f"a budget of {budget:,} parameters is below the minimum: the smallest allowed ranks "
            f"already cost {least:,}. Raise the budget, lower min_rank, or choose fewer targets"
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

    r_m = round(clip(λ w_m, lo_m, hi_m)) with λ from Σ c_m clip(λ w_m, lo_m, hi_m) = budget; the
    rounding gives the parameters left over by the floor to the largest remainders that still fit.

    Args:
        weights: non-negative finite weight of each target; only ratios matter. All zero means equal
            weights.
        costs: parameters per component, I + O, of each target. A tie goes to the higher weight,
            then to the earlier.
        budget: Σ r_m c_m allowed, in parameters.
        minimum, maximum: rank bounds of each target; 0 is allowed.

    Raises `InputError` when the bounds contradict each other or the budget, or a weight is negative
    or not finite.

    >>> bounds = {"minimum": {"a": 1, "b": 1}, "maximum": {"a": 8, "b": 8}}
    >>> proportional({"a": 3, "b": 1}, {"a": 10, "b": 10}, 80, **bounds)
    {'a': 6, 'b': 2}
    """
    check_bounds(costs, budget, minimum, maximum)
    for name in costs:
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise InputError(
                f"weight of {name!r} is {weights[name]}; expected a finite number >= 0"
            )
    if not any(weights[name] > 0 for name in costs):
        weights = dict.fromkeys(costs, 1.0)

    ideal = _relaxed(weights, costs, budget, minimum, maximum)
    pattern = {m: math.floor(ideal[m]) for m in costs}
    # What flooring left over: one component at a time to the largest remainder, ties to the higher
    # weight, then to the earlier target. What does not fit now never will: the rest only falls.
    rest = budget - parameters(pattern, costs)
    queue = [(pattern[m] - ideal[m], -weights[m], position, m) for position, m in enumerate(costs)]
    heapify(queue)
    while queue:
        over_share, weight, position, m = heappop(queue)
        if pattern[m] < maximum[m] and costs[m] <= rest:
            pattern[m] += 1
            rest -= costs[m]
            heappush(queue, (over_share + 1, weight, position, m))
    return pattern


def _relaxed(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, Fraction]:
    """Return clip(λ w_m, lo_m, hi_m) with the λ at which Σ c_m clip(λ w_m, lo_m, hi_m) = budget.

    In fractions: a float is one, and nothing is rounded, so that equal weights get equal shares on
    every machine.
    """
    exact = {m: Fraction(float(weights[m])) for m in costs}

    def at(scale: Fraction) -> dict[str, Fraction]:
        return {m: min(max(scale * exact[m], Fraction(minimum[m])), Fraction(maximum[m]))
                for m in costs}  # fmt: skip

    def spent(scale: Fraction) -> Fraction:
        return sum((costs[m] * rank for m, rank in at(scale).items()), Fraction(0))

    # `spent` rises with λ in straight lines, with a corner where a target leaves or meets a bound.
    bounds = [(bound[m], exact[m]) for m in costs if exact[m] for bound in (minimum, maximum)]
    corners = sorted({Fraction(bound) / weight for bound, weight in bounds} | {Fraction(0)})
    position = bisect_right(corners, Fraction(budget), key=spent)
    scale = corners[position - 1]
    if position < len(corners):
        beyond = corners[position]
        scale += (beyond - scale) * (budget - spent(scale)) / (spent(beyond) - spent(scale))
    return at(scale)


def top_k(
    scores: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, list[int]]:
    """Keep the components of highest score, over all targets together, that the budget pays for.

    First each target's best lo_m; then all others from the highest score down, each taken if it
    fits and its target is below hi_m. Equal scores: the lower component index first, then the
    earlier target, so that ties spread evenly.

    Args:
        scores: the finite score of every component of every target.
        costs, budget, minimum, maximum: as in `proportional`.

    Returns the kept indices of each target, ascending. Raises `InputError` as `check_bounds`, or on
    a non-finite score.

    >>> bounds = {"minimum": {"a": 0, "b": 0}, "maximum": {"a": 2, "b": 2}}
    >>> top_k({"a": [3, 1], "b": [2, 5]}, {"a": 10, "b": 10}, 30, **bounds)
    {'a': [0], 'b': [0, 1]}
    """
    # A target with fewer components than its minimum keeps what it has.
    within = {name: min(minimum[name], len(values)) for name, values in scores.items()}
    check_bounds(costs, budget, within, maximum)
    if not all(math.isfinite(score) for values in scores.values() for score in values):
        raise InputError("a component's score is not finite; expected finite numbers")
    rows = enumerate(scores.items())
    ranked = sorted(
        (-score, k, order, name) for order, (name, row) in rows for k, score in enumerate(row)
    )
    kept: dict[str, list[int]] = {name: [] for name in scores}
    others, rest = [], budget
    for _, k, _, name in ranked:  # what every target must keep
        if len(kept[name]) < within[name]:
            kept[name].append(k)
            rest -= costs[name]
        else:
            others.append((k, name))
    # Greedy: the best there is at equal costs, else short of it by less than one component.
    for k, name in others:  # then whatever still fits
        if len(kept[name]) < maximum[name] and costs[name] <= rest:
            kept[name].append(k)
            rest -= costs[name]
    return {name: sorted(indices) for name, indices in kept.items()}
