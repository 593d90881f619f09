"""A model in training follows the checkpoint that is loaded into it: in its ranks, and in the type
of its adapters.

PEFT, the Trainer at a resume and at its `load_best_model_at_end`, sentence-transformers and a
user's `load_state_dict` all load into adapters as they find them, of whatever ranks these have now;
PEFT turns 16-bit adapters into float32 on the way. Nothing asks the callback before. So the model
itself sees to it, wherever it lies and whoever loads.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from adaptive_lora.model.adapters import linear_adapters, ranks
from adaptive_lora.model.resize import resize

LOADED_FROM = "adapter_loaded_from"  # attribute: the folder of the checkpoint loaded last


def follow(model: PeftModel, *, ranks: bool = False) -> None:
    """Let `model` follow what is loaded into its active adapter: in the type, and, if `ranks`, in
    the ranks."""
    # A bound method, not a closure: a deep copy of the model then follows itself.
    model.load_adapter = MethodType(load_adapter, model)  # type: ignore[method-assign]
    hooks: Any = model._load_state_dict_pre_hooks.values()
    if ranks and not any(hook.hook is _follow_ranks for hook in hooks):
        model.register_load_state_dict_pre_hook(_follow_ranks)


def load_adapter(model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kw: Any) -> Any:
    """PEFT's own, but that the active adapter keeps its type."""
    if adapter_name != model.active_adapter:
        return type(model).load_adapter(model, model_id, adapter_name, *args, **kw)
    setattr(model, LOADED_FROM, Path(model_id))
    return type(model).load_adapter(
        model, model_id, adapter_name, *args, **{"autocast_adapter_dtype": False, **kw}
    )


def _follow_ranks(
    model: PeftModel, state_dict: MutableMapping[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Give `model` the ranks of the adapter in `state_dict`; a target absent there gets rank 0."""
    adapter = model.active_adapter
    _name_parked(model, state_dict, prefix)
    start, end = f"{prefix}base_model.model.", f".lora_A.{adapter}.weight"
    saved = {
        key[len(start) : -len(end)]: len(tensor)
        for key, tensor in state_dict.items()
        if key.startswith(start) and key.endswith(end)
    }
    # None in a checkpoint of PEFT's AdaLoRA, which keeps its first ranks to the end, nor where
    # something else is loaded.
    now = ranks(model) if saved else {}
    changes = {
        name: saved.get(name, 0)
        for name in linear_adapters(model)
        if saved and saved.get(name, 0) != now[name]
    }
    if changes:
        resize(model, changes)


def _name_parked(
    model: PeftModel, state_dict: MutableMapping[str, torch.Tensor], prefix: str
) -> None:
    """Put the adapter's name into the keys of targets that have rank 0 now: PEFT does so for what
    it finds in the model, and drops the rest in silence."""
    active = model.active_adapter
    others = [f".lora_A.{name}." for name in model.peft_config if name != active]
    if any(other in key for key in state_dict for other in others):
        return  # it is another adapter that is loaded, or a whole model, whose keys are named
    for name, layer in linear_adapters(model).items():
        for part in ("lora_A", "lora_B") if hasattr(layer, "lora_parked") else ():
            start = f"{prefix}base_model.model.{name}.{part}"
            if f"{start}.weight" in state_dict:
                state_dict[f"{start}.{active}.weight"] = state_dict.pop(f"{start}.weight")


def loaded_from(model: nn.Module) -> Path | None:
    """Return the folder that was loaded into the active adapter last, by its `load_adapter`."""
    return vars(model).get(LOADED_FROM)
