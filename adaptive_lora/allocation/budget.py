"""Budget schedules: how many LoRA parameters may be spent at a step. Pure; no torch.

Times are fractions of the training when below 1, steps when whole numbers; total steps come from
the trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from adaptive_lora.errors import InputError


def steps_of(time: float, total: int) -> int:
    """Return a time as a number of steps: a float below 1 is a fraction of `total`, a whole number
    is steps.

    >>> steps_of(0.1, 200), steps_of(30, 200)
    (20, 30)
    """
    return round(time * total) if isinstance(time, float) and time < 1 else int(time)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """When budgets change, and to what. Training starts at `factor` times the final budget."""

    factor: float = 1.0

    @abstractmethod
    def at(self, step: int, total: int, final: int) -> int:
        """Return the budget in parameters after optimizer step `step` of `total`, for a final
        budget `final`."""

    def check(self, total: int) -> None:
        """Raise `InputError` unless the schedule fits into `total` steps."""

    def soon(self) -> Self:
        """Return the same for a training of two steps, to try a recipe out."""
        return self


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """b(t) = b_T."""

    def at(self, step: int, total: int, final: int) -> int:
        return final


@dataclass(frozen=True, kw_only=True)
class Cubic(Schedule):
    """From b_0 to b_T by a cubic curve.

    b(t) = b_0 for t < t_i; b_T + (b_0 − b_T)(1 − (t − t_i) / (T − t_f − t_i))³; b_T from T − t_f
    on. Rounded down.

    Args:
        factor: b_0 / b_T, at least 1.
        initial: t_i, steps or a fraction of T, before the budget starts to fall.
        final: t_f, steps or a fraction of T, of training at the final budget.

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equation 12.
    """

    factor: float = 1.5
    initial: float = 0.1
    final: float = 0.3

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError(
                f"the initial budget is {self.factor} of the final one; a shrinking method needs "
                "at least 1"
            )

    def soon(self) -> Self:
        return replace(self, initial=0, final=0)

    def span(self, total: int) -> tuple[int, int]:
        """Return (t_i, T − t_f) in steps."""
        return steps_of(self.initial, total), total - steps_of(self.final, total)

    def check(self, total: int) -> None:
        first, last = self.span(total)
        if not 0 <= first < last <= total:
            raise InputError(
                f"the budget schedule does not fit: of {total} training steps, {first} come before "
                f"it starts and {total - last} after it ends. Train for longer, or lower initial / "
                "final"
            )

    def at(self, step: int, total: int, final: int) -> int:
        first, last = self.span(total)
        # Rounded as `Method.initial_pattern` does, so that a training starts at this very budget.
        start = int(self.factor * final)
        if step < first:
            return start
        if step >= last:
            return final
        return int(final + (start - final) * (1 - (step - first) / (last - first)) ** 3)
