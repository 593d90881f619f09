"""Fewer parameters in a trained adapter: its largest singular components under one budget for all
targets.

    scale · B A = Σ_k σ_k u_k v_kᵀ,   kept: the components of highest σ_k² / (I + O) that the budget
    pays for

σ_k² is what dropping a component costs in ||ΔW||_F², I + O what keeping it costs in parameters.
Where all targets cost the same this is the optimal truncation: no other adapter with these
parameters is nearer to the trained one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

import torch
from torch import nn
from tqdm import tqdm

from adaptive_lora.adapter_tools.checks import check_supported
from adaptive_lora.adapter_tools.folder import (
    StoredAdapter,
    Update,
    one_scale,
    read_adapter,
    with_updates,
    write_adapter,
)
from adaptive_lora.allocation.allocate import RankPattern, parameters, top_k
from adaptive_lora.allocation.singular import balanced
from adaptive_lora.errors import DivergedError, InputError
from adaptive_lora.files import check_new
from adaptive_lora.model.adapters import adapters, non_finite, weights
from adaptive_lora.model.condition import MERGE, Need
from adaptive_lora.model.resize import check_model, resize
from adaptive_lora.model.saving import kind_of

Spectra = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Compression:
    """What was kept.

    Args:
        spectra: {target: singular values of scale · B A, falling}, before.
        costs: {target: parameters of one component, I + O}.
        before, after: {target: rank}; 0 means that the target has no adapter any more.
        adapter: the result as plain data; None when a model was changed in place.
        path: the folder it was written to, if it was.
    """

    spectra: Spectra
    costs: dict[str, int]
    before: RankPattern
    after: RankPattern
    adapter: StoredAdapter | None = None
    path: Path | None = None

    @property
    def parameters_before(self) -> int:
        """LoRA parameters before."""
        return parameters(self.before, self.costs)

    @property
    def parameters_after(self) -> int:
        """LoRA parameters after."""
        return parameters(self.after, self.costs)

    @property
    def kept(self) -> dict[str, float]:
        """{target: share of its Σ_k σ_k² that was kept}; NaN where there was none."""
        return {
            name: _energy(values[: self.after[name]]) / total
            if (total := _energy(values))
            else math.nan
            for name, values in self.spectra.items()
        }

    @property
    def energy(self) -> float:
        """Share of Σ σ_k² over all targets that was kept."""
        kept = sum(_energy(values[: self.after[name]]) for name, values in self.spectra.items())
        return kept / sum(map(_energy, self.spectra.values()))


def _energy(values: Iterable[float]) -> float:
    return math.fsum(value**2 for value in values)


@overload
def compress(
    adapter: str | Path,
    *,
    budget: float | None = ...,
    rank: int | None = ...,
    energy: float | None = ...,
    output: str | Path | None = ...,
) -> Compression: ...


@overload
def compress(
    adapter: nn.Module,
    *,
    budget: float | None = ...,
    rank: int | None = ...,
    energy: float | None = ...,
) -> Compression: ...


def compress(
    adapter: str | Path | nn.Module,
    *,
    budget: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    output: str | Path | None = None,
) -> Compression:
    """Keep the largest singular components of a trained adapter under one budget, over all targets
    together.

    Give one of `budget`, `rank`, `energy`. The result has balanced factors (√σ_k on either side)
    and one constant scale. Components without an update (σ_k = 0) are never kept, so an adapter may
    end below its budget.

    Args:
        adapter: a PEFT LoRA folder, a run directory, or a `PeftModel`, which is changed in place.
        budget: LoRA parameters of the result; below 1 a share of those there are.
        rank: the budget of this uniform rank on the targets there are.
        energy: the share of Σ σ_k² over all targets to keep, in (0, 1], with few parameters.
        output: the folder to write; it must not exist. Without it the result is in `adapter` of
            what is returned.

    The result is never above the budget, and below it by less than the cheapest component that
    could still be added. No O x I matrix is ever formed; the arithmetic is in float64. An optimizer
    of the model must be made anew.

    Raises `InputError` for a budget above what there is or below the cheapest component, for
    adapters that learned nothing or are no sum of components (DoRA), `IntegrityError` or
    `DivergedError` for weights that are not finite. Nothing is changed or written then.

    Source: Eckart & Young 1936, Psychometrika 1 (the best approximation of a rank).

    >>> from transformers import BertConfig, BertModel
    >>> import adaptive_lora as al
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=2, **sizes))
    >>> model = al.attach(tiny, al.methods.lora(4), targets=["query"])
    >>> for name, weight in model.named_parameters():
    ...     if "lora_B" in name:
    ...         _ = torch.nn.init.normal_(weight, std=2.0 if "layer.0" in name else 0.1)
    >>> result = compress(model, budget=0.5)
    >>> result.parameters_before, result.parameters_after
    (128, 64)
    >>> list(al.ranks(model).values())
    [4, 0]
    """
    if isinstance(adapter, str | Path):
        if output is not None:
            check_new(output)
        source = read_adapter(adapter)
        result, updates = truncate(source.updates, budget=budget, rank=rank, energy=energy)
        smaller = with_updates(source, updates)
        path = None if output is None else write_adapter(smaller, output)
        return Compression(**{**vars(result), "adapter": smaller, "path": path})
    if output is not None:
        raise InputError(
            "output is for an adapter folder; a model is changed in place: save it with "
            "adaptive_lora.save"
        )
    source_updates = updates_of(adapter)
    result, updates = truncate(source_updates, budget=budget, rank=rank, energy=energy)
    _put(adapter, result.after, updates)
    return result


def truncate(
    updates: Mapping[str, Update], *, budget: float | None, rank: int | None, energy: float | None
) -> tuple[Compression, dict[str, Update]]:
    """Return what is kept, and the updates that are left of it; arguments as of `compress`."""
    costs = {name: update.cost for name, update in updates.items()}
    before = {name: update.rank for name, update in updates.items()}
    allowed = _budget(before, costs, budget=budget, rank=rank, energy=energy)
    factors, spectra = {}, {}
    for name, update in tqdm(
        one_scale(updates).items(),
        desc="singular values",
        disable=not sys.stderr.isatty(),
        leave=False,
    ):
        a, b, values = balanced(update.a.detach().cpu(), update.b.detach().cpu())
        given = updates[name]  # what is written is no larger than what was read
        factors[name] = Update(a.to(given.a.dtype), b.to(given.b.dtype), update.scale)
        spectra[name] = tuple((update.scale * values).tolist())
    after = choose(spectra, costs, budget=allowed, energy=energy)
    left = {
        name: Update(
            factors[name].a[:k].clone(), factors[name].b[:, :k].clone(), factors[name].scale
        )
        for name, k in after.items()
        if k
    }
    return Compression(spectra, costs, before, after), left


def _budget(
    ranks: RankPattern,
    costs: Mapping[str, int],
    *,
    budget: float | None,
    rank: int | None,
    energy: float | None,
) -> int | None:
    """Return the budget in parameters, None for a share of the energy. Raises `InputError` for what
    makes no sense."""
    given = [
        name
        for name, value in (("budget", budget), ("rank", rank), ("energy", energy))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError(
            f"give one of budget, rank and energy; got {' and '.join(given) or 'none'}"
        )
    if energy is not None:
        if not 0 < energy <= 1:
            raise InputError(f"energy is {energy}; expected a share in (0, 1], such as 0.99")
        return None
    there, cheapest = parameters(ranks, costs), min(costs.values())
    if rank is not None:
        if rank < 1:
            raise InputError(f"rank is {rank}; expected a whole number of at least 1")
        allowed, asked = rank * sum(costs.values()), f"rank {rank} on {len(costs)} targets costs"
    else:
        assert budget is not None
        allowed, asked = _in_parameters(budget, there), "the budget is"
    if allowed > there:
        raise InputError(
            f"{asked} {allowed:,} parameters, but the adapter has only {there:,} (ranks "
            f"{min(ranks.values())}..{max(ranks.values())}); give less"
        )
    if allowed < cheapest:
        raise InputError(
            f"{asked} {allowed:,} parameters, but the cheapest component costs {cheapest:,}: no "
            "target would be left; give more"
        )
    return allowed


def _in_parameters(budget: float, there: int) -> int:
    """Return a budget as a number of parameters; below 1 it is a share of those there are."""
    if not (math.isfinite(budget) and budget > 0) or (budget >= 1 and budget != int(budget)):
        raise InputError(
            f"budget is {budget}; expected a number of parameters, or a share below 1 of those "
            "there are"
        )
    return int(budget * there if budget < 1 else budget)


def choose(
    spectra: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    *,
    budget: int | None,
    energy: float | None = None,
) -> RankPattern:
    """Return how many of the largest components of every target to keep: what `budget` pays for, or
    `energy` needs.

    By σ² per parameter, the highest first. For `energy` the components that turn out not to be
    needed are taken out again, the one of least σ² per parameter first.

    Args:
        spectra: {target: finite singular values, falling}.
        costs: {target: parameters of one component, I + O}.
        budget: parameters that may be spent, at least the cheapest component.
        energy: share of Σ σ² to keep, in (0, 1].

    Raises `InputError` when every singular value is zero.

    >>> choose({"a": [3.0, 1.0], "b": [2.0, 0.0]}, {"a": 10, "b": 10}, budget=20)
    {'a': 1, 'b': 1}
    >>> choose({"a": [3.0, 1.0], "b": [2.0, 0.0]}, {"a": 10, "b": 10}, budget=None, energy=0.9)
    {'a': 1, 'b': 1}
    """
    alive = {
        name: [value for value in values if value > _noise(name, spectra, costs)]
        for name, values in spectra.items()
    }
    if not any(alive.values()):
        raise InputError(
            "the adapter learned nothing: every update is zero, so there is nothing to keep"
        )
    scores = {name: [value**2 / costs[name] for value in values] for name, values in alive.items()}
    if energy is not None:
        return _holding(energy, alive, scores)
    assert budget is not None
    bounds = {name: len(values) for name, values in alive.items()}
    kept = top_k(scores, costs, budget, minimum=dict.fromkeys(costs, 0), maximum=bounds)
    return {name: len(indices) for name, indices in kept.items()}


def _holding(
    energy: float, alive: Mapping[str, Sequence[float]], scores: Mapping[str, Sequence[float]]
) -> RankPattern:
    """Return how many components hold this share of Σ σ²; see `choose`."""
    order = sorted(
        ((-score, name, k) for name, row in scores.items() for k, score in enumerate(row))
    )
    squares = [alive[name][k] ** 2 for _, name, k in order]
    wanted = energy * math.fsum(squares) * (1 - len(squares) * sys.float_info.epsilon)
    count = next(
        (n for n, total in enumerate(accumulate(squares), start=1) if total >= wanted), len(squares)
    )
    spare = math.fsum(squares[:count]) - wanted
    pattern = dict.fromkeys(alive, 0)
    for _, name, _ in order[:count]:
        pattern[name] += 1
    for (_, name, k), square in zip(
        reversed(order[:count]), reversed(squares[:count]), strict=True
    ):
        if square <= spare and k == pattern[name] - 1:
            pattern[name] -= 1
            spare -= square
    return pattern


def _noise(name: str, spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int]) -> float:
    """Return the size up to which a singular value is rounding, as NumPy's and MATLAB's `rank` have
    it."""
    return max(spectra[name], default=0.0) * costs[name] * sys.float_info.epsilon


def updates_of(model: nn.Module) -> dict[str, Update]:
    """Return {full target name: its update} of the active adapter; targets of rank 0 are left out.

    Raises `InputError` for models and adapters that cannot be changed in place, `DivergedError` for
    weights that are not finite.
    """
    seen = check_model(model, Need.CHANGE | Need.SAVE)
    model, config, layers = seen.model, seen.config, seen.layers
    if (kind := kind_of(config)) != "LORA":
        raise InputError(f"the model's adapter is {kind}; expected LORA")
    check_supported("the model's adapter", config)
    if other := [name for name in layers if name not in seen.linear]:
        raise InputError(
            f"the adapter on {other[0]!r}, a {type(layers[other[0]].get_base_layer()).__name__}, "
            "is no pair of matrices on a linear module; train without it, or "
            f"{MERGE}"
        )
    bad = non_finite(model)
    pairs = {name: pair for name, layer in layers.items() if (pair := weights(layer)) is not None}
    bad += tuple(
        name
        for name, pair in pairs.items()
        for tensor in pair
        if not bool(torch.isfinite(tensor.detach()).all())
    )
    if bad:
        raise DivergedError(f"not compressed: {bad[0]} is not finite", where=bad)
    return {
        name: Update(a, b, layers[name].scaling[layers[name].active_adapters[0]])
        for name, (a, b) in pairs.items()
    }


def _put(model: nn.Module, ranks: RankPattern, updates: Mapping[str, Update]) -> None:
    """Give the model's adapters these ranks and weights, and one scale."""
    layers = adapters(model)
    scale = next(iter(updates.values())).scale
    before = {name: dict(layer.scaling) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            # Before the resize, which writes a config that has one scale for all.
            layer.scaling[layer.active_adapters[0]] = scale
        resize(model, ranks)
    except Exception:
        for name, layer in layers.items():
            layer.scaling.update(before[name])
        raise
    for name, update in updates.items():
        for parameter, value in zip(weights(layers[name]) or (), (update.a, update.b), strict=True):
            parameter.data.copy_(value)
