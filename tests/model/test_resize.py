"""`resize` changes ranks and nothing else: function, survivors, moments, optimizer, all or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_bert, make_gpt2
from peft import PeftModel
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers import set_seed

import adaptive_lora as al
from adaptive_lora import Resize, methods
from adaptive_lora.allocation.importance import Statistic
from adaptive_lora.model.adapters import adapters, weights
from adaptive_lora.model.resize import check_optimizer, check_state_shapes, resize

QUERY = "bert.encoder.layer.1.attention.self.query"
OPTIMIZERS: dict[str, Callable[[list], Optimizer]] = {
    "adamw for-loop": lambda p: AdamW(p, lr=1e-2, foreach=False, weight_decay=0.0),
    "adamw foreach": lambda p: AdamW(p, lr=1e-2, foreach=True, weight_decay=0.0),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True, weight_decay=0.0),
    "adamw amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True, weight_decay=0.0),
    "adam": lambda p: Adam(p, lr=1e-2),
    "sgd momentum": lambda p: SGD(p, lr=1e-1, momentum=0.9),
    "sgd": lambda p: SGD(p, lr=1e-1),
}


def make_model(rank: int = 4) -> PeftModel:
    base = make_bert(n_layers=2)
    set_seed(1)
    return al.attach(base, methods.lora(rank), ["query", "value", "output.dense"]).eval()


def batch(step: int) -> dict[str, torch.Tensor]:
    rows = torch.randint(0, 64, (8, 10), generator=torch.Generator().manual_seed(step))
    return {"input_ids": rows, "labels": rows[:, 0] % 2}


def train(model: PeftModel, optimizer: Optimizer, steps: range) -> torch.Tensor:
    for step in steps:
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def trained(make: Callable[[list], Optimizer], rank: int = 4) -> tuple[PeftModel, Optimizer]:
    model = make_model(rank)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(6))
    return model, optimizer


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(99)["input_ids"]).logits


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growing_leaves_the_function_alone(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    before = logits(model)
    resize(model, dict.fromkeys(al.ranks(model), 7), optimizer)
    assert set(al.ranks(model).values()) == {7}
    # New columns of B are exactly zero; only the order of summation over components may differ.
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


def test_shrinking_equals_zeroing_the_dropped_components() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    twin = copy.deepcopy(model)
    keep = (0, 3)
    for layer in adapters(twin).values():
        weights(layer)[1].data[:, [1, 2]] = 0.0
    resize(model, dict.fromkeys(al.ranks(model), Resize(keep)), optimizer)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_weights_and_all_state_bitwise_and_stay_the_same_objects(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    layer = adapters(model)[QUERY]
    before = [
        (
            p,
            p.detach().clone(),
            {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)},
        )
        for p in weights(layer)
    ]
    keep = [2, 0]
    resize(model, {QUERY: Resize(tuple(keep), grow=3)}, optimizer)
    for dim, ((parameter, value, state), now) in enumerate(
        zip(before, weights(layer), strict=True)
    ):
        assert now is parameter
        index = torch.tensor(keep)
        assert torch.equal(now.detach().narrow(dim, 0, 2), value.index_select(dim, index))
        assert set(optimizer.state[now]) == set(optimizer.state[parameter])
        for key, old in state.items():
            new = optimizer.state[now][key]
            if old.dim() == 0:
                assert torch.equal(new, old), key
                continue
            kept = old.index_select(dim, index)
            assert torch.equal(new.narrow(dim, 0, 2), kept), key
            expected = kept.mean() if key in ("exp_avg_sq", "max_exp_avg_sq") else torch.zeros(())
            fresh = new.narrow(dim, 2, 3)
            # The mean is one float32 sum; `fill` writes the same number everywhere.
            torch.testing.assert_close(fresh, expected.expand_as(fresh), rtol=1e-6, atol=0)
    others = [n for n in al.ranks(model) if n != QUERY]
    assert all(al.ranks(model)[n] == 4 for n in others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_a_shrink_equals_training_with_the_dropped_components_dead(
    name: str,
) -> None:
    """The slow twin keeps the full rank, with the dropped components and their state at zero: they
    stay there."""
    model, optimizer = trained(OPTIMIZERS[name])
    twin, twin_optimizer = trained(OPTIMIZERS[name])
    for layer in adapters(twin).values():
        for dim, parameter in enumerate(weights(layer)):
            tensors = [
                parameter.data,
                *(v for v in twin_optimizer.state[parameter].values() if torch.is_tensor(v)),
            ]
            for tensor in tensors:
                if tensor.dim():
                    tensor.index_fill_(dim, torch.tensor([0, 1]), 0.0)
    resize(model, dict.fromkeys(al.ranks(model), Resize((2, 3))), optimizer)
    train(model, optimizer, range(6, 14))
    train(twin, twin_optimizer, range(6, 14))
    # Eight Adam steps amplify the different order of summation; 1e-4 is far below the 1e-1 that
    # training moves.
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_components_learn(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name], rank=1)
    resize(model, {QUERY: 3}, optimizer)
    _, b = weights(adapters(model)[QUERY])
    assert not b[:, 1:].any()
    train(model, optimizer, range(6, 9))
    assert b[:, 1:].all()


def test_first_updates_of_new_components_are_of_the_size_of_the_learning_rate() -> None:
    """With a zero second moment they would be several lr (design, decision 6)."""
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    train(model, optimizer, range(6, 60))
    resize(model, {QUERY: 6}, optimizer)
    _, b = weights(adapters(model)[QUERY])
    before = b.detach().clone()
    train(model, optimizer, range(60, 61))
    assert (b - before).abs()[:, 4:].max() < 2 * 1e-2


def test_rank_zero_costs_nothing_and_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    resize(model, {QUERY: 0}, optimizer)
    assert al.ranks(model)[QUERY] == 0
    assert not sum(
        p.numel() for name, p in model.named_parameters() if QUERY in name and "lora" in name
    )
    al.save(model, tmp_path)
    reloaded = PeftModel.from_pretrained(make_bert(n_layers=2), str(tmp_path)).eval()
    assert QUERY not in al.ranks(reloaded)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-6, atol=1e-6)
    train(model, optimizer, range(6, 8))
    before = logits(model)
    resize(model, {QUERY: 2}, optimizer)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    train(model, optimizer, range(8, 10))
    assert weights(adapters(model)[QUERY])[1].any()


def test_a_resize_works_while_an_old_graph_is_alive() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    # its graph still holds the gradient nodes of the old shapes
    alive = train(model, optimizer, range(6, 7))
    resize(model, dict.fromkeys(al.ranks(model), 2), optimizer)
    train(model, optimizer, range(7, 9))
    assert alive.requires_grad


def test_a_graph_that_still_needs_the_weights_refuses_the_resize_and_nothing_changes() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    waiting = model(**batch(0)).loss
    with pytest.raises(al.InputError, match="waits for backward"):
        resize(model, dict.fromkeys(al.ranks(model), 2), optimizer)
    assert set(al.ranks(model).values()) == {4}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    del waiting
    train(model, optimizer, range(6, 8))


def test_all_or_none() -> None:
    """A moment that is not finite in the last adapter leaves the first ones untouched too."""
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    *_, last = adapters(model).values()
    optimizer.state[weights(last)[0]]["exp_avg_sq"][0, 0] = float("inf")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(al.DivergedError, match="refused"):
        resize(model, dict.fromkeys(al.ranks(model), Resize((0, 1))), optimizer)
    assert set(al.ranks(model).values()) == {4}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_moments_left_behind_are_found_before_the_next_step() -> None:
    """Fused AdamW does not check: it would train wrong or corrupt the heap (faults, 11)."""
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    parameter, _ = weights(adapters(model)[QUERY])
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach()[:2].clone()))
    with pytest.raises(al.IntegrityError, match="exp_avg"):
        check_state_shapes(adapters(model), optimizer)


def test_statistics_follow_the_components() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    a, _ = weights(adapters(model)[QUERY])
    statistics = {
        "row": {QUERY: Statistic(torch.arange(4.0), 0)},
        "column": {QUERY: Statistic(torch.arange(8.0).reshape(2, 4), 1)},
        "start": {QUERY: Statistic(a.detach().clone(), 0, copies=True)},
        "count": {QUERY: Statistic(torch.tensor(7.0), None)},
    }
    resize(model, {QUERY: Resize((3, 1), 1)}, optimizer, statistics)
    assert statistics["row"][QUERY].tensor.tolist() == [3, 1, 2]  # the new one takes the mean
    assert statistics["column"][QUERY].tensor.tolist() == [[3, 1, 4], [7, 5, 4]]
    assert torch.equal(statistics["start"][QUERY].tensor, a)
    assert statistics["count"][QUERY].tensor == 7


def test_plain_ranks_keep_the_largest_components() -> None:
    model = make_model()
    a, b = weights(adapters(model)[QUERY])
    with torch.no_grad():
        b.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]).expand_as(b))
        a.copy_(torch.ones_like(a))
    resize(model, {QUERY: 2})
    assert b[0].tolist() == [4.0, 3.0]


def test_conv1d_grows_without_changing_the_function() -> None:
    set_seed(1)
    model = al.attach(make_gpt2(), methods.lora(2)).eval()
    for _, b in map(weights, adapters(model).values()):
        torch.nn.init.normal_(b)
    ids = batch(0)["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        resize(model, dict.fromkeys(al.ranks(model), 5))
        # logits of size 50
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nowhere": 2}, "carries no adapter"),
        ({QUERY: 17}, "impossible"),
        ({QUERY: -1}, "impossible"),
        ({QUERY: Resize((4,))}, "components 0..3"),
        ({QUERY: Resize((1, 1))}, "components 0..3"),
    ],
)
def test_impossible_changes_are_refused(changes: dict, message: str) -> None:
    model = make_model()
    with pytest.raises(al.InputError, match=message):
        resize(model, changes)
    assert set(al.ranks(model).values()) == {4}


def test_the_last_component_of_all_is_not_dropped() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    config, before = copy.deepcopy(model.peft_config["default"]), logits(model)
    with pytest.raises(al.InputError, match="every adapter would have rank 0"):
        resize(model, dict.fromkeys(al.ranks(model), 0), optimizer)
    assert set(al.ranks(model).values()) == {4}
    assert model.peft_config["default"] == config
    assert torch.equal(logits(model), before)


def test_other_optimizers_are_refused_by_name() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for optimizer in (torch.optim.Adafactor(parameters), torch.optim.RMSprop(parameters)):
        with pytest.raises(al.InputError, match=type(optimizer).__name__):
            check_optimizer(optimizer)
