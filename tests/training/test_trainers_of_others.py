"""Ranks that change in trainers of others: TRL's, and transformers' `Seq2SeqTrainer`, unmodified.

In each trainer, and in both ways in (`attach` first, or a plain base with a `LoraConfig`): it
trains within the budget, a killed run resumes exactly, and stock PEFT rereads every folder that it
leaves behind. `test_trl.py` looks closer at SFT's own defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from trainers import (
    KINDS,
    METHODS,
    SAVED_EVERY,
    STEPS,
    WAYS,
    Made,
    answers,
    batch,
    decisions,
    half,
    losses,
    make,
    unspent,
)
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.model.adapters import linear_adapters, targets_of, weights
from adaptive_lora.testing import apart, callback_of, state_of

pytest_plugins = ("model_folders",)
pytestmark = [
    # TRL 1.16 sets the default of this option under the name that transformers 5.23 deprecates,
    # whatever we pass.
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
    ),
    # What every import of trl.experimental says.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
disable_progress_bars()

CELLS = [(name, way) for name in KINDS for way in WAYS]
every_cell = pytest.mark.parametrize(
    ("name", "way"), CELLS, ids=[f"{name}-{way}" for name, way in CELLS]
)
RESUMED_FROM = f"checkpoint-{SAVED_EVERY}"
CHECKPOINTS = {f"checkpoint-{step}" for step in (3, 6, 8)}
Train = Callable[[str, str], Made]


@pytest.fixture(scope="module")
def trained(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Return a function that gives the finished training of a cell. Read only."""

    @cache
    def train(name: str, way: str) -> Made:
        return make(name, way, llama_folder, tmp_path_factory.mktemp("trainer")).train()

    yield train
    train.cache_clear()


