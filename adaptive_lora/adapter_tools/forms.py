"""The forms of one adapter that its readers agree on: other tensors and config, the same function.
Pure, no base weights.

native    mixed ranks, one scale: r = the largest rank, lora_alpha = scale · r. Exact in PEFT, and
          wherever one lora_alpha / r is applied to every module (vLLM)
uniform   A and B padded with zeros to the largest rank r, the scale in B, lora_alpha = r; every
          layer of an adapted kind has an adapter, of zeros where there was none. Exact under every
          reader's arithmetic
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adaptive_lora.adapter_tools.folder import StoredAdapter, Update, one_scale, times, with_updates
from adaptive_lora.naming import split_name

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank (vllm/config/lora.py, `MaxLoRARanks`)."""

LinearFeatures = Mapping[str, tuple[int, int]]
"""{full name of a linear module: (I, O)}."""


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank with which vLLM takes an adapter of this `r`; None when
    there is none.

    >>> [max_lora_rank(rank) for rank in (1, 6, 16, 513)]
    [1, 8, 16, None]
    """
    return next((size for size in MAX_LORA_RANKS if size >= rank), None)


def native(adapter: StoredAdapter) -> StoredAdapter:
    """Return the adapter with one scale; see `one_scale`."""
    return with_updates(adapter, one_scale(adapter.updates))


def uniform(adapter: StoredAdapter, modules: LinearFeatures | None = None) -> StoredAdapter:
    """Return the adapter with every rank the largest, scale 1, and an adapter in every layer of
    each adapted kind.

    Args:
        modules: the linear modules of the base model; without them layers are taken to run from 0
            to the last one adapted in their stack, and to be alike.
    """
    # llama.cpp divides lora_alpha by the tensor's own rank: one scale needs one rank.
    rank = max(update.rank for update in adapter.updates.values())
    some = next(iter(adapter.updates.values()))
    updates = {}
    for name, (inputs, outputs) in _every_layer(adapter, modules).items():
        update = adapter.updates.get(name) or Update(
            some.a.new_zeros(0, inputs), some.b.new_zeros(outputs, 0), 1.0
        )
        a, b = update.a.new_zeros(rank, inputs), times(update.b, update.scale)
        a[: update.rank] = update.a
        updates[name] = Update(
            a, torch.cat([b, b.new_zeros(outputs, rank - update.rank)], dim=1), 1.0
        )
    result = with_updates(adapter, updates)
    short = _short_names(result, modules)
    if short is None:
        return result
    config = copy.copy(result.config)
    config.target_modules = sorted(short)
    return replace(result, config=config)


def _every_layer(
    adapter: StoredAdapter, modules: LinearFeatures | None
) -> dict[str, tuple[int, int]]:
    """Return (I, O) of every module that must have an adapter, in the order of layers."""
    own = {name: (update.a.shape[1], update.b.shape[0]) for name, update in adapter.updates.items()}
    places = [(*split_name(name), shape) for name, shape in own.items()]
    alike = {(stack, kind): shape for stack, index, kind, shape in places if index is not None}
    if modules is not None:
        wanted = {
            name: shape
            for name, shape in modules.items()
            if name in own or (split_name(name)[1] is not None and split_name(name)[::2] in alike)
        }
        return {**wanted, **own}
    last: dict[str, int] = {}
    for stack, index, _, _ in places:
        last[stack] = max(last.get(stack, 0), index or 0)
    added = {
        f"{stack}.{index}.{kind}": shape
        for (stack, kind), shape in sorted(alike.items())
        for index in range(last[stack] + 1)
    }
    return {**own, **added, **own}  # own first, each with its own shape


def _short_names(adapter: StoredAdapter, modules: LinearFeatures | None) -> Any:
    """Return the last parts of the names ("q_proj"), as most readers know them; None where they
    would mean other modules."""
    leaves = {name.rpartition(".")[2] for name in adapter.updates}
    if modules is None:
        return None
    return (
        leaves
        if all(name in adapter.updates for name in modules if name.rpartition(".")[2] in leaves)
        else None
    )
