"""`Deciding`: lets a method look at a live model and change its ranks, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from adaptive_lora.allocation.allocate import RankPattern, Resize, check_bounds, parameters
from adaptive_lora.allocation.importance import Pairs, Scores, Statistics
from adaptive_lora.allocation.method import Method
from adaptive_lora.allocation.rules import View
from adaptive_lora.allocation.when import When
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.adapters import (
    all_weights,
    linear_adapters,
    lora_parameters,
    ranks,
    ranks_of,
    targets_of,
    weights,
)
from adaptive_lora.model.driver import Driver, Outcome, Static, check_plain
from adaptive_lora.model.memory import statistics_bytes
from adaptive_lora.model.resize import check_optimizer, check_state_shapes, resize


def driver_of(method: Method) -> type[Driver]:
    """Return the class that drives a model trained with `method`."""
    if method.adaptation is None:
        return Static
    return method.adaptation.driver or Deciding


class Deciding(Driver):
    """Importance, when, schedule and rule of a method, on a live model.

    Raises `InputError` at once for an unsupported optimizer, a schedule that does not fit, a budget
    below the minimum; and, naming the class, for parts of the method that answer what they may not.
    """

    def __init__(self, model: PeftModel, optimizer: Any, method: Method, total: int) -> None:
        check_plain(model, method)
        assert method.adaptation is not None
        self.model, self.optimizer, self.total = model, optimizer, total
        self.adaptation = method.adaptation
        self.layers = linear_adapters(model)
        self._statistics: Statistics = {}
        check_optimizer(optimizer)
        check_state_shapes(self.layers, optimizer)
        targets = targets_of(model)
        low, high = self.adaptation.min_rank, self.adaptation.max_rank
        self.costs = {target.name: target.cost for target in targets}
        # What keeps its rank, such as an adapter on an embedding, costs all the same.
        self.kept = kept_parameters(model)
        self.budget = within(method, self.kept).budget_parameters(targets)
        # A target too narrow for min_rank is held at its full rank.
        self.minimum = {target.name: min(low, target.full_rank) for target in targets}
        self.maximum = {
            target.name: min(high or target.full_rank, target.full_rank) for target in targets
        }
        if self.budget is not None:
            check_bounds(self.costs, self.budget, self.minimum, self.maximum)
        self.adaptation.schedule.check(total)
        self.steps = decision_steps(self.adaptation.when, total)
        # Asked at every step: a set takes no longer for many decisions.
        self._due = frozenset(self.steps)

    @property
    def statistics(self) -> Statistics:
        return self._statistics

    def watching(self, step: int) -> bool:
        # After the last decision nobody asks for scores, and observing would cost for nothing.
        return self.adaptation.when.needs_evaluation or step < self.steps[-1]

    def observe(self, step: int) -> None:
        # At every step: an optimizer takes moments of other shapes from a checkpoint in silence.
        check_state_shapes(self.layers, self.optimizer)
        # A target that took no part in this step (LayerDrop, an output nobody uses) shows nothing.
        pairs = {
            name: pair
            for name, pair in self._pairs().items()
            if all(p.grad is not None for p in pair)
        }
        if not pairs:
            raise InputError(
                "observe() found no gradients; call it after loss.backward() and before zero_grad()"
            )
        self._start()
        self.adaptation.importance.observe(pairs, self._statistics)

    def skip(self, step: int) -> None:
        # A decision may follow this very step, and needs statistics, empty ones at least.
        self._start()

    def _start(self) -> None:
        if not self._statistics:
            # Of every adapter, also of one at rank 0: it may grow later.
            pairs = {name: all_weights(layer) for name, layer in self.layers.items()}
            self._statistics = self.adaptation.importance.start(pairs)
            _check_statistics(self.adaptation.importance, self._statistics, pairs)

    def step(self, step: int) -> Outcome | None:
        if step not in self._due:
            return None
        return self._decide(step, last=step == self.steps[-1])

    def evaluated(self, step: int, losses: Sequence[float]) -> Outcome | None:
        when = self.adaptation.when
        if not when.needs_evaluation:
            return None
        answer = when.decides(losses)
        if answer not in (True, False):
            raise InputError(
                f"{type(when).__name__}.decides({list(losses)}) returned {answer!r}; expected True "
                "or False"
            )
        if answer:  # any decision may be the last
            return self._decide(step, last=not self.steps or step >= self.steps[-1])
        reason = f"loss {losses[-1]:.6g}, best {min(losses):.6g}: no plateau"
        return Outcome(status="kept", reason=reason)

    def settle(self, step: int, *, decided: bool) -> Outcome | None:
        above = self.budget is not None and parameters(self._ranks(), self.costs) > self.budget
        # A method that waits for evaluations grows: what grows now would never be trained.
        never = not decided and step > 0 and not self.adaptation.when.needs_evaluation
        if not (above or never):
            return None
        outcome = self._decide(step, last=True, budget=self.budget)
        reason = outcome.reason or f"training ended after step {step}: the last decision"
        return replace(outcome, reason=reason)

    def reach(self, evaluations: int) -> tuple[int, int]:
        """Return how often at most a method that waits for evaluations decides in so many, and the
        parameters it then has at most."""
        flat = [1.0]
        decisions = sum(
            self.adaptation.when.decides(flat * count) for count in range(1, evaluations + 1)
        )
        now = self._ranks()
        for _ in range(decisions):
            components = {name: [0.0] * rank for name, rank in now.items()}
            changes = self.adaptation.rule.decide(
                self._view_of(now, self.budget, components, dict.fromkeys(now, 0.0), last=False)
            )
            now |= {name: change.rank for name, change in changes.items()}
        return decisions, parameters(now, self.costs) + self.kept

    def forget(self) -> None:
        self._statistics = {}

    def restore(self, statistics: Statistics) -> None:
        self._statistics = statistics
        check_state_shapes(self.layers, self.optimizer)

    @classmethod
    def planned_bytes(cls, method: Method, model: PeftModel) -> int:
        assert method.adaptation is not None
        pairs = {target: all_weights(layer) for target, layer in linear_adapters(model).items()}
        return statistics_bytes(method.adaptation.importance.start(pairs))

    def _pairs(self) -> Pairs:
        return {
            name: pair
            for name, layer in self.layers.items()
            if (pair := weights(layer)) is not None
        }

    def _ranks(self) -> RankPattern:
        return ranks_of(self.layers)

    def _decide(self, step: int, *, last: bool, budget: int | None = None) -> Outcome:
        view, parts = self._view(step, last=last, budget=budget)
        total = None if view.budget is None else view.budget + self.kept
        seen: dict[str, Any] = {"budget": total, "scores": dict(view.scores), "parts": parts}
        # Refused and recorded, not raised: a later decision may meet finite scores.
        if (culprit := view.not_finite()) is not None:
            importance = type(self.adaptation.importance).__name__
            reason = f"a score is not finite: {importance} gave {culprit}"
            return Outcome(status="refused", reason=reason, **seen)
        changes = self.adaptation.rule.decide(view)
        _check_changes(self.adaptation.rule, changes, view)
        before = parameters(view.ranks, self.costs) + self.kept
        # The step as the seed: a resumed run draws the same new rows.
        resize(self.model, changes, self.optimizer, self._statistics, seed=step)
        decided = {**view.ranks, **{name: change.rank for name, change in changes.items()}}
        # Read off the tensors: what is recorded is what is there, not what was meant.
        if changes and self._ranks() != decided:
            raise IntegrityError("the ranks after a resize are not those decided")
        status = "changed" if changes else "kept"
        return Outcome(status=status, parameters_before=before, changes=changes, **seen)

    def _view(
        self, step: int, *, last: bool, budget: int | None
    ) -> tuple[View, dict[str, dict[str, float]]]:
        self._start()  # an evaluation may come before the first step
        importance, pairs, now = self.adaptation.importance, self._pairs(), self._ranks()
        rows = importance.scores(pairs, self._statistics)
        _check_scores(importance, rows, pairs)
        targets = importance.target_scores(pairs, self._statistics)
        if targets.keys() != pairs.keys():
            raise InputError(
                f"{type(importance).__name__}.target_scores() returned {_some(targets)}; expected "
                f"a number for each of the {len(pairs)} targets that have a rank"
            )
        if budget is None and self.budget is not None:
            budget = self.adaptation.schedule.at(step, self.total, self.budget)
            if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
                raise InputError(
                    f"{type(self.adaptation.schedule).__name__}.at({step}, {self.total}, "
                    f"{self.budget}) returned {budget!r}; expected a whole number of parameters"
                )
        components = {name: rows[name].tolist() if name in rows else [] for name in now}
        # A target of rank 0 has nothing to score, but may grow: it takes part with 0.
        scores = {**dict.fromkeys(now, 0.0), **targets}
        view = self._view_of(now, budget, components, scores, last=last)
        return view, importance.target_parts(pairs, self._statistics)

    def _view_of(
        self,
        now: RankPattern,
        budget: int | None,
        components: Mapping[str, Sequence[float]],
        scores: Mapping[str, float],
        *,
        last: bool,
    ) -> View:
        return View(
            ranks=now,
            costs=self.costs,
            budget=budget,
            minimum=self.minimum,
            maximum=self.maximum,
            components=components,
            scores=scores,
            last=last,
        )


def kept_parameters(model: PeftModel) -> int:
    """Return the LoRA parameters that no rank of a target counts: adapters on what is no linear
    module, magnitudes of DoRA."""
    now, targets = ranks(model), targets_of(model)
    return lora_parameters(model) - sum(now[target.name] * target.cost for target in targets)


def within(method: Method, kept: int) -> Method:
    """Return `method` with the budget that is left beside `kept` parameters. Raises `InputError`
    when that is none. `rank` counts targets alone and stays."""
    if method.budget is None or not kept:
        return method
    if kept >= method.budget:
        raise InputError(
            f"the budget is {method.budget:,} parameters, and adapters that keep their rank (on "
            f"what is no linear module) have {kept:,} already: give more, or leave them out"
        )
    return replace(method, budget=method.budget - kept)


def decision_steps(when: When, total: int) -> list[int]:
    """Return the steps of `when` for a training of `total` steps.

    Raises `InputError`, naming the class, for steps that cannot be, or no moment at all.
    """
    steps = when.steps(total)
    name = type(when).__name__
    whole = isinstance(steps, list) and all(type(step) is int for step in steps)
    if not whole or steps != sorted(set(steps)) or not all(1 <= step <= total for step in steps):
        raise InputError(
            f"{name}.steps({total}) returned {steps!r}; expected a list of whole numbers in "
            f"1..{total}, ascending"
        )
    if not steps and not when.needs_evaluation:
        raise InputError(
            f"{name}.steps({total}) returned [] and {name}.needs_evaluation is False: nothing "
            "would ever be decided; expected at least one step"
        )
    return steps


def _check_statistics(importance: Any, statistics: Statistics, pairs: Pairs) -> None:
    """Raise `InputError` unless what counts components has one entry for each."""
    for kind, row in statistics.items():
        for name, statistic in row.items():
            dim, shape = statistic.dim, tuple(statistic.tensor.shape)
            rank = len(pairs[name][0]) if name in pairs else -1
            if dim is not None and (dim >= len(shape) or shape[dim] != rank):
                raise InputError(
                    f"{type(importance).__name__}.start() returned {kind!r} of shape {shape} for "
                    f"{name!r}, with components along dimension {dim}; expected {rank} there (or "
                    "dim=None for what belongs to the adapter as a whole)"
                )


def _check_scores(importance: Any, scores: Scores, pairs: Pairs) -> None:
    """Raise `InputError` unless there is one score for each component of each target."""
    name = type(importance).__name__
    if scores.keys() != pairs.keys():
        raise InputError(
            f"{name}.scores() returned {_some(scores)}; expected a tensor for each of the "
            f"{len(pairs)} targets that have a rank"
        )
    for target, (a, _) in pairs.items():
        row = scores[target]
        shape = tuple(row.shape) if isinstance(row, torch.Tensor) else row
        if shape != (len(a),):
            raise InputError(
                f"{name}.scores() returned shape {shape} for {target!r}; expected ({len(a)},), one "
                "score for each component"
            )


def _check_changes(rule: Any, changes: Mapping[str, Resize], view: View) -> None:
    """Raise `InputError` for changes outside the bounds or above the budget."""
    name = type(rule).__name__
    pattern = dict(view.ranks)
    for target, change in changes.items():
        if target not in pattern:
            raise InputError(f"{name}.decide() returned a change of {target!r}, which is no target")
        # A target that is outside its bounds already may stay there, but not go further.
        low, high = view.minimum[target], view.maximum[target]
        if change.rank < min(low, pattern[target]) or change.rank > max(high, pattern[target]):
            raise InputError(
                f"{name}.decide() returned rank {change.rank} for {target!r}; expected "
                f"{low}..{high}"
            )
        pattern[target] = change.rank
    spent = parameters(pattern, view.costs)
    if changes and view.budget is not None and spent > view.budget:
        raise InputError(
            f"{name}.decide() returned ranks of {spent:,} parameters; the budget is {view.budget:,}"
        )


def _some(values: Mapping[str, Any]) -> str:
    shown = ", ".join(list(values)[:3]) + (" ..." if len(values) > 3 else "")
    return f"{len(values)} entries ({shown})" if values else "no entry"
