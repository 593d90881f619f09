"""Every method on small random models of the architectures people fine-tune: trained, saved,
reloaded by stock PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, TEXT, answers, batch_for, bitnet, make, method_for, train
from dynamic import DYNAMIC
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import InputError
from adaptive_lora.methods import METHODS
from adaptive_lora.model.attach import infer_task_type
from adaptive_lora.model.targets import coverage, find_targets, head_modules

HEADS = [name for name, architecture in ARCHITECTURES.items() if architecture.heads]
MIXTURES = ["mixtral", "qwen2-moe", "deepseek-v3"]
STATIC = [name for name in METHODS if name not in DYNAMIC]


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    """BitNet's layers carry `torch.compile`, which needs a compiler and many seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def head_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the trained copy of the head."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if "modules_to_save" in name
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_every_method_is_here() -> None:
    assert {*STATIC, *DYNAMIC} >= METHODS.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_targets_and_the_head_are_those_of_the_architecture(name: str) -> None:
    assert len(find_targets(make(name))) == ARCHITECTURES[name].targets
    assert head_modules(make(name)) == list(ARCHITECTURES[name].heads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_takes_part(name: str) -> None:
    """An adapter the forward pass goes round would be trained, counted and saved, and do
    nothing."""
    base = make(name)
    model = al.attach(base, methods.lora(2))
    model(**batch_for(base)).loss.backward()
    b = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(b) == ARCHITECTURES[name].targets
    assert [name for name, p in b.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("method_name", [*STATIC, *DYNAMIC])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_saved_and_reloaded_by_stock_peft(
    name: str, method_name: str, tmp_path: Path
) -> None:
    base = make(name)
    batch, method = batch_for(base), method_for(base, method_name)
    before = answers(base, batch)
    model = al.attach(base, method)
    initial, head = al.ranks(model), head_of(model)
    assert torch.equal(answers(model, batch), before)
    train(model, method, batch)
    trained, ranks = answers(model, batch), al.ranks(model)
    assert not torch.allclose(trained, before, atol=1e-4)
    assert (ranks != initial) == (method_name in DYNAMIC)

    stock = PeftModel.from_pretrained(make(name), al.save(model, tmp_path))
    # The same tensors in the same operations: equal to the last bit.
    assert torch.equal(answers(stock, batch), trained)
    assert al.ranks(stock) == {target: rank for target, rank in ranks.items() if rank}
    assert same(head_of(stock), head_of(model))
    assert all(not torch.equal(was, head_of(model)[key]) for key, was in head.items())
    assert torch.equal(answers(al.load(make(name), tmp_path), batch), trained)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_trained_and_saved_with_and_without_a_task_type(
    name: str, declared: bool, tmp_path: Path
) -> None:
    """Without: a class whose name tells PEFT's task type to nobody."""

    def fresh() -> PreTrainedModel:
        base = make(name)
        if not declared:
            base.__class__ = type("Mine", (type(base),), {})
        return base

    base = fresh()
    batch = batch_for(base)
    task_type = str(infer_task_type(base).value) if declared and infer_task_type(base) else None
    assert declared == (task_type is not None) or name == "vit"  # PEFT has no task type for images
    method = DYNAMIC["grad_delta"]()
    model = al.attach(base, method, task_type=task_type)
    before = head_of(model)
    assert {key.split(".modules_to_save")[0].split(".")[-1] for key in before} == set(
        ARCHITECTURES[name].heads
    )
    train(model, method, batch)
    after = head_of(model)
    assert [key for key in after if torch.equal(before[key], after[key])] == []
    stock = PeftModel.from_pretrained(fresh(), al.save(model, tmp_path))
    assert same(head_of(stock), after)
    assert torch.equal(answers(stock, batch), answers(model, batch))


def test_pefts_penalty_is_refused_where_peft_would_leave_it_out() -> None:
    """For images, PEFT has no task type; `orthogonality=0` is what the training above uses."""
    method = DYNAMIC["peft_adalora"]()
    with pytest.raises(InputError, match="give orthogonality=0"):
        train(al.attach(make("vit"), method), method, batch_for(make("vit")))


# --- layers that share weights ---


def albert(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**{**TEXT, "embedding_size": 8, **config})
    )


def cost(targets: list[Target]) -> int:
    return sum(target.cost for target in targets)


def test_an_adapter_on_shared_layers_serves_all_and_counts_once() -> None:
    shallow, deep = albert(num_hidden_layers=2), albert(num_hidden_layers=12)
    assert find_targets(shallow) == find_targets(deep)
    for base in (shallow, deep):
        model = al.attach(base, methods.lora(2))
        assert al.lora_parameters(model) == 2 * cost(find_targets(albert()))
    (query,) = find_targets(deep := albert(num_hidden_layers=12), ["query"])
    calls: list[None] = []
    model = al.attach(deep, methods.lora(2), ["query"])
    model.get_base_model().get_submodule(query.name).register_forward_hook(
        lambda *_: calls.append(None)
    )
    answers(model, batch_for(albert()))
    assert len(calls) == 12


def test_shapes_over_depth_see_one_layer_where_layers_are_shared_and_the_user_is_told() -> None:
    base = albert(num_hidden_layers=12)
    targets = find_targets(base)
    assert {target.n_layers for target in targets} == {1}
    told = "its layers share weights: each of these 6 adapters serves all 12 layers, "
    told += "and shapes over depth see 1 layer"
    assert coverage(base, targets) == [told]
    ranks = al.ranks(al.attach(base, methods.linear_decay(base_rank=7, min_rank=2)))
    assert set(ranks.values()) == {7}


def test_groups_of_shared_layers_are_told_too() -> None:
    base = albert(num_hidden_layers=4, num_hidden_groups=2)
    (line,) = coverage(base, find_targets(base, ["query", "value"]))
    assert (
        "each of these 4 adapters serves several of the 4 layers, and shapes over depth see 2 "
        "layers" in line
    )


def test_no_layer_is_shared_where_each_has_its_own_group() -> None:
    base = albert(num_hidden_layers=2, num_hidden_groups=2)
    assert coverage(base, find_targets(base)) == []


# --- mixtures of experts ---


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_carry_no_adapter_and_the_user_is_told(name: str) -> None:
    base = make(name)
    line = coverage(base, targets := find_targets(base))[0]
    experts = {key: p for key, p in base.named_parameters() if ".experts." in key}
    assert all(p.dim() == 3 for p in experts.values())
    count, total = (sum(p.numel() for p in some) for some in (experts.values(), base.parameters()))
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in line
    assert f"{count:,} parameters, {count / total:.0%} of the base" in line
    adapted = line.split("adapted are ")[1].split(", ")
    assert sorted(adapted) == sorted({target.kind for target in targets})
    model = al.attach(base, methods.lora(2))
    assert not any(
        "experts" in key
        for key, p in model.named_parameters()
        if p.requires_grad and ".experts." in key
    )


def test_the_gate_of_a_shared_expert_is_adapted_only_when_named() -> None:
    """Its one output has rank 1: with it, no rank above 1 could be given to all targets."""
    base = make("qwen2-moe")
    assert not any("shared_expert_gate" in target.name for target in find_targets(base))
    (gate, _) = find_targets(base, ["shared_expert_gate"])
    assert gate.full_rank == 1
    assert set(al.ranks(al.attach(base, methods.lora(1), ["shared_expert_gate"])).values()) == {1}


def test_what_peft_takes_for_experts_is_left_out_and_refused_by_name() -> None:
    """Stock PEFT moves `gate_proj`, `up_proj` and `down_proj` of such a family to its experts, also
    when it loads."""
    base = make("deepseek-v3")
    dense = "mlp.gate_proj, mlp.up_proj, mlp.down_proj"
    shared = dense.replace("mlp.", "mlp.shared_experts.")
    assert (
        f"{dense}, {shared}: no adapter, as PEFT takes these names"
        in coverage(base, find_targets(base))[1]
    )
    for targets in (["q_a_proj", "down_proj"], ["gate_proj"], r".*layers\.0\..*"):
        with pytest.raises(
            InputError, match=r"PEFT takes .*mlp\.(gate|down)_proj.* leave them out of the targets"
        ):
            al.attach(base, methods.lora(2), targets)
    # nothing was changed by the refusals
    assert al.ranks(al.attach(base, methods.lora(2), ["q_a_proj"]))


# --- packed weights ---


def test_packed_linear_modules_are_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match="no linear module that could carry an adapter") as error:
        al.attach(bitnet(), methods.lora(2))
    assert "14 BitLinear modules (self_attn.q_proj, " in str(error.value)
    assert "load it with its weights unpacked" in str(error.value)


def test_packed_modules_beside_linear_ones_are_told() -> None:
    base = bitnet(plain=("lm_head", "model.layers.0.self_attn", "model.layers.1.self_attn"))
    targets = find_targets(base)
    assert {target.kind for target in targets} == {f"self_attn.{which}_proj" for which in "qkvo"}
    assert coverage(base, targets) == [
        "6 BitLinear modules (mlp.gate_proj, mlp.up_proj, mlp.down_proj) hold packed weights and "
        "can carry no adapter"
    ]


# --- nothing to tell, and PEFT's own refusals ---


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name not in ("albert", *MIXTURES)]
)
def test_nothing_is_told_of_an_ordinary_model(name: str) -> None:
    base = make(name)
    assert coverage(base, find_targets(base)) == []


def test_what_peft_refuses_is_an_input_error() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    base = hf.MambaForCausalLM(hf.MambaConfig(**sizes, use_mambapy=False))
    with pytest.raises(
        InputError, match=r"PEFT refuses these targets: .*'out_proj' is incompatible with Mamba"
    ):
        al.attach(base, methods.lora(2))
