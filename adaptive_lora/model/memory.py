"""Memory in exact bytes, read off the live tensors, and what the process really took."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_lora.allocation.importance import Statistics
from adaptive_lora.model.adapters import adapters, all_weights
from adaptive_lora.model.resize import unwrap

CONSTANTS = "quantization constants"
PARTS = ("base", "head", "adapters", "gradients", "optimizer", "statistics")


def account(
    model: nn.Module, optimizer: Any = None, statistics: Statistics | None = None
) -> dict[str, Any]:
    """Return the bytes that training holds beside activations, by what they are for.

    total = base + head + adapters + gradients + optimizer + statistics; a storage that two names
    share counts once.

    Args:
        model: a model with adapters.
        optimizer: the optimizer that trains it, bare or wrapped by accelerate; None: no state.
        statistics: tensors of an importance; None: none.

    Returns {"base": {type: bytes}, "head": ..., "adapters": ..., "gradients": ..., "optimizer":
    ..., "statistics": ...} in bytes. `base` is what is frozen, its types those of the tensors
    ("uint8" of packed 4-bit weights) and "quantization constants". `head` is what is trained in
    full beside the adapters. `gradients` is one of each trained parameter, which is there between
    backward and `zero_grad`. Values are not looked at, finite or not.

    >>> from transformers import BertConfig, BertModel
    >>> from adaptive_lora import attach, methods
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    >>> account(attach(tiny, methods.lora(4), targets=["query"]))["adapters"]  # 4 x 4 (8 + 8) bytes
    256
    """
    pairs = [parameter for layer in adapters(model).values() for parameter in all_weights(layer)]
    gates = [
        gate for layer in adapters(model).values() for gate in getattr(layer, "lora_E", {}).values()
    ]
    adapter = {id(parameter): parameter for parameter in (*pairs, *gates)}
    trained = {
        id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad
    }
    base: dict[str, int] = {}
    seen: set[int] = set()
    for tensor, kind in _frozen(model, adapter.keys() | trained.keys()):
        # By storage and not by tensor: tied embeddings and views count once.
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            base[kind] = base.get(kind, 0) + size(tensor)
    state = unwrap(optimizer).state if optimizer is not None else {}
    return {
        "base": base,
        "head": sum(size(parameter) for key, parameter in trained.items() if key not in adapter),
        "adapters": sum(map(size, adapter.values())),
        "gradients": sum(map(size, trained.values())),
        "optimizer": sum(state_bytes(state.get(parameter, {})) for parameter in trained.values()),
        "statistics": statistics_bytes(statistics or {}),
    }


def total(parts: dict[str, Any]) -> int:
    """Return the sum of an account, in bytes."""
    return int(
        sum(sum(part.values()) if isinstance(part, dict) else part for part in parts.values())
    )


def size(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements.

    >>> size(torch.zeros(3, 2, dtype=torch.float16))
    12
    """
    return tensor.numel() * tensor.element_size()


def state_bytes(state: dict[str, Any]) -> int:
    """Return the bytes of one parameter's optimizer state."""
    return sum(size(value) for value in state.values() if isinstance(value, torch.Tensor))


def statistics_bytes(statistics: Statistics) -> int:
    """Return the bytes of an importance's statistics."""
    return sum(size(row.tensor) for kind in statistics.values() for row in kind.values())


def adapter_bytes(layers: Iterable[Any], optimizer: Any, statistics: Statistics) -> dict[str, int]:
    """Return the bytes that follow the ranks, for a row of the history; see `account`."""
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    state, weight = unwrap(optimizer).state, sum(map(size, parameters))
    return {
        "adapters": weight,
        "gradients": weight,
        "optimizer": sum(state_bytes(state.get(parameter, {})) for parameter in parameters),
        "statistics": statistics_bytes(statistics),
    }


def _frozen(model: nn.Module, trained: Iterable[int]) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield (tensor, type) of all that is not trained, quantisation constants included."""
    known = set(trained)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in known:
                yield tensor, str(tensor.dtype).removeprefix("torch.")
        weight = getattr(module, "weight", None)
        for state in (
            getattr(weight, "quant_state", None),
            getattr(getattr(weight, "quant_state", None), "state2", None),
        ):
            for tensor in vars(state).values() if state is not None else ():
                if isinstance(tensor, torch.Tensor):
                    yield tensor, CONSTANTS
        # bitsandbytes moves the scales of an 8-bit weight to the module at the first forward pass.
        for holder in (weight, getattr(module, "state", None)):
            scales = getattr(holder, "SCB", None)
            if isinstance(scales, torch.Tensor):
                yield scales, CONSTANTS


def process_memory() -> int:
    """Return what this process holds now, in bytes: CUDA's allocator where there is one, else the
    resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    # Where the system does not say, the peak is the nearest there is.
    return resident() or peak_memory()


def resident() -> int | None:
    """Return the resident set of this process in bytes; None where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else None


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: CUDA's allocator where there is one, else
    the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # With the freed blocks that glibc keeps. Its settings stay the user's: what would give them
    # back makes a step 1.5 to 1.8 times as long.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if platform.system() == "Darwin" else peak * 1024  # kilobytes, except on macOS
    # Linux counts the two apart, and the peak may lag by some pages
    return max(peak, resident() or 0)
