"""`Driver`: how the ranks of one live model change, under a `RankController`.

The controller counts steps and keeps the history; a driver knows what to look at and what to do.
There is one for each way: `deciding.Deciding`, our engine; `peft_adalora.PeftAdaLora`; `Static`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftModel

from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.importance import Statistics
from adaptive_lora.allocation.method import Method
from adaptive_lora.errors import InputError
from adaptive_lora.model.adapters import is_masked


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a driver did. The controller makes a `Decision` of it, which describes the fields."""

    status: str
    reason: str | None = None
    budget: int | None = None
    parameters_before: int | None = None  # None: as many as after
    changes: dict[str, Resize] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


class Driver(ABC):
    """Changes the ranks of one model. Steps are optimizer steps, counted from 1.

    Args:
        model: with the adapters of `method`.
        optimizer: the optimizer that trains it, bare or wrapped by accelerate.
        method: how ranks are chosen.
        total: steps of the whole training.
    """

    needs_every_step: ClassVar[bool] = False
    """Whether no step may be left out: fp16's loss scaler leaves some out."""

    @abstractmethod
    def __init__(self, model: PeftModel, optimizer: Any, method: Method, total: int) -> None: ...

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """All that is remembered and must be saved beside the model; the controller does."""

    @abstractmethod
    def watching(self, step: int) -> bool:
        """Return whether gradients are needed after step `step`: a decision is still to come."""

    @abstractmethod
    def observe(self, step: int) -> None:
        """Take in the gradients of `step`: after the last backward, before `optimizer.step()`."""

    @abstractmethod
    def skip(self, step: int) -> None:
        """Instead of `observe`, when the gradients of `step` are thrown away.

        Raises `DivergedError` where that cannot be.
        """

    @abstractmethod
    def step(self, step: int) -> Outcome | None:
        """Change ranks after `step`, if it is a decision step."""

    @abstractmethod
    def evaluated(self, step: int, losses: Sequence[float]) -> Outcome | None:
        """Change ranks after an evaluation, if the method waits for one.

        Args:
            losses: of all evaluations so far, those that were finite.
        """

    def settle(self, step: int, *, decided: bool) -> Outcome | None:
        """Decide once more where training ends after `step`, before the last decision or above the
        budget.

        Args:
            decided: whether anything was decided so far.
        """
        return None

    def finish(self) -> Outcome | None:
        """End the training."""
        return None

    def forget(self) -> None:
        """Drop the statistics: nobody will look at them again."""
        return

    @abstractmethod
    def restore(self, statistics: Statistics) -> None:
        """Take up what a checkpoint held. The model has the ranks of that moment."""

    @classmethod
    @abstractmethod
    def planned_bytes(cls, method: Method, model: PeftModel) -> int:
        """Return the bytes its statistics will take on `model`, which may be without storage."""


class Static(Driver):
    """For methods whose ranks stay as they are: does nothing."""

    def __init__(self, model: PeftModel, optimizer: Any, method: Method, total: int) -> None:
        check_plain(model, method)

    @property
    def statistics(self) -> Statistics:
        return {}

    def watching(self, step: int) -> bool:
        return False

    def observe(self, step: int) -> None:
        pass

    def skip(self, step: int) -> None:
        pass

    def step(self, step: int) -> Outcome | None:
        return None

    def evaluated(self, step: int, losses: Sequence[float]) -> Outcome | None:
        return None

    def restore(self, statistics: Statistics) -> None:
        pass

    @classmethod
    def planned_bytes(cls, method: Method, model: PeftModel) -> int:
        return 0


def check_plain(model: PeftModel, method: Method) -> None:
    """Raise `InputError` unless the model's adapters are plain LoRA."""
    if is_masked(model):
        raise InputError(
            f"the model was attached with methods.peft_adalora; got the method {method.name!r} to "
            "train it"
        )
