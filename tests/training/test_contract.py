"""What the README promises of a training holds on every path: however the model, the callback and
the checkpoint come in, and however the training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from dynamic import DYNAMIC, STEPS, callback_of, make_model, make_trainer, records, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback, TrainingArguments

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.allocation import history
from adaptive_lora.model import saving
from adaptive_lora.model.adapter_file import tensor_ranks
from adaptive_lora.model.adapters import adapters, targets_of
from adaptive_lora.model.condition import adapter_parameters
from adaptive_lora.testing import TARGETS, apart, logits
from adaptive_lora.training.controller import STATE_FILE, NeverDecidedError

SHRINKING = ("adalora", "squeeze", "grad_delta")


class StopAfter(TrainerCallback):
    """As a time limit does, or early stopping."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        control.should_training_stop = state.global_step >= self.step


def stock(rank: int = 8, **config: object) -> PeftModel:
    """The tiny BERT with adapters that PEFT put on by itself."""
    torch.manual_seed(5)
    settings = {"lora_alpha": 2 * rank, "target_modules": list(TARGETS), "task_type": "SEQ_CLS"}
    return get_peft_model(make_bert(n_layers=2), LoraConfig(r=rank, **{**settings, **config}))


def budget(trainer: Trainer) -> int:
    return callback_of(trainer).method.budget_parameters(targets_of(trainer.model))


def reread(model: PeftModel, folder: Path) -> float:
    """Save, read by stock PEFT, and return how far the answers are apart."""
    again = PeftModel.from_pretrained(make_bert(n_layers=2), str(al.save(model, folder))).eval()
    return apart(logits(again), logits(model))


# --- training ends early ---


@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("step", [1, 4, 7])  # before any decision; between; near the end
def test_a_training_that_stops_early_ends_within_its_budget(
    name: str, step: int, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, DYNAMIC[name](), callbacks=[StopAfter(step)], save_strategy="no"
    )
    trainer.train()
    rows = callback_of(trainer).history
    assert al.lora_parameters(trainer.model) <= budget(trainer)
    # a last decision, recorded as such, unless the planned ones have brought it there
    assert rows[-1].reason == f"training ended after step {step}: the last decision" or (
        rows[-1].parameters_after <= budget(trainer)
    )
    assert history.replay(callback_of(trainer).controller.initial_pattern, rows) == al.ranks(
        trainer.model
    )
    assert reread(trainer.model, tmp_path / "adapter") <= 1e-5


@pytest.mark.parametrize("step", [1, 5])
def test_pefts_adalora_that_stops_early_ends_with_its_target(step: int, tmp_path: Path) -> None:
    method = DYNAMIC["peft_adalora"]()
    trainer = make_trainer(tmp_path, method, callbacks=[StopAfter(step)], save_strategy="no")
    trainer.train()
    ranks = al.ranks(trainer.model)
    assert sum(ranks.values()) <= method.adaptation.target_rank * len(ranks)
    assert reread(trainer.model, tmp_path / "adapter") <= 1e-5


def test_data_that_end_before_max_steps_end_the_training_within_the_budget(
    tmp_path: Path,
) -> None:
    """A stream that is shorter than said."""

    class Short(torch.utils.data.IterableDataset):
        def __iter__(self) -> object:
            return iter(records(20))

    trainer = make_trainer(tmp_path, DYNAMIC["adalora"](), save_strategy="no", eval_strategy="no")
    trainer.train_dataset = Short()
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert al.lora_parameters(trainer.model) <= budget(trainer)


