"""`AdaptiveTrainer` stops before a number that is not finite reaches a weight or a log."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dynamic
import pytest
import torch
from conftest import make_bert
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, set_seed

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.errors import DivergedError, InputError, NothingLearnedError
from adaptive_lora.files import finite
from adaptive_lora.training.trainer import AdaptiveTrainer, MetricsFile, use_progress

NAN, INF = float("nan"), float("inf")
BATCH = 4
POISON = 63  # a token that no ordinary record holds
EMBEDDING = "base_model.model.bert.embeddings.word_embeddings"
QUERY_B = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.default.weight"
Weights = dict[str, torch.Tensor]


def records(poisoned_batch: int | None = None, count: int = 40) -> list[dict[str, torch.Tensor]]:
    """Return sequences of ordinary tokens; one record of batch number `poisoned_batch` (from 1)
    holds the poison."""
    rows = torch.randint(0, POISON, (count, 8), generator=torch.Generator().manual_seed(3))
    if poisoned_batch is not None:
        rows[poisoned_batch * BATCH - 1, 2] = POISON
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]


def make_model() -> PeftModel:
    base = make_bert()
    set_seed(5)
    return al.attach(
        base, methods.linear_decay(base_rank=4, min_rank=2), ["query", "value"], dropout=0.1
    )


def make_trainer(
    folder: Path,
    *,
    kind: type[AdaptiveTrainer] = AdaptiveTrainer,
    train: list | None = None,
    evaluate: list | None = None,
    callbacks: list | None = None,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> AdaptiveTrainer:
    """Return a trainer over sequential batches with a constant learning rate: fewer steps are a
    prefix of more."""
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
    data = {"train_dataset": train or records(), "eval_dataset": evaluate}
    return kind(make_model(), args, **data, callbacks=callbacks, **(more or {}))


def trainable(model: PeftModel) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def after(steps: int, folder: Path, **options: Any) -> tuple[Weights, list[dict]]:
    """Return the trainable parameters and the losses of an undisturbed run of `steps` steps."""
    trainer = make_trainer(folder / "clean", max_steps=max(steps, 1), **options)
    if steps:
        trainer.train()
    return trainable(trainer.model), losses(trainer.state.log_history)


def losses(rows: list[dict]) -> list[dict]:
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows if "loss" in row
    ]


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
    assert all(
        part in str(error)
        for part in (f"step {step}", "loss is nan", EMBEDDING, "Lower the learning rate")
    )
    weights, log = after(step - 1, tmp_path)
    assert same(trainable(trainer.model), weights)
    assert losses(trainer.state.log_history) == log
    assert (tmp_path / "run" / f"checkpoint-{step - 1}").is_dir() == (step > 1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_alone_is_not_finite_is_named_itself(value: float, tmp_path: Path) -> None:
    class Faulty(AdaptiveTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + (
                value if self.state.global_step == 2 else 0.0
            )

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
    "overflow": lambda gradient: torch.full_like(
        gradient, 1e30
    ),  # finite; the sum of its squares is not
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
    norms = {
        name: p.grad.norm() for name, p in trainer.model.named_parameters() if p.grad is not None
    }
    assert [name for name, norm in norms.items() if not (norm.isfinite() and norm > 0)] == [QUERY_B]
    weights, log = after(3, tmp_path, max_grad_norm=max_grad_norm)
    assert same(trainable(trainer.model), weights)
    assert losses(trainer.state.log_history) == log
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert len(saved) == len(weights)
    for name, tensor in weights.items():
        assert torch.equal(
            saved[name.replace(".default", "").replace(".modules_to_save", "")], tensor
        )


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


# --- skip instead of stop ---


class Watch(TrainerCallback):
    """Keep what `look` sees before and after each optimizer step."""

    def __init__(self, look: Callable[[], Weights]) -> None:
        self.look = look
        self.before: list[Weights] = []
        self.after: list[Weights] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before.append(self.look())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.after.append(self.look())

    def still(self) -> list[int]:
        """Return the numbers of the steps, from 1, that changed not a bit."""
        pairs = zip(self.before, self.after, strict=True)
        return [step for step, (before, after) in enumerate(pairs, 1) if same(before, after)]


def skipper(folder: Path, max_skipped: int = 5, **options: Any) -> AdaptiveTrainer:
    """Return a trainer that skips; two micro-batches a step."""
    more = {"on_non_finite": "skip", "max_skipped": max_skipped, **options.pop("more", {})}
    options = {"gradient_accumulation_steps": 2, "train": records(count=48), **options}
    return make_trainer(folder, more=more, **options)


def skipped_rows(trainer: AdaptiveTrainer) -> list[tuple[int, int]]:
    return [
        (row["step"], row["skipped_steps"])
        for row in trainer.state.log_history
        if "skipped_steps" in row
    ]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "AdamW": {"optim": "adamw_torch"},
    "SGD": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "Adam": {
        "more": {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1})}
    },
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize(
    "micro_batch", [1, 7, 8]
)  # the first of all; the first and the second half of step 4
def test_skip_leaves_weights_and_moments_bitwise_unchanged_in_that_step_only(
    micro_batch: int, cause: str, optimizer: str, tmp_path: Path
) -> None:
    train = records(poisoned_batch=micro_batch if cause == "loss" else None, count=48)
    trainer = skipper(tmp_path, train=train, weight_decay=0.1, **OPTIMIZERS[optimizer])
    if cause == "loss":
        trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
    else:
        spoil(trainer.model, backward=micro_batch, change=CHANGES["one inf"])
    watch = Watch(lambda: dynamic.state_of(trainer))
    trainer.add_callback(watch)
    trainer.train()
    step = (micro_batch + 1) // 2
    assert watch.still() == [step]
    assert len(watch.after[-1]) > len(trainable(trainer.model))  # moments were looked at
    assert (trainer.state.global_step, trainer.skipped_steps, skipped_rows(trainer)) == (
        6,
        1,
        [(step, 1)],
    )


def test_skip_logs_the_mean_loss_of_the_steps_made_and_never_0_or_nan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(every: int) -> list[dict]:
        trainer = skipper(tmp_path, logging_steps=every, train=records(poisoned_batch=10, count=48))
        trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
        spoil(trainer.model, backward=7, change=CHANGES["nan"])
        trainer.train()
        return trainer.state.log_history

    each, wide = train(1), train(3)
    assert [row["step"] for row in each if "skipped_steps" in row] == [4, 5]
    single = {row["step"]: row["loss"] for row in each if "loss" in row}
    assert list(single) == [1, 2, 3, 6]
    assert all(
        math.isfinite(value) and value != 0
        for row in each
        for key, value in row.items()
        if "loss" in key
    )
    rows = {row["step"]: row["loss"] for row in wide if "loss" in row}
    assert rows == pytest.approx({3: (single[1] + single[2] + single[3]) / 3, 6: single[6]})
    assert each[-1]["train_loss"] == pytest.approx(sum(single.values()) / 4)
    messages = [
        record.getMessage() for record in caplog.records if "skipped" in record.getMessage()
    ]
    assert (
        messages[0]
        == f"step 4 skipped (1 of at most 5): the gradient is not finite; first seen in {QUERY_B}"
    )
    assert (
        messages[1]
        == f"step 5 skipped (2 of at most 5): the loss is nan; first seen in {EMBEDDING}"
    )


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_a_log_row_at_a_skipped_step_has_no_gradient_norm(cause: str, tmp_path: Path) -> None:
    trainer = skipper(tmp_path, logging_steps=2, train=records(poisoned_batch=8, count=48))
    if cause == "loss":
        trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
    else:
        spoil(trainer.model, backward=8, change=CHANGES["nan"])
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert ["grad_norm" in rows[step] for step in (2, 4, 6)] == [True, False, True]
    assert rows[4]["loss"] > 0


def test_skip_stops_after_max_skipped_steps_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = skipper(tmp_path, max_skipped=2)
    for micro_batch in (3, 4, 7, 12):  # two in step 2, which is one step
        spoil(trainer.model, backward=micro_batch, change=CHANGES["nan"])
    error = diverge(trainer)
    assert (error.step, error.where) == (6, (QUERY_B,))
    assert "Skipped before: 2, all that max_skipped allows. Lower the learning rate" in str(error)
    assert skipped_rows(trainer) == [(2, 1), (4, 2)]
    assert (tmp_path / "checkpoint-5").is_dir()


def test_skipped_steps_are_counted_over_a_resume_which_ends_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    def prepared(max_skipped: int) -> AdaptiveTrainer:
        data, file = records(poisoned_batch=3, count=48), MetricsFile(tmp_path / "metrics.jsonl")
        options = {"train": data, "max_skipped": max_skipped, "callbacks": [file]}
        trainer = skipper(tmp_path, save_strategy="steps", save_steps=2, **options)
        trainer.model.get_submodule(EMBEDDING).weight.data[POISON] = NAN
        return trainer

    whole = prepared(2)
    spoil(whole.model, backward=9, change=CHANGES["nan"])
    whole.train()
    assert whole.skipped_steps == 2
    for max_skipped in (2, 1):
        resumed = prepared(max_skipped)
        spoil(resumed.model, backward=5, change=CHANGES["nan"])  # backward pass 9 in all, in step 5
        if max_skipped == 2:
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert skipped_rows(resumed) == skipped_rows(whole) == [(2, 1), (5, 2)]
            assert same(dynamic.state_of(resumed), dynamic.state_of(whole))
        else:
            with pytest.raises(DivergedError, match=r"stopped at step 5: .* Skipped before: 1"):
                resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        rows = strict((tmp_path / "metrics.jsonl").read_text())
        assert [row["step"] for row in rows if "skipped_steps" in row] == (
            [2, 5] if max_skipped == 2 else [2]
        )


def test_the_mean_over_no_steps_is_not_logged_as_0(tmp_path: Path) -> None:
    trainer = skipper(tmp_path, max_steps=1)
    spoil(trainer.model, backward=1, change=CHANGES["nan"])
    # and every step having been skipped, nothing is learned
    with pytest.raises(NothingLearnedError):
        trainer.train()
    assert not [row for row in trainer.state.log_history if "loss" in row or "train_loss" in row]


CHANGING = [name for name in dynamic.DYNAMIC if name != "peft_adalora"]


def rank_trainer(folder: Path, name: str, *bad_steps: int) -> AdaptiveTrainer:
    """Return a trainer of twelve steps whose ranks change, with a NaN in the gradients of
    `bad_steps`."""
    kind: Any = partial(AdaptiveTrainer, on_non_finite="skip")
    trainer = dynamic.make_trainer(folder, dynamic.DYNAMIC[name](), kind=kind, save_strategy="no")
    backward = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal backward
        backward += 1
        return gradient * NAN if (backward + 1) // 2 in bad_steps else gradient

    trainer.model.get_parameter(
        "base_model.model.classifier.modules_to_save.default.weight"
    ).register_hook(hook)
    return trainer


@pytest.mark.parametrize("name", CHANGING)
def test_a_skipped_step_leaves_the_scores_of_the_ranks_alone_and_counts(
    name: str, tmp_path: Path
) -> None:
    trainer = rank_trainer(tmp_path, name, 3, 4)  # 4: a decision step of several methods

    def look() -> Weights:
        statistics = dynamic.callback_of(trainer).controller._statistics
        return {
            f"{kind}|{n}": s.tensor.clone()
            for kind, row in statistics.items()
            for n, s in row.items()
        }

    watch = Watch(look)
    trainer.add_callback(watch)
    trainer.train()
    controller = dynamic.callback_of(trainer).controller
    assert (trainer.skipped_steps, controller.step_count) == (2, trainer.state.global_step)
    # the last step whose gradients every method looks at
    watched = 4 if name == "grad_delta unbudgeted" else 5
    # weight changes alone take nothing in at a step
    if any("start_" not in key for key in watch.after[2]):
        assert [step for step in watch.still() if step <= watched] == [3, 4]
    assert any(row.status == "changed" for row in controller.history)
    assert not [row for row in controller.history if row.status == "refused"]


@pytest.mark.parametrize("name", CHANGING)
def test_skipped_steps_up_to_the_first_decision_crash_nothing(name: str, tmp_path: Path) -> None:
    trainer = rank_trainer(tmp_path, name, 1, 2, 3, 4, 5)
    trainer.train()
    controller = dynamic.callback_of(trainer).controller
    assert (trainer.skipped_steps, controller.step_count) == (5, 12)
    assert controller.history


def test_pefts_adalora_cannot_skip_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match="step 3 cannot be skipped: PEFT's AdaLoRA needs its gradients"
    ) as error:
        rank_trainer(tmp_path, "peft_adalora", 3).train()
    assert error.value.step == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_non_finite": "ignore"}, "on_non_finite is 'ignore'; expected 'stop' or 'skip'"),
        ({"max_skipped": 0}, "max_skipped is 0; expected a whole number >= 1"),
        ({"max_skipped": 2.5}, "max_skipped is 2.5"),
        ({"max_skipped": True}, "max_skipped is True"),
    ],
)
def test_a_policy_that_is_none_is_refused(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, more=wrong)


def test_skip_is_refused_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    make_trainer(tmp_path)
    with pytest.raises(InputError, match="several processes"):
        skipper(tmp_path)


# --- nothing learned ---


def test_a_rate_that_moves_nothing_is_an_error_with_remedies(tmp_path: Path) -> None:
    with pytest.raises(
        NothingLearnedError, match="nothing in 6 steps: no trainable parameter changed"
    ) as error:
        make_trainer(tmp_path, learning_rate=1e-300).train()
    assert all(
        word in str(error.value)
        for word in ("learning rate 0", "warm-up", "frozen", "skipped", "label")
    )


def test_adapters_whose_b_stays_zero_are_an_error_though_the_head_was_trained(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_B" not in name)
    before = trainable(trainer.model)
    with pytest.raises(NothingLearnedError, match="every update B A is still zero"):
        trainer.train()
    assert not same(trainable(trainer.model), before)


def test_one_adapter_that_learned_is_enough(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name == QUERY_B)
    trainer.train()
    assert trainer.model.get_parameter(QUERY_B).any()


def test_an_adapter_that_was_trained_before_must_change_too(tmp_path: Path) -> None:
    # one epoch
    trainer = make_trainer(tmp_path, max_steps=10, save_strategy="steps", save_steps=10)
    trainer.train()
    again = AdaptiveTrainer(trainer.model, trainer.args, train_dataset=records())
    again.args.learning_rate = 1e-300
    with pytest.raises(NothingLearnedError, match="no trainable parameter changed"):
        again.train()
    # makes no step: nothing was to change
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_resumed_run_must_change_what_the_checkpoint_held(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()  # the learning rate is in them
    with pytest.raises(NothingLearnedError, match="no trainable parameter changed"):
        make_trainer(tmp_path, learning_rate=0.0).train(resume_from_checkpoint=str(checkpoint))


def test_the_drop_in_does_not_return_an_accuracy_of_nothing_learned() -> None:
    tuner = al.AdaptiveLoRA(
        make_bert(),
        records(),
        records(count=8),
        warmup_steps=2,
        num_train_epochs=1,
        learning_rate=1e-300,
        batch_size=8,
        training_arguments={"use_cpu": True, "disable_tqdm": True},
    )
    with pytest.raises(NothingLearnedError, match="learned nothing in 5 steps"):
        tuner.train()
    with pytest.raises(InputError, match="nothing is trained yet"):
        _ = tuner.model


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


def test_the_metrics_file_holds_the_log_as_strict_json_also_of_a_run_that_diverged(
    tmp_path: Path,
) -> None:
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
    make_trainer(
        tmp_path, save_strategy="steps", save_steps=3, callbacks=[MetricsFile(file)]
    ).train()
    once = losses(strict(file.read_text()))
    trainer = make_trainer(tmp_path, callbacks=[MetricsFile(file)])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["step"] for row in once] == [1, 2, 3, 4, 5, 6]
    assert losses(strict(file.read_text())) == once  # bit for bit, dropout on


def test_output_that_is_no_terminal_gets_one_plain_line_per_log_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    use_progress(trainer, stream=io.StringIO())
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two steps and the summary
    assert lines[0].startswith("step      1/2  loss 0.")