def unequal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of what is not the same in both, bit for bit."""
    return [
        name
        for name in sorted(one.keys() | two.keys())
        if name not in one or name not in two or not torch.equal(one[name], two[name])
    ]


def tensors_of(folder: Path) -> dict[str, int]:
    """Return {target: rank} of the adapter in a folder, read off its tensors."""
    start, end = "base_model.model.", ".lora_A.weight"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {
            key[len(start) : -len(end)]: file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118
            if key.endswith(end)
        }


def present(pattern: dict[str, int]) -> dict[str, int]:
    return {name: rank for name, rank in pattern.items() if rank}


@every_cell
def test_it_trains_and_ends_within_the_budget(name: str, way: str, trained: Train) -> None:
    made = trained(name, way)
    model, callback = made.trainer.model, callback_of(made.trainer)
    controller = callback.controller
    assert controller is not None
    assert controller.total_steps == made.trainer.state.global_step == STEPS
    assert [row.step for row in callback.history] == [1, 2, 3, 4, 5, 6]
    assert any(row.changes for row in callback.history if row.step < SAVED_EVERY)
    assert any(row.changes for row in callback.history if row.step > SAVED_EVERY)
    left, cheapest = unspent(model)
    assert 0 <= left < cheapest
    assert all(
        bool(b.any()) for _, b in filter(None, map(weights, linear_adapters(model).values()))
    )


@every_cell
def test_what_is_not_at_the_start_of_the_method_is_brought_there_and_that_is_said_once(
    name: str, way: str, trained: Train
) -> None:
    made = trained(name, way)
    controller = callback_of(made.trainer).controller
    assert controller is not None
    start = METHODS[way]().initial_pattern(targets_of(made.trainer.model))
    assert controller.initial_pattern == start
    assert set(start.values()) == {4}
    expected = ["starts at other ranks than the model was attached with"] * (way == "peft_config")
    assert len(made.said) == len(expected)
    assert all(part in line for part, line in zip(expected, made.said, strict=True))


@every_cell
def test_resumed_after_a_rank_change_equals_uninterrupted(
    name: str, way: str, trained: Train, llama_folder: str, tmp_path: Path
) -> None:
    whole = trained(name, way)
    resumed = make(name, way, llama_folder, tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(whole.folder / RESUMED_FROM))
    assert unequal(state_of(resumed.trainer), state_of(whole.trainer)) == []
    assert decisions(resumed.trainer) == decisions(whole.trainer)
    assert losses(resumed.trainer) == losses(whole.trainer)
    assert unequal(reference_of(resumed), reference_of(whole)) == []


@every_cell
def test_stock_peft_rereads_every_folder_as_the_model_was_when_it_was_written(
    name: str, way: str, trained: Train, llama_folder: str, tmp_path: Path
) -> None:
    made = trained(name, way)
    kind, model = made.kind, made.trainer.model
    now = al.ranks(model), answers(kind, model)
    expected = {made.folder / checkpoint: there for checkpoint, there in made.seen.at.items()}
    assert {folder.name for folder in expected} == CHECKPOINTS
    made.trainer.save_model(str(tmp_path / "trainer"))
    al.save(model, tmp_path / "ours")
    expected |= {tmp_path / "trainer": now, tmp_path / "ours": now}
    for folder in [folder for folder in expected if made.reference and folder.name != "ours"]:
        ranks = dict.fromkeys(now[0], 4)  # of the start
        assert made.reference_answers is not None
        expected[folder / "ref"] = ranks, made.reference_answers
    written = {
        file.parent
        for place in (made.folder, tmp_path)
        for file in place.rglob("adapter_config.json")
    }
    assert written == expected.keys()
    for folder, (ranks, there) in expected.items():
        assert tensors_of(folder) == present(ranks)
        if folder.name in CHECKPOINTS:
            state = json.loads((folder / "rank_state.json").read_text(encoding="utf-8"))
            assert state["history"][-1]["pattern"] == ranks
        base = kind.base(llama_folder)
        assert apart(there, answers(kind, PeftModel.from_pretrained(base, str(folder)))) <= 1e-6
        loaded = al.load(kind.base(llama_folder), folder)
        assert al.ranks(loaded) == present(ranks)
        assert apart(there, answers(kind, loaded)) <= 1e-6
    bare = kind.base(llama_folder).eval()
    untouched = answers(kind, get_peft_model(bare, LoraConfig(target_modules="all-linear")))
    assert apart(now[1], untouched) > 1e-3


def reference_of(made: Made) -> dict[str, torch.Tensor]:
    model = made.trainer.model
    return {name: p.detach() for name, p in model.named_parameters() if ".ref." in name}


@every_cell
def test_the_reference_adapter_is_left_as_it_was(name: str, way: str, trained: Train) -> None:
    made = trained(name, way)
    assert bool(made.reference) is (made.kind.reference and way == "attach")
    assert unequal(reference_of(made), made.reference) == []
    assert made.trainer.model.active_adapter == "default"


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("DPO", "in memory"),
        *((name, "in a folder") for name, kind in KINDS.items() if kind.reference),
    ],
)
def test_the_reference_of_a_model_that_was_tuned_before_is_that_model(
    name: str, where: str, trained: Train, llama_folder: str, tmp_path: Path
) -> None:
    """Ranks differ from the start, some are 0; those that are trained grow to the method's
    start."""
    tuned = trained("SFT", "attach")
    before = answers(tuned.kind, tuned.trainer.model)
    model = al.load(
        tuned.kind.base(llama_folder),
        al.save(tuned.trainer.model, tmp_path / "tuned"),
        trainable=True,
    )
    ranks = al.ranks(model)
    if where == "in memory":  # with adapters of rank 0, which no folder holds
        al.resize(model, {next(iter(ranks)): 0})
        before, ranks = answers(tuned.kind, model), al.ranks(model)
    method = methods.adalora(2, factor=4.0, initial=1, final=2, every=1)
    made = make(name, "attach", llama_folder, tmp_path / "next", model=model, method=method)
    made.train()
    assert al.ranks(model) != ranks
    assert made.reference_answers is not None
    assert torch.equal(made.reference_answers, before)
    assert unequal(reference_of(made), made.reference) == []
    reread = PeftModel.from_pretrained(
        made.kind.base(llama_folder), str(made.folder / "checkpoint-8" / "ref")
    )
    assert apart(before, answers(made.kind, reread)) <= 1e-6
    assert tensors_of(made.folder / "checkpoint-8" / "ref") == present(ranks)
    left, cheapest = unspent(model)
    assert 0 <= left < cheapest


def test_grpo_resumes_as_exactly_as_without_us(llama_folder: str, tmp_path: Path) -> None:
    """It uses what it has sampled for `num_iterations` steps, keeps that in no checkpoint, and
    counts anew after a resume: exact is a resume from a step at which it samples, with plain LoRA
    too."""
    for callbacks in ([], None):  # without us, with us

        def grpo(name: str, callbacks: list[TrainerCallback] | None = callbacks) -> Made:
            folder = tmp_path / f"{name} {callbacks}"
            return make(
                "GRPO", "attach", llama_folder, folder, callbacks=callbacks, num_iterations=2
            )

        whole = grpo("whole").train()
        for step, exact in ((3, False), (6, True)):
            resumed = grpo(f"from {step}")
            resumed.train(resume_from_checkpoint=str(whole.folder / f"checkpoint-{step}"))
            apart = unequal(state_of(resumed.trainer), state_of(whole.trainer))
            assert (apart == []) is exact


# PEFT's of a target of rank 0, which it did not merge.
@pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do.:UserWarning")
def test_what_grpo_hands_to_vllm_is_the_base_with_the_adapter_in_it(
    trained: Train, llama_folder: str
) -> None:
    """No vLLM here, but TRL's own choice of what it sends: all that lacks PEFT's prefix, merged. A
    target of rank 0 adds nothing to it."""
    made = trained("GRPO", "attach")
    model = made.trainer.model
    assert 0 in al.ranks(model).values()
    there = answers(made.kind, model)
    alone = SimpleNamespace(
        model=model,
        _dist=SimpleNamespace(gather_params=nullcontext, is_fsdp=False),
        _fix_param_name_to_vllm=lambda name, extra_prefixes: name,
    )
    base = made.kind.base(llama_folder)
    with torch.no_grad():
        for name, tensor in VLLMGeneration._iter_named_params(alone):
            base.get_parameter(name).copy_(tensor)
        merged = base(**batch(made.kind)).logits
    assert apart(there, merged) <= 1e-5
    assert apart(there, answers(made.kind, model)) <= 1e-5  # unmerged, up to rounding


class Stop(TrainerCallback):
    """Early stopping, after step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


