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

from adaptive_lora.adapter_tools.checks import Tensors, check_names, split_tensors
from adaptive_lora.adapter_tools.folder import (
    StoredAdapter,
    Update,
    read_files,
    times,
    with_updates,
    write_adapter,
)
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import check_new
from adaptive_lora.model.saving import check_finite, kind_of

PARTS = {"a": ".lora_A", "b": ".lora_B", "gate": ".lora_E"}
CARRIED = (
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "lora_dropout", "bias",
    "fan_in_fan_out", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
)  # fmt: skip


def convert(path: str | Path, output: str | Path | None = None) -> StoredAdapter:
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
    masks = _masks(folder, config, pairs)
    scale = _alpha(config, config.init_r) / config.init_r
    gated = {
        name: _gated(f"{name!r} in {folder}", parts, masks.get(name), config, scale)
        for name, parts in pairs.items()
    }
    updates = {name: update for name, update in gated.items() if update.rank}
    if not updates:
        raise InputError(
            f"the adapter in {folder} has no target left: every gate is zero, so it changes "
            "nothing. It was saved before it learned anything"
        )
    plain = LoraConfig(
        **{name: value for name in CARRIED if (value := getattr(config, name, None)) is not None}
    )
    whole = StoredAdapter(
        plain, {name: Update(p["a"], p["b"], scale) for name, p in pairs.items()}, rest, folder
    )
    converted = with_updates(whole, updates)
    if output is not None:
        write_adapter(converted, output)
    return converted


def _masks(folder: Path, config: Any, pairs: dict[str, Tensors]) -> dict[str, torch.Tensor]:
    """Return {target: the components that PEFT kept} of its `rank_pattern`, whose keys are such as
    "layer.0.query.lora_E" or "...lora_E.default"."""
    masks = {
        str(key).partition(".lora_E")[0]: torch.tensor(mask, dtype=torch.bool)
        for key, mask in (config.rank_pattern or {}).items()
    }
    unknown = sorted(masks.keys() - pairs.keys())
    if unknown:
        raise IntegrityError(
            f"the adapter in {folder} is incomplete: it has a mask, but no tensors, for "
            f"{unknown[0]!r}"
        )
    return masks


def _alpha(config: Any, rank: int) -> float:
    alpha: float = config.lora_alpha
    return alpha if alpha > 0 else rank


def _gated(
    where: str, parts: Tensors, mask: torch.Tensor | None, config: Any, scale: float
) -> Update:
    """Return A' and B' of a target: of the components that are neither masked nor gated by zero."""
    a, b, gate = parts["a"], parts["b"], parts["gate"].flatten()
    rank = config.init_r if mask is None else int(mask.sum())
    uncut = config.init_r if mask is None else len(mask)
    if len(gate) != len(a) or len(a) not in {rank, uncut}:
        raise IntegrityError(
            f"{where} has {len(a)} components and {len(gate)} gates; expected {rank}, as its "
            "config says"
        )
    alive = gate != 0
    if mask is not None and len(mask) == len(gate):  # not yet cut to the mask
        alive &= mask
    gates = gate.double() * (_alpha(config, rank) / (config.init_r + 1e-5) / scale)
    return Update(a[alive], times(b[:, alive], gates[alive]), scale)
