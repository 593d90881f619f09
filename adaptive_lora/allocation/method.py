"""`Method`: how ranks are chosen. Read this first: everything else here is one of its parts.

A method is a shape (the ranks before training) and, where ranks change while the model trains, an
`Adaptation`, the product of four parts that know nothing of each other:

    importance    what is a component worth?           gradients and weights -> a score each
    when          is it time to decide?                 the step, or the evaluation losses
    schedule      how much may be spent now?            progress -> a budget in parameters
    rule          who gets it?                          scores + budget -> ranks

Three of them, to see how the parts combine (all are in `adaptive_lora/methods.py`):

    adalora    Sensitivity      At every 10 steps    Cubic, from 1.5 x      TopK: drop the worst
    squeeze    SingularValues   At, in stages        Cubic, from 2 x        Truncate: rotate first
    plateau    Uniform          OnPlateau            Constant               Grow: everyone by two

Numbers in, ranks out: nothing in this package knows a module, an optimizer or a Trainer. Who lets a
method work on a live model is `adaptive_lora/model/deciding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adaptive_lora.allocation.allocate import RankPattern, proportional
from adaptive_lora.allocation.budget import Constant, Schedule
from adaptive_lora.allocation.importance import Importance
from adaptive_lora.allocation.rules import Rule
from adaptive_lora.allocation.shapes import Shape
from adaptive_lora.allocation.target import Target
from adaptive_lora.allocation.when import When
from adaptive_lora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The changing part of a method.

    Args:
        importance: scores components from gradients and weights.
        rule: turns scores and the budget of the moment into new ranks.
        when: at which moments to decide.
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

    driver: ClassVar[type[Any] | None] = None
    """The class that changes the ranks of a model so; None means `model.deciding.Deciding`."""

    def peft_config(self, rank: int, scale: float, common: dict[str, Any]) -> Any:
        """Return PEFT's config of the adapters to begin with; None means plain LoRA."""
        return None

    def last_pattern(self, targets: Sequence[Target]) -> RankPattern | None:
        """Return ranks with as many parameters as those at the end, where that is known before the
        training; None where the training decides."""
        return None


@dataclass(frozen=True, kw_only=True)
class Method:
    """How ranks are chosen. Build one with a preset below, or with your own shape.

    Args:
        name: shown in results.
        shape: the raw rank of every target.
        rank: budget as the parameters of uniform rank `rank`; or
        budget: budget in parameters, Σ R (I + O). With neither, the raw ranks are used as they are.
        adaptation: how ranks change while the model trains; None means that they do not.
        raw_start: start at the raw ranks, whatever the budget; for methods that grow up to it.

    Raises `InputError` when both are given, or one is not a positive whole number.

    >>> half = lambda targets: {target.name: target.full_rank // 2 for target in targets}
    >>> halves = Method(name="halves", shape=half)
    """

    name: str
    shape: Shape
    rank: int | None = None
    budget: int | None = None
    adaptation: Adaptation | None = None
    raw_start: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.budget is not None:
            raise InputError(
                f"method {self.name!r}: give rank ({self.rank}) or budget ({self.budget}), not both"
            )
        for what, value in (("rank", self.rank), ("budget", self.budget)):
            if value is not None:
                check_whole(f"method {self.name!r}: {what}", value, at_least=1)

    def budget_parameters(self, targets: Sequence[Target]) -> int | None:
        """Return the budget on these targets in parameters; None when the raw ranks are used."""
        return (
            self.budget if self.rank is None else sum(self.rank * target.cost for target in targets)
        )

    def initial_pattern(self, targets: Sequence[Target]) -> RankPattern:
        """Return the rank of every target before training.

        Raises `InputError` when a rank exceeds min(I, O) or the budget cannot be met.
        """
        raw = self.shape(targets)
        for target in targets:
            if target.name not in raw:
                raise InputError(
                    f"the shape of method {self.name!r} gives no rank to target {target.name!r}"
                )
        budget = None if self.raw_start else self.budget_parameters(targets)
        if budget is None:
            for target in targets:
                if raw[target.name] > target.full_rank:
                    raise InputError(
                        f"rank {raw[target.name]} for {target.name!r} exceeds min(in_features, "
                        f"out_features) = min({target.in_features}, {target.out_features}) = "
                        f"{target.full_rank}; choose a lower rank"
                    )
            return raw
        # A rank above some targets will do: the others take up what these cannot hold.
        largest = max(target.full_rank for target in targets)
        if self.rank is not None and self.rank > largest:
            raise InputError(
                f"rank {self.rank} exceeds min(in_features, out_features) of every target, at most "
                f"{largest}; choose a lower rank"
            )
        factor = 1 if self.adaptation is None else self.adaptation.schedule.factor
        # What the shape gives any rank keeps a component at least; rank 0 stays rank 0.
        return proportional(
            raw,
            {target.name: target.cost for target in targets},
            int(budget * factor),
            minimum={name: min(rank, 1) for name, rank in raw.items()},
            maximum={t.name: t.full_rank if raw[t.name] else 0 for t in targets},
        )


def check_whole(what: str, value: object, *, at_least: int) -> int:
    """Return `value`, or raise `InputError` unless it is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{what} is {value!r}; expected a whole number >= {at_least}")
    if value < at_least:
        raise InputError(f"{what} is {value}; expected a whole number >= {at_least}")
    return value