def test_a_loop_of_ones_own_that_ends_early_ends_within_its_budget() -> None:
    method = DYNAMIC["squeeze"]()
    model = make_model(method)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = al.RankController(model, optimizer, method, STEPS)
    batch = {key: torch.stack([row[key] for row in records(8)]) for key in records(1)[0]}
    for _ in range(3):
        model(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    controller.finish(stopped_early=True)
    assert al.lora_parameters(model) <= method.budget_parameters(targets_of(model))


# --- the best checkpoint at the end ---


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("step", [3, 9])
def test_the_best_checkpoint_comes_back_with_its_ranks_and_within_the_budget(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = DYNAMIC[name]()
    trainer = make_trainer(
        tmp_path, method, save_steps=3, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    plain = trainer.evaluate

    def evaluate(*args: object, **kwargs: object) -> dict:
        metrics = plain(*args, **kwargs)
        return {**metrics, "eval_loss": float(abs(trainer.state.global_step - step))}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    best = tmp_path / f"checkpoint-{step}"
    assert trainer.state.best_model_checkpoint == str(best)
    rows = callback_of(trainer).history
    there = tensor_ranks(best / "adapter_model.safetensors")
    ranks = al.ranks(trainer.model)
    if method.budget_parameters(targets_of(trainer.model)) is None or not any(
        row.reason and "last decision" in row.reason for row in rows
    ):
        assert name == "peft_adalora" or ranks == {**dict.fromkeys(ranks, 0), **there}
        assert name == "peft_adalora" or reread(trainer.model, tmp_path / "out") <= 1e-5
    assert budget(trainer) is None or al.lora_parameters(trainer.model) <= budget(trainer)
    assert history.replay(callback_of(trainer).controller.initial_pattern, rows) == ranks
    assert reread(trainer.model, tmp_path / "adapter") <= 1e-5
    # and what the optimizer holds fits, should it be used again
    for parameter, state in trainer.optimizer.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


# --- the model starts otherwise than the method ---


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("name", [*DYNAMIC, "linear_decay"])
def test_a_model_attached_otherwise_is_brought_to_the_methods_start_and_that_is_said(
    name: str, rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = methods.linear_decay(rank=2) if name == "linear_decay" else DYNAMIC[name]()
    if name == "peft_adalora":
        pytest.skip("PEFT's own layers: refused, below")
    model = stock(rank)
    before = logits(model)
    with caplog.at_level(logging.WARNING, "adaptive_lora"):
        trainer = make_trainer(tmp_path, method, model=model, save_strategy="no")
    start = method.initial_pattern(targets_of(model))
    assert al.ranks(model) == start
    assert torch.equal(logits(model), before)  # B is zero
    said = [line.getMessage() for line in caplog.records]
    assert sum("starts at other ranks" in line for line in said) == (set(start.values()) != {rank})
    trainer.train()
    rows = callback_of(trainer).history
    assert method.adaptation is None or any(row.status == "changed" for row in rows)
    assert budget(trainer) is None or al.lora_parameters(model) <= budget(trainer)
    assert reread(model, tmp_path / "adapter") <= 1e-5


def test_pefts_adalora_wants_its_own_layers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DYNAMIC["peft_adalora"](), model=stock(), save_strategy="no")
    with pytest.raises(al.InputError, match="has plain LoRA adapters; attach it with"):
        trainer.train()


def test_a_trained_adapter_grows_to_the_start_but_is_never_cut_there(tmp_path: Path) -> None:
    def trained(rank: int) -> PeftModel:
        model = stock(rank)
        for layer in adapters(model).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        return model

    method = methods.adalora(2, factor=2.0, initial=2, final=2, every=2)  # starts at rank 4
    model = trained(2)
    before = logits(model)
    trainer = make_trainer(tmp_path, method, model=model, save_strategy="no")
    assert set(al.ranks(model).values()) == {2}  # it may be about to resume
    trainer.train()
    assert callback_of(trainer).history[0].parameters_before == 4 * sum(
        target.cost for target in targets_of(model)
    )
    assert apart(before, logits(model)) > 0
    model = trained(8)
    before = logits(model)
    with pytest.raises(al.InputError, match=r"trained already, at rank 8.*adaptive_lora\.compress"):
        make_trainer(tmp_path, method, model=model, save_strategy="no").train()
    assert torch.equal(logits(model), before)


def test_a_resumed_training_that_was_brought_to_its_start_ends_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    """Its model comes anew from PEFT each time, with other ranks than any checkpoint."""
    method = DYNAMIC["adalora"]()
    whole = make_trainer(tmp_path, method, model=stock())
    whole.train()
    again = make_trainer(tmp_path, method, model=stock())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected, found = state_of(whole), state_of(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_static_method_is_resumed_with_its_ranks_too(tmp_path: Path) -> None:
    method = methods.linear_decay(rank=2)
    whole = make_trainer(tmp_path, method, model=stock())
    whole.train()
    again = make_trainer(tmp_path, method, model=stock())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert al.ranks(again.model) == al.ranks(whole.model)
    expected, found = state_of(whole), state_of(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- how the callback comes in ---


def test_two_callbacks_in_one_training_are_refused(tmp_path: Path) -> None:
    method = DYNAMIC["adalora"]()
    trainer = make_trainer(tmp_path, method, save_strategy="no")
    trainer.add_callback(al.AdaptiveRankCallback(method))
    with pytest.raises(al.InputError, match="two AdaptiveRankCallbacks"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_total_limit": 1}, "save_total_limit is 1"),
        ({"eval_strategy": "no"}, "nothing is evaluated"),
    ],
)
def test_a_callback_that_is_added_later_checks_all_the_same(
    options: dict, message: str, tmp_path: Path
) -> None:
    method = DYNAMIC["plateau"]()
    arguments = make_trainer(tmp_path, method).args
    for name, value in options.items():
        setattr(arguments, name, value)
    data = {"train_dataset": records(), "eval_dataset": records(8)}
    trainer = Trainer(make_model(method), arguments, **data)
    trainer.add_callback(al.AdaptiveRankCallback(method))
    with pytest.raises(al.InputError, match=message):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def _both_active(model: PeftModel) -> None:
    model.add_adapter("b", LoraConfig(target_modules=["query"]))
    for layer in adapters(model).values():
        layer.set_adapter(["default", "b"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.merge_adapter(), "is merged into the base weights"),
        (lambda model: model.base_model.disable_adapter_layers(), "is disabled"),
        (lambda model: model.requires_grad_(False), "is frozen"),
        (_both_active, "2 adapters are active together, 'b', 'default'"),
        (lambda model: model.bert.embeddings.requires_grad_(True),
         "weights of the base are trainable"),
        (lambda model: next(iter(adapters(model).values())).lora_A["default"].weight.data.fill_(
            float("nan")), "NaN or infinite values"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["callbacks=", "add_callback", "controller"])
def test_a_model_that_cannot_be_trained_as_it_is_is_refused_whichever_way_it_enters(
    spoil: Callable[[PeftModel], object], message: str, how: str, tmp_path: Path
) -> None:
    method = DYNAMIC["adalora"]()
    model = make_model(method)
    spoil(model)
    callback = al.AdaptiveRankCallback(method)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=STEPS)

    def enter() -> None:
        if how == "controller":
            al.RankController(model, AdamW(model.parameters()), method, STEPS)
        elif how == "callbacks=":
            Trainer(model, arguments, train_dataset=records(), callbacks=[callback])
        else:
            trainer = Trainer(model, arguments, train_dataset=records())
            trainer.add_callback(callback)
            trainer.train()

    with pytest.raises(al.InputError, match=message):
        enter()


def test_a_hyperparameter_search_ends_each_trial_within_its_budget(tmp_path: Path) -> None:
    """One callback, a model made anew for every trial."""
    method = DYNAMIC["adalora"]()
    callback, spent = al.AdaptiveRankCallback(method), []

    class Look(TrainerCallback):
        def on_train_end(self, args: object, state: object, control: object, **kw: object) -> None:
            spent.append((al.lora_parameters(kw["model"]), len(callback.history)))

    trainer = Trainer(
        args=make_trainer(tmp_path, method, save_strategy="no").args,
        model_init=lambda: make_model(method),
        train_dataset=records(),
        eval_dataset=records(8),
        callbacks=[callback, Look()],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    allowed = method.budget_parameters(targets_of(make_model(method)))
    assert len(spent) == 2
    assert all(parameters <= allowed and rows == 5 for parameters, rows in spent)


def test_a_second_training_starts_at_the_start_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, DYNAMIC["adalora"](), save_strategy="no")
    trainer.train()
    with caplog.at_level(logging.WARNING, "adaptive_lora"):
        trainer.train()
    assert "were brought there, 432 -> 896 LoRA parameters" in caplog.text
    assert al.lora_parameters(trainer.model) <= budget(trainer)


# --- auto_find_batch_size ---


class OutOfMemory(TrainerCallback):
    """As a GPU is at batch 4, after ranks have changed."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.train_batch_size == 4 and state.global_step == 7:
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("name", ["adalora", "grad_delta"])
def test_a_smaller_batch_starts_as_new(name: str, tmp_path: Path) -> None:
    """accelerate halves the batch, or takes nine tenths of it, and begins again."""
    method = DYNAMIC[name]()
    options = {"save_strategy": "no", "eval_strategy": "no"}
    trainer = make_trainer(
        tmp_path,
        method,
        callbacks=[OutOfMemory()],
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        **options,
    )
    trainer.train()
    size = trainer._train_batch_size
    assert size < 4
    plain = make_trainer(tmp_path, method, per_device_train_batch_size=size, **options)
    plain.train()
    expected, found = state_of(plain), state_of(trainer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row.pattern for row in callback_of(plain).history] == [
        row.pattern for row in callback_of(trainer).history
    ]


# --- types ---


@pytest.mark.parametrize("method", [methods.lora(2), DYNAMIC["adalora"]()], ids=lambda m: m.name)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_types_are_kept_through_a_resume(
    method: al.Method, base: torch.dtype, adapter: torch.dtype, tmp_path: Path
) -> None:
    def made() -> Trainer:
        torch.manual_seed(5)
        model = al.attach(make_bert(n_layers=2).to(base), method, TARGETS)
        for layer in adapters(model).values():
            layer.lora_A.to(adapter)
            layer.lora_B.to(adapter)
        return make_trainer(tmp_path, method, model=model)

    whole, again = made(), made()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for layer in adapters(again.model).values():
        assert {p.dtype for p in adapter_parameters(layer)} == {adapter}
    expected, found = state_of(whole), state_of(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- nothing optional costs a finished training ---


@pytest.mark.parametrize("file", ["write_fingerprint", "write_base"])
def test_what_lies_beside_an_adapter_never_costs_it(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("self.stride(-1) must be 1 to view BFloat16 as Byte")

    monkeypatch.setattr(saving, file, fails)
    model = make_model(methods.lora(2))
    with caplog.at_level(logging.WARNING, "adaptive_lora"):
        assert reread(model, tmp_path) <= 1e-5
    assert "the adapter is saved without" in caplog.text


def test_a_training_that_never_decided_leaves_its_adapter(tmp_path: Path) -> None:
    """A plateau that never came: the ranks are not as wished, but the training was paid for."""
    method = methods.plateau(2, patience=100)
    trainer = make_trainer(tmp_path, method, save_strategy="no", eval_steps=100)
    with pytest.raises(NeverDecidedError, match="The trained adapter is in") as error:
        trainer.train()
    folder = tmp_path / "adapter"
    assert str(folder) in str(error.value)
    again = PeftModel.from_pretrained(make_bert(n_layers=2), str(folder)).eval()
    assert apart(logits(again), logits(trainer.model)) <= 1e-5


# --- what is said at the start ---


@pytest.mark.parametrize(("every", "said"), [(4, True), (1, False)])
def test_a_plateau_that_cannot_reach_its_budget_says_so_at_the_start(
    every: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = methods.plateau(8, initial_rank=2)
    trainer = make_trainer(tmp_path, method, save_strategy="no", eval_steps=every)
    with caplog.at_level(logging.WARNING, "adaptive_lora"):
        trainer.train()
    assert ("cannot reach its budget: 2 evaluations" in caplog.text) == said
    if not said:
        return
    assert "1 decisions at most, to 896 of 1,792 parameters" in caplog.text


@pytest.mark.parametrize("how", ["torch_compile", "model.compile"])
def test_a_compiled_model_trains_as_an_uncompiled_one_and_what_that_costs_is_said(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo by itself gives up after 8 shapes; here, for the time it takes, after 2."""
    method = methods.adalora(2, factor=3.0, initial=1, final=1, every=1)
    options = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 5}
    plain = make_trainer(tmp_path, method, **options)
    plain.train()
    model = make_model(method)
    if how == "torch_compile":
        options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    else:
        model.compile(backend="eager")
    trainer = make_trainer(tmp_path, method, model=model, **options)
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with limit, caplog.at_level(logging.WARNING, "adaptive_lora"):
        trainer.train()
    assert "its ranks change up to 4 times: torch compiles it anew" in caplog.text
    assert "recompile_limit" not in caplog.text
    rows, found = callback_of(plain).history, callback_of(trainer).history
    assert [row.pattern for row in found] == [row.pattern for row in rows]
    assert sum(row.status == "changed" for row in rows) > 2
    assert apart(logits(model), logits(plain.model)) <= 1e-4


def test_adapters_on_what_is_no_linear_module_are_trained_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stock(4, target_modules=[*TARGETS, "word_embeddings"])
    kept = al.lora_parameters(model) - 4 * sum(target.cost for target in targets_of(model))
    assert kept == 4 * (64 + 16)
    method = methods.adalora(budget=1_000, initial=2, final=2, every=2)
    trainer = make_trainer(tmp_path, method, model=model, save_strategy="no")
    with caplog.at_level(logging.WARNING, "adaptive_lora"):
        trainer.train()
    assert "1 adapters lie on what is no linear module (bert.embeddings.word_emb" in caplog.text
    assert al.ranks(model)["bert.embeddings.word_embeddings"] == 4
    assert al.lora_parameters(model) <= 1_000
    assert reread(model, tmp_path / "adapter") <= 1e-5
    with pytest.raises(al.InputError, match="whose rank stays as it is"):
        al.resize(model, {"bert.embeddings.word_embeddings": 2})


# --- a model inside another module ---


class Wrapper(nn.Module):
    """As sentence-transformers, a value head, or one's own make."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: torch.Tensor) -> object:
        return self.inner(**batch)


def test_a_model_inside_another_module_is_found_trained_resumed_and_saved(
    tmp_path: Path,
) -> None:
    method = DYNAMIC["adalora"]()

    def made() -> Trainer:
        wrapped = Wrapper(make_model(method))
        return make_trainer(tmp_path, method, model=wrapped, remove_unused_columns=False)

    whole, again = made(), made()
    whole.train()
    assert (tmp_path / "checkpoint-7" / STATE_FILE).is_file()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(expected[n], p) for n, p in again.model.named_parameters())
    assert al.ranks(whole.model) == al.ranks(whole.model.inner)
    assert al.lora_parameters(whole.model) <= method.budget_parameters(targets_of(whole.model))
    folder = al.save(whole.model, tmp_path / "adapter")
    stocks = PeftModel.from_pretrained(make_bert(n_layers=2), str(folder)).eval()
    assert apart(logits(stocks), logits(whole.model.inner)) <= 1e-5
