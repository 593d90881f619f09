"""Allocation rules as objects: what a method asks at each decision step. Pure; no torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptive_lora.allocation.allocate import RankPattern, Resize, parameters, proportional, top_k


@dataclass(frozen=True, kw_only=True)
class View:
    """All a decision may depend on, as plain numbers: the same view gives the same decision.

    Args:
        ranks: the rank of every target now.
        costs: parameters of one component of every target, I + O.
        budget: parameters that may be spent now; None when the method has no budget.
        minimum, maximum: rank bounds of every target.
        components: the score of every component; scores: one score for every target.
        last: no decision comes after this one, so what the budget leaves over may be spent.
    """

    ranks: Mapping[str, int]
    costs: Mapping[str, int]
    budget: int | None
    minimum: Mapping[str, int]
    maximum: Mapping[str, int]
    components: Mapping[str, Sequence[float]]
    scores: Mapping[str, float]
    last: bool = True

    def not_finite(self) -> str | None:
        """Return the first score that is not finite, with its target; a decision on such scores is
        refused. None when all are finite."""
        rows = {name: [self.scores[name], *self.components[name]] for name in self.scores}
        for name, row in rows.items():
            for score in row:
                if not math.isfinite(score):
                    return f"{score} for {name!r}"
        return None

    def to_pattern(self, pattern: RankPattern) -> dict[str, Resize]:
        """Return the resizes to `pattern`: the best components stay, new ones come last."""
        changes = {}
        for name, rank in pattern.items():
            now = self.ranks[name]
            if rank < now:
                row = self.components[name]
                best = sorted(range(now), key=lambda k: (-row[k], k))[:rank]
                changes[name] = Resize(tuple(sorted(best)))
            elif rank > now:
                changes[name] = Resize(tuple(range(now)), rank - now)
        return changes


class Rule(ABC):
    """Scores and a budget in, resizes out. A target that does not change is left out."""

    @abstractmethod
    def decide(self, view: View) -> dict[str, Resize]:
        """Return the changes. All scores of `view` are finite. Raises `InputError` when the budget
        cannot be met."""


@dataclass(frozen=True)
class TopK(Rule):
    """Keep the components of highest score over all targets (AdaLoRA).

    Costs differ, so a little of the budget may pay for no component there is; the last decision
    spends it on new ones.
    """

    def decide(self, view: View) -> dict[str, Resize]:
        assert view.budget is not None
        kept = top_k(
            view.components, view.costs, view.budget, minimum=view.minimum, maximum=view.maximum
        )
        rest = view.budget - sum(len(keep) * view.costs[name] for name, keep in kept.items())
        grow = dict.fromkeys(kept, 0)
        for name in sorted(kept, key=lambda m: -view.scores[m]) if view.last else ():
            open_ranks = view.maximum[name] - len(kept[name])
            grow[name] = min(open_ranks, rest // view.costs[name]) if kept[name] else 0
            rest -= grow[name] * view.costs[name]
        return {
            name: Resize(tuple(keep), grow[name])
            for name, keep in kept.items()
            if len(keep) < view.ranks[name] or grow[name]
        }


@dataclass(frozen=True)
class Truncate(TopK):
    """As `TopK`, of the singular components of each B A: what changes is rotated to them first."""

    def decide(self, view: View) -> dict[str, Resize]:
        return {
            name: replace(change, rotated=True) for name, change in super().decide(view).items()
        }


@dataclass(frozen=True)
class Proportional(Rule):
    """Ranks in proportion to target scores under a budget; without one r = r_min + s (r_max −
    r_min), rounded down.

    Args:
        floor: added to every score before apportioning, so that the lowest keeps a share.
    """

    floor: float = 0.0

    def decide(self, view: View) -> dict[str, Resize]:
        if view.budget is None:
            span = {m: view.maximum[m] - view.minimum[m] for m in view.costs}
            pattern = {
                m: int(view.minimum[m] + min(max(view.scores[m], 0.0), 1.0) * span[m])
                for m in view.costs
            }
        else:
            # Scores are below 0 where an importance has a negative weight.
            weights = {m: max(view.scores[m], 0.0) + self.floor for m in view.costs}
            pattern = proportional(
                weights, view.costs, view.budget, minimum=view.minimum, maximum=view.maximum
            )
        return view.to_pattern(pattern)


@dataclass(frozen=True)
class Grow(Rule):
    """Every target grows by `step` components, up to its maximum and the budget; the best-scored
    first.

    Args:
        step: components added to a target at a time.
        share: the share of targets that grow, in (0, 1]; 1 means all.
    """

    step: int = 2
    share: float = 1.0

    def decide(self, view: View) -> dict[str, Resize]:
        count = max(1, round(self.share * len(view.costs)))
        able = [m for m in view.costs if view.ranks[m] < view.maximum[m]]
        chosen = sorted(able, key=lambda m: -view.scores[m])[:count]
        pattern = dict(view.ranks)
        rest = math.inf if view.budget is None else view.budget - parameters(pattern, view.costs)
        # One component a round: a budget that ends in between is spread over the targets.
        for _ in range(self.step):
            for m in chosen:
                if pattern[m] < view.maximum[m] and view.costs[m] <= rest:
                    pattern[m] += 1
                    rest -= view.costs[m]
        return view.to_pattern(pattern)
