"""AdaLoRA checkpoints as stock PEFT writes them, at every moment of its schedule, answer the same
as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2
from model_folders import Command
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from transformers import PreTrainedModel, set_seed

import adaptive_lora as al
from adaptive_lora.adapter_tools.convert import convert
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.adapters import adapters
from adaptive_lora.testing import TARGETS, apart, logits, make_bert, records

pytest_plugins = ("model_folders",)
pytestmark = [  # PEFT on what it writes itself
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]

STEPS = 10
ALPHA = 400  # large, so that a few steps on factors of size 0.02 show in the answers
SCHEDULE = {"tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "init_r": 4, "target_r": 1}


def adalora(
    steps: int, base: PreTrainedModel | None = None, name: str = "default", **config: Any
) -> PeftModel:
    """A model after `steps` of stock PEFT's AdaLoRA loop."""
    base = base or make_bert(n_layers=2)
    set_seed(5)
    options = {
        "target_modules": list(TARGETS),
        "task_type": "SEQ_CLS",
        "lora_alpha": ALPHA,
        **SCHEDULE,
        **config,
    }
    model = get_peft_model(base, AdaLoraConfig(**options), adapter_name=name)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(1, steps + 1):
        batch = {
            key: torch.stack([row[key] for row in records()[4 * step : 4 * step + 4]])
            for key in records()[0]
        }
        if options["task_type"] == "CAUSAL_LM":
            batch["labels"] = batch["input_ids"]
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adalora") / "end"
    adalora(STEPS).save_pretrained(folder)
    return folder


def answers(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(make_bert(n_layers=2), str(folder)).eval())


# Before the first mask, between two masks, right after the last, and in the final phase.
@pytest.mark.parametrize("steps", [1, 3, 5, 7, STEPS])
def test_a_checkpoint_of_any_moment_answers_the_same(steps: int, tmp_path: Path) -> None:
    model = adalora(steps)
    model.save_pretrained(tmp_path / "adalora")
    pattern = json.loads((tmp_path / "adalora" / "adapter_config.json").read_text())["rank_pattern"]
    assert bool(pattern) == (steps > 1)
    converted = convert(tmp_path / "adalora", tmp_path / "lora")
    expected = answers(tmp_path / "adalora")
    assert apart(expected, logits(make_headed(tmp_path))) > 1e-3  # the adapter does something
    assert apart(expected, answers(tmp_path / "lora")) <= 1e-5  # rounding of float32
    true = {
        name: int(layer.lora_E["default"].count_nonzero())
        for name, layer in adapters(model).items()
    }
    if pattern:
        true = {name: sum(pattern[f"{name}.lora_E"]) for name in true}
    assert converted.ranks == {name: rank for name, rank in true.items() if rank}
    if steps >= 7:
        assert sum(true.values()) == SCHEDULE["target_r"] * len(true)
        assert len(set(true.values())) > 1
    layers = adapters(PeftModel.from_pretrained(make_bert(n_layers=2), str(tmp_path / "lora")))
    assert {layer.scaling["default"] for layer in layers.values()} == {ALPHA / SCHEDULE["init_r"]}


def make_headed(folder: Path) -> PeftModel:
    """The base model with the trained head of the checkpoint in `folder`, without the adapters'
    update."""
    model = PeftModel.from_pretrained(make_bert(n_layers=2), str(folder / "adalora"))
    for layer in adapters(model).values():
        layer.lora_E["default"].data.zero_()
    return model.eval()


def test_without_a_pattern_in_the_config_the_zero_gates_tell(tmp_path: Path) -> None:
    """As checkpoints of this library's `peft_adalora` are: every component is in the file."""
    model = adalora(STEPS)
    model.save_pretrained(tmp_path / "with")
    model.peft_config["default"].rank_pattern = None
    model.save_pretrained(tmp_path / "without")
    key = f"base_model.model.{next(iter(adapters(model)))}.lora_E"
    assert load_file(tmp_path / "without" / "adapter_model.safetensors")[key].shape == (4, 1)
    cut, whole = (
        convert(tmp_path / part, tmp_path / f"{part}-lora") for part in ("with", "without")
    )
    assert cut.ranks == whole.ranks
    assert apart(answers(tmp_path / "without"), answers(tmp_path / "without-lora")) <= 1e-5
    assert torch.equal(answers(tmp_path / "with-lora"), answers(tmp_path / "without-lora"))


