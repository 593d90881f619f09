"""What an adapter says of its base: enough to make it again, and never a leave to run code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import make
from conftest import make_bert
from model_folders import Command
from safetensors.torch import load_file, save_file
from torch import nn

import adaptive_lora as al
from adaptive_lora import InputError, IntegrityError, methods
from adaptive_lora.adapter_tools.base import base_of_adapter
from adaptive_lora.adapter_tools.compress import compress
from adaptive_lora.adapter_tools.export import export
from adaptive_lora.adapter_tools.folder import read_adapter
from adaptive_lora.model.base_model import BASE_FILE, Base, read_base
from adaptive_lora.model.fingerprint import FINGERPRINT_FILE

pytest_plugins = ("model_folders",)
LABELS = {0: "bad", 1: "good", 2: "neither"}


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A pretrained model without a head."""
    make_bert().bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter of a classifier on that model."""
    head = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    base = hf.BertForSequenceClassification.from_pretrained(base_folder, num_labels=3, **head)
    return al.save(al.attach(base, methods.lora(2), ["query"]), tmp_path / "adapter")


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / BASE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_class_head_and_dtype_are_those_of_the_model(adapter: Path) -> None:
    assert read_base(adapter) == {
        "version": 1,
        "class": "BertForSequenceClassification",
        "head": {
            "num_labels": 3,
            "id2label": LABELS,
            "label2id": {name: index for index, name in LABELS.items()},
        },
        "dtype": "float32",
        "remote_code": False,
    }


@pytest.mark.parametrize("name", ["bert qa", "gpt2", "llama", "llama classifier", "t5", "vit"])
def test_the_record_makes_the_same_model_again(name: str, tmp_path: Path) -> None:
    base = make(name)
    base.save_pretrained(tmp_path / "base")
    kind, shapes = type(base), {key: value.shape for key, value in base.state_dict().items()}
    al.save(al.attach(base, methods.lora(1)), tmp_path / "adapter")
    found = base_of_adapter(read_adapter(tmp_path / "adapter"), str(tmp_path / "base"))
    again = found.load()
    assert type(again.model) is kind
    assert {key: value.shape for key, value in again.model.state_dict().items()} == shapes
    assert (again.missing, again.resized) == ([], {})


def test_a_model_of_nobody_else_has_no_record(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    al.save(al.attach(Own(), methods.lora(1)), tmp_path)
    assert read_base(tmp_path) is None


def test_an_adapter_alone_is_exported_with_its_class_names(
    adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    """No run is needed; what is made of the adapter says the same of its base."""
    export(adapter, "merged", tmp_path / "merged")
    assert hf.AutoConfig.from_pretrained(tmp_path / "merged").id2label == LABELS
    export(adapter, "native", tmp_path / "native")
    assert (tmp_path / "native" / BASE_FILE).read_bytes() == (adapter / BASE_FILE).read_bytes()


def test_an_adapter_of_version_0_1_is_exported_by_task_type_and_width_of_head(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / BASE_FILE).unlink()
    found = base_of_adapter(read_adapter(adapter))
    assert found.kind is hf.AutoModelForSequenceClassification
    assert found.head == {"num_labels": 3}
    done = export(adapter, "merged", tmp_path / "merged")
    assert any("version 0.1" in note and "class names" in note for note in done.notes)
    assert hf.AutoConfig.from_pretrained(tmp_path / "merged").num_labels == 3


def test_a_run_directory_of_version_0_1_is_exported(
    classification_run: Path, command: Command, tmp_path: Path
) -> None:
    run = shutil.copytree(
        classification_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
    )
    (run / "adapter" / BASE_FILE).unlink()
    for form in ("native", "merged"):
        done = command("export", run, "--to", form, "--output", tmp_path / form)
        assert done.code == 0, done.err
        assert "checked: read back" in done.out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "is of format 2; this version reads format 1"),
        ({"head": {"num_labels": 3, "trust_remote_code": True}}, "damaged: head has num_labels, t"),
        ({"head": {"id2label": {"one": "a"}}}, "damaged"),
        ({"head": 3}, "damaged"),
        ({"remote_code": "no"}, "damaged"),
    ],
)
def test_a_record_that_is_damaged_or_of_a_later_version_is_refused(
    fields: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    rewrite(adapter, **fields)
    with pytest.raises(IntegrityError, match=f"{BASE_FILE} is {message}|{message}"):
        export(adapter, "native", tmp_path / "out")
    (adapter / BASE_FILE).write_text("{")
    with pytest.raises(IntegrityError, match=f"{BASE_FILE} is damaged"):
        read_base(adapter)


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "BertTokenizer", "absent", ""])
def test_a_class_that_is_no_model_of_transformers_counts_as_none(name: str, adapter: Path) -> None:
    rewrite(adapter, **{"class": name})
    assert base_of_adapter(read_adapter(adapter)).kind is hf.AutoModelForSequenceClassification


def test_another_architecture_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """transformers takes the defaults of a class for what a foreign configuration lacks: Llama with
    7 billion parameters."""
    make("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a 'gpt2' model; expected 'llama' .LlamaForCausalLM"):
        Base(str(tmp_path), hf.LlamaForCausalLM).load()


def test_a_damaged_file_of_weights_is_told_from_a_wrong_request(base_folder: Path) -> None:
    file = base_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(IntegrityError, match=r"the weights of .* are damaged"):
        Base(str(base_folder), hf.BertModel).load()


def test_what_is_made_of_an_adapter_keeps_the_record(adapter: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        tensors = {
            name: torch.randn_like(tensor) if "lora_B" in name else tensor
            for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    compress(adapter, rank=1, output=tmp_path / "small")
    for name in (BASE_FILE, FINGERPRINT_FILE):
        assert (tmp_path / "small" / name).read_bytes() == (adapter / name).read_bytes()


# --- code that comes with a model ---

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({marker!r}).write_text("ran")
class MineConfig(BertConfig):
    model_type = "mine"
class Mine(BertForSequenceClassification):
    config_class = MineConfig
"""


