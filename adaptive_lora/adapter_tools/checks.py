"""What an adapter folder must and must not hold, as far as names, shapes and the config can
tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.adapter_file import PREFIX
from adaptive_lora.model.condition import MERGE, NO_COMPONENTS
from adaptive_lora.model.fingerprint import changes_base
from adaptive_lora.naming import passes, split_name

Tensors = dict[str, torch.Tensor]
# Fields of a LoraConfig that make the function another than that of scale · B A on linear layers.
UNSUPPORTED = {
    **NO_COMPONENTS,
    "use_dora": ("DoRA, which rescales W + B A column by column", MERGE),
    "lora_bias": ("a bias on B (lora_bias)", MERGE),
    "target_parameters": (
        "adapters on bare parameters (target_parameters), such as experts",
        MERGE,
    ),
}


def check_supported(adapter: str, config: Any) -> None:
    """Raise `InputError` for a kind of LoRA whose update is no sum of components, or that changes
    the base weights."""
    for name, (what, remedy) in UNSUPPORTED.items():
        if getattr(config, name, None):
            raise InputError(f"{adapter} is {what}: not a sum of components of B A; {remedy}")
    start = config.init_lora_weights
    if changes_base(start):
        raise InputError(
            f"{adapter} was started with init_lora_weights={start!r}, which changes the base "
            "weights each time it is loaded, by its rank. Save it as ordinary LoRA first: "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), or merge "
            "it: PeftModel.merge_and_unload()"
        )


def split_tensors(
    folder: Path, tensors: Tensors, suffixes: Mapping[str, str], *, empty: bool = False
) -> tuple[dict[str, Tensors], Tensors]:
    """Return ({target: {part: tensor}} for {part: end of its name}, the other tensors). The parts
    "a" and "b" must fit.

    With `empty` a target may have rank 0.

    Raises `InputError` for adapters of embeddings and convolutions or when there are no parts at
    all, `IntegrityError` for a missing part or a shape that does not fit.
    """
    parts: dict[str, Tensors] = {}
    rest: Tensors = {}
    for key, tensor in tensors.items():
        part = next((part for part, suffix in suffixes.items() if key.endswith(suffix)), None)
        if part is None or not key.startswith(PREFIX):
            rest[key] = tensor
        else:
            parts.setdefault(key.removeprefix(PREFIX).removesuffix(suffixes[part]), {})[part] = (
                tensor
            )
    for key in rest:
        if ".lora_embedding_" in key:
            raise InputError(
                f"the adapter in {folder} changes an embedding ({_target(key)}); expected linear "
                f"targets only. Train without embeddings among target_modules, or {MERGE}"
            )
    if not parts:
        names = f", first {next(iter(tensors))!r}" if tensors else ""
        raise InputError(
            f"the adapter in {folder} has no target left: none of its {len(tensors)} "
            f"tensors{names} is a LoRA weight ({PREFIX}NAME{next(iter(suffixes.values()))}). An "
            "adapter of rank 0 everywhere changes nothing"
        )
    for name, found in parts.items():
        missing = [suffix for part, suffix in suffixes.items() if part not in found]
        if missing:
            raise IntegrityError(
                f"the adapter in {folder} is incomplete: {name!r} has no {missing[0].lstrip('.')}"
            )
        _check_shapes(f"{name!r} in {folder}", found, empty=empty)
    return dict(sorted(parts.items(), key=lambda item: _in_order(item[0]))), rest


def _check_shapes(where: str, parts: Tensors, *, empty: bool) -> None:
    """Raise unless A is (R, I) and B is (O, R); see `split_tensors`."""
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    a, b = shapes["a"], shapes["b"]
    if any(len(shape) > 2 for shape in shapes.values()):
        raise InputError(
            f"{where} is an adapter of a convolution, A {a}, B {b}; expected linear targets only. "
            f"Train without it among target_modules, or {MERGE}"
        )
    if any(len(shape) < 2 or (0 in shape and not empty) for shape in shapes.values()):
        raise IntegrityError(
            f"{where} has empty weights, A {a}, B {b}: the shards of ZeRO-3 or FSDP were not "
            "gathered when it was saved"
        )
    if a[0] != b[1]:
        raise IntegrityError(
            f"A and B of {where} do not fit: A is {a} and B {b}; expected (R, I) and (O, R)"
        )


def _in_order(name: str) -> list[tuple[int, int | str]]:
    """Order names as layers are: 2 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _target(key: str) -> str:
    return re.sub(r"\.lora_.*", "", key.removeprefix(PREFIX))


def check_names(folder: Path, config: Any, targets: Iterable[str], rest: Iterable[str]) -> None:
    """Raise `IntegrityError` unless the tensors are those the config speaks of, as far as names can
    tell."""
    names = list(targets)
    extra = _strangers(folder, config, names)
    extra += [key for key in rest if not _expected(config, key)]
    if extra:
        raise IntegrityError(
            f"the adapter in {folder} holds {len(extra)} tensors that its {CONFIG_NAME} does not "
            f"speak of, first {extra[0]!r}; PEFT would ignore them silently. Was a file exchanged, "
            "or written by hand?"
        )
    absent = _without_tensors(config.target_modules, names)
    if absent:
        raise IntegrityError(
            f"the adapter in {folder} is incomplete: its {CONFIG_NAME} lists {absent[0]!r}, of "
            "which there are no tensors"
            + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
        )
    whole = config.modules_to_save or []
    absent = [one for one in whole if not any(passes(key, [one]) for key in rest)]
    # PEFT lists "classifier" and "score" for a model that has one of them
    if absent and len(absent) == len(whole):
        raise IntegrityError(
            f"the adapter in {folder} is incomplete: modules_to_save names {absent[0]!r}, of which "
            "there are no tensors"
        )


def _strangers(folder: Path, config: Any, names: list[str]) -> list[str]:
    """Return the names that `target_modules` does not speak of."""
    if config.target_modules is None or config.target_modules == "all-linear":
        return []
    try:
        return [name for name in names if not check_target_module_exists(config, name)]
    except re.error as error:
        raise IntegrityError(
            f"target_modules in {folder / CONFIG_NAME} is no regular expression: {error}"
        ) from error


def _without_tensors(wanted: Any, names: list[str]) -> list[str]:
    """Return the modules listed in `target_modules` that are none of `names`."""
    listed = [] if isinstance(wanted, str) or wanted is None else sorted(wanted)
    # A name with a layer index stands for one module; "q_proj" may have been offered for other
    # models too.
    absent = [one for one in listed if split_name(one)[1] is not None and one not in names]
    return [one for one in absent if not any(name.endswith(f".{one}") for name in names)]


def _expected(config: Any, key: str) -> bool:
    """True for tensors beside A and B that PEFT writes: whole modules, biases, resized embeddings,
    trained tokens."""
    if not key.startswith(PREFIX) or ".lora_" in key:
        return False
    whole = [*(config.modules_to_save or []), *EMBEDDING_LAYER_NAMES]
    return (
        passes(key, whole)
        or (config.bias != "none" and key.endswith(".bias"))
        or "trainable_tokens" in key
        or "shared.weight" in key  # T5's embeddings
    )