@pytest.mark.parametrize("alpha", [0, 7])
def test_pefts_rule_for_alpha(alpha: int, tmp_path: Path) -> None:
    """With alpha <= 0 PEFT takes a target's own rank for it, so the targets' scales differ."""
    adalora(STEPS, lora_alpha=alpha).save_pretrained(tmp_path / "adalora")
    convert(tmp_path / "adalora", tmp_path / "lora")
    assert apart(answers(tmp_path / "adalora"), answers(tmp_path / "lora")) <= 1e-5


def test_conv1d_another_adapter_name_and_half_precision(tmp_path: Path) -> None:
    config = {
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    model = adalora(STEPS, make_gpt2(), name="mine", **config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    converted = convert(tmp_path / "mine", tmp_path / "lora")
    tensors = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    for name, update in converted.updates.items():  # bfloat16 cannot hold gates times B
        assert (update.a.dtype, update.b.dtype) == (torch.bfloat16, torch.float32)
        a, b, gate = (tensors[f"base_model.model.{name}.lora_{part}"].double() for part in "ABE")
        exact = ALPHA / (SCHEDULE["init_r"] + 1e-5) * (b * gate.flatten()) @ a
        found = update.scale * update.b.double() @ update.a.double()
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    ours, theirs = (
        logits(
            PeftModel.from_pretrained(make_gpt2().to(torch.bfloat16), str(tmp_path / part))
            .eval()
            .float()
        )
        for part in ("lora", "mine")
    )
    assert apart(theirs, ours) <= 3e-2  # all arithmetic has 8 bits


def test_on_the_command_line(finished: Path, tmp_path: Path, command: Command) -> None:
    ended = command("convert", finished, "--output", tmp_path / "lora")
    assert ended.code == 0, ended.err
    assert f"adapter: {tmp_path / 'lora'}" in ended.out
    assert apart(answers(finished), answers(tmp_path / "lora")) <= 1e-5
    again = command("convert", finished, "--output", tmp_path / "lora")
    assert again.code == 2
    assert "exists; give another name" in again.err


# --- what is no AdaLoRA checkpoint, or a damaged one ---


def test_lora_is_told_from_adalora(finished: Path, tmp_path: Path) -> None:
    get_peft_model(make_bert(), LoraConfig(target_modules=["query"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(InputError, match="holds a LORA adapter; expected ADALORA"):
        convert(tmp_path / "lora")
    with pytest.raises(
        InputError, match=r"holds an AdaLoRA adapter; expected LoRA\. Convert it first"
    ):
        al.compress(finished, rank=1)


def test_gates_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    adalora(0).save_pretrained(tmp_path / "adalora")
    with pytest.raises(InputError, match="no target left: every gate is zero"):
        convert(tmp_path / "adalora", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("damage", ["missing gate", "missing target", "another rank", "NaN"])
def test_damage_is_named(damage: str, finished: Path, tmp_path: Path) -> None:
    tensors = load_file(finished / "adapter_model.safetensors")
    key = max(
        (key for key in tensors if key.endswith(".lora_E")), key=lambda key: tensors[key].numel()
    )
    if damage == "missing gate":
        del tensors[key]
        message = "has no lora_E"
    elif damage == "missing target":
        for part in "ABE":
            del tensors[f"{key[:-1]}{part}"]
        message = "has a mask, but no tensors"
    elif damage == "another rank":
        for part, dim in (("A", 0), ("B", 1), ("E", 0)):
            tensors[f"{key[:-1]}{part}"] = tensors[f"{key[:-1]}{part}"].repeat_interleave(3, dim)
        message = "components and .* gates; expected"
    else:
        tensors[key][0] = float("nan")
        message = "holds NaN"
    (tmp_path / "adapter_config.json").write_bytes((finished / "adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match=message):
        convert(tmp_path, tmp_path / "lora")
