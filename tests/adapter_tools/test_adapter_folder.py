"""Adapter folders as plain data: PEFT's scales, exact round trips, and a clear word on everything
that is not LoRA."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_bert, make_gpt2
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.folder import (
    Update,
    one_scale,
    read_adapter,
    state_dict,
    with_updates,
    write_adapter,
)
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.adapters import adapters
from adaptive_lora.testing import apart, logits

QUERY = "bert.encoder.layer.1.attention.self.query"
CONFIGS: dict[str, dict[str, Any]] = {
    "uniform": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "rank pattern": {"r": 4, "rank_pattern": {"query": 2, "layer.0.attention.self.value": 3}},
    "alpha pattern": {
        "r": 4,
        "alpha_pattern": {r"layer\.[01]\.attention.self.query": 5, "query": 16},
    },
    "all of it": {
        "use_rslora": True,
        "rank_pattern": {QUERY: 1, "dense": 6},
        "alpha_pattern": {"1.output.dense": 3.5},
    },
    "regex": {"r": 2, "target_modules": r".*layer\.[02].*(query|intermediate\.dense)"},
    "some layers": {"r": 2, "target_modules": ["query"], "layers_to_transform": [0, 2]},
    "negative": {"r": 2, "lora_alpha": -3},
    "biases": {"r": 2, "bias": "lora_only"},
}


def trained(config: LoraConfig, base: nn.Module | None = None) -> PeftModel:
    """A model with adapters whose B is not zero."""
    model = get_peft_model(base or make_bert(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_config(name: str = "uniform", **more: Any) -> LoraConfig:
    targets = {"target_modules": ["query", "value", "dense"]}
    return LoraConfig(**{**targets, "task_type": "SEQ_CLS", **CONFIGS[name], **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(make_config("all of it")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_scale_is_the_one_peft_applies(name: str, tmp_path: Path) -> None:
    model = trained(make_config(name))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    layers = adapters(model)
    assert adapter.ranks == al.ranks(model)
    for target, update in adapter.updates.items():
        assert update.scale == layers[target].scaling["default"]
        assert torch.equal(update.a, layers[target].lora_A["default"].weight)
        assert update.cost == layers[target].in_features + layers[target].out_features
    assert adapter.parameters == al.lora_parameters(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_in_native_form_peft_answers_the_same(name: str, tmp_path: Path) -> None:
    model = trained(make_config(name))
    model.save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in")
    native = with_updates(adapter, one_scale(adapter.updates))
    write_adapter(native, tmp_path / "out")
    again = PeftModel.from_pretrained(make_bert(), str(tmp_path / "out")).eval()
    # B is rounded once more where its scale changed
    assert apart(logits(model), logits(again)) <= 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (scale,) = {update.scale for update in native.updates.values()}
    # what vLLM applies to every target
    assert config["lora_alpha"] / config["r"] == pytest.approx(scale)
    assert state_dict(read_adapter(tmp_path / "out")).keys() == state_dict(adapter).keys()


def test_dropped_targets_are_gone_and_the_others_exact(tmp_path: Path) -> None:
    model = trained(make_config("uniform", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in")
    kept = {
        name: update
        for name, update in adapter.updates.items()
        if "layer.1" in name and "output" in name
    }
    write_adapter(with_updates(adapter, kept), tmp_path / "out")
    again = PeftModel.from_pretrained(make_bert(), str(tmp_path / "out"))
    assert adapters(again).keys() == kept.keys()
    for name, layer in adapters(model).items():
        if name not in kept:
            layer.lora_B["default"].weight.data.zero_()
    assert apart(logits(model), logits(again.eval())) == 0


def test_a_name_that_could_end_another_is_written_as_a_regular_expression(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.inner = nn.Linear(4, 4), nn.Sequential()
            self.inner.add_module("q", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.q(x))

    get_peft_model(
        Two(), LoraConfig(target_modules=["q"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in")
    write_adapter(with_updates(adapter, {"q": adapter.updates["q"]}), tmp_path / "out")
    again = PeftModel.from_pretrained(Two(), str(tmp_path / "out"))
    assert list(al.ranks(again)) == ["q"]


def test_conv1d_and_half_precision_pass_through(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["c_attn", "c_fc"], r=3, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = trained(config, make_gpt2()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in")
    assert adapter.costs["transformer.h.0.attn.c_attn"] == 16 + 48
    write_adapter(with_updates(adapter, one_scale(adapter.updates)), tmp_path / "out")
    before, after = (
        load_file(tmp_path / part / "adapter_model.safetensors") for part in ("in", "out")
    )
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[key], after[key]) and after[key].dtype == torch.bfloat16
        for key in before
    )
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    )


def test_layers_come_in_their_order_and_tokenizers_come_along(tmp_path: Path) -> None:
    model = trained(make_config(target_modules=["query"]), make_bert(n_layers=11))
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "optimizer.pt").write_text("not an adapter's")
    adapter = read_adapter(tmp_path / "in")
    assert [int(name.split(".")[3]) for name in adapter.updates] == list(range(11))
    written = write_adapter(adapter, tmp_path / "out")
    assert sorted(file.name for file in written.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert oct(written.stat().st_mode)[-3:] == oct((tmp_path / "in").stat().st_mode)[-3:]


def test_a_run_directory_stands_for_its_adapter(folder: Path) -> None:
    assert read_adapter(folder.parent).folder == folder


def test_one_scale_keeps_the_update_and_leaves_the_most_frequent_alone() -> None:
    a, b = torch.randn(2, 3), torch.randn(4, 2)
    updates = {"x": Update(a, b, 2.0), "y": Update(a, b, 2.0), "z": Update(a, b, -0.3)}
    same = one_scale(updates)
    assert {update.scale for update in same.values()} == {2.0}
    assert same["x"] is updates["x"]
    assert torch.allclose(2.0 * same["z"].b @ a, -0.3 * b @ a, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_scale_is_exact_whatever_the_factors_are_stored_in(dtype: torch.dtype) -> None:
    """float16 holds 0.3 · B with an error of 2.4e-4, float32 with one of 6e-8."""
    a, b = torch.randn(2, 3).to(dtype), torch.randn(4, 2).to(dtype)
    updates = {"x": Update(a, b, 2.0), "y": Update(a, b, 0.6), "z": Update(a, b, 0.5)}
    updates["w"] = updates["x"]
    for name, update in one_scale(updates).items():
        assert update.scale == 2.0
        exact = updates[name].b.double() * updates[name].scale / 2.0
        torch.testing.assert_close(update.b.double(), exact, rtol=1e-7, atol=0)
        assert update.b.dtype == (torch.float32 if name == "y" else dtype)


# --- writing ---


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(folder)
    occupied = folder.parent / "occupied"
    occupied.mkdir()
    with pytest.raises(InputError, match="exists; give another name"):
        write_adapter(adapter, occupied)
    (folder.parent / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write"):
        write_adapter(adapter, folder.parent / "file" / "below")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaptive_lora.adapter_tools.folder.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_adapter(adapter, folder.parent / "new")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", "file", "occupied"]


def test_nan_is_never_written(folder: Path) -> None:
    adapter = read_adapter(folder)
    adapter.updates[QUERY].a[0, 0] = float("nan")
    with pytest.raises(IntegrityError, match="NaN or infinite values in 1 tensors"):
        write_adapter(adapter, folder.parent / "new")


# --- reading what is no LoRA adapter, or a damaged one ---

Tensors = dict[str, torch.Tensor]
KEY = f"base_model.model.{QUERY}"
A = f"{KEY}.lora_A.weight"


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    rewrite(folder, lambda found: found.update(tensors))


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def everything_but_heads(tensors: Tensors) -> None:
    for key in [key for key in tensors if "lora" in key]:
        del tensors[key]


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), InputError,
                  "no adapter folder: it has no adapter_config"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), InputError,
                   "has no adapter_model.safetensors"),
    "pickle": (pickled, InputError, "as a pickle .*convert it once: PeftModel.from_pretrained"),
    "broken JSON": (lambda f: (f / "adapter_config.json").write_text("{"), IntegrityError,
                    "config.json is damaged"),
    "JSON list": (lambda f: (f / "adapter_config.json").write_text("[]"), IntegrityError,
                  "config.json is damaged"),
    "unknown kind": (lambda f: configure(f, peft_type="LORAX"), IntegrityError,
                     "config.json is damaged"),
    "truncated": (truncated, IntegrityError, "safetensors is damaged"),
    "no B": (lambda f: rewrite(f, lambda t: t.pop(f"{KEY}.lora_B.weight")), IntegrityError,
             "query' has no lora_B.weight"),
    "B of another rank": (
        lambda f: rewrite(f, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(16, 3)})),
        IntegrityError,
        r"A is \(1, 16\) and B \(16, 3\); expected \(R, I\) and \(O, R\)",
    ),
    "rank 0": (
        lambda f: add(f, {f"{KEY}.lora_{x}.weight": torch.ones(0, 0) for x in "AB"}),
        IntegrityError,
        "empty weights",
    ),
    "no target": (lambda f: rewrite(f, everything_but_heads), InputError,
                  "has no target left: none of its 2 tensors"),
    "NaN": (lambda f: rewrite(f, lambda t: t[f"{KEY}.lora_A.weight"].fill_(float("nan"))),
            IntegrityError, "holds NaN"),
    "infinite head": (
        lambda f: rewrite(f, lambda t: t["base_model.model.classifier.bias"].fill_(float("inf"))),
        IntegrityError,
        "infinite values in 1 tensors",
    ),
    "no head": (
        lambda f: rewrite(f, lambda t: [t.pop(key) for key in list(t) if "classifier" in key]),
        IntegrityError,
        "modules_to_save names 'classifier'",
    ),
    "a foreign tensor": (
        lambda f: add(f, {"base_model.model.bert.pooler.weight": torch.ones(1)}),
        IntegrityError,
        "1 tensors that its adapter_config.json does not speak of, first "
        "'base_model.model.bert.pooler.weight'",
    ),
    "an untargeted adapter": (
        lambda f: add(f, {f"{KEY[:-5]}key.lora_{x}.weight": torch.ones(16, 16) for x in "AB"}),
        IntegrityError,
        "self.key'; PEFT would ignore",
    ),
    "names with the adapter's": (
        lambda f: rewrite(f, lambda t: t.update({f"{KEY}.lora_A.default.weight": t.pop(A)})),
        IntegrityError,
        "query' has no lora_A.weight",
    ),
    "another rank in the config": (lambda f: configure(f, rank_pattern={}), IntegrityError,
                                   "has rank 6, but .* says 8"),
    "a broken pattern": (lambda f: configure(f, rank_pattern={"(": 2}), IntegrityError,
                         "no regular expression"),
    "alpha of no number": (lambda f: configure(f, lora_alpha="16"), IntegrityError,
                           "lora_alpha of .* is '16'"),
    "a missing layer": (
        lambda f: (
            configure(f, target_modules=[*read_adapter(f).updates]),
            rewrite(f, lambda t: [t.pop(f"{KEY}.lora_{x}.weight") for x in "AB"]),
        ),
        IntegrityError,
        f"incomplete: its adapter_config.json lists '{QUERY}'",
    ),
    "DoRA": (lambda f: configure(f, use_dora=True), InputError,
             "is DoRA, which rescales .*merge_and_unload"),
    "bias on B": (lambda f: configure(f, lora_bias=True), InputError, "a bias on B"),
    "experts": (lambda f: configure(f, target_parameters=["experts.up"]), InputError,
                "bare parameters"),
    "PiSSA": (lambda f: configure(f, init_lora_weights="pissa_niter_4"), InputError,
              "path_initial_model_for_weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_said(name: str, folder: Path) -> None:
    damage, kind, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(kind, match=message):
        read_adapter(folder)


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")
    get_peft_model(make_bert(), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(InputError, match="holds a IA3 adapter; expected LORA"):
        read_adapter(tmp_path / "ia3")
    config = LoraConfig(
        target_modules=["wte", "c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    get_peft_model(make_gpt2(), config).save_pretrained(
        tmp_path / "embedding", save_embedding_layers=True
    )
    with pytest.raises(
        InputError, match=r"changes an embedding \(transformer.wte\); expected linear targets only"
    ):
        read_adapter(tmp_path / "embedding")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    get_peft_model(net, LoraConfig(target_modules=["0", "2"])).save_pretrained(
        tmp_path / "convolution"
    )
    with pytest.raises(InputError, match=r"'0' in .* is an adapter of a convolution"):
        read_adapter(tmp_path / "convolution")
    with pytest.raises(InputError, match=re.escape("hf download some/adapter")):
        read_adapter("some/adapter")


def test_a_native_adapter_of_this_library_is_read(tmp_path: Path) -> None:
    model = al.attach(make_bert(), methods.custom(layer_ranks=[4, 2, 0]), ["query"])
    al.save(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert list(adapter.ranks.values()) == [4, 2]
    assert {update.scale for update in adapter.updates.values()} == {2.0}
