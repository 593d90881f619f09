"""How a method changes ranks while the model trains: importance x budget schedule x rule, and when
to decide."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptive_lora.allocation.budget import Constant, Schedule, steps_of
from adaptive_lora.allocation.importance import Importance
from adaptive_lora.allocation.rules import Rule
from adaptive_lora.errors import InputError


class When:
    """When decisions are made: `At` fixed steps, or `OnPlateau` of the evaluation loss."""


@dataclass(frozen=True, kw_only=True)
class At(When):
    """At `start`; with `rest` given, also every `every` steps from there, the last time `rest`
    before the end.

    Args:
        start: the first decision, in steps or as a fraction of the training (see
            `budget.steps_of`).
        rest: training after the last decision, likewise; None means one single decision.
        every: between decisions, likewise.
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
        """Return the decision steps, ascending, counted from 1. Raises `InputError` when they do
        not fit."""
        first = (
            max(1, steps_of(self.start, total)) if self.start < 1 else steps_of(self.start, total)
        )
        last = first if self.rest is None else total - steps_of(self.rest, total)
        if not 1 <= first <= last <= total:
            raise InputError(
                f"decision steps {first}..{last} do not fit a training of {total} steps; "
                "train for longer, or decide earlier (warmup_steps, initial, final)"
            )
        return sorted({*range(first, last, max(1, steps_of(self.every, total))), last})


@dataclass(frozen=True, kw_only=True)
class OnPlateau(When):
    """When the evaluation loss has not fallen by more than `threshold` for `patience` evaluations
    in a row."""

    patience: int = 1
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise InputError(
                f"patience is {self.patience}; expected a whole number of evaluations >= 1"
            )


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The changing part of a method.

    Args:
        importance: scores components from gradients and weights.
        rule: turns scores and the budget of the moment into new ranks.
        when: the decision steps.
        schedule: the budget of the moment; `schedule.factor` times the final budget is where
            training starts.
        min_rank, max_rank: bounds for every target; max_rank None means min(I, O).
    """

    importance: Importance
    rule: Rule
    when: When
    schedule: Schedule = field(default_factory=Constant)
    min_rank: int = 0
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.min_rank < 0 or (self.max_rank is not None and self.min_rank > self.max_rank):
            raise InputError(
                f"min_rank {self.min_rank} and max_rank {self.max_rank}: expected 0 <= min_rank <= "
                "max_rank"
            )


@dataclass(frozen=True, kw_only=True)
class MaskedByPeft(Adaptation):
    """Left to PEFT's `AdaLoraModel`, which multiplies components by a gate and sets gates to zero;
    ranks change once, at the end, when what is left becomes plain LoRA. PEFT counts components, so
    there is no budget in parameters.

    Args:
        target_rank: components at the end, as an average over the targets.
        orthogonality: weight of PEFT's penalty ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖ in the training loss.
    """

    target_rank: int
    orthogonality: float = 0.5
