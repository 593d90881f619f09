"""The base model of an adapter: another one of the same shapes is refused, the same one in another
form is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from model_folders import Command
from peft import PeftModel
from transformers import BertModel, PreTrainedModel

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.compress import compress
from adaptive_lora.errors import IntegrityError
from adaptive_lora.model.fingerprint import FINGERPRINT_FILE, fingerprint

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
