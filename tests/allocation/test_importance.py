"""Scores equal their definitions: slow twins, and PEFT's AdaLoRA on the same gradients."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from reference import AdaLoraTwin
from torch import nn

from adaptive_lora import InputError
from adaptive_lora.allocation.budget import Constant, Cubic
from adaptive_lora.allocation.history import Decision, from_json
from adaptive_lora.allocation.importance import (
    GradientNorm,
    Magnitude,
    Pairs,
    Sensitivity,
    Uniform,
    WeightDelta,
    Weighted,
)

SHAPES = {"q": (5, 8, 6), "v": (3, 4, 7)}  # target: (R, I, O)


def make_pairs() -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            nn.Parameter(torch.randn(r, i, generator=generator)),
            nn.Parameter(torch.randn(o, r, generator=generator)),
        )
        for name, (r, i, o) in SHAPES.items()
    }


def random_step(pairs: Pairs, step: int) -> None:
    """Fresh gradients, then a small move of the weights, as training would make."""
    generator = torch.Generator().manual_seed(step)
    for pair in pairs.values():
        for parameter in pair:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def move(pairs: Pairs) -> None:
    with torch.no_grad():
        for pair in pairs.values():
            for parameter in pair:
                parameter -= 0.01 * parameter.grad


def test_sensitivity_equals_the_papers_equations() -> None:
    pairs, importance, twin = make_pairs(), Sensitivity(beta1=0.8, beta2=0.9), AdaLoraTwin(0.8, 0.9)
    statistics = importance.start(pairs)
    for step in range(20):
        random_step(pairs, step)
        importance.observe(pairs, statistics)
        twin.observe(
            {
                n: (a.tolist(), b.tolist(), a.grad.tolist(), b.grad.tolist())
                for n, (a, b) in pairs.items()
            }
        )
        move(pairs)
    for name, scores in importance.scores(pairs, statistics).items():
        # Twenty float32 averages against float64.
        torch.testing.assert_close(
            scores.double(), torch.tensor(twin.scores(name), dtype=torch.float64), rtol=1e-4, atol=0
        )


def peft_model(pairs: Pairs) -> nn.Module:
    """The same weights under PEFT's names, with the gate E (PEFT: lora_E) at 1, where our gate
    always stands."""
    model = nn.Module()
    for name, (a, b) in pairs.items():
        model.register_parameter(f"{name}_lora_A", nn.Parameter(a.detach().clone()))
        model.register_parameter(f"{name}_lora_B", nn.Parameter(b.detach().clone()))
        model.register_parameter(f"{name}_lora_E", nn.Parameter(torch.ones(a.shape[0], 1)))
    return model


def dotted(model: nn.Module) -> SimpleNamespace:
    """PEFT finds parameters by `.lora_A.` in dotted names, which a flat module cannot have."""
    named = [(n.replace("_lora_", ".lora_") + ".default", p) for n, p in model.named_parameters()]
    return SimpleNamespace(named_parameters=lambda: named)


def test_scores_and_masks_equal_pefts_adalora_for_fifty_steps() -> None:
    """On the same gradients PEFT's rank allocator scores every triplet as we do, and masks the same
    ones.

    What differs by design: PEFT trains the gate E and sets it to 0 to mask; we have no gate, so
    here E stays 1, its gradient is Σ_j A_kj g_A,kj (what it is at 1), and the comparison ends at
    the first mask that takes effect.
    """
    pairs = make_pairs()
    model = peft_model(pairs)
    config: Any = SimpleNamespace(
        beta1=0.85, beta2=0.85, total_step=60, tinit=5, tfinal=5, deltaT=1, init_r=4, target_r=2
    )
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.adapter_name = config, "default"
    allocator.beta1, allocator.beta2 = 0.85, 0.85
    allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = {}, {}, {}
    importance = Sensitivity()
    statistics = importance.start(pairs)
    for step in range(50):
        random_step(pairs, step)
        for name, (a, b) in pairs.items():
            theirs = {part: getattr(model, f"{name}_lora_{part}") for part in "ABE"}
            theirs["A"].data, theirs["B"].data = a.detach().clone(), b.detach().clone()
            theirs["A"].grad, theirs["B"].grad = a.grad.clone(), b.grad.clone()
            theirs["E"].grad = (a.detach() * a.grad).sum(1, keepdim=True)
        importance.observe(pairs, statistics)
        allocator.update_ipt(dotted(model))
        ours = importance.scores(pairs, statistics)
        for name in pairs:
            element = {
                part: allocator._element_score(f"{name}.lora_{part}.default").detach()
                for part in "ABE"
            }
            theirs_score = allocator._combine_ipt(
                element["E"],
                torch.cat(
                    [element["A"].mean(1, keepdim=True), element["B"].mean(0, keepdim=True).T],
                    dim=1,
                ),
            )
            torch.testing.assert_close(ours[name], theirs_score.flatten(), rtol=1e-5, atol=1e-8)
            kept = set(ours[name].topk(2).indices.tolist())
            assert kept == set(theirs_score.flatten().topk(2).indices.tolist())
        move(pairs)


@pytest.mark.parametrize(
    ("total", "initial", "final"), [(100, 10, 30), (57, 0.1, 0.3), (1000, 0, 1)]
)
def test_the_cubic_schedule_equals_the_papers_at_every_step(
    total: int, initial: float, final: float
) -> None:
    schedule = Cubic(factor=1.5, initial=initial, final=final)
    first, last = schedule.span(total)
    for step in range(total + 1):
        if step < first:
            expected = 1500.0
        elif step < last:
            expected = 1000 + 500 * (1 - (step - first) / (last - first)) ** 3
        else:
            expected = 1000.0
        assert schedule.at(step, total, 1000) == int(expected)
    budgets = [schedule.at(step, total, 1000) for step in range(total + 1)]
    assert budgets == sorted(budgets, reverse=True)


def test_a_schedule_that_does_not_fit_or_would_grow_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"10 training steps, 8 come before.* 5 after"):
        Cubic(initial=8, final=5).check(10)
    with pytest.raises(InputError, match=r"0\.5"):
        Cubic(factor=0.5)
    assert Constant().at(3, 10, 77) == 77


def test_gradient_norm_and_weight_delta_by_definition() -> None:
    pairs = make_pairs()
    start = {n: (a.detach().clone(), b.detach().clone()) for n, (a, b) in pairs.items()}
    gradient, delta = GradientNorm(), WeightDelta()
    gradient_statistics, delta_statistics = gradient.start(pairs), delta.start(pairs)
    norms: dict[str, list[float]] = {name: [] for name in pairs}
    for step in range(7):
        random_step(pairs, step)
        gradient.observe(pairs, gradient_statistics)
        delta.observe(pairs, delta_statistics)
        for name, (a, b) in pairs.items():
            norms[name].append(float(a.grad.norm() + b.grad.norm()))
        move(pairs)
    for name, score in gradient.target_scores(pairs, gradient_statistics).items():
        assert score == pytest.approx(sum(norms[name]) / 7, rel=1e-5)
    for name, score in delta.target_scores(pairs, delta_statistics).items():
        moved = [
            float((now - then).detach().norm())
            for now, then in zip(pairs[name], start[name], strict=True)
        ]
        assert score == pytest.approx(sum(moved), rel=1e-5)


def test_magnitude_is_the_norm_of_the_component() -> None:
    pairs = make_pairs()
    for name, scores in Magnitude().scores(pairs, {}).items():
        a, b = pairs[name]
        for k, score in enumerate(scores):
            assert float(score) == pytest.approx(
                float(torch.outer(b.detach()[:, k], a.detach()[k]).norm()), rel=1e-5
            )


def test_a_weighted_combination_lies_between_its_parts_and_all_equal_scores_are_zero() -> None:
    pairs = make_pairs()
    importance = Weighted(parts=((0.7, Magnitude()), (0.3, Uniform())))
    scores = importance.target_scores(pairs, importance.start(pairs))
    # Uniform's target score is the rank (a sum of ones): min-max gives 1 to the larger rank.
    assert sorted(scores.values())[0] >= 0
    assert sorted(scores.values())[-1] <= 1
    only_equal = Weighted(parts=((1.0, Uniform()),)).scores(pairs, {})
    assert all(not row.any() for row in only_equal.values())


def test_the_parts_of_a_weighted_score_are_its_parts_alone_and_survive_the_history_file() -> None:
    pairs = make_pairs()
    importance = Weighted(parts=((0.7, Magnitude()), (0.2, Uniform()), (0.1, Magnitude())))
    parts = importance.target_parts(pairs, importance.start(pairs))
    alone = Magnitude().target_scores(pairs, {})
    assert parts == {"Magnitude": alone, "Uniform": {"q": 5.0, "v": 3.0}, "Magnitude 2": alone}
    facts = {
        "status": "refused",
        "reason": "",
        "budget": None,
        "parameters_before": 0,
        "parameters_after": 0,
    }
    row = Decision(
        **facts,
        step=1,
        changes={},
        pattern={},
        scores={},
        parts=parts | {"Uniform": {"q": math.inf}},
    )
    again = from_json(json.loads(row.to_json()))
    assert math.isnan(again.parts["Uniform"].pop("q"))
    assert again.parts == parts | {"Uniform": {}}
