"""Quantised bases: what is quantised, every method on them, exact resume, reload, and what is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import TRAIN, Command, arguments, recipe, result_of, rows_of, weights_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    TrainerCallback,
)

import adaptive_lora as al
from adaptive_lora.adapter_tools.export import export
from adaptive_lora.errors import InputError
from adaptive_lora.model import quantization
from adaptive_lora.model.quantization import compute_dtype, quantizable, to_quantize
from adaptive_lora.model.saving import load
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.runs import run as run_module
from adaptive_lora.runs import use
from adaptive_lora.runs.loading import load_model, load_task
from adaptive_lora.runs.run import run
from adaptive_lora.runs.simulation import enable_checkpointing
from adaptive_lora.tasks.data import load_splits

pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'adaptive-lora[quant]'"
)
pytest_plugins = ("model_folders",)

SCHEMES = ("nf4", "int8")


@pytest.fixture(scope="session")
def bert_folder(wide_bert_folder: str) -> str:
    return wide_bert_folder


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 3},
    "linear_decay": {"name": "linear_decay", "base_rank": 4, "min_rank": 2},
    "linear_increase": {"name": "linear_increase", "base_rank": 4, "min_rank": 2},
    "attention_heavy": {"name": "attention_heavy", "base_rank": 4, "min_rank": 2},
    "empirical": {"name": "empirical", "base_rank": 4},
    "custom": {"name": "custom", "layer_ranks": [4, 2]},
    "adalora": {"name": "adalora", "rank": 2, "factor": 2.0, "initial": 2, "final": 2, "every": 2},
    "peft_adalora": {
        "name": "peft_adalora",
        "rank": 2,
        "initial_rank": 4,
        "initial": 2,
        "final": 2,
        "every": 2,
    },
    "grad_delta": {
        "name": "grad_delta",
        "warmup_steps": 3,
        "initial_rank": 3,
        "min_rank": 1,
        "max_rank": 6,
    },
    "plateau": {"name": "plateau", "initial_rank": 1, "max_rank": 5, "threshold": 100.0},
}


def config_of(
    model: str, data: str, output: Path, scheme: str = "nf4", **sections: Any
) -> RunConfig:
    times = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}
    method = sections.pop("method", METHODS["linear_decay"])
    sections["training"] = times | sections.get("training", {})
    values = recipe(model, data, output, quantization=scheme, **sections)
    return parse({**values, "method": method})


def base_of_run(config: RunConfig) -> Any:
    task = load_task(config)
    task.learn(load_splits(config.data).train)
    return load_model(config, task)[0]


def answers(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 30).view(2, 12)).logits


def is_quantized(model: nn.Module) -> bool:
    return bool({"Linear4bit", "Linear8bitLt"} & set(linear_types(model).values()))


def linear_types(model: nn.Module) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize(("scheme", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_all_linear_modules_but_the_head_are_quantised(
    scheme: str, kind: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    model = base_of_run(config_of(bert_folder, reviews_file, tmp_path / "run", scheme))
    types = linear_types(model)
    assert {name for name, found in types.items() if found == kind} == set(types) - {"classifier"}
    assert types["classifier"] == "Linear"
    assert {p.dtype for name, p in model.named_parameters() if p.is_floating_point()} == {
        torch.float32
    }


def test_nf4_is_bitsandbytes_double_quantised_nf4(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """The weights a quantised layer stands for are within the widest gap between two NF4 levels of
    the true ones."""
    import bitsandbytes as bnb

    model = base_of_run(config_of(bert_folder, reviews_file, tmp_path / "run"))
    true = base_of_run(config_of(bert_folder, reviews_file, tmp_path / "run", "none"))
    name = "bert.encoder.layer.0.attention.self.query"
    layer, weight = model.get_submodule(name), true.get_submodule(name).weight.detach()
    assert layer.weight.quant_state.nested
    assert (layer.weight.quant_type, layer.compute_dtype) == ("nf4", torch.float32)
    error = (
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) - weight
    ).abs()
    levels = layer.weight.quant_state.code.sort().values
    # Half the widest gap, times the largest weight of a block; 3 % more, as the scales are
    # quantised too.
    assert error.max() <= 1.03 * (levels.diff().max() / 2) * weight.abs().max()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "nf4") for name in al.METHODS),
        *((name, "int8") for name in ("lora", "adalora", "peft_adalora", "plateau")),
    ],
)
def test_every_method_trains_saves_and_reloads_in_stock_peft(
    name: str, scheme: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    method = METHODS.get(name, {"name": name, "rank": 2})  # a new method: with a small budget
    config = config_of(bert_folder, reviews_file, tmp_path / "run", scheme, method=method)
    result = run(config)
    assert result["status"] == "ok"
    opened = use.open_run(tmp_path / "run")
    assert is_quantized(opened.model)
    assert al.ranks(opened.model) == {n: r for n, r in result["ranks"].items() if r}
    evaluated = use.evaluate(opened)
    assert evaluated["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-6)
    stock = PeftModel.from_pretrained(base_of_run(config), tmp_path / "run" / "adapter")
    assert torch.equal(answers(stock), answers(opened.model))


def test_logits_after_reload_are_those_before(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    config = config_of(bert_folder, reviews_file, tmp_path / "run")
    model = al.attach(base_of_run(config), al.methods.linear_decay(base_rank=4, min_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = answers(model)
    al.save(model, tmp_path / "adapter")
    assert torch.equal(answers(load(base_of_run(config), tmp_path / "adapter")), before)


class StopError(Exception):
    """Stands for the kill."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StopError


