"""An unmodified TRL `SFTTrainer` with our callback: ranks change, a killed run resumes exactly,
stock PEFT loads the result.

A tiny random Llama on the CPU and text from memory, in float32 and with SFT's own defaults (bf16
autocast, activation checkpointing). A model that is a `PeftModel` already is used as it is: the
trainer's model is ours, not a wrapper of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from model_folders import instructions
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.model.adapters import targets_of
from adaptive_lora.testing import apart, callback_of, state_of
from adaptive_lora.training.controller import NeverDecidedError

pytest_plugins = ("model_folders",)
# TRL 1.16 sets the default of this option under the name that transformers 5.23 deprecates,
# whatever we pass.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
)
disable_progress_bars()

STEPS, RESUMED_FROM = 12, 5
TOKENS = torch.tensor([[4, 6, 12, 18, 20, 9, 5]])
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "SFT defaults": {},
}
Make = Callable[..., SFTTrainer]


class Behind(TrainerCallback):
    """After every step: is what the optimizer holds what the model trains, of the type it had at
    the start?"""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, set[torch.dtype]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        held = [p for group in kwargs["optimizer"].param_groups for p in group["params"]]
        self.seen.append(
            ({id(p) for p in trained} == {id(p) for p in held}, {p.dtype for p in trained})
        )


@pytest.fixture(scope="module")
def make(llama_folder: str) -> Make:
    """Return a function that makes a trainer: 32 texts, two micro-steps of 2 texts to a step, 12
    steps."""

    def trainer(
        folder: Path,
        setting: str,
        method: al.Method | None = None,
        *,
        quantized: bool = False,
        **options: Any,
    ) -> SFTTrainer:
        method = method or methods.adalora(2, factor=2.0, initial=2, final=2, every=2)
        set_seed(5)
        model = al.attach(AutoModelForCausalLM.from_pretrained(llama_folder), method, dropout=0.1)
        if quantized:
            model.base_model.model.is_loaded_in_8bit = True  # what SFT asks
        arguments = {
            "num_train_epochs": 1.5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        data = Dataset.from_dict({"text": [" ".join(row.values()) for row in instructions(32)]})
        made = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(folder), **{**arguments, **SETTINGS[setting], **options}),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            processing_class=AutoTokenizer.from_pretrained(llama_folder),
            callbacks=[al.AdaptiveRankCallback(method), Behind()],
        )
        assert made.model is model
        if quantized:
            del model.base_model.model.is_loaded_in_8bit  # what the Trainer asks for other reasons
        return made

    return trainer


@pytest.fixture(scope="module")
def trained(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SFTTrainer]:
    """Return a function that gives the finished training of a setting, with a checkpoint after step
    5. Read only."""

    @cache
    def train(setting: str) -> SFTTrainer:
        folder = tmp_path_factory.mktemp("sft")
        trainer = make(folder, setting, save_strategy="steps", save_steps=RESUMED_FROM)
        trainer.train()
        return trainer

    return train


def decisions(trainer: SFTTrainer) -> list[tuple[Any, ...]]:
    return [
        (r.step, r.status, r.budget, r.pattern, r.scores, r.changes)
        for r in callback_of(trainer).history
    ]


def unspent(trainer: SFTTrainer) -> tuple[int, int]:
    """Return the parameters left of the budget, uniform rank 2, and those of the cheapest
    component."""
    costs = {target.name: target.cost for target in targets_of(trainer.model)}
    return sum(2 * cost for cost in costs.values()) - al.lora_parameters(trainer.model), min(
        costs.values()
    )


def behind(trainer: SFTTrainer) -> list[tuple[bool, set[torch.dtype]]]:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Behind)).seen


def losses(trainer: SFTTrainer) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_shrink_to_the_budget_on_the_steps_the_trainer_counts(
    setting: str, trained: Callable[[str], SFTTrainer]
) -> None:
    trainer = trained(setting)
    controller = callback_of(trainer).controller
    assert controller is not None
    assert controller.total_steps == trainer.state.global_step == STEPS
    assert [row.step for row in callback_of(trainer).history] == [2, 4, 6, 8, 10]
    assert any(row.changes for row in callback_of(trainer).history if row.step < RESUMED_FROM)
    assert any(row.changes for row in callback_of(trainer).history if row.step > RESUMED_FROM)
    left, cheapest = unspent(trainer)
    assert 0 <= left < cheapest
    assert len(set(al.ranks(trainer.model).values())) > 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_sft_leaves_the_adapters_to_our_optimizer_in_one_type(
    setting: str, trained: Callable[[str], SFTTrainer]
) -> None:
    assert behind(trained(setting)) == [(True, {torch.float32})] * STEPS
    assert trained(setting).args.bf16 is (setting == "SFT defaults")
    assert trained(setting).args.gradient_checkpointing is (setting == "SFT defaults")
    assert losses(trained(setting))[-1] < losses(trained(setting))[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_after_a_rank_change_equals_uninterrupted(
    setting: str, make: Make, trained: Callable[[str], SFTTrainer], tmp_path: Path
) -> None:
    whole = trained(setting)
    resumed = make(tmp_path, setting)
    resumed.train(
        resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{RESUMED_FROM}")
    )
    mine, theirs = state_of(resumed), state_of(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert decisions(resumed) == decisions(whole)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("setting", SETTINGS)
def test_stock_peft_loads_the_saved_adapter_with_equal_logits(
    setting: str, trained: Callable[[str], SFTTrainer], llama_folder: str, tmp_path: Path
) -> None:
    trainer = trained(setting)
    trainer.save_model(str(tmp_path))
    bare = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    # Without the autocast that accelerate wraps round the PEFT model's forward; SFT's own is inside
    # and stays.
    tuned = trainer.model.get_base_model().eval()
    with torch.no_grad():
        before, here = (model(input_ids=TOKENS).logits for model in (bare, tuned))
        loaded = PeftModel.from_pretrained(bare, str(tmp_path)).eval()
        there = loaded(input_ids=TOKENS).logits
    assert apart(here, there) <= 1e-6
    assert apart(here, before) > 1e-2


def test_a_method_that_never_decides_is_an_error_at_the_end(make: Make, tmp_path: Path) -> None:
    """The only evaluation is the one after the last step: too late for a decision."""
    options = {"eval_strategy": "steps", "eval_steps": 100}
    never = make(tmp_path, "float32", methods.plateau(initial_rank=1), **options)
    with pytest.raises(NeverDecidedError, match="never decided anything in 12 of 12 steps"):
        never.train()


def test_adapters_that_sft_casts_to_bf16_on_a_quantized_model(
    make: Make, llama_folder: str, tmp_path: Path
) -> None:
    trainer = make(
        tmp_path, "SFT defaults", quantized=True, save_strategy="steps", save_steps=RESUMED_FROM
    )
    trainer.train()
    assert behind(trainer) == [(True, {torch.bfloat16})] * STEPS
    resumed = make(tmp_path / "resumed", "SFT defaults", quantized=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{RESUMED_FROM}"))
    mine, theirs = state_of(resumed), state_of(trainer)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    left, cheapest = unspent(trainer)
    assert 0 <= left < cheapest
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).eval()
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                # the base is float32 here, and PEFT loads adapters as that
                parameter.data = parameter.data.bfloat16()
        here = trainer.model.get_base_model().eval()(input_ids=TOKENS).logits
        there = loaded(input_ids=TOKENS).logits
    assert apart(here, there) <= 1e-6
