"""What other programs make of an adapter folder, in a few lines each, read from files alone.

Each puts its updates on a plain base model by forward hooks, by its own arithmetic:

    vLLM        lora_alpha / r of the config for every module, whatever its rank (lora_alpha / √r
                with use_rslora), rank and alpha patterns not read; 0.33.0 reads both, by PEFT's
                rule. Buffers hold max_lora_rank >= r components; q, k, v and gate, up are slices of
                one packed module, a slice without an adapter is zero. (vllm/lora: peft_helper.py,
                lora_weights.py, layers/)
    llama.cpp   lora_alpha / the tensor's own rank, B.shape[1]. (src/llama-adapter.h, get_scale;
                lora_alpha is all that convert_lora_to_gguf.py keeps of the config)
    SGLang, TGI, LoRAX: as vLLM, and every layer of a module kind must have an adapter, all of one
                rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from adaptive_lora.naming import split_name

PREFIX = "base_model.model."
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks


def read(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return (config, {target: (A, B)}, other tensors)."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {
        name.removeprefix(PREFIX): t
        for name, t in load_file(folder / "adapter_model.safetensors").items()
    }
    ends = (".lora_A.weight", ".lora_B.weight")
    targets = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    others = {name: t for name, t in tensors.items() if not name.endswith(ends)}
    return (
        config,
        {name: (tensors[name + ends[0]], tensors[name + ends[1]]) for name in targets},
        others,
    )


def with_heads(base: nn.Module, others: dict[str, torch.Tensor]) -> None:
    # of an adapted output layer
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in others.items()}
    missing = base.load_state_dict(plain, strict=False)
    assert not missing.unexpected_keys


def add(base: nn.Module, name: str, update: Any) -> None:
    base.get_submodule(name.lstrip(".")).register_forward_hook(
        lambda _m, arguments, out: out + update(arguments[0])
    )


def vllm(
    base: nn.Module, folder: Path, max_lora_rank: int | None = None, *, patterns: bool = False
) -> nn.Module:
    """Return `base` as vLLM would serve it with the adapter; with `patterns`, as a version does
    that reads those.

    It refuses heads (but "classifier" and "score" in the newest); here they are put in place.
    """
    config, pairs, others = read(folder)
    slots = max_lora_rank or min(size for size in MAX_LORA_RANKS if size >= config["r"])
    assert max(a.shape[0] for a, _ in pairs.values()) <= config["r"] <= slots, (
        "rank is greater than max_lora_rank"
    )

    def field(pattern: str, default: str, name: str) -> float:
        keys = config.get(pattern) or {} if patterns else {}
        return next(
            (v for key, v in keys.items() if re.match(rf"(.*\.)?({key})$", name)), config[default]
        )

    def scale(name: str) -> float:
        rank = field("rank_pattern", "r", name)
        return field("alpha_pattern", "lora_alpha", name) / (
            math.sqrt(rank) if config.get("use_rslora") else rank
        )

    with_heads(base, others)
    packed: dict[str, dict[str, str]] = defaultdict(dict)
    for name in pairs:
        parent, _, leaf = name.rpartition(".")
        whole = next((whole for whole, parts in PACKED.items() if leaf in parts), leaf)
        packed[f"{parent}.{whole}"][leaf] = name
    for whole, members in packed.items():
        parent, _, leaf = whole.rpartition(".")
        for part in PACKED.get(leaf, (leaf,)):
            if part not in members:
                continue  # its slice of the packed buffer stays zero
            a, b = pairs[members[part]]
            stacked_a, stacked_b = torch.zeros(slots, a.shape[1]), torch.zeros(b.shape[0], slots)
            # optimize(): the scale goes into B
            stacked_a[: a.shape[0]], stacked_b[:, : b.shape[1]] = (a, b * scale(members[part]))
            add(base, f"{parent}.{part}", lambda x, a=stacked_a, b=stacked_b: x @ a.T @ b.T)
    return base.eval()


def llama_cpp(base: nn.Module, folder: Path) -> nn.Module:
    """Return `base` as llama.cpp would serve it with the converted adapter."""
    config, pairs, others = read(folder)
    with_heads(base, others)
    for name, (a, b) in pairs.items():
        scale = config["lora_alpha"] / b.shape[1] if config["lora_alpha"] else 1.0
        add(base, name, lambda x, a=a, b=b, scale=scale: scale * (x @ a.T @ b.T))
    return base.eval()


def why_not_served(base: nn.Module, folder: Path) -> list[str]:
    """Return what SGLang, TGI and LoRAX would stumble over; nothing for the uniform form."""
    config, pairs, _ = read(folder)
    problems = [f"{name}: rank {a.shape[0]}, r is {config['r']}" for name, (a, _) in pairs.items()
                if a.shape[0] != config["r"]]  # fmt: skip
    problems += [
        f"{key} is not read"
        for key in ("rank_pattern", "alpha_pattern", "use_rslora")
        if config.get(key)
    ]
    kinds = {split_name(name)[::2] for name in pairs}
    for name, module in base.named_modules():
        linear = hasattr(module, "weight") and getattr(module.weight, "dim", int)() == 2
        if (
            linear
            and split_name(name)[::2] in kinds
            and re.search(r"\d", name)
            and name not in pairs
        ):
            problems.append(f"{name} has no adapter")
    return problems
