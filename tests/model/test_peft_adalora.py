"""`peft_adalora`: PEFT's own AdaLoRA, called as its documentation asks, and turned exactly into
plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dynamic import DYNAMIC, STEPS, callback_of, make_model, make_trainer, records
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import set_seed

import adaptive_lora as al
from adaptive_lora import InputError, RankController, methods
from adaptive_lora.model.adapters import adapters, is_masked, weights
from adaptive_lora.testing import TARGETS, apart, logits, make_bert
from adaptive_lora.training.controller import NeverDecidedError

METHOD = DYNAMIC["peft_adalora"]
BATCHES = [
    {
        key: torch.stack([row[key] for row in records()[start : start + 4]])
        for key in ("input_ids", "labels")
    }
    for start in range(0, 4 * STEPS, 4)
]


def trained(
    method: al.Method, *, total: int = STEPS, steps: int = STEPS, lr: float = 1e-2
) -> RankController:
    model = make_model(method)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    controller = RankController(model, optimizer, method, total)
    for batch in BATCHES[:steps]:
        model(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return controller


def test_it_is_pefts_adalora_driven_by_hand_bit_for_bit() -> None:
    """The twin: PEFT's own loop, `update_and_allocate` between `optimizer.step()` and
    `zero_grad()`, steps from 1."""
    base = make_bert(n_layers=2)
    set_seed(5)
    schedule = {"tinit": 2, "tfinal": 2, "deltaT": 2, "total_step": STEPS}
    sizes = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "lora_dropout": 0.1}
    twin = get_peft_model(
        base, AdaLoraConfig(target_modules=list(TARGETS), task_type="SEQ_CLS", **schedule, **sizes)
    )
    optimizer = AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    for step, batch in enumerate(BATCHES, start=1):
        twin(**batch).loss.backward()
        optimizer.step()
        twin.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    ours = dict(trained(METHOD()).model.named_parameters())
    theirs = dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    masked = {
        name: mask
        for name, mask in twin.peft_config["default"].rank_pattern.items()
        if not all(mask)
    }
    assert masked  # PEFT did drop components
    assert sum(map(sum, twin.peft_config["default"].rank_pattern.values())) == 2 * len(
        adapters(twin)
    )


def test_the_plain_lora_at_the_end_answers_as_the_masked_one_did() -> None:
    controller = trained(METHOD())
    model, head = (
        controller.model,
        {n: p.clone() for n, p in controller.model.named_parameters() if "classifier" in n},
    )
    alive = {
        name: int((layer.lora_E["default"] != 0).sum()) for name, layer in adapters(model).items()
    }
    before, random_state = logits(model), torch.get_rng_state()
    controller.finish()
    # Rounding of float32: Λ is multiplied into B rather than into A.
    assert apart(before, logits(model)) <= 1e-6
    assert not is_masked(model)
    assert al.ranks(model) == alive
    assert sum(alive.values()) == 2 * len(alive)
    assert len(set(alive.values())) > 1  # and not uniformly
    assert torch.equal(random_state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
        assert name not in head or torch.equal(parameter, head[name])
    assert model.training


def test_a_target_whose_gates_are_all_zero_ends_at_rank_0(tmp_path: Path) -> None:
    controller = trained(METHOD())
    first = next(iter(adapters(controller.model)))
    adapters(controller.model)[first].lora_E["default"].data.zero_()
    before = logits(controller.model)
    controller.finish()
    assert al.ranks(controller.model)[first] == 0
    assert apart(before, logits(controller.model)) <= 1e-6
    al.save(controller.model, tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(n_layers=2), str(tmp_path))
    assert apart(before, logits(loaded)) <= 1e-6


def test_gates_that_never_opened_leave_plain_lora_at_its_start() -> None:
    controller = trained(METHOD(), lr=0.0)
    model, before = controller.model, logits(controller.model)
    controller.finish()
    assert set(al.ranks(model).values()) == {4}
    # and it can be trained
    assert all(a.any() and not b.any() for a, b in map(weights, adapters(model).values()))
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("name", ["", "bert.embeddings", "bert.encoder.layer.0"])
def test_what_was_put_in_eval_mode_stays_there_alone(name: str) -> None:
    controller = trained(METHOD())
    base = controller.model.get_base_model()
    (base.get_submodule(name) if name else controller.model).eval()
    controller.finish()
    still = {n for n, module in base.named_modules() if not module.training}
    assert still == {n for n, _ in base.named_modules() if n.startswith(name)}


def test_a_target_that_takes_no_part_in_a_step_has_a_gradient_of_zero_there() -> None:
    controller = trained(METHOD(), steps=3)
    gate = next(iter(adapters(controller.model).values())).lora_E["default"]
    sensitivity = controller.model.base_model.rankallocator.exp_avg_ipt
    name = next(
        name for name, p in controller.model.base_model.model.named_parameters() if p is gate
    )
    before = sensitivity[name].clone()
    assert before.any()
    controller.model(**BATCHES[3]).loss.backward()
    gate.grad = None
    controller.observe()
    controller.step()
    assert torch.equal(sensitivity[name], 0.85 * before)
    assert gate.grad is None


def test_evaluation_is_without_the_penalty_training_with_it() -> None:
    model = trained(METHOD(), steps=3).model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = BATCHES[0]
    plain = cross_entropy(model(**batch).logits, batch["labels"])
    with_penalty = model(**batch).loss
    model.eval()
    assert torch.equal(model(**batch).loss, plain)
    assert with_penalty > plain + 0.1
    assert model.peft_config["default"].orth_reg_weight == 0.5


@pytest.mark.parametrize("total", [3, 4, 7, 12])
@pytest.mark.parametrize("final", [0, 1])
def test_the_final_allocation_is_never_missed(total: int, final: int) -> None:
    """Whatever `every` is: PEFT compares the step number with total − final, and numbering from 0
    misses it."""
    method = methods.peft_adalora(2, initial_rank=4, initial=1, final=final, every=5)
    controller = trained(method, total=total, steps=total)
    controller.finish()
    assert sum(al.ranks(controller.model).values()) == 2 * len(al.ranks(controller.model))
    assert controller.history[-2].status == "masked"
    assert controller.history[-2].step == total - final


def test_ranks_stay_physical_in_the_history_until_the_end() -> None:
    controller = trained(METHOD())
    controller.finish()
    *masked, last = controller.history
    assert {row.status for row in masked} == {"masked"}
    assert all(set(row.pattern.values()) == {4} and not row.changes for row in masked)
    assert len({row.bytes_after["optimizer"] for row in masked}) == 1
    alive = [sum(row.parts["components alive"].values()) for row in masked]
    assert alive[0] > alive[-1] == 2 * len(last.pattern)
    assert last.parameters_after < last.parameters_before == masked[-1].parameters_after
    assert all(score > 0 for row in masked for score in row.scores.values())


def test_a_mid_schedule_checkpoint_is_whole(tmp_path: Path) -> None:
    """Stock PEFT reloads it to the same answers, where PEFT's own driving drops what is masked."""
    trainer = make_trainer(tmp_path, METHOD(), save_steps=5)
    answers = []
    controller_step = RankController.step

    def remember(controller: RankController) -> None:
        controller_step(controller)
        if controller.step_count == 5:
            answers.append(logits(controller.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankController, "step", remember)
        trainer.train()
    loaded = PeftModel.from_pretrained(make_bert(n_layers=2), str(tmp_path / "checkpoint-5"))
    assert torch.equal(logits(loaded), answers[0])
    assert {layer.r["default"] for layer in adapters(loaded).values()} == {4}
    assert not is_masked(trainer.model)
    assert callback_of(trainer).history[-1].status == "changed"


def test_what_is_not_yet_plain_is_not_saved_and_not_resized(tmp_path: Path) -> None:
    model = trained(METHOD(), steps=3).model
    with pytest.raises(InputError, match=r"still PEFT's AdaLoRA.*finish\(\)"):
        al.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(InputError, match="cannot be resized"):
        al.resize(model, {next(iter(al.ranks(model))): 1})


def test_a_model_of_one_kind_is_refused_with_a_method_of_the_other() -> None:
    for made, used, message in (
        (methods.adalora(2), METHOD(), "has plain LoRA adapters"),
        (METHOD(), methods.adalora(2), "attached with methods.peft_adalora"),
        (METHOD(), methods.lora(2), "attached with methods.peft_adalora"),
    ):
        model = make_model(made)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(InputError, match=message):
            RankController(model, optimizer, used, STEPS)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="initial_rank 2 must be above the final rank 4"):
        methods.peft_adalora(4, initial_rank=2)
    method = methods.peft_adalora(2, initial=10, final=10)
    with pytest.raises(InputError, match="does not fit"):
        trained(method)
    with pytest.raises(InputError, match="exceeds"):
        make_model(methods.peft_adalora(16))
    with pytest.raises(InputError, match="no argument 'budget'"):
        methods.build("peft_adalora", {"budget": 1000})


