"""What a part of a method may not answer is an error that names its class and the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import adaptive_lora as al
from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.budget import Constant
from adaptive_lora.allocation.importance import (
    Pairs,
    Sensitivity,
    Statistic,
    Statistics,
    Uniform,
)
from adaptive_lora.allocation.method import Adaptation
from adaptive_lora.allocation.rules import Proportional, Rule, View
from adaptive_lora.allocation.when import At, OnPlateau, When
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.driver import Static
from adaptive_lora.testing import STEPS, make_model, records
from adaptive_lora.training.controller import STATE_FILE, NeverDecidedError

BATCH = {key: torch.stack([row[key] for row in records(4)]) for key in ("input_ids", "labels")}


def method_of(**parts: Any) -> al.Method:
    whole = {"importance": Uniform(), "rule": Proportional(), "when": At(start=2), **parts}
    ones = lambda targets: {target.name: 2 for target in targets}
    return al.Method(name="mine", shape=ones, rank=2, adaptation=Adaptation(**whole))


def controlled(method: al.Method) -> tuple[al.RankController, torch.optim.Optimizer]:
    model = make_model(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return al.RankController(model, optimizer, method, STEPS), optimizer


def train(method: al.Method, losses: Sequence[float] = ()) -> al.RankController:
    controller, optimizer = controlled(method)
    for step in range(STEPS):
        controller.model(**BATCH).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        if step < len(losses):
            controller.evaluated(losses[step])
    controller.finish()
    return controller


@dataclass(frozen=True)
class Steps(When):
    answer: Any

    def steps(self, total: int) -> Any:
        return self.answer


@dataclass(frozen=True)
class Evaluations(When):
    needs_evaluation: ClassVar[bool] = True
    answer: Any

    def decides(self, losses: Sequence[float]) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "steps", [[0], [STEPS + 1], [3, 2], [2, 2], [2.0], [True], (2, 3), None, "3"], ids=repr
)
def test_steps_that_cannot_be_are_refused_before_the_first(steps: Any) -> None:
    with pytest.raises(InputError) as refused:
        controlled(method_of(when=Steps(steps)))
    assert f"Steps.steps({STEPS}) returned {steps!r}; expected" in str(refused.value)


def test_a_when_without_any_moment_is_refused() -> None:
    with pytest.raises(InputError, match=r"Steps.steps\(12\) returned \[\].*would ever be decided"):
        controlled(method_of(when=Steps([])))


def test_an_answer_that_is_no_yes_or_no_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"Evaluations.decides\(\[0.5\]\) returned None; expected True"
    ):
        train(method_of(when=Evaluations(None)), losses=[0.5])


def test_a_when_of_ones_own_decides_at_steps_and_at_evaluations() -> None:
    """Both in one: at step 3, and at every evaluation whose loss is above 1."""

    @dataclass(frozen=True)
    class Both(When):
        needs_evaluation: ClassVar[bool] = True

        def steps(self, total: int) -> list[int]:
            return [3]

        def decides(self, losses: Sequence[float]) -> bool:
            return losses[-1] > 1

    rows = train(method_of(when=Both()), losses=[0.5, 2.0, 0.5, 0.5, 3.0]).history
    decided = [(row.step, row.reason) for row in rows if row.scores]
    assert decided == [(2, None), (3, None), (5, None)]


def test_an_evaluation_before_the_first_step_may_decide() -> None:
    """Trainers evaluate there with eval_on_start; nothing has been observed yet."""
    controller, _ = controlled(method_of(when=Evaluations(True), importance=Sensitivity()))
    controller.evaluated(0.5)
    (row,) = controller.history
    assert set(row.scores.values()) == {0.0}


@dataclass(frozen=True)
class Answers(Uniform):
    """Says of the first target something else than it should."""

    change: Callable[[Any], Any]
    what: str = "scores"

    def _odd(self, what: str, answer: Any) -> Any:
        return self.change(answer) if what == self.what else answer

    def start(self, pairs: Pairs) -> Statistics:
        plain = {"seen": {name: Statistic(torch.zeros(len(a))) for name, (a, _) in pairs.items()}}
        return self._odd("start", plain)

    def scores(self, pairs: Pairs, statistics: Statistics) -> Any:
        return self._odd("scores", super().scores(pairs, statistics))

    def target_scores(self, pairs: Pairs, statistics: Statistics) -> Any:
        return self._odd("target_scores", dict.fromkeys(pairs, 1.0))


def first(answer: dict[str, Any], value: Callable[[Any], Any]) -> dict[str, Any]:
    name = next(iter(answer))
    return {**answer, name: value(answer[name])}


def one_more(answer: dict[str, Any]) -> dict[str, Any]:
    return first(answer, lambda row: torch.cat([row, row[:1]]))


def shorter(answer: Statistics) -> Statistics:
    return {"seen": first(answer["seen"], lambda statistic: Statistic(statistic.tensor[:1]))}


QUERY = "'bert.encoder.layer.0.attention.self.query'"


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        (
            "scores",
            one_more,
            rf"Answers.scores\(\) returned shape \(3,\) for {QUERY}; expected \(2,\)",
        ),
        (
            "scores",
            lambda _: {},
            r"Answers.scores\(\) returned no entry; expected a tensor for each",
        ),
        ("scores", lambda a: first(a, lambda _: 3.0), r"Answers.scores\(\) returned shape 3.0 for"),
        (
            "target_scores",
            lambda a: {**a, "x": 1.0},
            r"Answers.target_scores\(\) returned 7 entries",
        ),
        (
            "start",
            shorter,
            r"Answers.start\(\) returned 'seen' of shape \(1,\) for .*expected 2 there",
        ),
    ],
)
def test_an_importance_that_answers_in_another_shape_is_named(
    what: str, change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(method_of(importance=Answers(change, what)))


@pytest.mark.parametrize("what", ["scores", "target_scores"])
def test_an_importance_that_answers_nan_is_named_in_the_refused_decision(what: str) -> None:
    bad = lambda row: row * float("nan")
    with pytest.raises(NeverDecidedError, match=f"was refused: .*Answers gave nan for {QUERY}"):
        train(method_of(importance=Answers(lambda a: first(a, bad), what)))


@dataclass(frozen=True)
class Changes(Rule):
    change: Callable[[View], dict[str, Resize]]

    def decide(self, view: View) -> dict[str, Resize]:
        return self.change(view)


def all_at(rank: int) -> Callable[[View], dict[str, Resize]]:
    return lambda view: view.to_pattern(dict.fromkeys(view.ranks, rank))


@pytest.mark.parametrize(
    ("change", "bounds", "message"),
    [
        (all_at(3), {}, r"Changes.decide\(\) returned ranks of 672 parameters; the budget is 448"),
        (all_at(3), {"max_rank": 2}, r"returned rank 3 for .*expected 0..2"),
        (all_at(1), {"min_rank": 2}, r"returned rank 1 for .*expected 2..16"),
        (lambda _: {"x": Resize((0,))}, {}, "returned a change of 'x', which is no target"),
    ],
)
def test_a_rule_outside_bounds_or_budget_is_named(
    change: Any, bounds: dict[str, int], message: str
) -> None:
    method = method_of(rule=Changes(change), **bounds)
    with pytest.raises(InputError, match=message):
        train(method)


def test_a_schedule_that_answers_no_whole_number_is_named() -> None:
    class Half(Constant):
        def at(self, step: int, total: int, final: int) -> Any:
            return final / 2

    with pytest.raises(InputError, match=r"Half.at\(2, 12, 448\) returned 224.0; expected a whole"):
        train(method_of(schedule=Half()))


# --- the rank state of a checkpoint, and who reads it ---


def test_a_method_that_never_changes_ranks_is_driven_by_nothing(tmp_path: Path) -> None:
    controller, _ = controlled(al.methods.lora(2))
    assert isinstance(controller.driver, Static)
    controller.step()
    controller.finish()
    assert controller.history == []


def state_after(losses: Sequence[float], folder: Path) -> dict[str, Any]:
    method = method_of(when=OnPlateau(patience=3), min_rank=1, max_rank=8)
    controller, _ = controlled(method)
    for loss in losses:
        controller.evaluated(loss)
    folder.mkdir(exist_ok=True)
    controller.save_state(folder)
    return json.loads((folder / STATE_FILE).read_text())


def resumed(state: dict[str, Any], folder: Path) -> al.RankController:
    (folder / STATE_FILE).write_text(json.dumps(state))
    controller, _ = controlled(method_of(when=OnPlateau(patience=3), min_rank=1, max_rank=8))
    controller.load_state(folder)
    return controller


@pytest.mark.parametrize(
    ("losses", "best", "bad"), [([], None, 0), ([0.5], 0.5, 0), ([0.7, 0.5, 0.6, 0.5], 0.5, 2)]
)
def test_the_state_that_version_0_1_wrote_goes_on_as_it_would_have(
    losses: list[float], best: float | None, bad: int, tmp_path: Path
) -> None:
    """It kept the best loss and how many evaluations came since, not the losses themselves."""
    now = state_after(losses, tmp_path)
    old = {k: v for k, v in now.items() if k not in ("version", "losses")}
    controllers = [
        resumed(now, tmp_path),
        resumed({**old, "best_loss": best, "bad_evaluations": bad}, tmp_path),
    ]
    for loss in (0.55, 0.4, 0.45, 0.45, 0.45):
        for controller in controllers:
            controller.evaluated(loss)
    mine, theirs = ([(r.step, r.status, r.pattern) for r in c.history] for c in controllers)
    assert mine == theirs


def test_the_state_of_a_later_version_is_refused(tmp_path: Path) -> None:
    state = {**state_after([0.5], tmp_path), "version": 99}
    with pytest.raises(IntegrityError, match="its rank state is of version 99, this adaptive-lora"):
        resumed(state, tmp_path)


def test_plain_lora_is_not_driven_by_pefts_adalora_nor_the_other_way_round() -> None:
    masked, plain = al.methods.peft_adalora(2, initial_rank=4, initial=2, final=2), method_of()
    for attached, trained in ((masked, plain), (masked, al.methods.lora(2)), (plain, masked)):
        model = make_model(attached)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(InputError, match="attach"):
            al.RankController(model, optimizer, trained, STEPS)
