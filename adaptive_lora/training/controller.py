"""`RankController`: the one object with state. It watches a training loop, any loop, and changes
ranks in it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaptive_lora.allocation import history
from adaptive_lora.allocation.adaptation import At, MaskedByPeft, OnPlateau
from adaptive_lora.allocation.allocate import check_bounds
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.importance import Pairs, Statistic, Statistics
from adaptive_lora.allocation.rules import View
from adaptive_lora.errors import AdaptiveLoraError, DivergedError, InputError, IntegrityError
from adaptive_lora.methods import Method
from adaptive_lora.model.adapters import (
    adapters,
    all_weights,
    is_masked,
    lora_parameters,
    ranks,
    targets_of,
    weights,
)
from adaptive_lora.model.memory import adapter_bytes
from adaptive_lora.model.peft_adalora import PeftAdaLora
from adaptive_lora.model.resize import check_model, check_optimizer, check_state_shapes, resize

STATE_FILE, TENSOR_FILE = "rank_state.json", "rank_state.safetensors"


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
        model: from `attach(base, method)`.
        optimizer: AdamW, Adam or SGD over the model's trainable parameters, bare or wrapped by
            accelerate.
        method: the method the model was attached with.
        total_steps: optimizer steps of the whole training.
        on_decision: called with each `Decision`.

    Raises `InputError` at once for an unsupported optimizer, a schedule that does not fit, or a
    budget below the minimum.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Any,
        method: Method,
        total_steps: int,
        on_decision: Callable[[Decision], None] | None = None,
    ) -> None:
        check_model(model)
        self.model, self.optimizer, self.method, self.total_steps = (
            model,
            optimizer,
            method,
            total_steps,
        )
        self.on_decision = on_decision
        self.step_count = 0
        self.history: list[Decision] = []
        self.initial_pattern = ranks(model)
        self._layers = adapters(model)
        self._statistics: Statistics = {}
        self._observed = self._finished = False
        self._best_loss, self._bad_evaluations = math.inf, 0
        self._decision_steps: list[int] = []
        self._adaptation = method.adaptation
        self._peft: PeftAdaLora | None = None
        if isinstance(self._adaptation, MaskedByPeft):
            self._adaptation.schedule.check(total_steps)
            self._peft = PeftAdaLora(model, self._adaptation, total_steps)
            return
        if is_masked(model):
            raise InputError(
                f"the model was attached with methods.peft_adalora; got the method {method.name!r} "
                "to train it"
            )
        if self._adaptation is None:
            return
        check_optimizer(optimizer)
        check_state_shapes(self._layers, optimizer)
        targets = targets_of(model)
        self._costs = {target.name: target.cost for target in targets}
        self._budget = method.budget_parameters(targets)
        self._minimum = {
            target.name: min(self._adaptation.min_rank, target.full_rank) for target in targets
        }
        self._maximum = {
            target.name: min(self._adaptation.max_rank or target.full_rank, target.full_rank)
            for target in targets
        }
        if self._budget is not None:
            check_bounds(self._costs, self._budget, self._minimum, self._maximum)
        self._adaptation.schedule.check(total_steps)
        if isinstance(self._adaptation.when, At):
            self._decision_steps = self._adaptation.when.steps(total_steps)

    def observe(self) -> None:
        """Take in the gradients of this optimizer step: after the last backward, before
        `optimizer.step()`."""
        if not self._watching():
            return
        assert self._adaptation is not None
        if self._observed:
            raise InputError(
                "observe() was called twice without step(); call controller.step() after each "
                "optimizer step"
            )
        if self._peft is not None:
            self._peft.observe(self.step_count + 1)
            self._observed = True
            return
        check_state_shapes(self._layers, self.optimizer)
        # A target that took no part in this step (LayerDrop, a layer whose output nobody uses)
        # shows nothing.
        pairs = {
            name: pair
            for name, pair in self._pairs().items()
            if all(p.grad is not None for p in pair)
        }
        if not pairs:
            raise InputError(
                "observe() found no gradients; call it after loss.backward() and before zero_grad()"
            )
        self._start_statistics()
        self._adaptation.importance.observe(pairs, self._statistics)
        self._observed = True

    def skip(self) -> None:
        """Instead of `observe()`, in a step whose gradients are thrown away: it counts, but leaves
        no trace in the scores.

        Raises `DivergedError` for PEFT's AdaLoRA, which must see the gradients of every step.
        """
        if self._peft is not None:
            step = self.step_count + 1
            raise DivergedError(
                f"step {step} cannot be skipped: PEFT's AdaLoRA needs its gradients", step=step
            )
        if self._watching():
            self._start_statistics()
            self._observed = True

    def _start_statistics(self) -> None:
        if not self._statistics:
            assert self._adaptation is not None
            # Of every adapter, also of one at rank 0: it may grow later.
            everything = {name: all_weights(layer) for name, layer in self._layers.items()}
            self._statistics = self._adaptation.importance.start(everything)

    def step(self) -> None:
        """Count one optimizer step and, at a decision step, change ranks: after `optimizer.step()`
        and `zero_grad()`."""
        if self._watching() and not self._observed:
            raise InputError(
                "step() was called without observe(); call controller.observe() after "
                "loss.backward()"
            )
        self._observed = False
        self.step_count += 1
        if self._peft is not None:
            self._mask(self._peft)
        elif self.step_count in self._decision_steps:
            self._decide()
            if self.step_count == self._decision_steps[-1]:
                self._statistics = {}  # nobody looks at them again

    def evaluated(self, loss: float) -> None:
        """Take in a validation loss; a method that waits for a plateau may change ranks now, but
        not after the last step."""
        if self._adaptation is None or not isinstance(self._adaptation.when, OnPlateau):
            return
        if (
            self._finished or self.step_count >= self.total_steps
        ):  # what grows now would never be trained
            return
        if not math.isfinite(loss):
            self._record("refused", f"the evaluation loss is {loss}", 0.0, {}, {})
            return
        when = self._adaptation.when
        if self._best_loss - loss > when.threshold:
            self._best_loss, self._bad_evaluations = loss, 0
        else:
            self._bad_evaluations += 1
        if self._bad_evaluations >= when.patience:
            self._bad_evaluations = 0
            self._decide()
        else:
            self._record(
                "kept", f"loss {loss:.6g}, best {self._best_loss:.6g}: no plateau", 0.0, {}, {}
            )

    def finish(self, *, stopped_early: bool = False) -> None:
        """End the training: adapters that only PEFT can run become plain LoRA. Raises
        `NeverDecidedError` when the method has decision steps and none was ever reached or the last
        was refused, unless training stopped early on purpose.
        """
        self._finished = True
        last = self.history[-1] if self.history else None
        if self._peft is not None:
            self._unmask(self._peft)
        if self._adaptation is None or stopped_early:
            return
        if last is not None and last.status == "refused":
            raise NeverDecidedError(
                f"the last decision of method {self.method.name!r}, after step {last.step}, was "
                f"refused: {last.reason}. The "
                "ranks are not those the method would have chosen; train with a lower learning "
                "rate, or in bf16 or float32"
            )
        if last is None:
            raise NeverDecidedError(
                f"method {self.method.name!r} never decided anything in {self.step_count} of "
                f"{self.total_steps} steps: the "
                "adapter still has its initial ranks. Is total_steps right, is step() called after "
                "every optimizer step, "
                "and evaluated() after every evaluation?"
            )

    def _watching(self) -> bool:
        """True while a decision is still to come that needs gradients."""
        if self._adaptation is None:
            return False
        if self._peft is not None or isinstance(self._adaptation.when, OnPlateau):
            return True
        return self.step_count < self._decision_steps[-1]

    def _pairs(self) -> Pairs:
        return {
            name: pair
            for name, layer in self._layers.items()
            if (pair := weights(layer)) is not None
        }

    def _decide(self) -> None:
        assert self._adaptation is not None
        started = time.perf_counter()
        importance, pairs, now = self._adaptation.importance, self._pairs(), ranks(self.model)
        components = {name: [] for name in now} | {
            name: row.tolist() for name, row in importance.scores(pairs, self._statistics).items()
        }
        scores = dict.fromkeys(now, 0.0) | importance.target_scores(pairs, self._statistics)
        parts = importance.target_parts(pairs, self._statistics)
        view = View(
            ranks=now,
            costs=self._costs,
            budget=None
            if self._budget is None
            else self._adaptation.schedule.at(self.step_count, self.total_steps, self._budget),
            minimum=self._minimum,
            maximum=self._maximum,
            components=components,
            scores=scores,
            last=not self._decision_steps or self.step_count >= self._decision_steps[-1],
        )
        if not view.finite():
            seconds = time.perf_counter() - started
            self._record(
                "refused", "a score is not finite", seconds, {}, scores, view.budget, parts=parts
            )
            return
        changes = self._adaptation.rule.decide(view)
        before = lora_parameters(self.model)
        resize(self.model, changes, self.optimizer, self._statistics, seed=self.step_count)
        if changes and ranks(self.model) != now | {
            name: change.rank for name, change in changes.items()
        }:
            raise IntegrityError("the ranks after a resize are not those decided")
        status = "changed" if changes else "kept"
        self._record(
            status, None, time.perf_counter() - started, changes, scores, view.budget, before, parts
        )

    def _mask(self, peft: PeftAdaLora) -> None:
        started = time.perf_counter()
        scores = peft.step(self.step_count)
        if scores is not None:
            alive = {
                "components alive": {name: float(len(kept)) for name, kept in peft.alive().items()}
            }
            self._statistics = peft.statistics()
            self._record("masked", None, time.perf_counter() - started, {}, scores, parts=alive)

    def _unmask(self, peft: PeftAdaLora) -> None:
        started, before = time.perf_counter(), lora_parameters(self.model)
        changes = peft.to_lora()
        self._peft, self._layers, self._statistics = None, adapters(self.model), {}
        self._record(
            "changed",
            "plain LoRA from PEFT's",
            time.perf_counter() - started,
            changes,
            {},
            before=before,
        )

    def _record(
        self,
        status: str,
        reason: str | None,
        seconds: float,
        changes: dict[str, Any],
        scores: dict[str, float],
        budget: int | None = None,
        before: int | None = None,
        parts: dict[str, dict[str, float]] | None = None,
    ) -> None:
        after = lora_parameters(self.model)
        decision = Decision(
            step=self.step_count,
            status=status,
            reason=reason,
            budget=budget,
            parameters_before=after if before is None else before,
            parameters_after=after,
            changes=changes,
            pattern=ranks(self.model),
            scores=scores,
            bytes_after=adapter_bytes(self._layers.values(), self.optimizer, self._statistics),
            seconds=seconds,
            parts=parts or {},
        )
        self.history.append(decision)
        if self.on_decision is not None:
            self.on_decision(decision)

    def save_state(self, folder: Path) -> None:
        """Write everything needed to go on exactly: statistics as safetensors, the rest as JSON,
        the JSON last."""
        if self._peft is not None:
            self._statistics = self._peft.statistics()
        tensors = {
            f"{kind}|{name}": s.tensor.contiguous()
            for kind, row in self._statistics.items()
            for name, s in row.items()
        }
        save_file(tensors, folder / TENSOR_FILE)
        shapes = {
            f"{kind}|{name}": [s.dim, s.copies]
            for kind, row in self._statistics.items()
            for name, s in row.items()
        }
        state = {
            "method": _identity(self.method),
            "total_steps": self.total_steps,
            "step": self.step_count,
            "best_loss": None if math.isinf(self._best_loss) else self._best_loss,
            "bad_evaluations": self._bad_evaluations,
            "initial_pattern": self.initial_pattern,
            "statistics": shapes,
            "history": [json.loads(row.to_json()) for row in self.history],
        }
        (folder / STATE_FILE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")

    def load_state(self, folder: Path) -> None:
        """Take up the state that `save_state` wrote. The model must already have the ranks of that
        moment.

        Raises `IntegrityError` when a file is missing, belongs to another method or training
        length, or does not fit.
        """
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSOR_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(
                f"cannot resume from {folder}: the rank state is missing or damaged: {error}"
            ) from error
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
        device = next(iter(self._pairs().values()))[0].device
        self._statistics = {}
        for key, (dim, copies) in state["statistics"].items():
            kind, _, name = key.partition("|")
            self._statistics.setdefault(kind, {})[name] = Statistic(
                tensors[key].to(device), dim, copies
            )
        self.step_count = state["step"]
        self._best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self._bad_evaluations = state["bad_evaluations"]
        self.initial_pattern = state["initial_pattern"]
        self.history = [history.from_json(row) for row in state["history"]]
        if history.replay(self.initial_pattern, self.history) != ranks(self.model):
            raise IntegrityError(
                f"cannot resume from {folder}: the saved ranks are not those the history leads to"
            )
        if self._peft is not None:
            self._peft.restore(self._statistics)
        else:
            check_state_shapes(self._layers, self.optimizer)


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
