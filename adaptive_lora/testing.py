"""Conformance: the laws every method must hold, for your own method too. Needs pytest only to be
run by it.

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check, tmp_path):
        check(lambda: my_method(rank=2), tmp_path)

A check trains a tiny random BERT for `STEPS` steps (about half a second) and raises
`AssertionError` with the law that was broken. Choose arguments with which your method decides
within `STEPS` steps; evaluations come every third. `make_method` is called anew for every training,
which several checks share when they get the same function one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from adaptive_lora.allocation import history
from adaptive_lora.allocation.allocate import RankPattern, parameters
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.target import Target
from adaptive_lora.files import HISTORY_FILE
from adaptive_lora.methods import Method
from adaptive_lora.model.adapters import lora_parameters, ranks, targets_of
from adaptive_lora.model.attach import attach
from adaptive_lora.model.deciding import decision_steps
from adaptive_lora.model.resize import unwrap
from adaptive_lora.model.saving import save
from adaptive_lora.model.targets import find_targets
from adaptive_lora.training.callback import AdaptiveRankCallback
from adaptive_lora.training.trainer import AdaptiveTrainer

MakeMethod = Callable[[], Method]
Check = Callable[[MakeMethod, Path], None]
STEPS = 12
TARGETS = ("query", "value", "intermediate.dense")
"""Of two layers: six targets of two costs, I + O = 32 and 48."""


def make_bert(n_layers: int = 3, **config: Any) -> BertForSequenceClassification:
    """A BERT classifier: I = O = 16 in attention, 16 <-> 32 in the feed-forward; the same weights
    at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    limits = {"max_position_embeddings": 32, "num_hidden_layers": n_layers}
    return BertForSequenceClassification(BertConfig(**{**sizes, **limits, **config}))


def records(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Random tokens of length 8; the label is the parity of the first. The same at every call."""
    rows = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]


def make_model(method: Method, dropout: float = 0.1) -> PeftModel:
    """The tiny BERT with the adapters of `method` on `TARGETS`; the same weights at every call."""
    base = make_bert(n_layers=2)
    set_seed(5)
    return attach(base, method, TARGETS, dropout=dropout)


def make_trainer(
    folder: Path,
    method: Method,
    *,
    kind: type[Trainer] = Trainer,
    callback: AdaptiveRankCallback | None = None,
    callbacks: list[TrainerCallback] | None = None,
    model: PeftModel | None = None,
    **options: Any,
) -> Trainer:
    """Return a stock `Trainer` with our callback. Batch 2 x accumulation 2: two micro-steps to each
    step."""
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        # Bit for bit is promised of a CPU.
        "use_cpu": True,
    }
    return kind(
        model=model or make_model(method),
        args=(Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments)(
            output_dir=str(folder), **{**arguments, **options}
        ),
        train_dataset=records(),
        eval_dataset=records(8),
        callbacks=[callback or AdaptiveRankCallback(method), *(callbacks or [])],
    )


def callback_of(trainer: Trainer) -> AdaptiveRankCallback:
    """Return our callback of a trainer."""
    return next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, AdaptiveRankCallback)
    )


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return every trainable parameter and every tensor of optimizer state, by name."""
    state = {}
    for name, parameter in _model(trainer).named_parameters():
        if parameter.requires_grad:
            state[name] = parameter.detach().clone()
            for key, value in unwrap(trainer.optimizer).state.get(parameter, {}).items():
                state[f"{name}|{key}"] = value.clone()
    return state


def _model(trainer: Trainer) -> PeftModel:
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def logits(model: PeftModel) -> torch.Tensor:
    """Return the model's answers to eight records, without dropout; no random number is drawn."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        answer: torch.Tensor = model(
            input_ids=torch.stack([row["input_ids"] for row in records(8)])
        ).logits
    model.train(was_training)
    return answer


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return max |one − two| / max |one|."""
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-30))


