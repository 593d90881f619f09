"""Which base model an adapter was trained on: a digest of every frozen weight, kept beside the
adapter.

Two checkpoints of one architecture take each other's adapters without a word, and answer wrongly.
Names do not tell them apart: folders move, and their content changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import read_file, write_json
from adaptive_lora.model.quantization import Dequantized
from adaptive_lora.model.targets import head_modules
from adaptive_lora.naming import inside

FINGERPRINT_FILE = "base_fingerprint.json"
SAMPLES = 1024  # values of a tensor, evenly spaced: any training of it changes most of them
# Adapters; what is trained whole; a pooler, drawn anew where a checkpoint lacks it, as many do.
NOT_THE_BASE = ("lora_", "modules_to_save", "original_module", "pooler")

Digests = dict[str, list[str]]


def digests(model: nn.Module) -> Digests:
    """Return {name in the base model: [type, SHA-256 of evenly spaced values in bfloat16]} of what
    is frozen but the head.

    Quantised weights are left out: they cannot be compared with those they were made from. So are
    biases, which PEFT can train, and weights split over processes.
    """
    frozen = ((name, weight) for name, weight in _weights(model) if not weight.requires_grad)
    return {name: [_kind(weight), _digest(weight)] for name, weight in frozen}


def write_fingerprint(model: nn.Module, folder: Path) -> None:
    """Write the digests of the base of `model`, adapters or none, into an adapter's folder."""
    write_json(folder / FINGERPRINT_FILE, digests(model))


def check_fingerprint(model: nn.Module, folder: Path) -> None:
    """Raise `IntegrityError` when a weight of `model` is not what the adapter in `folder` was
    trained on.

    Nothing is checked without a fingerprint. Rounded to bfloat16 a weight is the same whether it
    comes from float32 or was saved or loaded in bfloat16; of one that went through float16 only on
    one side that is not so: not compared.
    """
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        return
    try:
        saved = read_file(file, "fingerprint")
        pairs = {str(name): (str(kind), str(digest)) for name, (kind, digest) in saved.items()}
    except (InputError, ValueError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}") from error
    compared, other = 0, []
    for name, weight in _weights(model):
        then, digest = pairs.get(name, (None, None))
        now = _kind(weight)
        if then is not None and (then == now or "float16" not in (then, now)):
            compared += 1
            if _digest(weight) != digest:
                other.append(name)
    if other:
        raise IntegrityError(
            f"the adapter in {folder} was trained on another base model of the same shapes: "
            f"{len(other)} of {compared} compared weights differ, first {other[0]}. Give the base "
            f"model it was trained on, or remove {file} to use it on this one all the same"
        )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # What a 4-bit weight stands for can no more be compared with what it was made from.
    stand_ins = [name for name, module in base.named_modules() if isinstance(module, Dequantized)]
    left_out = [*head_modules(base), *stand_ins]
    for name, weight in base.named_parameters():
        whole = (
            # Quantised weights and shards have types of their own.
            type(weight) in (nn.Parameter, torch.Tensor)
            and weight.device.type != "meta"
            and weight.numel() > 0
        )
        skipped = (
            name.endswith("bias")
            or inside(name, left_out)
            or any(part in name for part in NOT_THE_BASE)
        )
        if whole and weight.is_floating_point() and not skipped:
            # PEFT puts an adapted weight one level down: the name is the same with and without.
            yield name.replace(".base_layer.", "."), weight


def _kind(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _digest(weight: torch.Tensor) -> str:
    flat = weight.detach().reshape(-1)
    # Rounded: the base loaded in bfloat16 or float32 is the same, and a change of 1 % shows.
    values = flat[:: max(1, flat.numel() // SAMPLES)].to(torch.bfloat16).cpu()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
