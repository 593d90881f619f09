"""`RankController`: the one object with state. It watches a training loop, any loop, and changes
ranks in it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaptive_lora.allocation import history
from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.importance import Statistic, Statistics
from adaptive_lora.allocation.method import Method
from adaptive_lora.errors import AdaptiveLoraError, InputError, IntegrityError
from adaptive_lora.files import to_json, write_text
from adaptive_lora.model.adapters import (
    adapters,
    lora_parameters,
    parameters_of,
    ranks,
    ranks_of,
    targets_of,
)
from adaptive_lora.model.deciding import driver_of
from adaptive_lora.model.driver import Outcome
from adaptive_lora.model.following import follow
from adaptive_lora.model.memory import adapter_bytes
from adaptive_lora.model.resize import drop_misfits
from adaptive_lora.training.contract import bring_to_start, model_for

logger = logging.getLogger(__name__)

STATE_FILE, TENSOR_FILE = "rank_state.json", "rank_state.safetensors"
VERSION = 2  # of the rank state


class NeverDecidedError(AdaptiveLoraError):
    """The method has decision steps, but training ended without a single decision."""

    exit_code = 2


class RankController:
    """Changes ranks while a model trains.

        loss.backward(); controller.observe(); optimizer.step(); optimizer.zero_grad();
        controller.step()

    and `controller.finish()` at the end. A method that never changes ranks makes all of these do
    nothing.

    Args:
        model: from `attach(base, method)`, or any `PeftModel` with LoRA, or a module that holds
            one. Attached otherwise than the method starts, it is brought there.
        optimizer: AdamW, Adam or SGD over the model's trainable parameters, bare or wrapped by
            accelerate.
        method: the method the model was attached with.
        total_steps: optimizer steps of the whole training.
        on_decision: called with each `Decision`.

    Raises `InputError` at once for an unsupported optimizer, a schedule that does not fit, a budget
    below the minimum, or adapters that cannot be trained as they are (merged, disabled, frozen).
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Any,
        method: Method,
        total_steps: int,
        on_decision: Callable[[Decision], None] | None = None,
    ) -> None:
        self.model = model_for(model, method)
        self.optimizer, self.method = optimizer, method
        self.total_steps, self.on_decision = total_steps, on_decision
        self.step_count = 0
        self.history: list[Decision] = []
        self._losses: list[float] = []  # of the evaluations so far, where the method waits for them
        self._observed = self._finished = self._begun = False
        self.driver = driver_of(method)(self.model, optimizer, method, total_steps)
        follow(self.model, ranks=True)
        # Of a run that is resumed the adapters may be there already, trained: `begin` is for later.
        bring_to_start(self.model, method, optimizer, fresh_only=True)
        self.initial_pattern = ranks(self.model)

    def begin(self) -> None:
        """Bring the model to the method's first ranks, if it was attached with others; called by
        the first `observe()` or `step()` of a training that is not resumed."""
        if not self._begun:
            self._begun = True
            bring_to_start(self.model, self.method, self.optimizer)
            self.initial_pattern = ranks(self.model)

    def observe(self) -> None:
        """Take in this step's gradients: after the last backward, before `optimizer.step()`."""
        self.begin()
        if not self.driver.watching(self.step_count):
            return
        if self._observed:
            raise InputError(
                "observe() was called twice without step(); call controller.step() after each "
                "optimizer step"
            )
        self.driver.observe(self.step_count + 1)
        self._observed = True

    def skip(self) -> None:
        """Instead of `observe()`, in a step whose gradients are thrown away: it counts, but leaves
        no trace in the scores.

        Raises `DivergedError` for PEFT's AdaLoRA, which must see the gradients of every step.
        """
        if self.driver.watching(self.step_count):
            self.driver.skip(self.step_count + 1)
            self._observed = True

    def step(self) -> None:
        """Count one optimizer step and, at a decision step, change ranks: after `optimizer.step()`
        and `zero_grad()`."""
        self.begin()
        if self.driver.watching(self.step_count) and not self._observed:
            raise InputError(
                "step() was called without observe(); call controller.observe() after "
                "loss.backward()"
            )
        self._observed = False
        self.step_count += 1
        self._record(lambda: self.driver.step(self.step_count))
        if not self.driver.watching(self.step_count):
            # Checkpoints need not carry from here on what nobody will ask for.
            self.driver.forget()

    def evaluated(self, loss: float) -> None:
        """Take in a validation loss; a method that waits for one may change ranks now, but not
        after the last step: what grows then would never be trained."""
        adaptation = self.method.adaptation
        if adaptation is None or not adaptation.when.needs_evaluation:
            return
        if self._finished or self.step_count >= self.total_steps:
            return
        if not math.isfinite(loss):
            reason = f"the evaluation loss is {loss}"
            self._record(lambda: Outcome(status="refused", reason=reason))
            return
        self._losses.append(loss)
        self._record(lambda: self.driver.evaluated(self.step_count, self._losses))

    def finish(self, *, stopped_early: bool = False) -> None:
        """End the training, wherever it ends: the ranks are those of a last decision, within the
        budget, and adapters that only PEFT can run become plain LoRA.

        Args:
            stopped_early: training ended before its last step on purpose; what was to be decided
                later is decided now.

        Raises `NeverDecidedError` when the method has decision steps and none was ever reached, or
        the last was refused.
        """
        self._finished = True
        if self.history or stopped_early:
            before, count = lora_parameters(self.model), len(self.history)
            self._record(lambda: self.driver.settle(self.step_count, decided=count > 0))
            if len(self.history) > count:
                logger.warning(
                    "%s, %s -> %s LoRA parameters",
                    self.history[-1].reason, f"{before:,}", f"{lora_parameters(self.model):,}",
                )  # fmt: skip
        # Before the driver's last word: to become plain LoRA is no decision of the method.
        last = self.history[-1] if self.history else None
        self._record(self.driver.finish)
        if self.method.adaptation is None:
            return
        if last is not None and last.status == "refused":
            raise NeverDecidedError(
                f"the last decision of method {self.method.name!r}, after step {last.step}, was "
                f"refused: {last.reason}. The ranks are not those the method would have chosen; "
                "train with a lower learning rate, or in bf16 or float32"
            )
        if last is None and not stopped_early:
            raise NeverDecidedError(
                f"method {self.method.name!r} never decided anything in {self.step_count} of "
                f"{self.total_steps} steps: the adapter still has its initial ranks. Is "
                "total_steps right, is step() called after every optimizer step, and evaluated() "
                "after every evaluation?"
            )

    def take_up(self, folder: Path) -> None:
        """Go on from an earlier state of this training whose weights are in the model again: the
        best checkpoint's, at the end. Its scores come back, and the change is a row of the history.

        Raises `IntegrityError` as `load_state`.
        """
        now, before = ranks(self.model), history.replay(self.initial_pattern, self.history)
        # Moments of other shapes would be trusted by the next step, if there is one.
        drop_misfits(self.optimizer)
        if self.method.adaptation is None:
            return
        saved, statistics = self._read(folder)
        self._check_ranks(folder, saved)
        self.driver.restore(statistics)
        changes = {name: Resize((), rank) for name, rank in now.items() if rank != before[name]}
        reason = f"the best checkpoint, after step {saved['step']}, was loaded"
        costs = {target.name: target.cost for target in targets_of(self.model)}
        was = lora_parameters(self.model) + sum(
            (before[name] - now[name]) * costs[name] for name in changes
        )
        self._record(
            lambda: Outcome(status="loaded", reason=reason, parameters_before=was, changes=changes)
        )

    @property
    def _statistics(self) -> Statistics:
        return self.driver.statistics

    def _record(self, act: Callable[[], Outcome | None]) -> None:
        """Let the driver act, and put what it did into the history."""
        started = time.perf_counter()
        outcome = act()
        if outcome is None:
            return
        seconds, layers = time.perf_counter() - started, adapters(self.model)
        before, after = outcome.parameters_before, parameters_of(layers)
        decision = Decision(
            **{**vars(outcome), "parameters_before": after if before is None else before},
            step=self.step_count,
            parameters_after=after,
            pattern=ranks_of(layers),
            bytes_after=adapter_bytes(layers.values(), self.optimizer, self._statistics),
            seconds=seconds,
        )
        self.history.append(decision)
        if self.on_decision is not None:
            self.on_decision(decision)

    def save_state(self, folder: Path) -> None:
        """Write everything needed to go on exactly: statistics as safetensors, the rest as JSON,
        the JSON last."""
        rows = {
            f"{kind}|{name}": statistic
            for kind, row in self._statistics.items()
            for name, statistic in row.items()
        }
        # safetensors refuses any other layout.
        save_file({key: s.tensor.contiguous() for key, s in rows.items()}, folder / TENSOR_FILE)
        state = {
            "version": VERSION,
            "method": _identity(self.method),
            "total_steps": self.total_steps,
            "step": self.step_count,
            "losses": self._losses,
            "initial_pattern": self.initial_pattern,
            "statistics": {key: [s.dim, s.copies] for key, s in rows.items()},
            "history": [json.loads(row.to_json()) for row in self.history],
        }
        # Last: a checkpoint without this file is not whole, and a resume passes it over.
        write_text(folder / STATE_FILE, to_json(state))

    def load_state(self, folder: Path) -> None:
        """Take up the state that `save_state` wrote. The model must already have the ranks of that
        moment.

        Raises `IntegrityError` when a file is missing, belongs to another method or training
        length, is of a later version, or does not fit.
        """
        state, statistics = self._read(folder)
        self._begun = True
        self.step_count = state["step"]
        self._losses = state["losses"]
        self.initial_pattern = state["initial_pattern"]
        self.history = [history.from_json(row) for row in state["history"]]
        self._check_ranks(folder, state)
        self.driver.restore(statistics)

    def _check_ranks(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Raise `IntegrityError` unless the model has the ranks of this state: the adapter was
        loaded by others, with whatever ranks it had."""
        rows = [history.from_json(row) for row in state["history"]]
        if history.replay(state["initial_pattern"], rows) != ranks(self.model):
            raise IntegrityError(
                f"cannot go on from {folder}: the ranks loaded are not those its history leads to"
            )

    def _read(self, folder: Path) -> tuple[dict[str, Any], Statistics]:
        """Return the state in `folder`, of this training, and its statistics."""
        state, tensors = _read_state(folder)
        # Schedules are fractions of the whole: another length would have decided otherwise.
        mine = {**_identity(self.method), "total_steps": self.total_steps}
        saved = {**state["method"], "total_steps": state["total_steps"]}
        differing = [
            f"{key} was {saved.get(key)}, now {mine.get(key)}"
            for key in mine
            if saved.get(key) != mine[key]
        ]
        if differing:
            raise IntegrityError(
                f"cannot resume from {folder}: another method or training: {'; '.join(differing)}"
            )
        device = next(p.device for p in self.model.parameters() if p.requires_grad)
        statistics: Statistics = {}
        for key, (dim, copies) in state["statistics"].items():
            kind, _, name = key.partition("|")
            row = statistics.setdefault(kind, {})
            row[name] = Statistic(tensors[key].to(device), dim, copies)
        return state, statistics


def saved_step(folder: Path) -> int | None:
    """Return the step of the rank state in `folder`, None where it cannot be read."""
    try:
        return int(json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what `save_state` wrote, of this version or one before."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSOR_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise IntegrityError(
            f"cannot resume from {folder}: the rank state is missing or damaged: {error}"
        ) from error
    version = state.get("version", 1)
    if version > VERSION:
        raise IntegrityError(
            f"cannot resume from {folder}: its rank state is of version {version}, this "
            f"adaptive-lora reads up to {VERSION}; resume with the adaptive-lora that wrote it"
        )
    if version == 1:  # adaptive-lora 0.1 kept the best loss and how many came after it
        best, bad = state["best_loss"], state["bad_evaluations"]
        state["losses"] = [] if best is None else [best] * (1 + bad)
    return state, tensors


def _identity(method: Method) -> dict[str, str]:
    """Return what two methods must share for one to go on where the other stopped, as text."""
    values = {"method": method.name, "rank": method.rank, "budget": method.budget}
    if method.adaptation is not None:
        values |= {
            field.name: getattr(method.adaptation, field.name)
            for field in fields(method.adaptation)
        }
    # An object without a text of its own is shown by its address, which says nothing.
    return {key: repr(value) for key, value in values.items() if " at 0x" not in repr(value)}
