"""A run killed at any point and resumed from its last checkpoint equals the uninterrupted run, bit
for bit.

CPU, float32, dropout on, a stock `Trainer` with our callback. In every method's twelve steps (two
micro-steps each) the run is killed before a decision, right at it, after it, and between the two
micro-steps; a fresh model at the first ranks resumes. In-process the kill is an exception: nothing
of the killed trainer is used again but its files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from dynamic import DYNAMIC, STEPS, callback_of, make_trainer, state_of
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import adaptive_lora as al
from adaptive_lora import IntegrityError, methods
from adaptive_lora.allocation import history


class Kill(Exception):  # noqa: N818
    """Stands for kill -9."""


class KillAt(TrainerCallback):
    """Kill in step `step` (from 1): at its "substep" (mid-accumulation), before its "optimizer"
    step, or at its "end"."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where

    def _strike(self, where: str, step: int) -> None:
        if (where, step) == (self.where, self.step):
            raise Kill

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._strike("substep", state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._strike("optimizer", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._strike("end", state.global_step)


def logs(trainer: Any) -> list[dict[str, Any]]:
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    return [
        {k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history
    ]


@cache
def uninterrupted(name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[tuple]]:
    trainer = make_trainer(Path(mkdtemp()), DYNAMIC[name](), save_strategy="no")
    trainer.train()
    return state_of(trainer), logs(trainer), decisions(trainer)


def decisions(trainer: Any) -> list[tuple]:
    return [
        (r.step, r.status, r.budget, r.pattern, r.scores, r.changes)
        for r in callback_of(trainer).history
    ]


# 13 kill points a method; every one of the 12 steps is hit, and several in all three places.
POINTS = [(2, "end"), (3, "substep"), (3, "end"), (4, "substep"), (4, "optimizer"), (4, "end"),
          (5, "end"), (6, "substep"),
          (7, "optimizer"), (8, "end"), (9, "substep"), (10, "end"), (12, "optimizer")]  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize(("step", "where"), POINTS)
def test_resumed_equals_uninterrupted(name: str, step: int, where: str, tmp_path: Path) -> None:
    with pytest.raises(Kill):
        make_trainer(tmp_path, DYNAMIC[name](), callbacks=[KillAt(step, where)]).train()
    resumed = make_trainer(tmp_path, DYNAMIC[name]())
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    state, rows, decided = uninterrupted(name)
    mine = state_of(resumed)
    assert mine.keys() == state.keys()
    assert [n for n in mine if not torch.equal(mine[n], state[n])] == []
    assert decisions(resumed) == decided
    assert [r for r in logs(resumed) if "loss" in r or "eval_loss" in r] == [
        r for r in rows if "loss" in r or "eval_loss" in r
    ]
    assert history.replay(
        callback_of(resumed).controller.initial_pattern, callback_of(resumed).history
    ) == al.ranks(resumed.model)


@pytest.mark.parametrize("name", ["plateau", "adalora"])
def test_a_checkpoint_in_the_last_step_of_an_epoch_holds_what_its_evaluation_decided(
    name: str, tmp_path: Path
) -> None:
    """The stock Trainer makes it before the epoch's evaluation, which a resumed run would never
    make."""
    # four steps an epoch
    options: dict[str, Any] = {"eval_strategy": "epoch", "per_device_train_batch_size": 8}
    whole = make_trainer(tmp_path / "whole", DYNAMIC[name](), **options)
    whole.train()
    ends = [row["step"] for row in whole.state.log_history if "eval_loss" in row]
    assert len(ends) > 1
    for step in ends[:-1]:
        resumed = make_trainer(tmp_path / f"from-{step}", DYNAMIC[name](), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        mine, theirs = state_of(resumed), state_of(whole)
        assert mine.keys() == theirs.keys()
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
        assert decisions(resumed) == decisions(whole)


@pytest.mark.parametrize("name", DYNAMIC)
def test_resumed_after_the_last_step_nothing_is_trained(name: str, tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end, in mid-epoch: a stock Trainer would make a
    thirteenth step."""
    whole = make_trainer(tmp_path, DYNAMIC[name](), kind=al.AdaptiveTrainer)
    whole.train()
    resumed = make_trainer(tmp_path, DYNAMIC[name](), kind=al.AdaptiveTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert resumed.state.global_step == STEPS
    mine, theirs = (
        {n: p.detach() for n, p in t.model.named_parameters()} for t in (resumed, whole)
    )
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
    assert decisions(resumed) == decisions(whole)


def test_the_points_lie_before_at_and_after_decisions_of_every_method() -> None:
    for name in DYNAMIC:
        changed = {
            step for step, status, *_ in uninterrupted(name)[2] if status in ("changed", "masked")
        }
        struck = {step for step, _ in POINTS}
        assert any({s - 1, s, s + 1} <= struck for s in changed), (name, changed)


@pytest.mark.parametrize(
    "damage",
    ["missing", "truncated", "other method", "other budget", "other schedule", "other length"],
)
def test_a_rank_state_that_is_missing_damaged_or_foreign_is_refused(
    damage: str, tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        make_trainer(tmp_path, DYNAMIC["adalora"](), callbacks=[KillAt(6, "end")]).train()
    checkpoint = Path(get_last_checkpoint(str(tmp_path)) or "")
    method, options = DYNAMIC["adalora"](), {}
    if damage == "missing":
        (checkpoint / "rank_state.json").unlink()
    elif damage == "truncated":
        file = checkpoint / "rank_state.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "other method":
        method = methods.adalora(2, factor=2.0, initial=2, final=2, every=2)
        method = al.Method(**{**vars(method), "name": "another"})
    elif damage == "other budget":
        method = methods.adalora(3, factor=2.0, initial=2, final=2, every=2)
    elif damage == "other schedule":
        method = methods.adalora(2, factor=2.0, initial=2, final=4, every=2)
    else:
        options = {"max_steps": STEPS + 1}
    named = {
        "other method": "method was 'adalora', now 'another'",
        "other budget": "rank was 2, now 3",
        "other schedule": "when was .*rest=2.*schedule was .*final=2",
        "other length": "total_steps was 12, now 13",
    }
    with pytest.raises(IntegrityError, match=f"cannot resume.*{named.get(damage, '')}"):
        make_trainer(tmp_path, method, **options).train(resume_from_checkpoint=str(checkpoint))