@pytest.mark.parametrize("total", [1, 2])
def test_a_training_too_short_to_score_anything_is_refused(total: int) -> None:
    with pytest.raises(
        InputError,
        match=f"after step 1 of {total}, before it has scored anything: train for longer",
    ):
        trained(methods.peft_adalora(2), total=total)


def test_a_model_without_a_task_type_is_refused_unless_it_wants_no_penalty() -> None:
    """PEFT adds the penalty where a class of its own, chosen by task type, calls it."""
    for orthogonality in (0.5, 0.0):
        method = methods.peft_adalora(2, orthogonality=orthogonality)
        model = al.attach(make_bert(n_layers=2).bert, method, TARGETS)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
        if orthogonality:
            with pytest.raises(
                InputError, match=r"only to models with a task type.*orthogonality=0"
            ):
                RankController(model, optimizer, method, STEPS)
        else:
            RankController(model, optimizer, method, STEPS)


def test_fp16_whose_loss_scaler_skips_steps_is_refused(tmp_path: Path) -> None:
    """Set on real arguments: no accelerator is here."""
    trainer = make_trainer(tmp_path, METHOD())
    trainer.args.fp16 = True
    with pytest.raises(InputError, match="fp16's loss scaler skips some: use bf16"):
        callback_of(trainer).on_init_end(
            trainer.args, trainer.state, trainer.control, trainer.model
        )


def test_training_that_ends_before_any_allocation_is_a_failure_and_still_plain() -> None:
    controller = trained(methods.peft_adalora(2, initial=5, final=2), steps=3)
    with pytest.raises(NeverDecidedError):
        controller.finish()
    assert not is_masked(controller.model)
    assert all(weights(layer) for layer in adapters(controller.model).values())


def test_non_finite_scores_stop_the_training() -> None:
    controller = trained(METHOD(), steps=3)
    model = controller.model
    model(**BATCHES[3]).loss.backward()
    next(p for n, p in model.named_parameters() if "lora_A" in n).grad.fill_(float("nan"))
    controller.observe()
    with pytest.raises(al.DivergedError, match="not finite"):
        controller.step()