def test_nothing_of_the_weights_file_stays_mapped(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """One tensor that lies in the file keeps all pages of it resident: 300 MB too many with a Llama
    of 94 M parameters."""
    if not Path("/proc/self/maps").is_file():
        pytest.skip("needs Linux's list of mappings")
    copied = tmp_path / "model"
    shutil.copytree(bert_folder, copied)
    model = base_of_run(config_of(str(copied), reviews_file, tmp_path / "run"))
    assert is_quantized(model)
    assert f"{copied}/model.safetensors" not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_into_full_precision_after_a_quantised_training(
    scheme: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """The merged model is the full-precision base with the adapter, and that differs from the
    quantised one."""
    config = config_of(
        bert_folder, reviews_file, tmp_path / "run", scheme, method=METHODS["adalora"]
    )
    run(config)
    done = export(tmp_path / "run", "merged", tmp_path / "merged")
    assert done.difference is not None
    assert done.difference <= 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not is_quantized(merged)
    full = config.model_copy(update={"quantization": "none"})
    expected = answers(PeftModel.from_pretrained(base_of_run(full), tmp_path / "run" / "adapter"))
    torch.testing.assert_close(
        answers(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    assert not torch.equal(answers(use.open_run(tmp_path / "run").model), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["lora", "adalora", "grad_delta", "plateau"])
def test_killed_and_resumed_on_a_quantised_base_equals_uninterrupted(
    name: str,
    scheme: str,
    bert_folder: str,
    reviews_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {"method": METHODS[name], "adapters": {"dropout": 0.1}}
    whole = config_of(bert_folder, reviews_file, tmp_path / "whole", scheme, **sections)
    run(whole)
    cut = config_of(bert_folder, reviews_file, tmp_path / "cut", scheme, **sections)
    with monkeypatch.context() as patch:
        plain = run_module._rank_callback
        kill = lambda method, folder: [*plain(method, folder), StopAt(5)]
        patch.setattr("adaptive_lora.runs.run._rank_callback", kill)
        with pytest.raises(StopError):
            run(cut)
    run(cut, resume=True)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert result_of(tmp_path / "cut")["ranks"] == result_of(tmp_path / "whole")["ranks"]


def test_gradients_with_checkpointing_are_those_without(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = al.attach(
            base_of_run(config_of(bert_folder, reviews_file, tmp_path / "run")), al.methods.lora(2)
        )
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        torch.manual_seed(1)
        model(
            input_ids=torch.arange(6, 30).view(2, 12), labels=torch.tensor([0, 1])
        ).loss.backward()
        return {
            name: p.grad
            for name, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() != set()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_with_gradient_checkpointing_runs(
    scheme: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    training = {"gradient_checkpointing": True, "max_steps": 2}
    result = run(config_of(bert_folder, reviews_file, tmp_path / "run", scheme, training=training))
    assert result["status"] == "ok"


def test_conv1d_of_gpt2_is_quantised_and_its_adapter_fits_the_full_precision_model(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_head=2, n_positions=32, n_layer=2)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    settings = quantization.bitsandbytes_config("nf4", torch.float32, [])
    base = GPT2Model.from_pretrained(tmp_path / "gpt2", quantization_config=settings)
    model = al.attach(base, al.methods.lora(2))
    assert set(al.ranks(model)) == set(quantizable(GPT2Model(config)))
    al.save(model, tmp_path / "adapter")
    # PEFT finds the right layout, and says so
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        plain = PeftModel.from_pretrained(
            GPT2Model.from_pretrained(tmp_path / "gpt2"), tmp_path / "adapter"
        )
    assert al.ranks(plain) == al.ranks(model)


def test_what_the_files_lack_is_trained_and_not_quantised(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """A masked-language model has no pooler: transformers would leave it half converted."""
    folder = tmp_path / "masked"
    shutil.copytree(bert_folder, folder)
    config = BertConfig.from_pretrained(bert_folder)
    BertForMaskedLM(config).save_pretrained(folder)
    result = run(config_of(str(folder), reviews_file, tmp_path / "run", training={"max_steps": 2}))
    assert "bert.pooler.dense" not in result["ranks"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("pooler.dense.weight" in name for name in saved)


def test_dry_run_on_a_quantised_base(bert_folder: str, reviews_file: str, tmp_path: Path) -> None:
    for scheme in SCHEMES:
        config = config_of(bert_folder, reviews_file, tmp_path / scheme, scheme)
        result = run(config, dry_run=True)
        kind = "uint8" if scheme == "nf4" else "int8"
        assert result["memory"]["base"][kind] > 0


# --- what is refused, each with one message ---


def test_bitsandbytes_missing(
    monkeypatch: pytest.MonkeyPatch, command: Command, files: dict[str, str]
) -> None:
    def absent(_name: str) -> str:
        raise quantization.PackageNotFoundError

    monkeypatch.setattr(quantization, "version", absent)
    outcome = command(*arguments(f"{TRAIN} --quantization nf4", files))
    assert outcome.code == 2
    assert "pip install 'adaptive-lora[quant]'" in outcome.err
    assert not Path(files["out"]).exists()


def test_bitsandbytes_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "version", lambda _name: "0.45.0")
    with pytest.raises(InputError, match=r"bitsandbytes >= 0\.48, found 0\.45\.0"):
        quantization.check_available()


def test_processor_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(InputError, match=r"cannot run here|does not support this CPU"):
        quantization.check_available()


def test_a_model_without_linear_modules() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    )
    with pytest.raises(InputError, match="no linear module that can be quantised"):
        to_quantize(model, "nf4", torch.float32)


def test_a_quantised_model_is_not_quantised_again(
    bert_folder: str, tmp_path: Path, command: Command, files: dict[str, str]
) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(bert_folder, folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(values))
    outcome = command(*arguments(f"{TRAIN} --quantization nf4", files | {"model": str(folder)}))
    assert outcome.code == 2
    assert "is quantised already (gptq): set quantization: none" in outcome.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_without_a_gpu(command: Command, files: dict[str, str]) -> None:
    outcome = command(*arguments(f"{TRAIN} --quantization nf4 --set dtype=float16", files))
    assert (outcome.code, Path(files["out"]).exists()) == (2, False)
    assert "dtype is float16 and there is no GPU" in outcome.err
    outcome = command(*arguments(f"{TRAIN} --quantization nf4 --set training.fp16=true", files))
    assert (outcome.code, Path(files["out"]).exists()) == (2, False)
    assert outcome.err.count("\n") == 1


def test_unknown_scheme(command: Command, files: dict[str, str]) -> None:
    outcome = command(*arguments(f"{TRAIN} --quantization fp4", files))
    assert outcome.code == 2
    assert "'none', 'nf4' or 'int8'" in outcome.err


def test_compute_type_by_device() -> None:
    assert compute_dtype("auto", device="cpu") == torch.float32
    assert compute_dtype("float16", device="cuda") == torch.float16
    with pytest.raises(InputError, match="float16 and there is no GPU"):
        compute_dtype("float16", device="cpu")
