"""`AdaptiveTrainer` stops before a number that is not finite reaches a weight or a log."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.errors import DivergedError
from adaptive_lora.trainer import AdaptiveTrainer, MetricsFile, finite, use_progress

NAN, INF = float("nan"), float("inf")
BATCH = 4
POISON = 63  # a token that no ordinary record holds
EMBEDDING = "base_model.model.bert.embeddings.word_embeddings"
QUERY_B = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.default.weight"
Weights = dict[str, torch.Tensor]


def records(poisoned_batch: int | None = None, count: int = 40) -> list[dict[str, torch.Tensor]]:
    """Return sequences of ordinary tokens; one record of batch number `poisoned_batch` (from 1) holds the poison."""
    rows = torch.randint(0, POISON, (count, 8), generator=torch.Generator().manual_seed(3))
    if poisoned_batch is not None:
        rows[poisoned_batch * BATCH - 1, 2] = POISON
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]


def make_model() -> PeftModel:
    base = make_bert()
    set_seed(5)
    return al.attach(base, methods.linear_decay(base_rank=4, min_rank=2), ["query", "value"], dropout=0.1)


def make_trainer(
    folder: Path,
    *,
    kind: type[AdaptiveTrainer] = AdaptiveTrainer,
    train: list | None = None,
    evaluate: list | None = None,
    callbacks: list | None = None,
    **options: Any,
) -> AdaptiveTrainer:
    """Return a trainer over sequential batches with a constant learning rate: fewer steps are a prefix of more."""
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        **options,
    }
    args = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, **arguments)
    return kind(make_model(), args, train_dataset=train or records(), eval_dataset=evaluate, callbacks=callbacks)


def trainable(model: PeftModel) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def after(steps: int, folder: Path, **options: Any) -> tuple[Weights, list[dict]]:
    """Return the trainable parameters and the losses of an undisturbed run of `steps` steps."""
    trainer = make_trainer(folder / "clean", max_steps=max(steps, 1), **options)
    if steps:
        trainer.train()
    return trainable(trainer.model), losses(trainer.state.log_history)


def losses(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


def diverge(trainer: AdaptiveTrainer) -> DivergedError:
    with pytest.raises(DivergedError) as error:
        trainer.train()
    return error.value


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the loss ---


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_poisoned_batch_stops_training_at_its_step_and_names_the_layer(
    step: int, value: float, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", train=records(poisoned_batch=step))
    trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = value
    error = diverge(trainer)
    assert (error.step, error.where) == (step, (EMBEDDING,))
    assert all(part in str(error) for part in (f"step {step}", "loss is nan", EMBEDDING, "Lower the learning rate"))
    weights, log = after(step - 1, tmp_path)
    assert same(trainable(trainer.model), weights)
    assert losses(trainer.state.log_history) == log
    assert (tmp_path / "run" / f"checkpoint-{step - 1}").is_dir() == (step > 1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_alone_is_not_finite_is_named_itself(value: float, tmp_path: Path) -> None:
    class Faulty(AdaptiveTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + (value if self.state.global_step == 2 else 0.0)

    trainer = make_trainer(tmp_path / "run", kind=Faulty)
    error = diverge(trainer)
    assert (error.step, error.where) == (3, ())
    assert f"the loss is {value}; first seen in the loss itself" in str(error)
    assert same(trainable(trainer.model), after(2, tmp_path)[0])


def test_a_weight_that_is_not_finite_is_named_before_what_follows_from_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.get_parameter(QUERY_B).data[0, 0] = NAN
    error = diverge(trainer)
    assert (error.step, error.where) == (1, (QUERY_B,))


# --- the gradient ---


def spoil(model: PeftModel, backward: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the gradient of one parameter in backward pass number `backward` (from 1)."""
    count = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return change(gradient) if count == backward else gradient

    model.get_parameter(QUERY_B).register_hook(hook)


CHANGES = {
    "nan": lambda gradient: torch.full_like(gradient, NAN),
    "one inf": lambda gradient: gradient.index_fill(0, torch.tensor([0]), INF),
    "overflow": lambda gradient: torch.full_like(gradient, 1e30),  # finite; the sum of its squares is not
}


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_gradient_in_one_layer_names_it_spreads_nowhere_and_leaves_a_checkpoint(
    change: str, max_grad_norm: float, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", max_grad_norm=max_grad_norm)
    spoil(trainer.model, backward=4, change=CHANGES[change])
    error = diverge(trainer)
    assert (error.step, error.where) == (4, (QUERY_B,))
    assert "step 4" in str(error)
    assert QUERY_B in str(error)
    norms = {name: p.grad.norm() for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert [name for name, norm in norms.items() if not (norm.isfinite() and norm > 0)] == [QUERY_B]
    weights, log = after(3, tmp_path, max_grad_norm=max_grad_norm)
    assert same(trainable(trainer.model), weights)
    assert losses(trainer.state.log_history) == log
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert len(saved) == len(weights)
    for name, tensor in weights.items():
        assert torch.equal(saved[name.replace(".default", "").replace(".modules_to_save", "")], tensor)


def test_steps_are_optimizer_steps_under_gradient_accumulation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    spoil(trainer.model, backward=5, change=CHANGES["nan"])  # the first half of step 3
    assert diverge(trainer).step == 3
    assert (tmp_path / "checkpoint-2").is_dir()


def test_no_checkpoint_is_written_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    spoil(trainer.model, backward=1, change=CHANGES["nan"])
    assert diverge(trainer).step == 1
    assert not list(tmp_path.glob("checkpoint-*"))


# --- evaluation and logs ---


def test_an_evaluation_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": BATCH}
    trainer = make_trainer(tmp_path / "run", evaluate=records(poisoned_batch=2, count=8), **options)
    trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
    error = diverge(trainer)
    assert error.step == 2
    assert "evaluation after step 2: eval_loss is nan" in str(error)
    assert same(trainable(trainer.model), after(2, tmp_path)[0])


def strict(text: str) -> list[dict]:
    """Parse JSON lines, refusing the NaN and Infinity that Python would read."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_the_metrics_file_holds_the_log_as_strict_json_also_of_a_run_that_diverged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    options = {"eval_strategy": "steps", "eval_steps": 2, "callbacks": [MetricsFile(file)]}
    trainer = make_trainer(tmp_path, evaluate=records(poisoned_batch=2, count=8), **options)
    trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
    diverge(trainer)
    rows = strict(file.read_text())
    assert rows == finite(trainer.state.log_history)
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[-1]["eval_loss"] is None
    assert all(math.isfinite(value) for row in rows[:-1] for value in row.values())


def test_after_a_resume_the_metrics_file_holds_every_step_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, callbacks=[MetricsFile(file)]).train()
    once = losses(strict(file.read_text()))
    trainer = make_trainer(tmp_path, callbacks=[MetricsFile(file)])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["step"] for row in once] == [1, 2, 3, 4, 5, 6]
    assert losses(strict(file.read_text())) == once  # bit for bit, dropout on


def test_finite_replaces_every_float_that_strict_json_has_no_word_for() -> None:
    value = {"loss": NAN, "rows": [1, INF, (-INF, 2.5)], "name": "nan", "ok": True, "none": None}
    replaced = {"loss": None, "rows": [1, None, [None, 2.5]], "name": "nan", "ok": True, "none": None}
    assert finite(value) == replaced
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == replaced


def test_output_that_is_no_terminal_gets_one_plain_line_per_log_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    use_progress(trainer, stream=io.StringIO())
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two steps and the summary
    assert lines[0].startswith("step      1/2  loss 0.")
