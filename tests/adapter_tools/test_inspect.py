"""`inspect` reports what is in the tensors, and says what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import Command, strict_json
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapter_folder import make_config, trained

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.inspect import effective_rank
from adaptive_lora.model.adapters import adapters
from adaptive_lora.testing import make_bert

pytest_plugins = ("model_folders",)

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(make_config("all of it")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_the_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    entropy = torch.distributions.Categorical(
        probs=torch.tensor(values, dtype=torch.float64)
    ).entropy()
    assert effective_rank(values) == pytest.approx(float(entropy.exp()), rel=1e-6)
    assert 1 - 1e-9 <= effective_rank(values) <= len(values) + 1e-9
    assert effective_rank([3 * value for value in values]) == pytest.approx(
        effective_rank(values), rel=1e-9
    )


def test_negative_values_are_no_singular_values() -> None:
    with pytest.raises(ValueError, match="never negative; got -1"):
        effective_rank([2.0, -1.0])


def test_the_facts_are_those_of_a_dense_update(folder: Path) -> None:
    found = al.inspect(folder)
    layers = adapters(PeftModel.from_pretrained(make_bert(), str(folder)))
    assert found.targets.keys() == layers.keys()
    assert found.parameters == sum(
        facts.rank * (facts.in_features + facts.out_features) for facts in found.targets.values()
    )
    for name, facts in found.targets.items():
        dense = layers[name].get_delta_weight("default").double()
        values = torch.linalg.svdvals(dense)[: facts.rank]
        assert (facts.out_features, facts.in_features) == dense.shape
        assert facts.rank == layers[name].r["default"]
        assert facts.scale == layers[name].scaling["default"]
        assert facts.norm == pytest.approx(float(dense.norm()), rel=1e-6)
        # the dense update is float32
        assert facts.spectrum == pytest.approx(values.tolist(), rel=1e-5)
        assert facts.effective_rank == pytest.approx(effective_rank(values.tolist()), rel=1e-5)
        shares = (values**2).cumsum(0) / (values**2).sum()
        assert facts.needed_99 == int((shares < 0.99).sum()) + 1
    assert found.other_tensors == (
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    )


@pytest.mark.parametrize(("energy", "name"), [(0.99, "needed_99"), (0.999, "needed_999")])
def test_what_is_needed_is_what_compress_keeps(energy: float, name: str, folder: Path) -> None:
    assert getattr(al.inspect(folder), name) == al.compress(folder, energy=energy).parameters_after


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        change(key, tensor)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_nan_is_reported_and_not_refused(folder: Path, command: Command) -> None:
    rewrite(
        folder, lambda key, tensor: tensor.fill_(math.nan) if f"{QUERY}.lora_A" in key else None
    )
    found = al.inspect(folder)
    assert not found.targets[QUERY].finite
    assert math.isnan(found.targets[QUERY].norm)
    assert found.needed_99 is None
    assert f"NaN or infinite values in 1 places, first {QUERY!r}" in found.warnings[0]
    ended = command("inspect", folder, "--json", "--figure", folder / "x.png")
    assert ended.code == 0, ended.err
    assert strict_json(ended.out)["targets"][QUERY]["norm"] is None
    assert (folder / "x.png").stat().st_size > 0


def test_an_adapter_that_learned_nothing_is_said_to(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda key, tensor: tensor.zero_() if f"{QUERY}.lora_B" in key else None)
    assert any(
        "1 of 16 targets learned nothing" in warning for warning in al.inspect(folder).warnings
    )
    al.save(al.attach(make_bert(), methods.lora(2), ["query"]), tmp_path / "fresh")
    found = al.inspect(tmp_path / "fresh")
    assert found.warnings == ("the adapter learned nothing: every update is zero (B as it starts)",)
    assert {facts.effective_rank for facts in found.targets.values()} == {0.0}


def test_what_other_readers_would_do_is_said(folder: Path, tmp_path: Path) -> None:
    warnings = " ".join(al.inspect(folder).warnings)
    assert "lora_alpha / r is" in warnings
    assert "ranks differ (1..8)" in warnings
    model = al.attach(make_bert(), methods.custom(layer_ranks=[4, 2, 0]), ["query", "value"])
    for layer in adapters(model).values():
        if "default" in layer.lora_B:
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    native = al.inspect(al.save(model, tmp_path / "native"))
    assert not any("lora_alpha" in warning for warning in native.warnings)
    # no kind is in the last layer
    assert not any("layers (not in" in warning for warning in native.warnings)
    al.resize(model, {QUERY: 0})
    gaps = al.inspect(al.save(model, tmp_path / "gaps"))
    assert any(
        "'attention.self.query' is adapted in 1 of 2 layers (not in 1): TGI" in one
        for one in gaps.warnings
    )
    uniform = trained(make_config("uniform"))
    uniform.save_pretrained(tmp_path / "uniform")
    assert al.inspect(tmp_path / "uniform").warnings == ()


def test_table_json_and_figure(folder: Path, tmp_path: Path, command: Command) -> None:
    ended = command("inspect", folder, "--figure", tmp_path / "adapter.svg")
    assert ended.code == 0, ended.err
    assert "attention.self" in ended.out
    assert "LoRA parameters on 16 targets, and 2 other tensors" in ended.out
    assert "warning: ranks differ" in ended.out
    assert (tmp_path / "adapter.svg").read_text().startswith("<?xml")
    as_json = command("inspect", folder, "--json")
    assert strict_json(as_json.out) == json.loads(json.dumps(al.inspect(folder).to_dict()))


def test_bad_input_is_one_message(folder: Path, tmp_path: Path, command: Command) -> None:
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no folder"),
        ((tmp_path,), ""),
        ((folder, "--figure", tmp_path / "x.gif"), "has the ending '.gif'"),
        ((folder, "--figure", tmp_path / "no" / "x.png"), "does not exist"),
        ((folder, "--figure", folder / "there.png"), "exists"),
    ):
        (folder / "there.png").write_text("mine")
        ended = command("inspect", *arguments)
        # a folder that holds `adapter` is read like a run
        assert ended.code == (0 if arguments == (tmp_path,) else 2)
        assert message in ended.err
    assert (folder / "there.png").read_text() == "mine"
