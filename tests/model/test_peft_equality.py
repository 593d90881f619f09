"""`lora(r)` is PEFT's LoRA, and `AdaptiveTrainer` is the `Trainer`: bit for bit, loss by loss, with
the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert, make_gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.model.targets import find_targets

STEPS = 20


def records(task: str, count: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 64, (count, 8), generator=generator)
    labels = rows if task == "CAUSAL_LM" else rows[:, 0] % 2
    return [{"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True)]


def train(
    kind: type[Trainer], model: PeftModel, folder: Path, **options: object
) -> tuple[dict, list[dict]]:
    """Train 20 steps; return the trainable parameters and what was logged, but for the times."""
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "seed": 11,
        **options,
    }
    args = TrainingArguments(
        folder, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **arguments
    )
    task = "CAUSAL_LM" if "gpt2" in str(type(model.get_base_model())) else "SEQ_CLS"
    trainer = kind(model, args, train_dataset=records(task))
    trainer.train()
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "train_loss")
    log = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history]
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
    }, log


class StockTrainer(Trainer):
    """The stock `Trainer`, told that a classifier's loss is a mean; it believes otherwise of any
    model with **kwargs, and accumulated gradients would grow with the number of micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model.peft_config["default"].task_type == "SEQ_CLS":
            self.model_accepts_loss_kwargs = False


CASES = {
    "SEQ_CLS": (make_bert, ["query", "value", "intermediate.dense"]),
    "CAUSAL_LM": (make_gpt2, ["c_attn", "c_proj"]),
}


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_lora_trains_like_plain_peft_with_the_stock_trainer(
    task: str, options: dict, tmp_path: Path
) -> None:
    make, targets = CASES[task]

    def ours(base: PreTrainedModel) -> PeftModel:
        return al.attach(base, methods.lora(8), targets, scale=2.0, dropout=0.1)

    def plain(base: PreTrainedModel) -> PeftModel:
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.1,
            target_modules=[target.name for target in find_targets(base, targets)],
            task_type=task,
            fan_in_fan_out=task == "CAUSAL_LM",  # Conv1D
        )
        return get_peft_model(base, config)

    outcomes = []
    for kind, attach in ((al.AdaptiveTrainer, ours), (StockTrainer, plain)):
        base = make()
        start = {name: p.detach().clone() for name, p in base.named_parameters()}
        set_seed(5)
        model = attach(base)
        parameters, log = train(kind, model, tmp_path, **options)
        outcomes.append((start, parameters, log))
    (start_a, ours_after, our_log), (start_b, plain_after, plain_log) = outcomes
    assert_same(start_a, start_b)
    assert_same(ours_after, plain_after)
    assert our_log == plain_log
    # and training did something, so that equality says something
    losses = [row["loss"] for row in our_log if "loss" in row]
    assert len(losses) == STEPS == len(set(losses))
    assert all(p.abs().sum() > 0 for name, p in ours_after.items() if "lora_B" in name)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    "method", [methods.linear_decay(base_rank=6, min_rank=2), methods.attention_heavy(rank=3)]
)
def test_a_static_pattern_trains_like_peft_with_that_rank_pattern(
    method: methods.Method, tmp_path: Path
) -> None:
    """Also with alpha / r equal everywhere, which PEFT needs an alpha_pattern for."""
    base = make_bert()
    set_seed(5)
    model = al.attach(base, method, scale=2.0, dropout=0.1)
    pattern = al.ranks(model)
    assert len(set(pattern.values())) > 1
    ours, our_log = train(al.AdaptiveTrainer, model, tmp_path)
    config = LoraConfig(
        target_modules=list(pattern),
        rank_pattern={f"^{name}": rank for name, rank in pattern.items()},
        alpha_pattern={f"^{name}": 2 * rank for name, rank in pattern.items()},
        lora_dropout=0.1,
        task_type="SEQ_CLS",
    )
    base = make_bert()
    set_seed(5)
    plain, plain_log = train(Trainer, get_peft_model(base, config), tmp_path)
    assert_same(ours, plain)
    assert our_log == plain_log
