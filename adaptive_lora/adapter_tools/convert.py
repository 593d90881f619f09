"""AdaLoRA checkpoints of PEFT, which only PEFT can load, as plain LoRA with the true rank of every
layer.

    ΔW = α / (r₀ + 10⁻⁵) · B diag(E) A = s B' A',   A' the rows and B' = B diag(E) f the columns
    whose gate E is not zero

with r₀ = `init_r`, the rank the training began with, s = α / r₀ and f = r₀ / (r₀ + 10⁻⁵): PEFT
guards its division so, and goes on to divide by r₀ when it has removed components. (With α <= 0
PEFT takes the rank itself for α.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig

from adaptive_lora.adapter_tools.checks import check_names, split_tensors
from adaptive_lora.adapter_tools.folder import (
    Adapter,
    Update,
    read_files,
    times,
    with_updates,
    write_adapter,
)
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import check_new
from adaptive_lora.model.adapters import check_finite, kind_of

PARTS = {"a": ".lora_A", "b": ".lora_B", "gate": ".lora_E"}
CARRIED = (
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "lora_dropout", "bias",
    "fan_in_fan_out", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
)  # fmt: skip


def convert(path: str | Path, output: str | Path | None = None) -> Adapter:
    """Return the AdaLoRA checkpoint in the folder `path` as plain LoRA, and write it to the folder
    `output` if given.

    Exact, up to one rounding of gates times B to float32. Components that PEFT masked, and gates
    that are zero, are left out; a target without any is left out. Works in mid-schedule too, where
    it gives the function the checkpoint has then.

    Args:
        path: a folder that PEFT saved, or a checkpoint of a Trainer.
        output: the folder to write; it must not exist.

    Raises `InputError` for what is no AdaLoRA folder or has no component left, `IntegrityError` for
    damaged files. Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equation 3; PEFT's
    `SVDLinear`.
    """
    if output is not None:
        check_new(output)
    folder, config, tensors = read_files(path)
    if not isinstance(config, AdaLoraConfig):
        raise InputError(f"{folder} holds a {kind_of(config)} adapter; expected ADALORA")
    # r₀ again, by old PEFT
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".ranknum")}
    pairs, rest = split_tensors(folder, tensors, PARTS, empty=True)
    check_names(folder, config, pairs, rest)
    check_finite(folder, tensors)
    masks = {
        _target(key): torch.tensor(mask, dtype=torch.bool)
        for key, mask in (config.rank_pattern or {}).items()
    }
    unknown = sorted(masks.keys() - pairs.keys())
    if unknown:
        raise IntegrityError(
            f"the adapter in {folder} is incomplete: it has a mask, but no tensors, for "
            f"{unknown[0]!r}"
        )
    scale = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / config.init_r
    updates = {}
    for name, parts in pairs.items():
        a, b, gate = parts["a"], parts["b"], parts["gate"].flatten()
        mask = masks.get(name)
        rank = config.init_r if mask is None else int(mask.sum())
        if len(gate) != len(a) or len(a) not in {
            rank,
            config.init_r if mask is None else len(mask),
        }:
            raise IntegrityError(
                f"{name!r} in {folder} has {len(a)} components and {len(gate)} gates; expected "
                f"{rank}, as its config says"
            )
        alive = gate != 0
        if mask is not None and len(mask) == len(gate):  # not yet cut to the mask
            alive &= mask
        alpha = config.lora_alpha if config.lora_alpha > 0 else rank
        gates = gate.double() * (alpha / (config.init_r + 1e-5) / scale)
        if bool(alive.any()):
            updates[name] = Update(a[alive], times(b[:, alive], gates[alive]), scale)
    if not updates:
        raise InputError(
            f"the adapter in {folder} has no target left: every gate is zero, so it changes "
            "nothing. It was saved before it "
            "learned anything"
        )
    plain = LoraConfig(
        **{name: value for name in CARRIED if (value := getattr(config, name, None)) is not None}
    )
    whole = Adapter(
        plain, {name: Update(p["a"], p["b"], scale) for name, p in pairs.items()}, rest, folder
    )
    converted = with_updates(whole, updates)
    if output is not None:
        write_adapter(converted, output)
    return converted


def _target(key: Any) -> str:
    """Return the target of a key of PEFT's `rank_pattern`, such as "layer.0.query.lora_E" or
    "...lora_E.default"."""
    return str(key).partition(".lora_E")[0]
