"""Selection rules: which setting of a method goes into the table. Each is a named class; pure."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

Key = TypeVar("Key")


class SelectionRule(ABC):
    """Chooses among settings by their figures on the selection metric, one a seed; None stands for
    a failed run.

    A setting in which more runs failed comes after one in which fewer did: a mean over survivors
    flatters. Of equal settings the first in the grid wins.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    @abstractmethod
    def score(self, figures: Sequence[float]) -> float:
        """Return the score of a setting, higher is better; `figures` are finite, higher is better,
        at least one."""

    def choose(
        self, settings: Mapping[Key, Sequence[float | None]], *, greater_is_better: bool
    ) -> Key:
        """Return the key of the chosen setting."""

        def order(key: Key) -> tuple[bool, int, float]:
            whole = [f for f in settings[key] if f is not None and math.isfinite(f)]
            score = (
                self.score(whole if greater_is_better else [-f for f in whole])
                if whole
                else -math.inf
            )
            return bool(whole), len(whole) - len(settings[key]), score

        return max(settings, key=order)


class BestMean(SelectionRule):
    """The best mean over seeds."""

    name, description = "best_mean", "the best mean over seeds"

    def score(self, figures: Sequence[float]) -> float:
        return statistics.fmean(figures)


class BestMedian(SelectionRule):
    """The best median over seeds."""

    name, description = "best_median", "the best median over seeds"

    def score(self, figures: Sequence[float]) -> float:
        return statistics.median(figures)


class BestWorst(SelectionRule):
    """The best worst seed: the careful choice."""

    name, description = "best_worst", "the best worst seed"

    def score(self, figures: Sequence[float]) -> float:
        return min(figures)


RULES: dict[str, type[SelectionRule]] = {
    rule.name: rule for rule in (BestMean, BestMedian, BestWorst)
}
