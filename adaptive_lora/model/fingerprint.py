"""Which base model an adapter was trained on: some values of every frozen weight, kept beside the
adapter.

Two checkpoints of one architecture take each other's adapters without a word, and answer wrongly.
Names do not tell them apart: folders move, and their content changes. Values do, and unlike a hash
of them they can be compared with a tolerance: the same base may come in 16 bits, have been merged
with an adapter and unmerged again, or have a larger vocabulary.

    same(x, y):  ||x - y|| <= u (1 + ||scale B A|| / ||W||) ||y||

u is the rounding of the coarser type that holds one side, once for 16 bits, 64 times for float32:
what merging and unmerging leaves behind. A weight that was trained is off by more.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import read_file, write_json
from adaptive_lora.model.quantization import Dequantized
from adaptive_lora.model.targets import head_modules
from adaptive_lora.naming import inside

FINGERPRINT_FILE, VERSION = "base_fingerprint.json", 2
SAMPLES = 64  # values of a weight, evenly spaced: any training of it changes most of them
# Adapters; what is trained whole; a pooler, drawn anew where a checkpoint lacks it, as many do.
NOT_THE_BASE = ("lora_", "modules_to_save", "original_module", "trainable_tokens", "pooler")
# Starts of LoRA that change the base weights each time the adapter is put on.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# ||x - y|| / ||y|| that rounding explains, by the type in which a weight is held.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-18}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sample:
    """Evenly spaced values of one weight.

    Args:
        size: how many values of the weight, from its first on, they are spread over; of a
            vocabulary these are its first rows, which stay when it grows.
        values: (`SAMPLES`,) or fewer, in the type of the weight, on the CPU.
        tokens: of a vocabulary, how many it has.
    """

    size: int
    values: torch.Tensor
    tokens: int | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sample)
            and (self.size, self.tokens) == (other.size, other.tokens)
            and self.values.dtype == other.values.dtype
            and torch.equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]


Fingerprint = dict[str, Sample]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return {name in the base model: a sample} of what is frozen but the head.

    Left out are quantised weights, which cannot be compared with those they were made from; biases,
    which PEFT can train; weights split over processes; and those that an adapter has changed: while
    it is merged, or by its start (PiSSA).
    """
    frozen = ((name, weight) for name, weight in _weights(model) if not weight.requires_grad)
    rows = _vocabularies(model)
    return {
        name: _sample(weight, _spread(weight, name in rows), len(weight) if name in rows else None)
        for name, weight in frozen
    }


def keep_fingerprint(model: PeftModel) -> None:
    """Take the fingerprint of the base now, unless that was done, for `write_fingerprint`: merging
    and unmerging, which some trainers do all the time, would blur it in 16 bits."""
    if "base_fingerprint" not in vars(model):
        vars(model)["base_fingerprint"] = fingerprint(model)


def write_fingerprint(model: nn.Module, folder: Path) -> None:
    """Write the fingerprint of the base of `model`, adapters or none, into an adapter's folder."""
    kept: Fingerprint = vars(model).get("base_fingerprint") or fingerprint(model)
    # What was unfrozen after it was taken is none of the base any more.
    trained = {name for name, weight in _weights(model, merged=True) if weight.requires_grad}
    weights = {
        name: [_kind(sample.values), sample.size, _text(sample.values), sample.tokens]
        for name, sample in kept.items()
        if name not in trained
    }
    write_json(folder / FINGERPRINT_FILE, {"version": VERSION, "weights": weights})


def check_fingerprint(model: nn.Module, folder: Path) -> None:
    """Raise `IntegrityError` when a weight of `model` is not what the adapter in `folder` was
    trained on; nothing is checked without a fingerprint."""
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        return
    saved, hashes = _read(file)
    compared, other = 0, []
    layers = _layers(model)
    for name, weight in _weights(model):
        if name in saved:
            then, now = saved[name], _sample(weight, saved[name].size)
            same = weight.numel() >= then.size and _same(then.values, now.values, layers.get(name))
        elif name in hashes and (
            hashes[name][0] == _kind(weight) or "float16" not in (hashes[name][0], _kind(weight))
        ):
            same = hashes[name][1] == _hash(weight)
        else:
            continue
        compared += 1
        if not same:
            other.append(name)
    if other:
        raise IntegrityError(
            f"the adapter in {folder} was trained on another base model of the same shapes: "
            f"{len(other)} of {compared} compared weights differ, first {other[0]}. Give the base "
            f"model it was trained on, or remove {file} to use it on this one all the same"
        )


def tokens_of(folder: Path) -> dict[str, int]:
    """Return {name in the base model: tokens} of the vocabularies that the adapter in `folder` was
    trained with, {} where it does not say. Raises `IntegrityError` as `check_fingerprint`."""
    file = folder / FINGERPRINT_FILE
    saved = _read(file)[0] if file.is_file() else {}
    return {name: sample.tokens for name, sample in saved.items() if sample.tokens is not None}


