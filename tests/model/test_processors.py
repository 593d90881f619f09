"""4-bit bases on every processor: what is trained does not depend on which kernels bitsandbytes has
there.

`has_avx512bf16` is made to answer 1 and 0 in turn; the whole suite under either answer: `make test
HAS_AVX512BF16=1`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import articles, recipe, result_of, reviews, rows_of, weights_of, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Trainer, TrainingArguments

import adaptive_lora as al
from adaptive_lora.errors import InputError
from adaptive_lora.model import quantization
from adaptive_lora.model.quantization import (
    dequantized_by_definition,
    kernel_is_exact,
    left_out,
    quantize_in_place,
)
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'adaptive-lora[quant]'"
)
pytest_plugins = ("model_folders",)
WIDTHS = (16, 32, 48, 64, 96, 100, 160, 172, 384)


@pytest.fixture(params=[1, 0], ids=["with AVX512-BF16", "without"])
def answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The processor's answer, forced."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return int(request.param)


# --- a run with evaluations is the run without ---


@pytest.mark.parametrize(("kind", "scheme"), [("bert", "nf4"), ("llama", "nf4"), ("bert", "int8")])
def test_evaluations_change_nothing(
    kind: str,
    scheme: str,
    answer: int,
    wide_bert_folder: str,
    wide_llama_folder: str,
    tmp_path: Path,
) -> None:
    """BERT's linear modules have biases, Llama's have none: there the gradient through the base
    went silently."""
    model, task = (
        (wide_bert_folder, "classification") if kind == "bert" else (wide_llama_folder, "causal_lm")
    )
    rows: Any = reviews(56) if kind == "bert" else [{"text": row["text"]} for row in articles(56)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    sections: dict[str, Any] = {"quantization": scheme, "task": task, "adapters": {"dropout": 0.1}}
    if kind == "llama":
        sections["data"] = {"text": "text"}
    for name, times in {
        "with": {"eval_strategy": "steps", "eval_steps": 3},
        "without": {"eval_strategy": "no"},
    }.items():
        training = {"max_steps": 12, "save_strategy": "no", **times}
        values = recipe(model, data, tmp_path / name, **sections, training=training)
        run(
            parse(
                {
                    **values,
                    "method": {"name": "adalora", "rank": 2, "initial": 2, "final": 2, "every": 2},
                }
            )
        )
    steps = {
        name: [row for row in rows_of(tmp_path / name) if "grad_norm" in row]
        for name in ("with", "without")
    }
    assert len(steps["with"]) == 12
    assert steps["with"] == steps["without"]  # losses, gradient norms, learning rates
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    one, two = result_of(tmp_path / "with"), result_of(tmp_path / "without")
    assert {
        k: v for k, v in one["metrics"].items() if "runtime" not in k and "per_second" not in k
    } == {k: v for k, v in two["metrics"].items() if "runtime" not in k and "per_second" not in k}


def four_bit(folder: str) -> Any:
    settings = quantization.bitsandbytes_config("nf4", torch.float32, ["lm_head"])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def with_trainer(model: PeftModel) -> PeftModel:
    al.AdaptiveTrainer(model, TrainingArguments("unused", report_to="none", use_cpu=True))
    return model


def with_callback(model: PeftModel) -> PeftModel:
    callbacks = [al.AdaptiveRankCallback(al.methods.lora(2))]
    Trainer(model, TrainingArguments("unused", report_to="none", use_cpu=True), callbacks=callbacks)
    return model


def plain(base: Any) -> PeftModel:
    return get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )


ENTRIES: dict[str, Callable[[Any], PeftModel]] = {
    "attach": lambda base: al.attach(base, al.methods.lora(2)),
    "AdaptiveTrainer on PEFT's own model": lambda base: with_trainer(plain(base)),
    "the callback on PEFT's own model": lambda base: with_callback(plain(base)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_gradients_after_an_evaluation_are_those_before(
    entry: str, answer: int, wide_llama_folder: str
) -> None:
    torch.manual_seed(0)
    model = ENTRIES[entry](four_bit(wide_llama_folder))
    ids = torch.arange(6, 30).view(2, 12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loaded_adapter_answers_as_before_it_was_saved(
    answer: int, wide_llama_folder: str, tmp_path: Path
) -> None:
    model = al.attach(four_bit(wide_llama_folder), al.methods.lora(2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(6, 30).view(2, 12)
    expected = model.eval()(input_ids=ids).logits.detach()
    al.save(model, tmp_path / "adapter")
    loaded = al.load(four_bit(wide_llama_folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_a_base_that_was_packed_for_inference_is_refused(wide_llama_folder: str) -> None:
    base = four_bit(wide_llama_folder)
    base.model.layers[
        0
    ].mlp.up_proj.weight.quant_state.packing_format_for_cpu = (
        True  # as the inference kernel leaves it
    )
    with pytest.raises(
        InputError,
        match=r"'model.layers.0.mlp.up_proj' were packed for inference.*load the base model again",
    ):
        al.attach(base, al.methods.lora(2))


# --- what a 4-bit layer computes is what it holds ---


def written_out(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """NF4 by its definition, one weight after the other."""
    code, scales = state.code.tolist(), state.absmax.tolist()
    outer, table, offset = (
        state.state2.absmax.tolist(),
        state.state2.code.tolist(),
        float(state.offset),
    )
    values = []
    for position in range(state.shape.numel()):
        byte = int(packed.flatten()[position // 2])
        block = position // 64
        absmax = table[scales[block]] * outer[block // 256] + offset
        values.append(code[byte >> 4 if position % 2 == 0 else byte & 15] * absmax)
    return torch.tensor(values).reshape(state.shape)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_quantised_layer_computes_with_the_weights_it_holds(width: int) -> None:
    """Modules of a width whose kernel is wrong here stay as they are, and are counted."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    model = BertModel(BertConfig(vocab_size=32, **sizes))
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    quantize_in_place(model, "nf4", torch.float32)
    left = {name for name in linear if type(model.get_submodule(name)) is nn.Linear}
    for name in sorted(linear - left)[:3]:
        layer: Any = model.get_submodule(name)
        weight = written_out(layer.weight.data, layer.weight.quant_state)
        x = torch.randn(3, layer.in_features, requires_grad=True)
        for mode in (True, False):
            y = layer.train(mode)(x) - layer.bias
            torch.testing.assert_close(
                y, x @ weight.T, rtol=0, atol=1e-5 * float(y.detach().abs().max())
            )
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(gradient, weight.sum(0).expand(3, -1), rtol=0, atol=1e-4)
    notes = left_out(model, "nf4", torch.float32)
    assert bool(notes) == bool(left)
    if left:
        assert notes[0].startswith(f"{len(left)} linear modules are not quantised")
        assert f"{width} inputs" in notes[0]


