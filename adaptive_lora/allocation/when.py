"""When decisions are made. Pure; no torch.

A `When` is frozen and is asked with plain numbers, so that a resumed training gets the answers that
the uninterrupted one got, and nothing of it has to be saved.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from adaptive_lora.allocation.budget import steps_of
from adaptive_lora.errors import InputError


class When(ABC):  # noqa: B024  # either method may be left as it is
    """The moments at which a method decides: steps known before the training, or evaluations.

    Override `steps`, or `decides` with `needs_evaluation = True`, or both. The same arguments must
    give the same answer.
    """

    needs_evaluation: ClassVar[bool] = False
    """Whether `decides` must be asked, so that a training without evaluations is refused."""

    def steps(self, total: int) -> list[int]:
        """Return the decision steps of a training of `total` steps, ascending, counted from 1.

        Raises `InputError` when they do not fit.
        """
        return []

    def decides(self, losses: Sequence[float]) -> bool:
        """Return whether to decide now, after the last of these evaluation losses.

        Asked after every evaluation whose loss is finite, with all of them since the start.
        """
        return False

    def soon(self) -> Self:
        """Return the same for a training of two steps, to try a recipe out."""
        return self


@dataclass(frozen=True, kw_only=True)
class At(When):
    """At `start`; with `rest` given, also every `every` steps from there, the last time `rest`
    before the end.

    Args:
        start: the first decision, in steps or as a fraction of the training (see
            `budget.steps_of`).
        rest: training after the last decision, likewise; None means one single decision.
        every: between decisions, likewise.

    >>> At(start=0.1, rest=0.3, every=20).steps(100)
    [10, 30, 50, 70]
    """

    start: float
    rest: float | None = None
    every: float = 10

    def __post_init__(self) -> None:
        if not (self.every >= 1 or (isinstance(self.every, float) and self.every > 0)):
            raise InputError(
                f"steps between decisions are {self.every}; expected a whole number >= 1, or a "
                "fraction"
            )

    def steps(self, total: int) -> list[int]:
        first = steps_of(self.start, total)
        # A fraction of a short training may round to 0, and there is no step 0.
        if self.start < 1:
            first = max(1, first)
        last = first if self.rest is None else total - steps_of(self.rest, total)
        if not 1 <= first <= last <= total:
            raise InputError(
                f"decision steps {first}..{last} do not fit a training of {total} steps; train for "
                "longer, or decide earlier (warmup_steps, initial, final)"
            )
        # `last` wherever `every` leads: without it the final budget would not be reached.
        return sorted({*range(first, last, max(1, steps_of(self.every, total))), last})

    def soon(self) -> Self:
        return replace(self, start=1, rest=None if self.rest is None else 0, every=1)


@dataclass(frozen=True, kw_only=True)
class OnPlateau(When):
    """When the evaluation loss has not fallen by more than `threshold` for `patience` evaluations
    in a row; a decision starts the count anew.

    >>> when = OnPlateau(patience=2)
    >>> losses = [0.9, 0.8, 0.8, 0.8, 0.8, 0.8]
    >>> [when.decides(losses[:count]) for count in range(1, 7)]
    [False, False, False, True, False, True]
    """

    needs_evaluation: ClassVar[bool] = True
    patience: int = 1
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise InputError(
                f"patience is {self.patience}; expected a whole number of evaluations >= 1"
            )

    def decides(self, losses: Sequence[float]) -> bool:
        best, bad = float("inf"), 0
        for loss in losses:
            bad %= self.patience
            best, bad = (loss, 0) if best - loss > self.threshold else (best, bad + 1)
        return bad == self.patience
