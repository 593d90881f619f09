"""Slow, obvious twins of the library's numeric routines: exact arithmetic, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction


def relaxed_ranks(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, Fraction]:
    """Return clip(λ w, lo, hi) with Σ c clip(λ w, lo, hi) = budget, exactly; the maximum where the
    budget allows it.

    λ rises from one point at which some target starts or stops growing to the next, until the
    budget is spent.
    """
    exact = {m: Fraction(w) for m, w in weights.items()}
    if not any(exact.values()):
        exact = dict.fromkeys(exact, Fraction(1))

    def at(scale: Fraction) -> dict[str, Fraction]:
        return {
            m: min(max(scale * w, Fraction(minimum[m])), Fraction(maximum[m]))
            for m, w in exact.items()
        }

    def spent(scale: Fraction) -> Fraction:
        return sum((costs[m] * rank for m, rank in at(scale).items()), Fraction(0))

    scale = Fraction(0)
    for point in sorted(
        {Fraction(bound[m]) / w for m, w in exact.items() if w for bound in (minimum, maximum)}
    ):
        if spent(point) > budget:  # between `scale` and `point` the spending is a straight line
            return at(
                scale + (point - scale) * (budget - spent(scale)) / (spent(point) - spent(scale))
            )
        scale = point
    return at(scale)


def proportional(
    weights: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    minimum: Mapping[str, int],
    maximum: Mapping[str, int],
) -> dict[str, int]:
    """Floor the relaxed ranks; then, while anything fits, add a component to the target furthest
    below its share."""
    shares = relaxed_ranks(weights, costs, budget, minimum, maximum)
    ranks = {m: int(share) for m, share in shares.items()}
    while True:
        rest = budget - sum(costs[m] * rank for m, rank in ranks.items())
        fitting = [m for m in costs if ranks[m] < maximum[m] and costs[m] <= rest]
        if not fitting:
            return ranks
        ranks[max(fitting, key=lambda m: (shares[m] - ranks[m], weights[m]))] += 1


class AdaLoraTwin:
    """AdaLoRA's smoothing and score, element by element in Python floats (arXiv 2303.10512,
    equations 8 to 11)."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.average: dict[tuple, float] = {}
        self.uncertainty: dict[tuple, float] = {}
        self.rank: dict[str, int] = {}
        self.width: dict[tuple[str, str], int] = {}

    def observe(self, adapters: Mapping[str, tuple[list, list, list, list]]) -> None:
        for name, (a, b, grad_a, grad_b) in adapters.items():
            self.rank[name], self.width[name, "a"], self.width[name, "b"] = (
                len(a),
                len(a[0]),
                len(b),
            )
            for k in range(len(a)):
                for j in range(len(a[0])):
                    self._smooth((name, "a", k, j), abs(a[k][j] * grad_a[k][j]))
                for o in range(len(b)):
                    self._smooth((name, "b", k, o), abs(b[o][k] * grad_b[o][k]))
                gate_gradient = sum(a[k][j] * grad_a[k][j] for j in range(len(a[0])))
                self._smooth((name, "gate", k, 0), abs(1.0 * gate_gradient))

    def _smooth(self, key: tuple, importance: float) -> None:
        average = self.beta1 * self.average.get(key, 0.0) + (1 - self.beta1) * importance
        self.average[key] = average
        deviation = abs(importance - average)
        self.uncertainty[key] = (
            self.beta2 * self.uncertainty.get(key, 0.0) + (1 - self.beta2) * deviation
        )

    def scores(self, name: str) -> list[float]:
        def s(*key: object) -> float:
            return self.average[key] * self.uncertainty[key]

        def mean(part: str, k: int) -> float:
            width = self.width[name, part]
            return sum(s(name, part, k, i) for i in range(width)) / width

        return [s(name, "gate", k, 0) + mean("a", k) + mean("b", k) for k in range(self.rank[name])]


def entity_spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Every stretch of words of one type such that each goes on from the one before it, and neither
    its first word nor the word after its last one does."""

    def goes_on(i: int) -> bool:
        if i == 0 or i == len(tags):
            return False
        return tags[i - 1][0] in "BI" and tags[i][0] in "IEL" and tags[i - 1][2:] == tags[i][2:]

    return {
        (first, last, tags[first][2:])
        for first in range(len(tags))
        for last in range(first, len(tags))
        if all(tags[i] != "O" for i in range(first, last + 1))
        and all(goes_on(i) for i in range(first + 1, last + 1))
        and not goes_on(first)
        and not goes_on(last + 1)
    }


def entity_scores(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict:
    """CoNLL's precision, recall and F1 as fractions, sentence by sentence."""
    right = given = wanted = 0
    for found, expected in zip(predicted, truth, strict=True):
        right += len(entity_spans(found) & entity_spans(expected))
        given += len(entity_spans(found))
        wanted += len(entity_spans(expected))
    precision = Fraction(right, given) if given else Fraction(0)
    recall = Fraction(right, wanted) if wanted else Fraction(0)
    both = precision + recall
    f1 = 2 * precision * recall / both if both else Fraction(0)
    return {"f1": f1, "precision": precision, "recall": recall}
