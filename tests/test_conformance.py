"""Every method of `METHODS` holds every law of `adaptive_lora.testing`, and each law can be
broken."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic import DYNAMIC

from adaptive_lora import Method, methods, testing
from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.importance import (
    GradientNorm,
    Importance,
    Pairs,
    Scores,
    Statistics,
    Uniform,
)
from adaptive_lora.allocation.method import Adaptation
from adaptive_lora.allocation.rules import Grow, Rule, TopK, View
from adaptive_lora.allocation.when import At, When
from adaptive_lora.methods import METHODS
from adaptive_lora.model import deciding, saving
from adaptive_lora.model.resize import resize, unwrap
from adaptive_lora.testing import (
    CHECKS,
    Check,
    MakeMethod,
    check_accumulation,
    check_budget,
    check_decides,
    check_growth_keeps_the_function,
    check_history_replays,
    check_initial_pattern,
    check_optimizer_state,
    check_ranks_are_the_pattern,
    check_reload,
    check_resume,
    check_same_seed,
    check_when,
)
from adaptive_lora.training import controller
from adaptive_lora.training.trainer import AdaptiveTrainer

# Arguments with which a method decides within twelve steps; the others are run at the budget of
# uniform rank 2.
PRESETS: dict[str, MakeMethod] = {
    **{name: lambda name=name: METHODS[name](rank=2) for name in METHODS},
    **DYNAMIC,
    "linear_decay unbudgeted": lambda: methods.linear_decay(base_rank=4, min_rank=1),
    "custom": lambda: methods.custom(pattern={".*query": 3, ".*value": 0, ".*": 1}),
    "growth from rank 0": lambda: Method(
        name="growth from rank 0",
        shape=lambda targets: {t.name: 0 if "value" in t.name else 2 for t in targets},
        rank=5,
        raw_start=True,
        adaptation=Adaptation(
            importance=GradientNorm(), rule=Grow(step=1), when=At(start=2, rest=2, every=3)
        ),
    ),
    "plateau budgeted": lambda: methods.plateau(
        3, initial_rank=1, max_rank=5, rank_step=1, threshold=100.0
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _nothing_imported_is_collected() -> Iterator[None]:
    """The Trainer collects garbage at every start; what is imported is half of the time of a
    training of twelve steps."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "name", PRESETS
)  # the outer loop: a method's checks come one after the other
def test_every_method_conforms(check: Check, name: str, tmp_path: Path) -> None:
    check(PRESETS[name], tmp_path)


class Remembers(Importance):
    """Counts micro-steps and trainings on `self`, where no checkpoint finds it."""

    trainings = 0

    def __init__(self, what: str) -> None:
        self.what, self.looks = what, 0
        Remembers.trainings += 1
        self.number = Remembers.trainings

    def start(self, pairs: Pairs) -> Statistics:
        return {}

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        self.looks += 1

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        now = self.looks if self.what == "looks" else self.number
        generator = torch.Generator().manual_seed(now)
        return {name: torch.rand(a.shape[0], generator=generator) for name, (a, _) in pairs.items()}


class Hoards(Rule):
    """Shrinks everything to rank 1, whatever the budget."""

    def decide(self, view: View) -> dict[str, Resize]:
        return view.to_pattern(dict.fromkeys(view.ranks, 1))


class Counts(When):
    """Decides when it has been asked often enough, whatever it is asked."""

    needs_evaluation = True

    def __init__(self) -> None:
        self.asked = 0

    def decides(self, losses: Sequence[float]) -> bool:
        self.asked += 1
        return self.asked > 3


def broken(importance: Importance, rule: Rule, when: When | None = None) -> Method:
    adaptation = Adaptation(
        importance=importance, rule=rule, when=when or At(start=2, rest=2, every=2)
    )
    return Method(
        name="broken",
        shape=lambda targets: {t.name: 1 for t in targets},
        rank=3,
        adaptation=adaptation,
    )


def shape_of(rank: object) -> Method:
    return Method(name="broken", shape=lambda targets: {t.name: rank for t in targets})


@pytest.mark.parametrize(
    ("check", "make_method", "message"),
    [
        (
            check_initial_pattern,
            lambda: Method(
                name="broken", shape=lambda targets: {t.name: 1 for t in targets} | {"another": 1}
            ),
            "not of these targets",
        ),
        (check_initial_pattern, lambda: shape_of(2.0), "expected a whole number"),
        (check_decides, lambda: broken(Uniform(), TopK()), "none changed a rank"),
        (check_when, lambda: broken(Uniform(), TopK(), when=Counts()), "in another order"),
        (check_budget, lambda: broken(Uniform(), Hoards()), "one more component costs"),
        (check_resume, lambda: broken(Remembers("looks"), Hoards()), "resumed from step 4"),
        (check_same_seed, lambda: broken(Remembers("number"), Hoards()), "the same seed"),
    ],
)
def test_a_broken_method_is_found_out(
    check: Check, make_method: MakeMethod, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(make_method, tmp_path)


def misreport(what: str) -> Any:
    """Return a `Decision` that says something else than was done."""

    def decision(**fields: Any) -> Decision:
        wrong = dict.fromkeys(fields["pattern"], 1) if what == "pattern" else {}
        return Decision(**{**fields, what: wrong})

    return decision


def resize_badly(what: str) -> Any:
    """Return a `resize` that leaves a stale moment, or new components that are not zero."""

    def bad(model: Any, changes: Any, optimizer: Any, *args: Any, **options: Any) -> None:
        resize(model, changes, optimizer, *args, **options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name and what == "moment":
                unwrap(optimizer).state[parameter]["stale"] = torch.zeros(3, 3)
            elif "lora_B" in name:
                parameter.data.add_(0.01)

    return bad


class Forgetful(AdaptiveTrainer):
    """Every micro-batch forgets the gradients of those before it."""

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        model.zero_grad()
        return super().training_step(model, *args, **kwargs)


def save_late(model: Any, folder: Path) -> None:
    """Save, and train on by a little."""
    saving.save(model, folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


@pytest.mark.parametrize(
    ("check", "where", "name", "bad", "message"),
    [
        (check_ranks_are_the_pattern, controller, "Decision", misreport("pattern"), "decided were"),
        (
            check_history_replays,
            controller,
            "Decision",
            misreport("changes"),
            "the history leads to",
        ),
        (check_optimizer_state, deciding, "resize", resize_badly("moment"), "has shape"),
        (
            check_growth_keeps_the_function,
            deciding,
            "resize",
            resize_badly("weights"),
            "changed the logits",
        ),
        (check_reload, testing, "save", save_late, "the logits differ"),
        (check_accumulation, testing, "AdaptiveTrainer", Forgetful, "batch 8 leads to"),
    ],
)
def test_a_broken_library_is_found_out(
    check: Check,
    where: Any,
    name: str,
    bad: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The laws a method cannot break by itself: here the engine is broken under it."""
    monkeypatch.setattr(deciding, "check_state_shapes", lambda *_: None)  # it would notice first
    monkeypatch.setattr(where, name, bad)
    # grad_delta makes one decision, from gradients: a later resize would stumble over the stale
    # moment by itself.
    method = "grad_delta" if check in (check_optimizer_state, check_accumulation) else "plateau"
    with pytest.raises(AssertionError, match=message):
        check(lambda: DYNAMIC[method](), tmp_path)  # anew: trainings are remembered by function
