"""Adapter folders: nothing bad is written, and nothing damaged, foreign or pickled is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.model.adapters import adapters

Tensors = dict[str, torch.Tensor]
QUERY_A = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.weight"


@pytest.fixture
def model(tiny_bert: PreTrainedModel) -> PeftModel:
    return al.attach(tiny_bert, methods.custom(layer_ranks=[4, 2, 0]), ["query"])


@pytest.fixture
def folder(model: PeftModel, tmp_path: Path) -> Path:
    return al.save(model, tmp_path / "adapter")


# --- attach ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; expected a finite number above 0"),
        ({"scale": -2.0}, "scale is -2.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"dropout": -0.1}, "dropout is -0.1; expected a probability"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_a_scale_or_dropout_that_makes_no_sense_is_refused(
    tiny_bert: PreTrainedModel, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        al.attach(tiny_bert, methods.lora(4), **options)


def test_a_model_that_has_adapters_gets_no_more(model: PeftModel, folder: Path) -> None:
    for again in (model, model.get_base_model()):
        with pytest.raises(InputError, match="already has adapters"):
            al.attach(again, methods.lora(4))
        with pytest.raises(InputError, match="already has adapters"):
            al.load(again, folder)


def test_a_pattern_of_rank_0_only_and_a_model_without_adapters_are_refused(
    tiny_bert: PreTrainedModel,
) -> None:
    with pytest.raises(InputError, match="gives every target rank 0"):
        al.attach(tiny_bert, methods.custom(pattern={".*": 0}))
    with pytest.raises(InputError, match="has no LoRA adapters"):
        al.ranks(tiny_bert)


def test_a_head_named_like_targets_is_refused(tiny_bert: PreTrainedModel) -> None:
    """PEFT would train every `query` in full, and adapt none."""
    tiny_bert.query = nn.Linear(16, 2)
    with pytest.raises(InputError, match="holds that of a head module"):
        al.attach(tiny_bert, methods.lora(2), ["query", "value"])


def test_adapters_of_different_scale_are_saved_and_resized_each_with_its_own(
    model: PeftModel, tmp_path: Path
) -> None:
    """As PEFT's `rank_pattern` without `alpha_pattern` makes them, or `set_scale`."""
    first, second = list(al.ranks(model))[:2]
    adapters(model)[first].scaling["default"] = 7.0
    al.resize(model, {second: 1})
    folder = al.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_bert(), folder)
    scales = {name: layer.scaling["default"] for name, layer in adapters(again).items()}
    assert scales[first] == pytest.approx(7.0)
    assert set(scales.values()) - {scales[first]} == {2.0}


# --- save ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "place", ["query.lora_A.default.weight", "classifier.modules_to_save.default.bias"]
)
def test_a_weight_that_is_not_finite_is_not_saved(
    model: PeftModel, tmp_path: Path, place: str, value: float
) -> None:
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith(place))
    parameter.data.view(-1)[3 % parameter.numel()] = value
    with pytest.raises(DivergedError, match="not saved: 1 parameters are not finite") as error:
        al.save(model, tmp_path / "adapter")
    assert error.value.where == (name,)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_an_adapter_and_keeps_other_files(model: PeftModel, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "result.json").write_text("{}")
    (folder / "logs").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    first = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        model.get_parameter(QUERY_A.replace(".weight", ".default.weight")).add_(1.0)
    al.save(model, folder)
    second = load_file(folder / "adapter_model.safetensors")
    assert [name for name in first if not torch.equal(first[name], second[name])] == [QUERY_A]
    assert sorted(path.name for path in folder.iterdir()) == before  # no staging folder is left
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "result.json").read_text() == "{}"


# --- load ---


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        **tensors,
        name: change(tensors.get(name, torch.zeros(2, 16))).contiguous(),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(QUERY_A), "1 tensors differ, first .*layer.1.*query"),
        (without(HEAD), "does not fit this model .*classifier.weight"),
        (
            with_(QUERY_A.replace("query", "value"), torch.clone),
            "1 tensors differ, first .*layer.1.*value",
        ),
        (with_("stray", torch.clone), "1 tensors differ, first stray"),
        (with_(QUERY_A, lambda a: a[:1]), "does not fit this model .*query"),
        (with_(QUERY_A, torch.t), "does not fit this model .*query"),
        (with_(HEAD, lambda w: w[:, :8]), "does not fit this model .*classifier"),
        (
            with_(QUERY_A, lambda a: a * float("nan")),
            "holds NaN or infinite values in 1 tensors, first .*layer.1.*query",
        ),
        (
            with_(HEAD, lambda w: w / 0.0),
            "holds NaN or infinite values in 1 tensors, first .*classifier",
        ),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys:UserWarning"
)  # PEFT warns; the library must raise
def test_tensors_that_are_not_those_expected_are_refused(
    folder: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(IntegrityError, match=f"(?s){message}"):
        al.load(make_bert(), folder)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-100], lambda data: data[:40], lambda data: b"", lambda data: b"no"],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_file_is_refused(
    folder: Path, file: str, damage: Callable[[bytes], bytes]
) -> None:
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(IntegrityError, match="damaged"):
        al.load(make_bert(), folder)


@pytest.mark.parametrize(
    "content", [[], {"r": 4}, {"peft_type": "LORA", "r": "four"}, {"peft_type": "NONSENSE"}]
)
def test_a_config_that_is_no_lora_config_is_refused(folder: Path, content: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="damaged"):
        al.load(make_bert(), folder)


def test_an_adapter_for_another_model_is_refused(folder: Path) -> None:
    for other in (make_bert(hidden_size=8), make_bert(n_layers=1)):
        with pytest.raises(IntegrityError, match="does not fit this model"):
            al.load(other, folder)


def test_an_adapter_of_another_kind_is_refused(tiny_bert: PreTrainedModel, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    get_peft_model(tiny_bert, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="IA3 adapter; expected LORA"):
        al.load(make_bert(), tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="is no adapter: it has no adapter_config"):
            al.load(make_bert(), path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter_model"):
        al.load(make_bert(), folder)


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_a_pickled_adapter_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(InputError, match=r"as a pickle .* can run any code"):
        al.load(make_bert(), folder)
    assert not (tmp_path / "unpickled").exists()
