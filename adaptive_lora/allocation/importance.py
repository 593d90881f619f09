"""Importance: a score per component, from what training shows. Higher is kept.

Symbols: A (R, I), B (O, R); component k is row k of A and column k of B; g_X = ∂L/∂X; t optimizer
steps. An importance is a frozen set of hyper-parameters; what it remembers lies outside, in plain
tensors (`Statistics`), so one rule resizes it and it is saved as safetensors. Nothing here waits
for the device, but for the scores themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from adaptive_lora.allocation.singular import singular_values

Pairs = Mapping[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]
"""{target: (A, B)}; after a backward pass both have gradients."""
Scores = dict[str, torch.Tensor]
"""{target: (R,) float}: a score for each component."""


@dataclass
class Statistic:
    """A tensor an importance keeps for one adapter.

    `dim` is its component dimension (0 as in A, 1 as in B), None for a number that belongs to the
    adapter as a whole. New components take the mean of the kept ones; with `copies` they take the
    new weights instead (a starting point).
    """

    tensor: torch.Tensor
    dim: int | None = 0
    copies: bool = False


Statistics = dict[str, dict[str, Statistic]]
"""{what: {target: Statistic}}: everything an importance remembers."""


class Importance(ABC):
    """How components are scored. Subclasses implement `start`, `observe` and `scores`; all take the
    same tensors."""

    @abstractmethod
    def start(self, pairs: Pairs) -> Statistics:
        """Return empty statistics for these adapters, at the first observation."""

    @abstractmethod
    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        """Take one optimizer step's gradients and weights into `statistics`, in place. Non-finite
        values spread into the statistics, and the decision that meets them is refused and
        recorded."""

    @abstractmethod
    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        """Return the score of every component, each of shape (R,)."""

    def target_scores(self, pairs: Pairs, statistics: Statistics) -> dict[str, float]:
        """Return one score for each target: the sum over its components, unless a subclass defines
        it otherwise."""
        return {name: float(score.sum()) for name, score in self.scores(pairs, statistics).items()}

    def target_parts(self, pairs: Pairs, statistics: Statistics) -> dict[str, dict[str, float]]:
        """Return {part: {target: score}}: what `target_scores` is made of, before any
        normalisation; {} if of one part."""
        return {}


def _tensors(statistics: Statistics, kind: str, pairs: Pairs) -> list[torch.Tensor]:
    return [statistics[kind][name].tensor for name in pairs]


def _times_gradient(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return w g of each parameter, in float32 as the statistics, whatever the parameter's type."""
    gradients = [p.grad.float() for p in parameters if p.grad is not None]
    return list(torch._foreach_mul([p.float() for p in parameters], gradients))


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Importance):
    """AdaLoRA's smoothed sensitivity times uncertainty.

    I = |w g|, Ī ← β₁ Ī + (1 − β₁) I, Ū ← β₂ Ū + (1 − β₂) |I − Ī|, s(w) = Ī Ū;
    S_k = s(λ_k) + mean_j s(A_kj) + mean_o s(B_ok).

    There is no gate λ in plain LoRA, and none is needed: for a gate of value 1 on component k,
    ∂L/∂λ_k = Σ_j A_kj g_A,kj.

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equations 8 to 11.
    """

    beta1: float = 0.85
    beta2: float = 0.85

    def start(self, pairs: Pairs) -> Statistics:
        return {
            f"{moment}_{part}": {
                name: Statistic(torch.zeros_like(pick(a, b), dtype=torch.float32), dim)
                for name, (a, b) in pairs.items()
            }
            for moment in ("sensitivity", "uncertainty")
            for part, dim, pick in (
                ("a", 0, lambda a, _b: a.detach()),
                ("b", 1, lambda _a, b: b.detach()),
                ("gate", 0, lambda a, _b: a.detach()[:, 0]),
            )
        }

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        with torch.no_grad():
            products_a = _times_gradient([a for a, _ in pairs.values()])
            products_b = _times_gradient([b for _, b in pairs.values()])
            gates = [product.sum(1) for product in products_a]
            for part, current in (("a", products_a), ("b", products_b), ("gate", gates)):
                # One call for all adapters: on tensors this small the calls cost most.
                torch._foreach_abs_(current)
                sensitivity = _tensors(statistics, f"sensitivity_{part}", pairs)
                uncertainty = _tensors(statistics, f"uncertainty_{part}", pairs)
                torch._foreach_lerp_(sensitivity, current, 1 - self.beta1)
                torch._foreach_sub_(current, sensitivity)
                torch._foreach_abs_(current)
                torch._foreach_lerp_(uncertainty, current, 1 - self.beta2)

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        def product(part: str, name: str) -> torch.Tensor:
            return (
                statistics[f"sensitivity_{part}"][name].tensor
                * statistics[f"uncertainty_{part}"][name].tensor
            )

        return {
            name: product("gate", name) + product("a", name).mean(1) + product("b", name).mean(0)
            for name in pairs
        }


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Importance):
    """Mean over the observed steps of the gradient norm: |g_A,k| + |g_B,k| a component, ‖g_A‖ +
    ‖g_B‖ a target.

    Source: system 2, Adaptive LoRA by gradient norms and weight deltas (2024).
    """

    def start(self, pairs: Pairs) -> Statistics:
        return {
            "gradient_norm": {
                n: Statistic(torch.zeros_like(a.detach()[:, 0], dtype=torch.float32))
                for n, (a, _) in pairs.items()
            },
            "gradient_norm_target": {
                n: Statistic(torch.zeros((), device=a.device), None) for n, (a, _) in pairs.items()
            },
            # Of each target: one that took no part in a step (LayerDrop) has fewer.
            "steps": {
                n: Statistic(torch.zeros((), device=a.device), None) for n, (a, _) in pairs.items()
            },
        }

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        for name, (a, b) in pairs.items():
            assert a.grad is not None
            assert b.grad is not None
            rows, columns = a.grad.norm(dim=1), b.grad.norm(dim=0)
            statistics["gradient_norm"][name].tensor += rows + columns
            statistics["gradient_norm_target"][name].tensor += rows.norm() + columns.norm()
            statistics["steps"][name].tensor += 1

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        return {
            n: statistics["gradient_norm"][n].tensor / statistics["steps"][n].tensor.clamp_min(1)
            for n in pairs
        }

    def target_scores(self, pairs: Pairs, statistics: Statistics) -> dict[str, float]:
        # 0: never took part in a step
        steps = {n: statistics["steps"][n].tensor.clamp_min(1) for n in pairs}
        return {n: float(statistics["gradient_norm_target"][n].tensor / steps[n]) for n in pairs}


