"""Change the rank of adapters in place: weights, optimizer moments and importance statistics by one
rule.

A `Resize` says which components stay and how many are new. Kept components keep everything bit for
bit. New ones get a fresh row in A, zero in B (so the function is unchanged), zero in the first
moment, and the mean of the kept entries in the second moment and in the statistics (with 0 there,
Adam's first updates of the new entries would be several lr).

A rotated `Resize` first turns the adapter to its singular components (`singular.rotation`): A' = Nᵀ
A, B' = B Pᵀ, and the moments as the gradients they average: m_A' = P m_A, v_A' = P² v_A, m_B' = m_B
N, v_B' = v_B N² (squares entry by entry, as if the entries of a gradient were uncorrelated).
Measured in `studies/squeeze.py`.

The `nn.Parameter` objects stay the same; only their storage is new. New objects behind an optimizer
would silently stop training, and moments of the wrong shape silently corrupt it under fused AdamW,
so shapes are checked after every change.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.importance import Statistic, Statistics
from adaptive_lora.allocation.singular import rotation
from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.model.adapters import (
    all_weights,
    is_masked,
    park,
    ranks_of,
    sync_config,
    unpark,
    weights,
)
from adaptive_lora.model.condition import Look, Need, look_at
from adaptive_lora.model.quantization import keep_trainable

# 8-bit Adam and Adafactor keep state that is not shaped like its parameter.
SUPPORTED = (AdamW, Adam, SGD)
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_model(model: Any, need: Need = Need.CHANGE) -> Look:
    """Return the adapters of the `PeftModel` that `model` is or holds. Raises `InputError` for one
    whose ranks cannot change, or whose weights were packed for inference."""
    seen = look_at(model, need)
    keep_trainable(seen.model)
    return seen


def check_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer. Raises `InputError` naming one that cannot be resized."""
    inner = unwrap(optimizer)
    # The exact class: what derives from it may keep state of other shapes.
    if type(inner) not in SUPPORTED:
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise InputError(
            f"the optimizer {type(inner).__module__}.{type(inner).__name__} cannot be resized; "
            f"expected one of {names} from torch.optim, whose state has the shape of its "
            "parameters (training.optim: adamw_torch)"
        )
    return inner


def resize(
    model: nn.Module,
    changes: Mapping[str, int | Resize],
    optimizer: Any = None,
    statistics: Statistics | None = None,
    *,
    seed: int = 0,
) -> None:
    """Change the rank of the named adapters, all or none.

    Kept: A[keep], B[:, keep] and all their state, bit for bit. New: A ~ U(±1/√I) (PEFT's own
    start), B = 0. A `Resize` with `rotated` keeps singular components of B A instead, with the
    moments carried over.

    Args:
        model: a model with adapters, or a module that holds one.
        changes: {full target name: new rank, or `Resize`}. A plain rank keeps the components of
            largest |b_k| |a_k| when it shrinks, and adds new ones at the end when it grows.
        optimizer: the optimizer that trains the adapters, bare or wrapped by accelerate; None
            before training.
        statistics: tensors of an importance, resized by the same rule, in place.
        seed: of the new rows of A; drawn from a generator of their own, so that no other random
            number changes.

    Raises `InputError` for unknown targets, those on no linear module, impossible ranks, an
    unsupported optimizer, or adapters whose ranks cannot change (merged, PiSSA), `DivergedError`
    when a new tensor would not be finite; nothing is changed then. Gradients of changed adapters
    are dropped.

    >>> from transformers import BertConfig, BertModel
    >>> from adaptive_lora import attach, methods, ranks
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    >>> model = attach(tiny, methods.lora(4), targets=["query"])
    >>> resize(model, {"encoder.layer.0.attention.self.query": 2})
    >>> ranks(model)
    {'encoder.layer.0.attention.self.query': 2}
    """
    seen = check_model(model)
    if is_masked(seen.model):
        raise InputError(
            "PEFT's AdaLoRA layers cannot be resized; attach with methods.adalora for ranks that "
            "shrink"
        )
    layers = seen.layers
    inner = check_optimizer(optimizer) if optimizer is not None else None
    linear = seen.linear
    plans = {name: _resize_of(name, layers, linear, change) for name, change in changes.items()}
    after = ranks_of(layers) | {name: plan.rank for name, plan in plans.items()}
    if not any(after.values()):
        raise InputError("every adapter would have rank 0; at least one must keep a component")
    # Everything is made and looked at before anything is put in place: a resize is whole or not.
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: _stage(layers[name], plan, inner, generator) for name, plan in plans.items()}
    staged = list(chain.from_iterable(pairs.values()))
    remembered = _stage_statistics(statistics or {}, plans, pairs)
    _check_finite(staged, remembered)

    if staged:
        _forget_compiled()
    _swap(staged)
    for item in staged:
        if inner is not None and item.state:
            # Into the state there is, which keeps Adam's step count.
            inner.state[item.parameter].update(item.state)
    for statistic, tensor in remembered:
        statistic.tensor = tensor
    for name, plan in plans.items():
        _sync_layer(layers[name], plan.rank)
    sync_config(seen.model, layers)
    if inner is not None:
        check_state_shapes(layers, inner)


