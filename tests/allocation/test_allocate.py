"""Allocation: budgets are met exactly, within bounds, in proportion to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any

import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st

from adaptive_lora.allocation.allocate import parameters, proportional
from adaptive_lora.errors import InputError


@dataclass(frozen=True)
class Problem:
    """The arguments of `proportional`, by position of the target."""

    weights: list[float]
    costs: list[int]
    minimum: list[int]
    maximum: list[int]
    budget: int

    def named(self, values: list) -> dict:
        return {f"m{i}": value for i, value in enumerate(values)}

    def solve(self, weights: list[float] | None = None) -> list[int]:
        return list(proportional(**self.arguments(weights or self.weights)).values())

    def shares(self) -> list[Fraction]:
        return list(reference.relaxed_ranks(**self.arguments(self.weights)).values())

    def arguments(self, weights: list[float]) -> dict[str, Any]:
        lists = {
            "weights": weights,
            "costs": self.costs,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }
        return {key: self.named(values) for key, values in lists.items()} | {"budget": self.budget}

    def cost(self, ranks: list[int]) -> int:
        return sum(c * r for c, r in zip(self.costs, ranks, strict=True))


WEIGHT = st.one_of(st.just(0.0), st.integers(0, 5).map(float), st.floats(0, 1e300, allow_nan=False))


@st.composite
def problems(
    draw: st.DrawFn, *, weight: st.SearchStrategy = WEIGHT, one_cost: bool = False
) -> Problem:
    """Targets of a few kinds: those of one kind differ in their weight only."""
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.integers(1, 40)),
            min_size=1,
            max_size=1 if one_cost else 4,
        )
    )
    kinds = []
    for shape in shapes * 2 if one_cost else shapes:
        maximum = draw(st.integers(0, min(shape)))
        kinds.append((sum(shape), draw(st.integers(0, maximum)), maximum))
    targets = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))
    n = len(targets)
    weights = draw(
        st.one_of(st.lists(weight, min_size=n, max_size=n), weight.map(lambda w: [w] * n))
    )
    least, most = sum(c * lo for c, lo, _ in targets), sum(c * hi for c, _, hi in targets)
    return Problem(
        weights, *map(list, zip(*targets, strict=True)), draw(st.integers(least, most + 100))
    )


@given(problems())
def test_ranks_stay_in_bounds_and_spend_the_budget_up_to_less_than_one_component(
    problem: Problem,
) -> None:
    ranks = problem.solve()
    assert all(
        lo <= r <= hi for lo, r, hi in zip(problem.minimum, ranks, problem.maximum, strict=True)
    )
    left = problem.budget - problem.cost(ranks)
    assert left >= 0
    assert all(
        left < c for c, r, hi in zip(problem.costs, ranks, problem.maximum, strict=True) if r < hi
    )


@given(problems())
# Weights so far apart that λ overflows a float, and that no fixed number of halvings finds it.
@example(Problem([5e-324, 2.0, 0.0], [2, 2, 2], [0, 0, 0], [4, 4, 4], 7))
@example(Problem([1e-80, 2.0, 1.0], [2, 2, 2], [0, 0, 0], [4, 4, 4], 7))
def test_the_ranks_are_those_of_the_slow_twin(problem: Problem) -> None:
    assert problem.solve() == list(
        reference.proportional(**problem.arguments(problem.weights)).values()
    )


@given(problems())
def test_no_target_gets_less_than_its_exact_share_rounded_down(problem: Problem) -> None:
    assert all(
        r >= floor(share) for r, share in zip(problem.solve(), problem.shares(), strict=True)
    )


@given(problems(weight=st.floats(1e-3, 1e3), one_cost=True))
def test_with_one_cost_every_rank_is_its_exact_share_rounded_down_or_up(problem: Problem) -> None:
    ranks, shares = problem.solve(), problem.shares()
    assert all(floor(share) <= r <= ceil(share) for r, share in zip(ranks, shares, strict=True))


@given(problems(weight=st.integers(0, 1000).map(float)), st.integers(-300, 300))
def test_only_ratios_of_weights_matter(problem: Problem, exponent: int) -> None:
    # Powers of two: the scaled weights are exact, so the ranks must be identical.
    assert problem.solve([w * 2.0**exponent for w in problem.weights]) == problem.solve()


@given(problems())
def test_all_zero_weights_mean_equal_weights(problem: Problem) -> None:
    n = len(problem.weights)
    assert problem.solve([0.0] * n) == problem.solve([1.0] * n)


@given(problems(), st.floats(1e-300, 1e300), st.integers(1, 40))
def test_equal_weights_and_the_budget_of_a_uniform_rank_give_that_rank(
    problem: Problem, weight: float, rank: int
) -> None:
    n = len(problem.costs)
    uniform = Problem([weight] * n, problem.costs, [0] * n, [40] * n, rank * sum(problem.costs))
    assert uniform.solve() == [rank] * n


@given(problems())
@example(
    Problem([1.0, 2.0, 1000.0], [2, 2, 3], [1, 1, 0], [2, 2, 2], 9)
)  # the first two held at their minimum
def test_a_higher_weight_at_equal_cost_and_bounds_never_gets_fewer(problem: Problem) -> None:
    kinds = list(zip(problem.costs, problem.minimum, problem.maximum, strict=True))
    rows = list(zip(kinds, problem.weights, problem.solve(), strict=True))
    for kind, weight, rank in rows:
        assert all(rank >= r for k, w, r in rows if k == kind and w < weight)


def test_the_cost_of_a_component_counts_not_the_sum_of_ranks() -> None:
    """A rank on a 4096 -> 11008 layer costs nearly three times one on 4096 -> 1024."""
    costs = {"wide": 4096 + 11008, "narrow": 4096 + 1024}
    bounds = {"minimum": dict.fromkeys(costs, 1), "maximum": dict.fromkeys(costs, 64)}
    budget = 8 * sum(costs.values())
    by_weight = {
        w: proportional({"wide": w, "narrow": 1.0}, costs, budget, **bounds) for w in (1.0, 3.0)
    }
    assert by_weight[1.0] == {"wide": 8, "narrow": 8}
    # λ (3 · 15104 + 5120) = 161792 gives λ = 3.21: shares 9.62 and 3.21, and 14464 parameters left
    # after flooring: too few for `wide`, enough for two more components of `narrow`.
    assert by_weight[3.0] == {"wide": 9, "narrow": 5}
    assert sum(by_weight[3.0].values()) < sum(by_weight[1.0].values())
    assert budget - parameters(by_weight[3.0], costs) < min(costs.values())


ONE = {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("weights", "budget", "minimum", "maximum", "numbers"),
    [
        (ONE, 1999, {"a": 1, "b": 1}, {"a": 8, "b": 8}, ["1,999", "2,000"]),
        (ONE, 9999, {"a": 4, "b": 1}, {"a": 3, "b": 8}, ["'a'", "4..3"]),
        (ONE, 9999, {"a": 1, "b": -1}, {"a": 8, "b": 8}, ["'b'", "-1..8"]),
        ({"a": -0.5, "b": 1.0}, 9999, {"a": 1, "b": 1}, {"a": 8, "b": 8}, ["'a'", "-0.5"]),
        ({"a": 1.0, "b": float("nan")}, 9999, {"a": 1, "b": 1}, {"a": 8, "b": 8}, ["'b'", "nan"]),
        ({"a": float("inf"), "b": 1.0}, 9999, {"a": 1, "b": 1}, {"a": 8, "b": 8}, ["'a'", "inf"]),
    ],
)
def test_contradictory_input_is_refused_with_the_numbers(
    weights: dict, budget: int, minimum: dict, maximum: dict, numbers: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        proportional(weights, {"a": 1000, "b": 1000}, budget, minimum=minimum, maximum=maximum)
    assert all(number in str(error.value) for number in numbers)