@dataclass(frozen=True, kw_only=True)
class WeightDelta(Importance):
    """How far the weights have come: |A_k − A₀,k| + |B_k − B₀,k| a component, ‖A − A₀‖ + ‖B − B₀‖ a
    target.

    Source: system 2, Adaptive LoRA by gradient norms and weight deltas (2024).
    """

    def start(self, pairs: Pairs) -> Statistics:
        return {
            "start_a": {
                n: Statistic(a.detach().clone(), 0, copies=True) for n, (a, _) in pairs.items()
            },
            "start_b": {
                n: Statistic(b.detach().clone(), 1, copies=True) for n, (_, b) in pairs.items()
            },
        }

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        pass  # the weights themselves remember

    def _moved(
        self, pairs: Pairs, statistics: Statistics, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = pairs[name]
        return a.detach() - statistics["start_a"][name].tensor, b.detach() - statistics["start_b"][
            name
        ].tensor

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        return {
            n: moved_a.norm(dim=1) + moved_b.norm(dim=0)
            for n in pairs
            for moved_a, moved_b in [self._moved(pairs, statistics, n)]
        }

    def target_scores(self, pairs: Pairs, statistics: Statistics) -> dict[str, float]:
        return {
            n: float(moved_a.norm() + moved_b.norm())
            for n in pairs
            for moved_a, moved_b in [self._moved(pairs, statistics, n)]
        }


class Memoryless(Importance):
    """Scores what the weights are now; nothing is remembered of the steps."""

    def start(self, pairs: Pairs) -> Statistics:
        return {}

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Magnitude(Memoryless):
    """|b_k| |a_k|, the Frobenius norm of the component b_k a_k."""

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        return {n: a.detach().norm(dim=1) * b.detach().norm(dim=0) for n, (a, b) in pairs.items()}


@dataclass(frozen=True, kw_only=True)
class SingularValues(Memoryless):
    """σ_k² / (I + O): the energy ‖B A‖² that the k-th singular component holds, for each parameter
    it costs.

    Component k is not row k of A but the k-th largest of Σ_k σ_k u_k v_kᵀ = B A: for rules that
    rotate (`Truncate`). The scale is the same everywhere and left out. Equal costs: the kept
    components are the best approximation of all updates together (Eckart & Young 1936).
    """

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        return {
            n: singular_values(a.detach(), b.detach()).square() / (a.shape[1] + b.shape[0])
            for n, (a, b) in pairs.items()
        }


@dataclass(frozen=True, kw_only=True)
class Uniform(Memoryless):
    """1 for every component: ranks then follow the rule alone."""

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        return {n: torch.ones(a.shape[0]) for n, (a, _) in pairs.items()}


@dataclass(frozen=True, kw_only=True)
class Weighted(Importance):
    """Σ_i w_i s̃_i, where s̃ is s min-max normalised over all targets (over all components for
    component scores)."""

    parts: tuple[tuple[float, Importance], ...] = field()

    def start(self, pairs: Pairs) -> Statistics:
        return {
            f"{i}.{kind}": entries
            for i, (_, part) in enumerate(self.parts)
            for kind, entries in part.start(pairs).items()
        }

    @staticmethod
    def _of(i: int, statistics: Statistics) -> Statistics:
        return {k.removeprefix(f"{i}."): v for k, v in statistics.items() if k.startswith(f"{i}.")}

    def observe(self, pairs: Pairs, statistics: Statistics) -> None:
        for i, (_, part) in enumerate(self.parts):
            part.observe(pairs, self._of(i, statistics))

    def scores(self, pairs: Pairs, statistics: Statistics) -> Scores:
        total = {n: torch.zeros(a.shape[0], device=a.device) for n, (a, _) in pairs.items()}
        for i, (weight, part) in enumerate(self.parts):
            scores = part.scores(pairs, self._of(i, statistics))
            everything = torch.cat([score.float() for score in scores.values()])
            # All equal: the clamp makes every score 0 where a division by 0 would make it NaN.
            low, high = everything.min(), everything.max()
            for n, score in scores.items():
                total[n] += weight * (score - low) / (high - low).clamp_min(1e-30)
        return total

    def target_scores(self, pairs: Pairs, statistics: Statistics) -> dict[str, float]:
        total = dict.fromkeys(pairs, 0.0)
        for (weight, _), raw in zip(
            self.parts, self.target_parts(pairs, statistics).values(), strict=True
        ):
            for n, score in min_max(raw).items():
                total[n] += weight * score
        return total

    def target_parts(self, pairs: Pairs, statistics: Statistics) -> dict[str, dict[str, float]]:
        """Return the scores of each part under the name of its class, in order; a second of a class
        is "Class 2"."""
        result: dict[str, dict[str, float]] = {}
        classes = [type(part).__name__ for _, part in self.parts]
        for i, (_, part) in enumerate(self.parts):
            before = classes[:i].count(classes[i])
            name = f"{classes[i]} {before + 1}" if before else classes[i]
            result[name] = part.target_scores(pairs, self._of(i, statistics))
        return result


def min_max(values: Mapping[str, float]) -> dict[str, float]:
    """Return (v − min) / (max − min) of each value; all equal gives 0, one that is not finite gives
    NaN, for every one.

    >>> min_max({"a": 1.0, "b": 3.0, "c": 2.0})
    {'a': 0.0, 'b': 1.0, 'c': 0.5}
    """
    if not all(map(math.isfinite, values.values())):
        return dict.fromkeys(values, math.nan)
    low, high = min(values.values()), max(values.values())
    return {
        name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()
    }