class Witness(AdaptiveRankCallback):
    """Our callback, looked at from outside before and after whatever may change ranks."""

    def __init__(self, method: Method, history_file: Path) -> None:
        super().__init__(method, history_file)
        self.history_file: Path = history_file
        # each decision, and the ranks of the tensors after it
        self.seen: list[tuple[Decision, RankPattern]] = []
        # (step, relative change of the logits) at each pure growth
        self.growths: list[tuple[int, float]] = []
        self.misfits: list[str] = []  # optimizer state that is not its parameter's

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch(super().on_step_end, *args, **kwargs)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._watch(super().on_evaluate, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        decided = len(self.history)
        super().on_train_end(*args, **kwargs)
        self.seen += [(row, ranks(kwargs["model"])) for row in self.history[decided:]]

    def _watch(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        model, before, decided = kwargs["model"], ranks(kwargs["model"]), len(self.history)
        answers = logits(model)
        event(*args, **kwargs)
        for row in self.history[decided:]:
            self.seen.append((row, ranks(model)))
            if row.changes and all(
                set(c.keep) == set(range(before[name])) for name, c in row.changes.items()
            ):
                self.growths.append((row.step, apart(answers, logits(model))))
        optimizer = unwrap(kwargs["optimizer"])
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                self.misfits.append(f"step {args[1].global_step}: {name} is not in the optimizer")
            for key, value in optimizer.state.get(parameter, {}).items():
                if value.dim() and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)} for {tuple(parameter.shape)}"
                    self.misfits.append(
                        f"step {args[1].global_step}: {key} of {name} has shape {shapes}"
                    )


def _train(make_method: MakeMethod, folder: Path, **options: Any) -> tuple[Trainer, Witness]:
    method = make_method()
    folder.mkdir(parents=True, exist_ok=True)
    witness = Witness(method, folder / HISTORY_FILE)
    trainer = make_trainer(folder, method, callback=witness, **{"save_strategy": "no", **options})
    trainer.train()
    return trainer, witness


@lru_cache(maxsize=1)
def _watched(make_method: MakeMethod) -> tuple[Trainer, Witness, list[Decision]]:
    """Return one plain training and the decisions it wrote, kept for the next check of the same
    `make_method`."""
    with TemporaryDirectory() as folder:
        trainer, witness = _train(make_method, Path(folder))
        lines = (
            witness.history_file.read_text(encoding="utf-8") if _dynamic(make_method) else ""
        ).splitlines()
    return trainer, witness, [history.from_json(json.loads(line)) for line in lines]


def _dynamic(make_method: MakeMethod) -> bool:
    return make_method().adaptation is not None


def _decisions(callback: AdaptiveRankCallback) -> list[tuple[Any, ...]]:
    """What was decided and why, without the time it took."""
    return [
        (r.step, r.status, r.reason, r.budget, r.pattern, r.scores, r.changes)
        for r in callback.history
    ]


def _unspent(
    pattern: RankPattern, targets: list[Target], maximum: dict[str, int], budget: int
) -> str | None:
    """Return what is wrong with the spending of `budget`; None when it is exact."""
    costs = {target.name: target.cost for target in targets}
    spent = parameters(pattern, costs)
    open_costs = [costs[m] for m, rank in pattern.items() if 0 < rank < maximum[m]]
    if spent > budget:
        return f"{spent} parameters are above the budget of {budget}"
    if open_costs and budget - spent >= min(open_costs):
        return (
            f"{budget - spent} of {budget} parameters are left, and one more component costs "
            f"{min(open_costs)}"
        )
    return None


def check_initial_pattern(make_method: MakeMethod, folder: Path) -> None:
    """Every target has a rank in 0..min(I, O), and the adapters have it."""
    method = make_method()
    targets = find_targets(make_bert(n_layers=2), TARGETS)
    pattern = method.initial_pattern(targets)
    names = {target.name for target in targets}
    assert pattern.keys() == names, (
        f"the initial pattern is not of these targets: {sorted(pattern.keys() ^ names)}"
    )
    for target in targets:
        rank = pattern[target.name]
        assert isinstance(rank, int), (
            f"the rank of {target.name} is {rank!r}; expected a whole number"
        )
        assert 0 <= rank <= target.full_rank, (
            f"the rank of {target.name} is {rank}; expected 0..{target.full_rank}"
        )
    made = ranks(make_model(method))
    assert made == pattern, f"attached {made}, the initial pattern is {pattern}"


def check_decides(make_method: MakeMethod, folder: Path) -> None:
    """A method with decision steps makes decisions, and ranks change: the other checks would hold
    of nothing."""
    if _dynamic(make_method):
        rows = _watched(make_method)[1].history
        assert any(row.scores for row in rows), (
            f"no decision in {STEPS} steps; choose arguments that decide earlier"
        )
        assert any(row.changes for row in rows), (
            f"of {len(rows)} decisions in {STEPS} steps, none changed a rank"
        )
        refused = [(row.step, row.reason) for row in rows if row.status == "refused"]
        assert not refused, f"decisions were refused: {refused}"


