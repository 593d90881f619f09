"""A small training with changing ranks, shared by the tests of controller, callback and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_bert
from peft import PeftModel
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import adaptive_lora as al
from adaptive_lora import AdaptiveRankCallback, Method, methods

STEPS = 12
# Every kind of decision: many small ones, one big one, and growth on evaluations (a threshold no loss can beat).
DYNAMIC = {
    "adalora": lambda: methods.adalora(2, factor=2.0, initial=2, final=2, every=2),
    "grad_delta": lambda: methods.grad_delta(3, warmup_steps=5, min_rank=1, max_rank=8),
    "grad_delta unbudgeted": lambda: methods.grad_delta(warmup_steps=4, initial_rank=3, min_rank=1, max_rank=6),
    "plateau": lambda: methods.plateau(initial_rank=1, max_rank=5, rank_step=2, threshold=100.0),
    "plateau per target": lambda: methods.plateau(
        initial_rank=1, max_rank=4, rank_step=1, threshold=100.0, per_target=True
    ),
}


def records(count: int = 64) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]


def make_model(method: Method, dropout: float = 0.1) -> PeftModel:
    base = make_bert(n_layers=2)
    set_seed(5)
    return al.attach(base, method, ["query", "value", "intermediate.dense"], dropout=dropout)


def make_trainer(
    folder: Path,
    method: Method,
    *,
    kind: type[Trainer] = Trainer,
    callbacks: list[TrainerCallback] | None = None,
    model: PeftModel | None = None,
    **options: Any,
) -> Trainer:
    """Return a stock `Trainer` with our callback. Batch 2 x accumulation 2: two micro-steps to each step."""
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
        "use_cpu": True,
    }
    return kind(
        model=model or make_model(method),
        args=(Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments)(
            output_dir=str(folder), **{**arguments, **options}
        ),
        train_dataset=records(),
        eval_dataset=records(8),
        callbacks=[AdaptiveRankCallback(method), *(callbacks or [])],
    )


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return every trainable parameter and every tensor of optimizer state, by name."""
    state = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            state[name] = parameter.detach().clone()
            for key, value in trainer.optimizer.optimizer.state.get(parameter, {}).items():
                state[f"{name}|{key}"] = value.clone()
    return state


def callback_of(trainer: Trainer) -> AdaptiveRankCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, AdaptiveRankCallback))