def _check_finite(staged: list[_Staged], remembered: list[tuple[Statistic, torch.Tensor]]) -> None:
    tensors = [*(t for item in staged for t in item.tensors()), *(t for _, t in remembered)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DivergedError(
            "a resize was refused: weights, moments or statistics would not be finite"
        )


def _stage_statistics(
    statistics: Statistics, plans: Mapping[str, Resize], pairs: Mapping[str, list[_Staged]]
) -> list[tuple[Statistic, torch.Tensor]]:
    """Return each statistic that counts components of what changes, with its new tensor."""
    staged = []
    for name, statistic in (item for row in statistics.values() for item in row.items()):
        dim = statistic.dim
        if name not in plans or dim is None:
            continue
        plan = plans[name]
        if plan.rotated:
            raise InputError(
                "an importance that remembers something of each component cannot be used with a "
                "rule that rotates components; use importance.SingularValues"
            )
        new = _take(statistic.tensor, dim, plan, _mean)
        # A new component starts where it is now, so that it has not moved yet.
        if statistic.copies:
            grown = (dim, len(plan.keep), plan.grow)
            new.narrow(*grown).copy_(pairs[name][dim].value.narrow(*grown))
        staged.append((statistic, new))
    return staged


def check_state_shapes(layers: Mapping[str, Any], optimizer: Any) -> None:
    """Raise `IntegrityError` unless every adapter parameter is in the optimizer, with state of its
    own shape."""
    inner = unwrap(optimizer)
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        for parameter in all_weights(layer):
            if id(parameter) not in known:
                raise IntegrityError(
                    f"an adapter parameter of {name!r} is not in the optimizer: it would not be "
                    "trained"
                )
            for key, value in inner.state.get(parameter, {}).items():
                if _is_moment(value) and value.shape != parameter.shape:
                    raise IntegrityError(
                        f"optimizer state {key!r} of {name!r} has shape {tuple(value.shape)}, its "
                        f"parameter {tuple(parameter.shape)}: the next step would be wrong. Change "
                        "ranks with adaptive_lora.resize only"
                    )


def drop_misfits(optimizer: Any) -> None:
    """Forget the state of parameters that were given another shape behind the optimizer's back."""
    state = unwrap(optimizer).state
    for parameter in list(state):
        values = state[parameter].values()
        if any(_is_moment(value) and value.shape != parameter.shape for value in values):
            del state[parameter]


@dataclass
class _Staged:
    """One parameter with its new value and new optimizer state, not yet in place."""

    parameter: nn.Parameter
    value: torch.Tensor
    state: dict[str, torch.Tensor]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.value
        yield from self.state.values()


def _swap(staged: list[_Staged]) -> None:
    """Put every new value into its parameter, or none.

    swap_tensors, not `.data =`: the latter breaks the next backward while an old graph (a live
    `loss`) exists. It refuses a parameter that a graph still needs, one that was never run
    backward; then the others are swapped back.
    """
    graph = (
        "ranks cannot change while a graph over the adapters waits for backward(): run evaluations "
        "under torch.no_grad(), and delete losses that are not used. Nothing was changed"
    )
    # Asked of all before any is swapped: a swap, taken back or not, ends the old graph for good.
    if any(map(_awaited, (item.parameter for item in staged))):
        raise InputError(graph)
    done: list[tuple[nn.Parameter, nn.Parameter]] = []
    try:
        for item in staged:
            # Of the old shape, and of a step that is done.
            item.parameter.grad = None
            other = nn.Parameter(item.value, requires_grad=item.parameter.requires_grad)
            torch.utils.swap_tensors(item.parameter, other)
            done.append((item.parameter, other))
    except RuntimeError as error:
        for parameter, other in done:
            torch.utils.swap_tensors(parameter, other)
        raise InputError(f"{graph} ({error})") from error


def _forget_compiled() -> None:
    """Have torch compile anew what it has compiled: that holds on to the parameters it was made
    for, which could not be swapped, and after 8 shapes dynamo would give up for good."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo, "utils") and dynamo.utils.counters["stats"]:
        dynamo.reset()


def _awaited(parameter: Any) -> bool:
    """Return whether `torch.utils.swap_tensors` would refuse: a graph holds more of `parameter`
    than the node that adds to its gradient."""
    if parameter._use_count() <= 1:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    return node is not None and parameter._use_count() != 2


def _resize_of(
    name: str, layers: Mapping[str, Any], linear: Mapping[str, Any], change: int | Resize
) -> Resize:
    if name not in layers:
        raise InputError(
            f"{name!r} carries no adapter; targets are {', '.join(list(layers)[:4])} ..."
        )
    layer = layers[name]
    if name not in linear:
        raise InputError(
            f"{name!r} is a {type(layer.get_base_layer()).__name__} with an adapter of PEFT's "
            f"{type(layer).__name__}, whose rank stays as it is; only adapters on linear modules "
            "can be resized"
        )
    pair = weights(layer)
    now = 0 if pair is None else pair[0].shape[0]
    full_rank = min(layer.in_features, layer.out_features)
    impossible = (
        f"rank {{rank}} for {name!r} is impossible; expected 0..{full_rank} = min(in, out features)"
    )
    if isinstance(change, int):
        if not 0 <= change <= full_rank:
            raise InputError(impossible.format(rank=change))
        if pair is None or change >= now:
            change = Resize(tuple(range(now)), change - now)
        else:
            size = pair[0].detach().norm(dim=1) * pair[1].detach().norm(dim=0)
            change = Resize(tuple(sorted(size.topk(change).indices.tolist())))
    if change.grow < 0 or change.rank > full_rank:
        raise InputError(impossible.format(rank=change.rank))
    if len(set(change.keep)) != len(change.keep) or not all(0 <= k < now for k in change.keep):
        raise InputError(f"{name!r} has components 0..{now - 1}; asked to keep {change.keep}")
    return change


def _mean(kept: torch.Tensor) -> float:
    # As if the new entries had met gradients as large as the kept ones; 0 would mean none.
    return kept.mean().item() if kept.numel() else 0.0


def _zero(_kept: torch.Tensor) -> float:
    return 0.0


def _take(tensor: torch.Tensor, dim: int, plan: Resize, fill: Any) -> torch.Tensor:
    """Return `tensor` with the kept components along `dim`, then new ones filled from these."""
    kept = tensor.index_select(dim, torch.tensor(plan.keep, dtype=torch.long, device=tensor.device))
    if not plan.grow:
        return kept
    shape = list(kept.shape)
    shape[dim] = plan.grow
    return torch.cat([kept, kept.new_full(shape, fill(kept))], dim=dim)


def _stage(
    layer: Any, plan: Resize, optimizer: Optimizer | None, generator: torch.Generator
) -> list[_Staged]:
    staged = []
    pair = all_weights(layer)
    turns: tuple[_Turn | None, ...] = (None, None)
    if plan.rotated and len(pair[0]):
        p, n = rotation(pair[0].detach(), pair[1].detach())
        # Gradients turn against the weights, so P and N change places for the moments.
        turns = _Turn(weights=n.T, moments=p), _Turn(weights=p, moments=n.T)
    for parameter, dim, turn in zip(pair, (0, 1), turns, strict=True):
        value = _take(
            parameter.detach() if turn is None else turn.of_weights(parameter.detach(), dim),
            dim,
            plan,
            _zero,
        )
        if dim == 0 and plan.grow:
            # kaiming_uniform_(a=√5) on (R, I), as PEFT starts A
            bound = 1 / math.sqrt(parameter.shape[1])
            # Drawn on the CPU: the same numbers whatever device the model is on.
            fresh = torch.empty(plan.grow, parameter.shape[1]).uniform_(
                -bound, bound, generator=generator
            )
            value[len(plan.keep) :] = fresh.to(value)
        state = {
            key: _take(
                moment if turn is None else turn.of_moment(key, moment, dim),
                dim,
                plan,
                _mean if key in SECOND_MOMENTS else _zero,
            )
            for key, moment in (optimizer.state.get(parameter, {}) if optimizer else {}).items()
            if _is_moment(moment)
        }
        staged.append(_Staged(parameter, value, state))
    return staged


@dataclass
class _Turn:
    """The (R, R) maps of one side of a rotation: new component i is Σ_j map_ij component j."""

    weights: torch.Tensor
    moments: torch.Tensor

    def of_weights(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return self._apply(self.weights, tensor, dim)

    def of_moment(self, key: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return self._apply(
            self.moments.square() if key in SECOND_MOMENTS else self.moments, tensor, dim
        )

    @staticmethod
    def _apply(by: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        # The map is float32 at least, so that 16-bit weights are rounded once, at the end.
        wide = tensor.to(by.dtype)
        return (by @ wide if dim == 0 else wide @ by.T).to(tensor)


def _is_moment(value: Any) -> bool:
    """True for state shaped like its parameter; Adam's step count is a scalar."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _sync_layer(layer: Any, rank: int) -> None:
    """Make the layer's own numbers agree with its tensors; the scale stays as it is."""
    unpark(layer)
    adapter = layer.active_adapters[0]
    layer.r[adapter] = rank
    layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = rank
    layer.lora_alpha[adapter] = layer.scaling[adapter] * rank
    if rank == 0:
        park(layer)