def check_when(make_method: MakeMethod, folder: Path) -> None:
    """The moments lie in the training, and are the same whenever one asks: a resumed training asks
    a new object."""
    method, again = make_method(), make_method()
    if method.adaptation is None or again.adaptation is None:
        return
    when, other = method.adaptation.when, again.adaptation.when
    steps = decision_steps(when, STEPS)
    losses = [0.9, 0.7, 0.8, 0.8, 0.6, 0.6, 0.7, 0.5]
    answers = [when.decides(losses[:count]) for count in range(1, len(losses) + 1)]
    backwards = [other.decides(losses[:count]) for count in range(len(losses), 0, -1)][::-1]
    assert decision_steps(other, STEPS) == steps, (
        f"asked anew, the decision steps are {other.steps(STEPS)}, before {steps}"
    )
    assert answers == backwards, (
        f"asked in another order, the evaluations decide {backwards}, before {answers}"
    )


def check_ranks_are_the_pattern(make_method: MakeMethod, folder: Path) -> None:
    """After every decision, and at the end, the tensors have the ranks that were decided."""
    trainer, witness, _ = _watched(make_method)
    for row, found in witness.seen:
        assert found == row.pattern, (
            f"step {row.step}: the tensors have ranks {found}, decided were {row.pattern}"
        )
    last = witness.seen[-1][0].pattern if witness.seen else ranks(make_model(make_method()))
    found = ranks(_model(trainer))
    assert found == last, f"after training the ranks are {found}, the last decision left {last}"


def check_budget(make_method: MakeMethod, folder: Path) -> None:
    """Never above the budget of the moment; at the end below it by less than the cheapest component
    that can be added.

    A method that grows up to its budget (`raw_start`) may end lower; rank 0 need not be grown
    again.
    """
    method = make_method()
    trainer, witness, _ = _watched(make_method)
    targets = targets_of(_model(trainer))
    budget = method.budget_parameters(targets)
    if budget is None:
        return
    for row, _ in witness.seen:
        counted = parameters(row.pattern, {t.name: t.cost for t in targets})
        assert counted == row.parameters_after, (
            f"step {row.step}: {row.parameters_after} recorded, {counted} spent"
        )
        if row.budget is not None:
            assert counted <= row.budget, (
                f"step {row.step}: {counted} parameters, the budget is {row.budget}"
            )
    bound = method.adaptation.max_rank if method.adaptation else None
    maximum = {t.name: t.full_rank if bound is None else min(bound, t.full_rank) for t in targets}
    spent = lora_parameters(_model(trainer))
    assert spent <= budget, f"{spent} parameters at the end, the budget is {budget}"
    wrong = None if method.raw_start else _unspent(ranks(_model(trainer)), targets, maximum, budget)
    assert wrong is None, f"at the end, {wrong}"


def check_bounds(make_method: MakeMethod, folder: Path) -> None:
    """After every decision min_rank <= rank <= max_rank <= min(I, O)."""
    adaptation = make_method().adaptation
    if adaptation is None:
        return
    trainer, witness, _ = _watched(make_method)
    for target in targets_of(_model(trainer)):
        low = min(adaptation.min_rank, target.full_rank)
        high = (
            target.full_rank
            if adaptation.max_rank is None
            else min(adaptation.max_rank, target.full_rank)
        )
        for row, found in witness.seen:
            if row.scores:  # an evaluation without a plateau decides nothing
                rank = found[target.name]
                assert low <= rank <= high, (
                    f"step {row.step}: rank {rank} of {target.name}; expected {low}..{high}"
                )


def check_optimizer_state(make_method: MakeMethod, folder: Path) -> None:
    """After every step each trained parameter is in the optimizer, with state of its shape."""
    _, witness, _ = _watched(make_method)
    assert not witness.misfits, f"{len(witness.misfits)} misfits, first: {witness.misfits[0]}"


