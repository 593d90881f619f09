"""`squeeze`: adapters turned to their singular components in mid-training, with the optimizer's
state."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import make_bert, make_gpt2
from test_resize import OPTIMIZERS, QUERY, batch, logits, make_model, train, trained

import adaptive_lora as al
from adaptive_lora import DivergedError, InputError, Resize, methods
from adaptive_lora.allocation import history
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.importance import (
    Importance,
    Magnitude,
    Sensitivity,
    SingularValues,
    Statistic,
)
from adaptive_lora.allocation.singular import rotation, singular_values
from adaptive_lora.allocation.when import At
from adaptive_lora.model.adapters import adapters, all_weights, weights
from adaptive_lora.model.resize import resize


def updates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: b.detach() @ a.detach()
        for n, layer in adapters(model).items()
        for a, b in [all_weights(layer)]
    }


def rotated(model: torch.nn.Module, rank: int | None = None, grow: int = 0) -> dict[str, Resize]:
    return {
        n: Resize(tuple(range(r if rank is None else rank)), grow, True)
        for n, r in al.ranks(model).items()
    }


def test_singular_values_are_those_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank, inputs, outputs in [(1, 5, 3), (3, 7, 5), (4, 4, 9)]:
        a, b = (
            torch.randn(rank, inputs, generator=generator),
            torch.randn(outputs, rank, generator=generator),
        )
        expected = torch.linalg.svdvals(b.double() @ a.double())[:rank].float()
        torch.testing.assert_close(
            singular_values(a, b)[: len(expected)], expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rotation_that_keeps_everything_leaves_the_function_alone(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    before = logits(model)
    resize(model, rotated(model, grow=2), optimizer)
    # Float32 of four products instead of one; the new components are zero.
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert set(al.ranks(model).values()) == {6}
    train(model, optimizer, range(6, 9))
    assert not torch.equal(logits(model), before)


def test_what_is_kept_is_the_best_approximation_and_balanced() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    full = updates(model)
    resize(model, rotated(model, 2), optimizer)
    for name, update in updates(model).items():
        u, s, vt = torch.linalg.svd(full[name].double())
        torch.testing.assert_close(
            update, ((u[:, :2] * s[:2]) @ vt[:2]).float(), rtol=1e-4, atol=1e-6
        )
        a, b = weights(adapters(model)[name])
        torch.testing.assert_close(
            a.detach().norm(dim=1), b.detach().norm(dim=0), rtol=1e-4, atol=0
        )
        gram = a.detach() @ a.detach().T
        assert float((gram - gram.diag().diag()).abs().max()) < 1e-5 * float(gram.max())


def test_state_that_is_a_gradient_becomes_the_gradient_of_the_rotated_adapter() -> None:
    """The law behind the maps: SGD's momentum buffer after one step is the gradient itself."""
    model = make_model()
    train(
        model,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        range(4),
    )
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9
    )
    train(model, optimizer, range(7, 8))  # lr 0: the weights stay, the buffer is the gradient
    resize(model, rotated(model), optimizer)
    model(**batch(7)).loss.backward()
    for layer in adapters(model).values():
        for parameter in weights(layer):
            carried = optimizer.state[parameter]["momentum_buffer"]
            # Relative to the largest entry: two float32 paths through a pseudo-inverse.
            assert float((carried - parameter.grad).abs().max()) < 1e-4 * float(
                parameter.grad.abs().max()
            )


def test_second_moments_are_carried_by_the_squares_and_stay_positive() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw amsgrad"])
    a, b = (p for p in weights(adapters(model)[QUERY]))
    p, n = rotation(a.detach(), b.detach())
    before = {key: (optimizer.state[a][key].clone(), optimizer.state[b][key].clone()) for key in
              ("exp_avg_sq", "max_exp_avg_sq")}  # fmt: skip
    steps = optimizer.state[a]["step"].clone()
    resize(model, {QUERY: Resize((0, 1), 0, True)}, optimizer)
    for key, (of_a, of_b) in before.items():
        torch.testing.assert_close(
            optimizer.state[a][key], (p.square() @ of_a)[:2], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            optimizer.state[b][key], (of_b @ n.square())[:, :2], rtol=1e-5, atol=0
        )
        assert bool((optimizer.state[a][key] >= 0).all())
    assert torch.equal(optimizer.state[a]["step"], steps)


def test_a_component_without_an_update_can_still_learn() -> None:
    """B = 0 at the start: balanced factors would both be zero, and stay so."""
    model = make_model()
    resize(model, rotated(model, 3))
    for layer in adapters(model).values():
        a, b = weights(layer)
        assert not b.any()
        assert bool((a.norm(dim=1) > 0.1).all())
    model(**batch(0)).loss.backward()
    assert all(float(weights(layer)[1].grad.abs().max()) > 0 for layer in adapters(model).values())