def _read(file: Path) -> tuple[Fingerprint, dict[str, tuple[str, str]]]:
    """Return the fingerprint in `file`, and the hashes that adaptive-lora 0.1 wrote instead. Raises
    `IntegrityError` when it is damaged."""
    try:
        content = read_file(file, "fingerprint")
        if "version" not in content:
            return {}, {str(name): (str(kind), str(text)) for name, (kind, text) in content.items()}
        if content["version"] != VERSION:
            raise ValueError(f"it is of format {content['version']!r}, expected {VERSION}")
        return {
            str(name): Sample(
                int(size), _values(kind, text), None if tokens is None else int(tokens)
            )
            for name, (kind, size, text, tokens) in content["weights"].items()
        }, {}
    except (InputError, ValueError, AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}") from error


def _same(then: torch.Tensor, now: torch.Tensor, layer: Any) -> bool:
    """Return whether rounding explains that one weight is `then` and `now`; `layer` is the adapter
    on it, if there is one."""
    if len(then) != len(now) or not torch.equal(then.isnan(), now.isnan()):
        return False
    then, now = then.nan_to_num(), now.nan_to_num()
    # The type each is held in, or is rounded to: a copy in 16 bits may be loaded in 32.
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        allowed = ROUNDING[kind]
        if kind not in (torch.float32, then.dtype, now.dtype):
            if not (_held(then, kind) or _held(now, kind)):
                continue
            allowed /= 2  # rounded once, and never merged in this type
        x, y = then.to(kind).double(), now.to(kind).double()
        apart, size = float((x - y).norm()), float(y.norm())
        if apart <= allowed * size or (
            layer is not None and apart <= allowed * size * (1 + _update_over_weight(layer))
        ):
            return True
    return False


def _hash(weight: torch.Tensor) -> str:
    """Return the hash of 1,024 values in bfloat16 that version 0.1 wrote. It tells a base that went
    through float16 on one side from itself: such pairs are not compared."""
    flat = weight.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16, copy=True).cpu()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _held(values: torch.Tensor, kind: torch.dtype) -> bool:
    return torch.equal(values.to(kind).double(), values.double())


def _update_over_weight(layer: Any) -> float:
    """Return ||scale B A|| / ||W|| of one adapter: merging rounds to the size of their sum."""
    update = layer.get_delta_weight(layer.active_adapters[0])
    return float(update.norm() / layer.get_base_layer().weight.norm().clamp_min(1e-30))


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return {name of the weight: the adapter on it} of linear targets."""
    return {
        f"{name}.weight": layer
        for name, layer in _base(model).named_modules()
        if isinstance(layer, LoraLayer) and layer.active_adapters[0] in layer.lora_A
    }


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _weights(model: nn.Module, *, merged: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    base: Any = _base(model)
    # What a 4-bit weight stands for can no more be compared with what it was made from.
    left_out = [name for name, module in base.named_modules() if isinstance(module, Dequantized)]
    left_out += head_modules(base)
    if not merged:
        left_out += _changed(model)
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
            yield re.sub(r"\.(base_layer|token_adapter)(?=\.)", "", name), weight


def _changed(model: nn.Module) -> list[str]:
    """Return the modules whose weights are not the base's own now."""
    starts = {
        name
        for name, config in getattr(model, "peft_config", {}).items()
        if changes_base(getattr(config, "init_lora_weights", None))
    }
    return [
        name
        for name, layer in _base(model).named_modules()
        if isinstance(layer, LoraLayer) and (layer.merged or starts & layer.r.keys())
    ]


def changes_base(start: Any) -> bool:
    """Return whether adapters with this `init_lora_weights` change the base weights under them."""
    return isinstance(start, str) and start.lower().startswith(CHANGES_BASE)


def _vocabularies(model: nn.Module) -> set[str]:
    """Return the names of weights with a row for each token."""
    base: Any = _base(model)
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    owners = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    owners |= {id(getattr(output, "weight", None))}
    return {name for name, weight in _weights(model) if id(weight) in owners}


def _spread(weight: torch.Tensor, vocabulary: bool) -> int:
    """Return over how many values a sample is spread: of a vocabulary over a number of rows that is
    there, and the same, when it grows or is padded."""
    if not vocabulary:
        return weight.numel()
    rows = len(weight)
    return min(1024, max(1, 1 << (rows.bit_length() - 2))) * (weight.numel() // rows)


def _sample(weight: torch.Tensor, size: int, tokens: int | None = None) -> Sample:
    flat = weight.detach().reshape(-1)[:size]
    values = flat[:: max(1, size // SAMPLES)][:SAMPLES].cpu().clone()
    return Sample(size, values.float() if values.dtype == torch.float64 else values, tokens)


def _kind(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _text(values: torch.Tensor) -> str:
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def _values(kind: str, text: str) -> torch.Tensor:
    values = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(values, dtype=TYPES[kind]) if values else torch.empty(0)
