"""Compression keeps the best components there are for the budget, and what it writes is what it
says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, scale_of
from hypothesis import given
from hypothesis import strategies as st
from model_folders import Command, digests, result_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_adapter_folder import CONFIGS, make_config, trained

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.compress import Spectra, choose, truncate
from adaptive_lora.adapter_tools.folder import Update, read_adapter
from adaptive_lora.allocation.allocate import parameters
from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.model.adapters import adapters
from adaptive_lora.testing import apart, logits, make_bert

pytest_plugins = ("model_folders",)

spectra = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.integers(0, 9).map(float), min_size=1, max_size=4).map(
        lambda row: tuple(sorted(row, reverse=True))
    ),
    min_size=1,
).filter(lambda found: any(any(row) for row in found.values()))


def energy(found: Spectra, pattern: dict[str, int]) -> float:
    return sum(value**2 for name, row in found.items() for value in row[: pattern[name]])


def every_pattern(found: Spectra) -> list[dict[str, int]]:
    """All ways to truncate."""
    ranges = [range(len(row) + 1) for row in found.values()]
    return [dict(zip(found, ranks, strict=True)) for ranks in itertools.product(*ranges)]


@given(spectra, st.integers(1, 16))
def test_for_equal_costs_it_is_the_best_of_all_truncations(found: Spectra, components: int) -> None:
    """Brute force: no pattern with as many parameters keeps more of Σ σ²."""
    costs = dict.fromkeys(found, 10)
    pattern = choose(found, costs, budget=10 * components)
    assert parameters(pattern, costs) <= 10 * components
    best = max(
        energy(found, other) for other in every_pattern(found) if sum(other.values()) <= components
    )
    assert energy(found, pattern) == best


@given(spectra, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.floats(0.01, 1))
def test_for_unequal_costs_it_is_within_one_component_of_the_best(
    found: Spectra, prices: list[int], share: float
) -> None:
    """A knapsack filled by value per parameter is short of the best by less than the one component
    that did not fit."""
    costs = dict(zip(found, prices, strict=False))
    whole = sum(len(row) * costs[name] for name, row in found.items())
    budget = max(min(costs.values()), int(share * whole))
    pattern = choose(found, costs, budget=budget)
    spent = parameters(pattern, costs)
    assert spent <= budget
    alive = {name: sum(value > 0 for value in row) for name, row in found.items()}
    assert all(pattern[name] <= alive[name] for name in found)
    left = [costs[name] for name in found if pattern[name] < alive[name]]
    assert budget - spent < min(left, default=math.inf)
    best = max(
        energy(found, other) for other in every_pattern(found) if parameters(other, costs) <= budget
    )
    assert (
        best - energy(found, pattern)
        < max(value**2 for row in found.values() for value in row) + 1e-9
    )


def test_a_dear_component_must_be_worth_its_parameters() -> None:
    """The largest singular value is dropped for two smaller ones at the same price."""
    found, costs = {"wide": (3.0,), "narrow": (2.9, 2.8)}, {"wide": 20, "narrow": 10}
    assert choose(found, costs, budget=20) == {"wide": 0, "narrow": 2}
    assert choose(found, costs, budget=None, energy=0.6) == {"wide": 0, "narrow": 2}


@given(spectra, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.floats(0.01, 1))
def test_energy_keeps_its_share_and_no_component_too_many(
    found: Spectra, prices: list[int], share: float
) -> None:
    costs = dict(zip(found, prices, strict=False))
    whole = energy(found, {name: len(row) for name, row in found.items()})
    pattern = choose(found, costs, budget=None, energy=share)
    assert energy(found, pattern) >= share * whole * (1 - 1e-12)
    for name in found:
        if pattern[name]:
            assert energy(found, pattern | {name: pattern[name] - 1}) < share * whole * (1 + 1e-12)
    equal = choose(found, dict.fromkeys(found, 1), budget=None, energy=share)
    fewest = min(
        sum(o.values())
        for o in every_pattern(found)
        if energy(found, o) >= share * whole * (1 - 1e-12)
    )
    assert sum(equal.values()) == fewest


def test_what_is_left_is_the_best_approximation_of_each_update() -> None:
    """The twin: a dense SVD of scale · B A, which the library never forms."""
    generator = torch.Generator().manual_seed(0)
    updates = {
        name: Update(
            *(torch.randn(shape, generator=generator) for shape in ((5, i), (o, 5))), scale
        )
        for name, (i, o, scale) in {"a": (7, 9, 2.0), "b": (12, 6, -0.5), "c": (4, 8, 2.0)}.items()
    }
    result, left = truncate(updates, budget=0.4, rank=None, energy=None)
    assert {update.scale for update in left.values()} == {2.0}
    for name, update in updates.items():
        dense = update.scale * update.b.double() @ update.a.double()
        u, values, v_t = torch.linalg.svd(dense, full_matrices=False)
        assert result.spectra[name] == pytest.approx(
            values[: len(result.spectra[name])].tolist(), rel=1e-6
        )
        k = result.after[name]
        if k == 0:
            assert name not in left
            continue
        best = u[:, :k] * values[:k] @ v_t[:k]
        ours = left[name].scale * left[name].b.double() @ left[name].a.double()
        assert torch.allclose(ours, best, atol=1e-6 * float(values[0]))  # the factors are float32
        # balanced
        assert torch.allclose(left[name].a.norm(dim=1), left[name].b.norm(dim=0), rtol=1e-5)
        assert result.kept[name] == pytest.approx(
            float((values[:k] ** 2).sum() / (values**2).sum())
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_and_live_model_are_the_same_for_every_config(name: str, tmp_path: Path) -> None:
    model = trained(make_config(name))
    model.save_pretrained(tmp_path / "in")
    before = digests(tmp_path / "in")
    there = read_adapter(tmp_path / "in")
    result = al.compress(tmp_path / "in", budget=0.5, output=tmp_path / "out")
    assert digests(tmp_path / "in") == before
    assert result.parameters_before == there.parameters
    assert (
        there.parameters // 2 - min(there.costs.values())
        < result.parameters_after
        <= there.parameters // 2
    )
    written = PeftModel.from_pretrained(make_bert(), str(tmp_path / "out")).eval()
    assert al.lora_parameters(written) == result.parameters_after
    assert al.ranks(written) == {target: rank for target, rank in result.after.items() if rank}
    live = al.compress(model, budget=0.5)
    assert live.after == result.after
    assert live.energy == pytest.approx(result.energy)
    assert apart(logits(written), logits(model)) <= 1e-5
    al.save(model, tmp_path / "saved")
    again = PeftModel.from_pretrained(make_bert(), str(tmp_path / "saved")).eval()
    assert apart(logits(model), logits(again)) <= 1e-5
    assert scale_of(model) == pytest.approx(scale_of(written))


def test_all_of_the_energy_is_the_same_function_and_padding_is_dropped(tmp_path: Path) -> None:
    model = trained(make_config("uniform"))
    for layer in adapters(model).values():  # half of every adapter repeats the other half
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        a[2:], b[:, 2:] = a[:2], -0.5 * b[:, :2]
    before = logits(model)
    model.save_pretrained(tmp_path / "in")
    result = al.compress(tmp_path / "in", energy=1.0, output=tmp_path / "out")
    assert set(result.after.values()) == {2}
    assert result.energy == pytest.approx(1)
    assert (
        apart(before, logits(PeftModel.from_pretrained(make_bert(), str(tmp_path / "out")).eval()))
        <= 1e-5
    )
    # nothing else to keep
    assert al.compress(tmp_path / "in", budget=0.9).parameters_after == result.parameters_after


def test_a_rank_is_the_budget_of_that_uniform_rank_and_can_differ_by_layer(tmp_path: Path) -> None:
    model = trained(make_config("uniform"))
    layers = adapters(model)
    strong = next(iter(layers))
    layers[strong].lora_B["default"].weight.data *= 100
    costs = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    result = al.compress(model, rank=1)
    assert (
        sum(costs.values()) - min(costs.values()) < result.parameters_after <= sum(costs.values())
    )
    assert result.after[strong] == 4


def test_conv1d_grouped_shapes_and_half_precision(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = trained(config, make_gpt2())
    model.save_pretrained(tmp_path / "in")
    al.compress(tmp_path / "in", energy=0.95, output=tmp_path / "out")
    al.compress(model, energy=0.95)
    assert (
        apart(
            logits(model),
            logits(PeftModel.from_pretrained(make_gpt2(), str(tmp_path / "out")).eval()),
        )
        <= 1e-5
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    al.compress(tmp_path / "half", energy=0.9, output=tmp_path / "smaller")
    tensors = load_file(tmp_path / "smaller" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_compressed_model_trains_on(tmp_path: Path) -> None:
    model = trained(make_config("rslora")).train()
    al.compress(model, rank=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = logits(model.eval())
    model.train()(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert apart(before, logits(model.eval())) > 1e-3
    again = al.compress(model, budget=0.5)
    assert again.parameters_after <= again.parameters_before // 2


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing asked": ({}, "give one of budget, rank and energy; got none"),
    "two asked": ({"budget": 10, "rank": 1}, "got budget and rank"),
    "a budget too large": (
        {"budget": 10_000},
        r"budget is 10,000 parameters, but the adapter has only 2,432",
    ),
    "a rank too large": ({"rank": 5}, r"rank 5 on 19 targets costs .* but the adapter has only"),
    "a budget too small": (
        {"budget": 31},
        "31 parameters, but the cheapest component costs 32: no target would be left",
    ),
    "rank 0": ({"rank": 0}, "rank is 0"),
    "half a parameter": ({"budget": 100.5}, "budget is 100.5"),
    "a negative budget": ({"budget": -1}, "budget is -1"),
    "NaN": ({"budget": math.nan}, "budget is nan"),
    "too much energy": ({"energy": 1.01}, r"energy is 1.01; expected a share in \(0, 1\]"),
    "no energy": ({"energy": 0.0}, "energy is 0.0"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    trained(make_config("uniform")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_make_no_sense(name: str, adapter: Path, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    there = read_adapter(adapter)
    message = message.replace("2,432", f"{there.parameters:,}").replace("19", str(len(there.ranks)))
    with pytest.raises(InputError, match=message):
        al.compress(adapter, output=tmp_path / "out", **options)
    model = PeftModel.from_pretrained(make_bert(), str(adapter)).eval()
    before = logits(model)
    with pytest.raises(InputError, match=message):
        al.compress(model, **options)
    assert not (tmp_path / "out").exists()
    assert torch.equal(before, logits(model))


def merged(model: PeftModel) -> None:
    model.merge_adapter()


def poisoned(model: PeftModel) -> None:
    next(iter(adapters(model).values())).lora_B["default"].weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (merged, InputError, "merged into .*unmerge_adapter"),
        (poisoned, DivergedError, "lora_B.* is not finite"),
    ],
)
def test_models_that_cannot_be_compressed(
    damage: Callable[[PeftModel], None], kind: type[Exception], message: str, adapter: Path
) -> None:
    for trainable in (True, False):
        model = PeftModel.from_pretrained(make_bert(), str(adapter), is_trainable=trainable)
        damage(model)
        with pytest.raises(
            kind, match=message if trainable or kind is InputError else "is not finite"
        ):
            al.compress(model, rank=1)


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    dora = get_peft_model(make_bert(), make_config("uniform", use_dora=True, task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="the model's adapter is DoRA"):
        al.compress(dora, rank=1)
    masked = al.attach(make_bert(), methods.peft_adalora(2), ["query"])
    with pytest.raises(InputError, match="the model's adapter is ADALORA"):
        al.compress(masked, rank=1)
    with pytest.raises(InputError, match="has no LoRA adapters"):
        al.compress(make_bert(), rank=1)  # type: ignore[arg-type]
    fresh = al.attach(make_bert(), methods.lora(2), ["query"])
    with pytest.raises(InputError, match="learned nothing: every update is zero"):
        al.compress(fresh, rank=1)
    with pytest.raises(InputError, match="output is for an adapter folder"):
        al.compress(fresh, rank=1, output=tmp_path / "x")  # type: ignore[call-overload]


def test_a_failed_change_leaves_the_scales(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(make_config("all of it"))
    before = {name: layer.scaling["default"] for name, layer in adapters(model).items()}

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("a graph waits")

    monkeypatch.setattr("adaptive_lora.adapter_tools.compress.resize", fail)
    with pytest.raises(InputError, match="a graph waits"):
        al.compress(model, rank=1)
    assert {name: layer.scaling["default"] for name, layer in adapters(model).items()} == before


# --- the command line ---


def test_measured_before_and_after(
    classification_run: Path, reviews_file: str, tmp_path: Path, command: Command
) -> None:
    whole = command(
        "compress",
        classification_run,
        "--run",
        classification_run,
        "--energy",
        1,
        "--output",
        tmp_path / "a",
    )
    assert whole.code == 0, whole.err
    loss = result_of(classification_run)["metrics"]["eval_loss"]
    line = next(line for line in whole.out.splitlines() if line.startswith("eval_loss"))
    assert [float(number) for number in line.split()[1::2]] == pytest.approx([loss, loss], rel=1e-4)
    small = command(
        "compress",
        classification_run,
        "--data",
        reviews_file,
        "--rank",
        1,
        "--output",
        tmp_path / "b",
    )
    assert small.code == 0, small.err
    assert "eval_accuracy" in small.out
    assert (tmp_path / "a" / "ranks.png").stat().st_size > 0
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert "energy kept 100.00 %" in whole.out


def test_bad_input_is_one_message(adapter: Path, tmp_path: Path, command: Command) -> None:
    for arguments, message in (
        ((adapter, "--rank", 99, "--output", tmp_path / "x"), "but the adapter has only"),
        ((adapter, "--output", tmp_path / "x"), "give one of budget, rank and energy; got none"),
        ((adapter, "--rank", 1, "--output", tmp_path), "exists; give another name"),
        ((tmp_path, "--rank", 1, "--output", tmp_path / "x"), "is no adapter folder"),
        (
            (adapter, "--rank", 1, "--data", "x.csv", "--output", tmp_path / "x"),
            "lies in no finished run",
        ),
    ):
        ended = command("compress", *arguments)
        assert ended.code == 2
        assert message in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_base_is_refused(
    classification_run: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    ended = command(
        "compress", adapter, "--run", classification_run, "--rank", 1, "--output", tmp_path / "x"
    )
    assert ended.code == IntegrityError.exit_code
    assert "does not fit this model" in ended.err
    assert not (tmp_path / "x").exists()