def test_dependent_rows_of_a_are_no_obstacle() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw foreach"])
    for layer in adapters(model).values():
        weights(layer)[0].data[3] = weights(layer)[0].data[2]
    before = logits(model)
    resize(model, rotated(model), optimizer)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_dtypes_stay() -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, range(2))
    resize(model, rotated(model, 2), optimizer)
    assert {p.dtype for layer in adapters(model).values() for p in weights(layer)} == {
        torch.bfloat16
    }
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {
        torch.bfloat16
    }


def test_nothing_changes_when_a_rotation_is_not_finite_or_statistics_would_be_mixed() -> None:
    model, optimizer = trained(OPTIMIZERS["adamw fused"])
    optimizer.state[weights(adapters(model)[QUERY])[0]]["exp_avg"][0, 0] = float("nan")
    before = copy.deepcopy(updates(model))
    with pytest.raises(DivergedError, match="not be finite"):
        resize(model, rotated(model, 2), optimizer)
    statistics = {"seen": {QUERY: Statistic(torch.ones(4))}}
    with pytest.raises(InputError, match=r"rotates components; use importance\.SingularValues"):
        resize(model, {QUERY: Resize((0,), 0, True)}, None, statistics)
    assert all(torch.equal(update, before[name]) for name, update in updates(model).items())
    assert set(al.ranks(model).values()) == {4}


def test_scores_weigh_energy_by_cost_and_not_finite_weights_give_not_finite_scores() -> None:
    model, _ = trained(OPTIMIZERS["adamw fused"])
    pairs = {name: weights(layer) for name, layer in adapters(model).items()}
    scores = SingularValues().scores(pairs, {})
    for name, update in updates(model).items():
        cost = sum(update.shape)
        expected = torch.linalg.svdvals(update)[:4].square() / cost
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-9)
    pairs[QUERY][0].data[0, 0] = float("inf")
    assert bool(SingularValues().scores(pairs, {})[QUERY].isnan().all())


def test_for_conv1d_too() -> None:
    model = al.attach(make_gpt2(2), methods.lora(4), ["c_attn", "c_fc"])
    for layer in adapters(model).values():
        torch.nn.init.normal_(weights(layer)[1])
    before = updates(model)
    resize(model, rotated(model))
    for name, update in updates(model).items():
        torch.testing.assert_close(update, before[name], rtol=1e-4, atol=1e-4)


def test_a_row_of_history_remembers_the_rotation_and_old_rows_have_none() -> None:
    fields = {"step": 1, "status": "changed", "reason": None, "budget": 1, "parameters_before": 2}
    row = Decision(
        **fields,
        parameters_after=1,
        changes={"q": Resize((0,), 0, True)},
        pattern={"q": 1},
        scores={},
    )
    text = json.loads(row.to_json())
    assert history.from_json(text) == row
    del text["changes"]["q"]["rotated"]
    assert history.from_json(text).changes["q"] == Resize((0,))
    assert history.replay({"q": 3}, [row]) == {"q": 1}


def test_the_default_cuts_in_four_stages_from_twice_the_budget() -> None:
    method = methods.squeeze()
    assert isinstance(method.adaptation.when, At)
    # the first is at the start of the fall
    assert method.adaptation.when.steps(100) == [30, 40, 50, 60, 70]
    assert method.adaptation.schedule.at(30, 100, 8) == 16
    assert method.adaptation.schedule.at(70, 100, 8) == 8
    with pytest.raises(InputError, match="steps between decisions are 0"):
        methods.squeeze(every=0)
    with pytest.raises(InputError, match="expected a whole number >= 1, or a fraction"):
        methods.squeeze(every=-0.1)


def run(importance: Importance) -> al.RankController:
    """Train for eight steps with `squeeze`, scored by another importance."""
    base = methods.squeeze(2, factor=2.0, initial=2, final=2, every=2)
    method = replace(base, adaptation=replace(base.adaptation, importance=importance))
    model = al.attach(make_bert(n_layers=2), method, ["query"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = al.RankController(model, optimizer, method, 8)
    for _ in range(8):
        model(**batch(1)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return controller


def test_an_importance_that_remembers_nothing_goes_with_the_rule_too() -> None:
    assert sum(al.ranks(run(Magnitude()).model).values()) == 4


def test_an_importance_that_remembers_components_is_refused() -> None:
    with pytest.raises(InputError, match="rotates components"):
        run(Sensitivity())