@every_cell
def test_stopped_early_the_last_decision_brings_the_budget(
    name: str, way: str, llama_folder: str, tmp_path: Path
) -> None:
    made = make(name, way, llama_folder, tmp_path / "run", save_strategy="no")
    made.trainer.add_callback(Stop())
    made.train()
    last = callback_of(made.trainer).history[-1]
    assert (last.step, last.reason) == (3, "training ended after step 3: the last decision")
    left, cheapest = unspent(made.trainer.model)
    assert 0 <= left < cheapest
    made.trainer.save_model(str(tmp_path / "end"))
    reread = PeftModel.from_pretrained(made.kind.base(llama_folder), str(tmp_path / "end"))
    assert apart(answers(made.kind, made.trainer.model), answers(made.kind, reread)) <= 1e-6


class Prefer(TrainerCallback):
    """Make the evaluation after one step the best."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_mark"] = float(state.global_step == self.step)


@pytest.mark.parametrize("best", [3, 6])
@pytest.mark.parametrize(
    ("name", "way"),
    [("SFT", "attach"), ("SFT", "peft_config"), ("SFT, bf16 base", "attach"), ("DPO", "attach")],
)
def test_the_best_checkpoint_comes_back_whatever_its_ranks(
    name: str, way: str, best: int, llama_folder: str, tmp_path: Path
) -> None:
    """After step 3 the ranks are above the budget: the last decision is made of what is loaded.
    After step 6 they are within."""
    method = METHODS["attach"]()  # which keeps rows of A as they are
    made = make(
        name, way, llama_folder, tmp_path / "run", method=method, eval_strategy="steps",
        eval_steps=SAVED_EVERY, load_best_model_at_end=True, metric_for_best_model="eval_mark",
        greater_is_better=True,
    )  # fmt: skip
    made.trainer.add_callback(Prefer(best))
    made.train()
    model, rows = made.trainer.model, callback_of(made.trainer).history
    assert made.trainer.state.best_global_step == best
    there, then = made.seen.at[f"checkpoint-{best}"]
    loaded = next(row for row in rows if row.status == "loaded")
    assert loaded.pattern == there
    left, cheapest = unspent(model)
    assert 0 <= left < cheapest
    if best == 6:
        assert rows[-1] is loaded
        assert al.ranks(model) == there
        assert torch.equal(answers(made.kind, model), then)
    else:
        assert rows[-1].changes
        saved = load_file(made.folder / f"checkpoint-{best}" / "adapter_model.safetensors")
        for target, layer in linear_adapters(model).items():
            pair = weights(layer)
            if pair is not None:
                kept = {
                    tuple(r) for r in saved[f"base_model.model.{target}.lora_A.weight"].tolist()
                }
                assert {tuple(row) for row in pair[0].tolist()} <= kept
    made.trainer.save_model(str(tmp_path / "end"))
    reread = PeftModel.from_pretrained(made.kind.base(llama_folder), str(tmp_path / "end"))
    assert apart(answers(made.kind, model), answers(made.kind, reread)) <= 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SFT", "DPO", "T5"])
def test_a_callback_added_later_trains_the_same(
    name: str, way: str, trained: Train, llama_folder: str, tmp_path: Path
) -> None:
    made = make(name, way, llama_folder, tmp_path, callbacks=[], save_strategy="no")
    made.trainer.add_callback(al.AdaptiveRankCallback(METHODS[way]()))
    made.train()
    assert unequal(state_of(made.trainer), state_of(trained(name, way).trainer)) == []
    assert made.said == trained(name, way).said


@pytest.mark.parametrize("way", WAYS)
def test_a_callback_added_later_resumes_exactly_or_not_at_all(
    way: str, trained: Train, llama_folder: str, tmp_path: Path
) -> None:
    """What `attach` returns follows the checkpoint by itself; of a plain base with `peft_config`
    nobody has heard when the Trainer loads."""
    whole = trained("SFT", way)
    made = make("SFT", way, llama_folder, tmp_path, callbacks=[], save_strategy="no")
    made.trainer.add_callback(al.AdaptiveRankCallback(METHODS[way]()))
    checkpoint = str(whole.folder / RESUMED_FROM)
    if way == "attach":
        made.train(resume_from_checkpoint=checkpoint)
        assert unequal(state_of(made.trainer), state_of(whole.trainer)) == []
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            made.train(resume_from_checkpoint=checkpoint)


def test_adapters_in_bf16_stay_that(llama_folder: str, tmp_path: Path) -> None:
    """On a bf16 base, as PEFT makes them with `autocast_adapter_dtype=False`: in training, after a
    resume, in the file."""
    method = METHODS["attach"]()
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")  # for both

    def sft(folder: str) -> Made:
        torch.manual_seed(0)
        model = get_peft_model(half(llama_folder), config, autocast_adapter_dtype=False)
        return make(
            "SFT, bf16 base", "peft_config", llama_folder, tmp_path / folder,
            model=model, method=method,
        )  # fmt: skip

    whole, resumed = sft("whole").train(), sft("resumed")
    resumed.train(resume_from_checkpoint=str(whole.folder / RESUMED_FROM))
    assert unequal(state_of(resumed.trainer), state_of(whole.trainer)) == []
    model = whole.trainer.model
    types = {p.dtype for made in (whole, resumed) for p in made.trainer.model.parameters()}
    assert types == {torch.bfloat16}
    left, cheapest = unspent(model)
    assert 0 <= left < cheapest
    for checkpoint, (ranks, there) in whole.seen.at.items():
        reread = PeftModel.from_pretrained(
            half(llama_folder), str(whole.folder / checkpoint), autocast_adapter_dtype=False
        )
        assert tensors_of(whole.folder / checkpoint) == present(ranks)
        assert torch.equal(answers(whole.kind, reread), there)
