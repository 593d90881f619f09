"""The base model of an adapter: another one of the same shapes is refused, the same one in another
form is not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from model_folders import Command
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertModel, PreTrainedModel

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.compress import compress
from adaptive_lora.errors import IntegrityError
from adaptive_lora.model.fingerprint import FINGERPRINT_FILE, fingerprint
from adaptive_lora.testing import TARGETS

pytest_plugins = ("model_folders",)


@pytest.fixture
def folder(tiny_bert: PreTrainedModel, tmp_path: Path) -> Path:
    return al.save(al.attach(tiny_bert, methods.lora(2), ["query"]), tmp_path / "adapter")


def test_the_samples_are_of_the_base_whether_adapters_are_on_it_or_not() -> None:
    bare, adapted = make_bert(), al.attach(make_bert(), methods.lora(2), ["query"])
    for weight in bare.parameters():
        weight.requires_grad_(False)
    assert fingerprint(adapted) == fingerprint(bare)
    assert "bert.encoder.layer.0.attention.self.query.weight" in fingerprint(bare)
    assert not any("classifier" in name or "lora" in name for name in fingerprint(bare))


@pytest.mark.parametrize("changed", ["query", "value", "word_embeddings", "LayerNorm"])
def test_a_base_with_one_other_kind_of_weight_is_refused(changed: str, folder: Path) -> None:
    other = make_bert()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if changed in name:
                weight.mul_(1.01)  # bfloat16 tells 1 from 1.01
    with pytest.raises(
        IntegrityError, match=f"trained on another base model of the same shapes.*{changed}"
    ):
        al.load(other, folder)


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_type_is_not_refused(
    then: torch.dtype, now: torch.dtype, tmp_path: Path
) -> None:
    folder = al.save(
        al.attach(make_bert().to(then), methods.lora(2), ["query"]), tmp_path / "adapter"
    )
    assert isinstance(al.load(make_bert().to(now), folder), PeftModel)
    if then != torch.float16:  # a copy saved in bfloat16
        assert isinstance(al.load(make_bert().to(torch.bfloat16).to(now), folder), PeftModel)
    if (then == torch.float16) == (now == torch.float16):
        other = make_bert()
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(1.1)
        with pytest.raises(IntegrityError, match="another base model"):
            al.load(other.to(now), folder)


def test_without_the_file_nothing_is_compared_and_a_damaged_one_is_named(folder: Path) -> None:
    other = make_bert()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    file = folder / FINGERPRINT_FILE
    for text in ("{", "[]", '{"a": 1}'):
        file.write_text(text)
        with pytest.raises(IntegrityError, match=f"{FINGERPRINT_FILE} is damaged"):
            al.load(make_bert(), folder)
    file.unlink()
    assert isinstance(al.load(other, folder), PeftModel)


def test_what_is_made_of_an_adapter_keeps_it(tmp_path: Path) -> None:
    model = al.attach(make_bert(), methods.lora(4), ["query"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    source = al.save(model, tmp_path / "adapter")
    compress(source, output=tmp_path / "small", rank=2)
    assert (tmp_path / "small" / FINGERPRINT_FILE).read_bytes() == (
        source / FINGERPRINT_FILE
    ).read_bytes()


def test_every_command_refuses_another_base_model(
    classification_run: Path, bert_folder: str, reviews_file: str, command: Command, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bert_folder, other)
    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.add_(0.01)
    model.save_pretrained(other)
    for words in (
        ("evaluate", classification_run, "--model", other, "--data", reviews_file),
        (
            "export",
            classification_run,
            "--model",
            other,
            "--to",
            "native",
            "--output",
            tmp_path / "out",
        ),
        (
            "export",
            classification_run,
            "--model",
            other,
            "--to",
            "merged",
            "--no-check",
            "--output",
            tmp_path / "out",
        ),
    ):
        done = command(*words)
        assert done.code == 4
        assert "trained on another base model of the same shapes: 1 of" in " ".join(
            done.err.split()
        )
        assert "layer.0.output.dense.weight" in done.err
    assert not (tmp_path / "out").exists()
    assert json.loads((classification_run / "adapter" / FINGERPRINT_FILE).read_text())


# --- the same base, changed by rounding alone ---


def filled(base: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = al.attach(base.to(dtype), methods.lora(4), TARGETS)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def retrained(base: PreTrainedModel, by: float = 1e-3) -> PreTrainedModel:
    """As little as anyone fine-tunes: every weight moved by a thousandth of its size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(torch.randn_like(weight) * by * weight.std(unbiased=False))
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cycles", [1, 20])
def test_merging_and_unmerging_in_training_does_not_make_it_another_base(
    dtype: torch.dtype, cycles: int, tmp_path: Path
) -> None:
    """GRPO with vLLM does so at each generation; in 16 bits it wears the weights out."""
    model = filled(make_bert(), dtype)
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    folder = al.save(model, tmp_path / "adapter")
    assert isinstance(al.load(make_bert().to(dtype), folder), PeftModel)
    assert isinstance(al.load(make_bert(), folder), PeftModel)
    # what bfloat16 cannot tell is not told
    by = 1e-2 if dtype == torch.bfloat16 else 1e-3
    with pytest.raises(IntegrityError, match="another base model"):
        al.load(retrained(make_bert(), by), folder)


