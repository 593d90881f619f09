"""`RankController` and `AdaptiveRankCallback`: decisions happen, hold their bounds, and cannot be
forgotten silently."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from dynamic import DYNAMIC, STEPS, callback_of, make_model, make_trainer, records, state_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import (
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import adaptive_lora as al
from adaptive_lora import RankController, methods
from adaptive_lora.allocation import history
from adaptive_lora.allocation.importance import Sensitivity, Uniform
from adaptive_lora.allocation.method import Adaptation
from adaptive_lora.allocation.rules import TopK
from adaptive_lora.allocation.when import At
from adaptive_lora.model.adapters import targets_of
from adaptive_lora.testing import logits
from adaptive_lora.training.controller import NeverDecidedError

BATCH = {key: torch.stack([row[key] for row in records(8)]) for key in ("input_ids", "labels")}


def controlled(method: al.Method, total: int = STEPS) -> tuple[RankController, AdamW]:
    model = make_model(method)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    return RankController(model, optimizer, method, total), optimizer


def run(controller: RankController, optimizer: AdamW, steps: int = STEPS) -> None:
    for _ in range(steps):
        controller.model(**BATCH).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, al.AdaptiveTrainer])
def test_ranks_change_in_a_stock_trainer_and_every_decision_holds_its_bounds(
    name: str, kind: type[Trainer], tmp_path: Path
) -> None:
    method = DYNAMIC[name]()
    trainer = make_trainer(tmp_path, method, kind=kind, save_strategy="no", callbacks=[])
    start = al.ranks(trainer.model)
    trainer.train()
    rows = callback_of(trainer).history
    assert any(row.status == "changed" for row in rows)
    costs = {t.name: t.cost for t in targets_of(trainer.model)}
    full = {t.name: t.full_rank for t in targets_of(trainer.model)}
    adaptation = method.adaptation
    for row in rows:
        spent = sum(rank * costs[n] for n, rank in row.pattern.items())
        spent += sum(row.pattern.values()) if row.status == "masked" else 0  # PEFT's gates
        assert spent == row.parameters_after
        assert all(
            min(adaptation.min_rank, full[n])
            <= rank
            <= min(adaptation.max_rank or full[n], full[n])
            for n, rank in row.pattern.items()
        )
        if row.budget is not None:
            assert spent <= row.budget
    assert rows[-1].pattern == al.ranks(trainer.model) == history.replay(start, rows)
    assert not [
        r
        for r in rows
        if json.loads(r.to_json())["status"] not in ("changed", "kept", "masked", "refused")
    ]


def test_shrinking_ends_at_the_budget_to_less_than_one_component() -> None:
    controller, optimizer = controlled(DYNAMIC["adalora"]())
    run(controller, optimizer)
    controller.finish()
    row = controller.history[-1]
    open_costs = [
        t.cost for t in targets_of(controller.model) if 0 < row.pattern[t.name] < t.full_rank
    ]
    assert 0 <= row.budget - row.parameters_after < min(open_costs)
    assert row.bytes_after["adapters"] == 4 * row.parameters_after
    # Two moments of the same shape, and a four-byte step count a tensor, at rank 0 too: it may grow
    # again.
    assert row.bytes_after["optimizer"] == 8 * row.parameters_after + 4 * 2 * len(row.pattern)


def test_forgotten_calls_are_errors_and_not_silence() -> None:
    controller, optimizer = controlled(DYNAMIC["adalora"]())
    controller.model(**BATCH).loss.backward()
    optimizer.step()
    with pytest.raises(al.InputError, match="without observe"):
        controller.step()
    controller.observe()
    with pytest.raises(al.InputError, match="twice without step"):
        controller.observe()
    controller.step()
    optimizer.zero_grad()
    with pytest.raises(al.InputError, match="no gradients"):
        controller.observe()


def test_training_that_ends_before_any_decision_is_a_failure() -> None:
    controller, optimizer = controlled(methods.adalora(2, initial=50, final=10), total=100)
    run(controller, optimizer, steps=5)
    with pytest.raises(NeverDecidedError, match="never decided anything in 5 of 100 steps"):
        controller.finish()


def test_a_plateau_that_is_never_evaluated_is_a_failure() -> None:
    controller, optimizer = controlled(DYNAMIC["plateau"]())
    run(controller, optimizer)
    with pytest.raises(NeverDecidedError, match="evaluated"):
        controller.finish()


class StopAt5(TrainerCallback):
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        control.should_training_stop = state.global_step == 5


def test_an_evaluation_after_an_early_stop_grows_nothing(tmp_path: Path) -> None:
    """It would be the first plateau: what grows then is never trained."""
    trainer = make_trainer(
        tmp_path, DYNAMIC["plateau"](), save_strategy="no", callbacks=[StopAt5()]
    )
    trainer.train()
    ranks, decisions = al.ranks(trainer.model), len(callback_of(trainer).history)
    trainer.evaluate()
    assert (al.ranks(trainer.model), len(callback_of(trainer).history)) == (ranks, decisions)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_an_evaluation_loss_that_is_not_finite_is_a_refused_decision_and_no_plateau(
    loss: float,
) -> None:
    controller, optimizer = controlled(DYNAMIC["plateau"]())
    run(controller, optimizer, steps=1)
    controller.evaluated(1.0)
    before = al.ranks(controller.model)
    controller.evaluated(loss)
    row = controller.history[-1]
    assert (row.status, row.reason) == ("refused", f"the evaluation loss is {loss}")
    assert al.ranks(controller.model) == row.pattern == before


def test_a_plateau_of_several_evaluation_sets_is_refused_at_the_first_evaluation(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path, DYNAMIC["plateau"](), save_strategy="no")
    trainer.eval_dataset = {"easy": records(4), "hard": records(8)}
    with pytest.raises(
        al.InputError, match=r"waits for a plateau of eval_loss, but .* gave only eval_easy_loss"
    ):
        trainer.train()
    assert trainer.state.global_step == 3


SAID = "a score is not finite: Weighted gave nan for 'bert.encoder.layer.0.attention.self.query'"


def test_scores_that_are_not_finite_refuse_the_decision_and_fail_the_training() -> None:
    controller, optimizer = controlled(DYNAMIC["grad_delta"]())
    before = al.ranks(controller.model)
    for step in range(STEPS):
        controller.model(**BATCH).loss.backward()
        if step == 2:
            next(p for n, p in controller.model.named_parameters() if "lora_B" in n).grad.fill_(
                float("nan")
            )
        controller.observe()
        optimizer.zero_grad()
        controller.step()
    (row,) = controller.history
    assert (row.status, row.reason) == ("refused", SAID)
    assert al.ranks(controller.model) == before
    assert None in json.loads(row.to_json())["scores"].values()
    with pytest.raises(NeverDecidedError, match=f"after step 5, was refused: {SAID}"):
        controller.finish()


@pytest.mark.parametrize("name", ["adalora", "grad_delta", "grad_delta unbudgeted"])
def test_a_target_outside_the_forward_pass_is_scored_as_finite(name: str) -> None:
    """Its gradient is None, at every step: a layer left out, as LayerDrop does at some."""
    controller, optimizer = controlled(DYNAMIC[name]())
    controller.model.get_base_model().bert.encoder.layer[1].forward = lambda hidden, *_, **__: (
        hidden
    )
    run(controller, optimizer)
    controller.finish()
    assert {row.status for row in controller.history} <= {"changed", "kept"}
    assert all(math.isfinite(score) for row in controller.history for score in row.scores.values())


def test_a_step_that_fp16s_loss_scaler_skips_leaves_no_trace_in_the_scores(tmp_path: Path) -> None:
    """Called by hand: no accelerator, and so no scaler, is here."""
    callback = al.AdaptiveRankCallback(DYNAMIC["adalora"]())
    callback.controller, optimizer = controlled(callback.method)
    controller, args = callback.controller, TrainingArguments(str(tmp_path), use_cpu=True)
    args.fp16 = True

    def observed(gradient: float) -> bool:
        """Return whether the statistics change in a step with this number in one gradient."""
        before = [s.tensor.clone() for row in controller._statistics.values() for s in row.values()]
        controller.model(**BATCH).loss.backward()
        next(p for n, p in controller.model.named_parameters() if "lora_B" in n).grad[0, 0] = (
            gradient
        )
        callback.on_pre_optimizer_step(
            args, TrainerState(), TrainerControl(), model=controller.model
        )
        optimizer.zero_grad()
        controller.step()
        after = [s.tensor for row in controller._statistics.values() for s in row.values()]
        return not all(torch.equal(one, two) for one, two in zip(before, after, strict=True))

    run(controller, optimizer, steps=1)
    assert [observed(float("inf")), observed(float("nan")), observed(1.0)] == [False, False, True]
    assert controller.step_count == 4


@pytest.mark.parametrize("name", ["adalora", "grad_delta"])
def test_after_the_last_decision_the_statistics_are_freed(name: str) -> None:
    controller, optimizer = controlled(DYNAMIC[name]())
    run(controller, optimizer)
    assert controller.history[-1].bytes_after["statistics"] > 0  # the decision itself needed them
    assert not controller._statistics


@pytest.mark.parametrize("importance", [Uniform(), Sensitivity(beta1=0.5)])
def test_all_equal_or_all_zero_scores_have_a_defined_answer(importance: object) -> None:
    """Uniform: all equal. Sensitivity with zero gradients: all zero. Ties spread evenly over
    targets of equal cost."""
    base = DYNAMIC["adalora"]()
    method = dataclasses.replace(
        base, adaptation=dataclasses.replace(base.adaptation, importance=importance)
    )
    controller, _ = controlled(method)
    for _ in range(STEPS):
        for parameter in controller.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        controller.observe()
        controller.step()
    controller.finish()
    ranks = [rank for name, rank in al.ranks(controller.model).items() if "attention" in name]
    assert max(ranks) - min(ranks) <= 1


def test_one_single_target_keeps_its_budget() -> None:
    method = DYNAMIC["adalora"]()
    name = "bert.encoder.layer.0.attention.self.query"
    model = al.attach(make_bert(n_layers=2), method, [name])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    controller = RankController(model, optimizer, method, STEPS)
    assert al.ranks(model) == {name: 4}
    run(controller, optimizer)
    assert al.ranks(model) == {name: 2}


def test_a_method_whose_pattern_never_changes_trains_bit_for_bit_like_plain_lora(
    tmp_path: Path,
) -> None:
    never = al.Method(
        name="never",
        shape=lambda targets: {t.name: 3 for t in targets},
        rank=3,
        adaptation=Adaptation(
            importance=Sensitivity(), rule=TopK(), when=At(start=2, rest=2, every=2)
        ),
    )
    ours = make_trainer(tmp_path / "a", never, save_strategy="no", eval_strategy="no")
    ours.train()
    assert {row.status for row in callback_of(ours).history} == {"kept"}
    plain = make_trainer(tmp_path / "b", methods.lora(3), save_strategy="no", eval_strategy="no")
    plain.train()
    mine, theirs = state_of(ours), state_of(plain)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", ["adalora", "grad_delta"])
def test_batch_8_equals_batch_4_by_accumulation_2(name: str, tmp_path: Path) -> None:
    """Same scores, same decisions: they are taken once an optimizer step, on the whole gradient."""
    rows = []
    for batch, accumulation in ((8, 1), (4, 2)):
        method = DYNAMIC[name]()
        trainer = make_trainer(
            tmp_path, method, kind=al.AdaptiveTrainer, model=make_model(method, dropout=0.0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, save_strategy="no", eval_strategy="no",
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        rows.append(callback_of(trainer).history)
    assert [r.pattern for r in rows[0]] == [r.pattern for r in rows[1]]
    for one, two in zip(*rows, strict=True):
        largest = max(one.scores.values())
        for target, score in one.scores.items():
            # The gradient is the same sum in another order. SGD, because Adam would blow rounding
            # of tiny gradients up.
            assert score == pytest.approx(two.scores[target], rel=1e-3, abs=1e-3 * largest)


def test_loading_another_adapter_leaves_the_trained_one_alone(tmp_path: Path) -> None:
    al.save(make_model(methods.lora(1)), tmp_path / "other")
    trainer = make_trainer(tmp_path, DYNAMIC["adalora"](), save_strategy="no")
    model = trainer.model
    for name in ("second", "third"):  # before and after training
        ranks, answers = al.ranks(model), logits(model)
        model.load_adapter(str(tmp_path / "other"), name)
        assert al.ranks(model) == ranks
        assert torch.equal(logits(model), answers)
        if name == "second":
            trainer.train()
    assert pickle.dumps(model)  # nothing of ours is left in it


@pytest.mark.parametrize("how", ["add_callback", "model_init"])
@pytest.mark.parametrize("step", [4, 8])  # before the first decision, and after some
def test_a_resume_is_exact_however_the_callback_and_the_model_came_in(
    how: str, step: int, tmp_path: Path
) -> None:
    method = methods.adalora(2, initial=6, final=2, every=2)
    arguments = make_trainer(tmp_path, method, save_steps=4).args
    data = {"train_dataset": records(), "eval_dataset": records(8), "args": arguments}

    def trained(**options: object) -> Trainer:
        callback = al.AdaptiveRankCallback(method)
        if how == "add_callback":
            trainer = Trainer(make_model(method), **data)
            trainer.add_callback(callback)
        else:
            trainer = Trainer(model_init=lambda: make_model(method), callbacks=[callback], **data)
        trainer.train(**options)
        return trainer

    expected = state_of(trained())
    found = state_of(trained(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_folder_of_the_history_file_is_made(tmp_path: Path) -> None:
    method, file = DYNAMIC["grad_delta"](), tmp_path / "not" / "yet" / "allocations.jsonl"
    callback = al.AdaptiveRankCallback(method, file)
    make_trainer(
        tmp_path, method, callback=callback, save_strategy="no", eval_strategy="no"
    ).train()
    assert file.read_text().splitlines() == [row.to_json() for row in callback.history]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (DYNAMIC["plateau"](), {"eval_strategy": "no"}, "nothing is evaluated"),
        (methods.adalora(2), {"optim": "adafactor"}, "Adafactor"),
        (methods.grad_delta(2, warmup_steps=200), {},
         r"200\.\.200 do not fit a training of 12 steps"),
        (methods.adalora(2, initial=8, final=8), {}, "does not fit"),
        (methods.adalora(2, min_rank=3), {}, "below the minimum"),
        (methods.adalora(2), {"save_total_limit": 1}, "save_total_limit is 1; expected at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(
    method: al.Method, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(al.InputError, match=message):
        make_trainer(tmp_path, method, **options).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("what", "value"), [("fsdp", "full_shard"), ("deepspeed", "zero2.json"), ("_n_gpu", 2)]
)
def test_a_trainer_over_several_devices_or_shards_is_refused(
    what: str, value: object, tmp_path: Path
) -> None:
    """Set on real arguments: neither the devices nor DeepSpeed are here."""
    trainer = make_trainer(tmp_path, methods.lora(2), callbacks=[])
    trainer.args.__dict__[what] = value
    with pytest.raises(
        al.InputError, match=r"ranks cannot change (under DeepSpeed or FSDP|in DataParallel)"
    ):
        al.AdaptiveRankCallback(methods.adalora(2)).on_init_end(
            trainer.args, trainer.state, trainer.control, trainer.model
        )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (DistributedDataParallel, "DistributedDataParallel"),
        (
            lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
            "PeftModel sharded by FSDP",
        ),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_a_wrapped_or_sharded_model_is_refused_by_name(
    wrap: Callable[[object], object], name: str
) -> None:
    method = methods.adalora(2)
    model = wrap(make_model(method))
    with pytest.raises(al.InputError, match=f"the model is a {name}; expected the PeftModel"):
        RankController(model, AdamW(model.parameters()), method, STEPS)
    with pytest.raises(al.InputError, match=f"the model is a {name}; expected the PeftModel"):
        al.resize(model, {})


def test_methods_refuse_contradictions_when_built() -> None:
    with pytest.raises(al.InputError, match=r"0\.5 of the final one"):
        methods.adalora(8, factor=0.5)
    with pytest.raises(al.InputError, match="min_rank 5 and max_rank 4"):
        methods.grad_delta(min_rank=5, max_rank=4)
    with pytest.raises(al.InputError, match="patience is 0"):
        methods.plateau(patience=0)