@pytest.fixture
def remote(base_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter trained on a model whose code came with it, and the file which that code makes."""
    config = json.loads((base_folder / "config.json").read_text())
    places = {"AutoConfig": "mine.MineConfig"}
    places["AutoModelForSequenceClassification"] = "mine.Mine"
    config |= {"model_type": "mine", "auto_map": places}
    (base_folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (base_folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    base = hf.AutoModelForSequenceClassification.from_pretrained(
        base_folder, trust_remote_code=True, num_labels=3
    )
    folder = al.save(al.attach(base, methods.lora(2), ["query"]), tmp_path / "adapter")
    assert marker.read_text()
    marker.unlink()
    return folder, marker


def test_that_code_ran_in_the_training_is_recorded_and_no_leave_to_run_it(
    remote: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    adapter, marker = remote
    record = read_base(adapter)
    assert record is not None
    assert record["remote_code"]
    assert record["class"] == "AutoModelForSequenceClassification"
    for form in ("native", "merged"):
        refused = command("export", adapter, "--to", form, "--output", tmp_path / form)
        assert refused.code == 2
        assert "made by code of its own" in refused.err
        assert "--trust-remote-code" in refused.err
    # a record that lies, and an adapter without one, run nothing either
    rewrite(adapter, remote_code=False)
    for _ in range(2):
        refused = command("export", adapter, "--to", "merged", "--output", tmp_path / "out")
        assert refused.code == 2
        (adapter / BASE_FILE).unlink(missing_ok=True)
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "bert"]


def test_with_leave_it_is_run_and_answers_the_same(
    remote: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    adapter, _ = remote
    for form in ("native", "merged"):
        done = command(
            "export", adapter, "--to", form, "--output", tmp_path / form, "--trust-remote-code"
        )
        assert done.code == 0, done.err
        assert "checked: read back" in done.out