def check_history_replays(make_method: MakeMethod, folder: Path) -> None:
    """The changes in `allocations.jsonl`, applied to the initial pattern, give the final ranks."""
    if _dynamic(make_method):
        trainer, witness, rows = _watched(make_method)
        assert witness.controller is not None
        assert len(rows) == len(witness.seen), (
            f"{len(rows)} rows written, {len(witness.seen)} decisions made"
        )
        replayed, found = (
            history.replay(witness.controller.initial_pattern, rows),
            ranks(_model(trainer)),
        )
        assert replayed == found, f"the history leads to {replayed}, the ranks are {found}"


def check_growth_keeps_the_function(make_method: MakeMethod, folder: Path) -> None:
    """A decision that only grows leaves the answers as they were, to 1e-6 of the largest."""
    if _dynamic(make_method):
        for step, change in _watched(make_method)[1].growths:
            assert change <= 1e-6, (
                f"step {step}: growing changed the logits by {change:.2g} of the largest"
            )


def check_resume(make_method: MakeMethod, folder: Path) -> None:
    """Resumed from a checkpoint a third and two thirds of the way, training ends bit for bit as if
    never stopped."""
    every = STEPS // 3
    whole, witness = _train(make_method, folder / "whole", save_strategy="steps", save_steps=every)
    for step in (every, 2 * every):
        method = make_method()
        again = AdaptiveRankCallback(method)
        trainer = make_trainer(folder / f"from-{step}", method, callback=again, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        _same(f"resumed from step {step}", trainer, whole)
        mine, theirs = _decisions(again), _decisions(witness)
        assert mine == theirs, (
            f"resumed from step {step}, decisions are {mine}, uninterrupted {theirs}"
        )


def check_reload(make_method: MakeMethod, folder: Path) -> None:
    """The saved adapter, loaded by stock PEFT on a fresh base, answers as the trained model."""
    trainer, _ = _train(make_method, folder)
    save(_model(trainer), folder / "adapter")
    loaded = PeftModel.from_pretrained(make_bert(n_layers=2), str(folder / "adapter"))
    change = apart(logits(_model(trainer)), logits(loaded))
    assert change <= 1e-6, (
        f"reloaded by stock PEFT, the logits differ by {change:.2g} of the largest"
    )


def check_same_seed(make_method: MakeMethod, folder: Path) -> None:
    """Two trainings with the same seed are the same, bit for bit."""
    one, first, _ = _watched(make_method)
    two, second = _train(make_method, folder)
    _same("trained again with the same seed", two, one)
    mine, theirs = _decisions(second), _decisions(first)
    assert mine == theirs, f"the same seed gave decisions {mine}, before {theirs}"


def check_accumulation(make_method: MakeMethod, folder: Path) -> None:
    """Batch 8 and batch 4 x accumulation 2 lead to the same ranks: one look at the whole gradient
    of each step."""
    patterns = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = make_model(make_method(), dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        # SGD: Adam would blow the rounding of tiny gradients up.
        options = {
            "optim": "sgd",
            "learning_rate": 0.1,
            "gradient_accumulation_steps": accumulation,
        }
        trainer, witness = _train(
            make_method,
            folder / f"batch-{batch}",
            kind=AdaptiveTrainer,
            model=model,
            per_device_train_batch_size=batch,
            **options,
        )
        patterns.append([found for _, found in witness.seen] + [ranks(_model(trainer))])
    assert patterns[0] == patterns[1], (
        f"batch 8 leads to {patterns[0]}, batch 4 x accumulation 2 to {patterns[1]}"
    )


def _same(what: str, trainer: Trainer, reference: Trainer) -> None:
    mine, theirs = state_of(trainer), state_of(reference)
    odd = sorted(mine.keys() ^ theirs.keys())
    assert not odd, (
        f"{what}: {len(odd)} parameters or moments exist on one side only, first {odd[0]}"
    )
    odd = [
        name
        for name in mine
        if mine[name].shape != theirs[name].shape or not torch.equal(mine[name], theirs[name])
    ]
    assert not odd, (
        f"{what}: {len(odd)} of {len(mine)} parameters and moments differ, first {odd[0]}"
    )


CHECKS: tuple[Check, ...] = (
    check_initial_pattern,
    check_decides,
    check_when,
    check_ranks_are_the_pattern,
    check_budget,
    check_bounds,
    check_optimizer_state,
    check_history_replays,
    check_growth_keeps_the_function,
    check_resume,
    check_reload,
    check_same_seed,
    check_accumulation,
)
"""The laws. `check(make_method, folder)` raises `AssertionError` when one is broken."""