def test_a_wrong_kernel_is_found_and_never_trained_on(
    monkeypatch: pytest.MonkeyPatch,
    wide_bert_folder: str,
    reviews_file: str,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """On any machine: a kernel that is wrong at 64 inputs, as some are at 48."""
    true = bitsandbytes.functional.dequantize_4bit

    def wrong(packed: Any, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return true(packed, state, *args, **kwargs) * (1.1 if state.shape[-1] == 64 else 1.0)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", wrong)
    kernel_is_exact.cache_clear()
    try:
        assert not kernel_is_exact(64, 128, torch.float32)
        assert kernel_is_exact(128, 64, torch.float32)
        config = parse(
            recipe(
                wide_bert_folder,
                reviews_file,
                tmp_path / "run",
                quantization="nf4",
                training={"max_steps": 2},
            )
        )
        run(config)
        said = " ".join(capsys.readouterr().out.split())
        assert "11 linear modules are not quantised: on this processor" in said
    finally:
        kernel_is_exact.cache_clear()


@pytest.fixture
def wrong_at_128(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On any machine: a kernel that is wrong at 128 inputs."""
    true = bitsandbytes.functional.dequantize_4bit

    def wrong(packed: Any, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return true(packed, state, *args, **kwargs) * (1.1 if state.shape[-1] == 128 else 1.0)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", wrong)
    kernel_is_exact.cache_clear()
    yield
    kernel_is_exact.cache_clear()


def test_a_base_of_ones_own_is_used_as_it_is_meant(
    wrong_at_128: None, wide_bert_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a module with a wrong kernel holds is taken by the definition, unquantised; the adapter
    is an ordinary one, for the quantised base and for the one in full precision."""
    settings = quantization.bitsandbytes_config("nf4", torch.float32, [])

    def quantised() -> Any:
        return BertModel.from_pretrained(wide_bert_folder, quantization_config=settings)

    base = quantised()
    name = "encoder.layer.0.output.dense"  # 128 inputs
    layer = base.get_submodule(name)
    held = dequantized_by_definition(layer.weight.data, layer.weight.quant_state)
    model = al.attach(base, al.methods.lora(2))
    assert "2 linear modules are used unquantised: on this processor" in caplog.text
    x = torch.randn(3, 128)
    used = model.get_base_model().get_submodule(name).get_base_layer()
    assert torch.equal(used(x), nn.functional.linear(x, held, layer.bias))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        nn.init.normal_(parameter)
    ids = torch.arange(6, 30).view(2, 12)
    expected = model.eval()(input_ids=ids)[0].detach()
    al.save(model, tmp_path / "adapter")
    again = al.load(quantised(), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids)[0], expected)
    al.load(BertModel.from_pretrained(wide_bert_folder), tmp_path / "adapter")  # no other base


def test_adapters_on_a_wrong_kernel_are_refused(wrong_at_128: None, wide_llama_folder: str) -> None:
    with pytest.raises(InputError, match="carry adapters already: put the adapters on with"):
        with_callback(plain(four_bit(wide_llama_folder)))


@pytest.mark.parametrize("dry_run", [False, True])
def test_where_no_kernel_is_right_nothing_is_quantised_and_that_is_said(
    dry_run: bool,
    monkeypatch: pytest.MonkeyPatch,
    wide_bert_folder: str,
    reviews_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quantization, "kernel_is_exact", lambda *_: False)
    values = recipe(wide_bert_folder, reviews_file, tmp_path / "run", quantization="nf4")
    result = run(
        parse({**values, "training": {**values["training"], "max_steps": 2}}), dry_run=dry_run
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "13 linear modules are not quantised: on this processor" in said
    assert result["memory"]["base"].keys() == {"float32", "int64"}


def test_a_plan_for_another_machine_asks_no_kernel_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "kernel_is_exact", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = BertModel(
        BertConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    assert left_out(model, "nf4", torch.bfloat16, "cuda") == []
    assert left_out(model, "nf4", torch.float32, "cpu") != []


# --- commands say nothing of kernels ---


def test_a_command_does_not_print_the_remark_about_kernels(wide_bert_folder: str) -> None:
    """PEFT imports bitsandbytes, quantised or not; a new process, for the remark comes once."""
    processor = Path(__file__).parent.parent / "processor"
    words = [
        "plan",
        "--model",
        wide_bert_folder,
        "--batch-size",
        "2",
        "--max-length",
        "8",
        "--device",
        "cpu",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "adaptive_lora.cli", *words],
        env={**os.environ, "PYTHONPATH": str(processor), "HAS_AVX512BF16": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stderr == ""