def test_saved_while_merged_and_read_on_a_base_that_was_merged_with_it_before(
    tmp_path: Path,
) -> None:
    """As of an adapter that PEFT alone put on: its fingerprint is taken when it is saved."""
    for dtype in (torch.float32, torch.bfloat16):
        config = LoraConfig(r=4, target_modules=list(TARGETS), init_lora_weights=False)
        torch.manual_seed(7)
        model = get_peft_model(make_bert().to(dtype), config)
        model.merge_adapter()
        folder = al.save(model, tmp_path / str(dtype))
        assert isinstance(al.load(make_bert().to(dtype), folder), PeftModel)
        base = make_bert().to(dtype)
        other = get_peft_model(base, config)
        other.merge_adapter()
        other.unmerge_adapter()
        assert isinstance(al.load(other.unload(), folder), PeftModel)


@pytest.mark.parametrize("tokens", [60, 65, 128, 1000])
def test_a_resized_vocabulary_is_the_same_base_and_too_small_a_one_is_named(
    tokens: int, folder: Path
) -> None:
    base = make_bert()
    base.resize_token_embeddings(tokens, mean_resizing=False)
    if tokens < 64:
        with pytest.raises(al.InputError, match=r"vocabulary of 64 tokens.*embeddings\(64\) first"):
            al.load(base, folder)
    else:
        assert isinstance(al.load(base, folder), PeftModel)
    other = make_bert()
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    other.resize_token_embeddings(max(tokens, 64), mean_resizing=False)
    with pytest.raises(IntegrityError, match="word_embeddings"):
        al.load(other, folder)


def test_a_base_that_differs_by_a_thousandth_is_another_one_in_float32(folder: Path) -> None:
    with pytest.raises(IntegrityError, match="another base model"):
        al.load(retrained(make_bert()), folder)


def test_a_refused_base_is_as_it_was(folder: Path) -> None:
    base = retrained(make_bert())
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    with pytest.raises(IntegrityError):
        al.load(base, folder)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in base.modules()] == modules
    assert all(weight.requires_grad for weight in base.parameters())


def test_a_fingerprint_of_version_0_1_is_still_compared(folder: Path) -> None:
    """It held hashes of 1,024 values in bfloat16."""
    model = make_bert()
    hashes = {}
    for name, weight in model.named_parameters():
        if "classifier" in name or "pooler" in name or name.endswith("bias"):
            continue
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).contiguous()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        hashes[name] = ["float32", digest]
    (folder / FINGERPRINT_FILE).write_text(json.dumps(hashes))
    assert isinstance(al.load(make_bert(), folder), PeftModel)
    other = make_bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(1.01)
    with pytest.raises(IntegrityError, match=r"1 of \d+ compared weights differ"):
        al.load(other, folder)
