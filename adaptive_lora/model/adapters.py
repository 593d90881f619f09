"""Adapters on a model, as they are: their tensors, ranks and scales, and the config that describes
them. The layers are PEFT's own `LoraLayer`s, unchanged.

The scale of every adapter is the same constant, update = scale · B A, whatever its rank. After
`attach` the model's `peft_config` always describes the tensors that are really there, so any save
(ours, PEFT's, the Trainer's checkpoints) writes a checkpoint that stock PEFT reloads exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import nn

from adaptive_lora.allocation.allocate import RankPattern
from adaptive_lora.allocation.target import Target
from adaptive_lora.model.condition import adapter_parameters, look_at
from adaptive_lora.model.targets import describe_targets


def is_masked(model: PeftModel) -> bool:
    """True while the adapters are PEFT's AdaLoRA, whose gates mask components;
    `RankController.finish` ends that."""
    return model.peft_config[model.active_adapter].peft_type == PeftType.ADALORA


def base_of(model: Any) -> nn.Module:
    """Return the Hugging Face model inside a `PeftModel`; any other model is its own base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters(model: nn.Module) -> dict[str, Any]:
    """Return {full name: PEFT's `LoraLayer`} of the active adapter, in module order: of linear
    targets, and of whatever else PEFT adapts.

    Raises `InputError` for a model without adapters, or with several active ones.
    """
    return look_at(model).layers


def linear_adapters(model: nn.Module) -> dict[str, Any]:
    """Return those of `adapters` whose rank can change."""
    return look_at(model).linear


def weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Return (A, B) of the active adapter, of shapes (R, I) and (O, R); None at rank 0.

    On an embedding I is the vocabulary and O its width; a convolution's have its kernel's size too.
    """
    adapter = layer.active_adapters[0]
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    if adapter not in layer.lora_A:
        return None
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    # AdaLoRA's are bare parameters
    return (a, b) if isinstance(a, nn.Parameter) else (a.weight, b.weight)


def ranks(model: nn.Module) -> RankPattern:
    """Return {full target name: rank}, read from the shapes of the tensors, never from a config, a
    plan or a mask. `model` may also be a module that holds the `PeftModel`.

    Raises `InputError` for a model without adapters, or with several active ones.
    """
    return ranks_of(adapters(model))


def ranks_of(layers: Mapping[str, Any]) -> RankPattern:
    """Return {name: rank} of these layers; as `ranks`, for who has them already."""
    return {name: _rank(layer) for name, layer in layers.items()}


def _rank(layer: Any) -> int:
    pair = weights(layer)
    # PEFT keeps the adapters of all experts of a parameter in one tensor.
    return 0 if pair is None else pair[0].shape[0] // getattr(layer, "num_experts", 1)


def lora_parameters(model: nn.Module) -> int:
    """Return the LoRA parameters, Σ R (I + O), counted on the tensors of all adapters, whatever
    they lie on; with AdaLoRA's gates and DoRA's magnitudes where there are. Raises as `ranks`."""
    return parameters_of(adapters(model))


def parameters_of(layers: Mapping[str, Any]) -> int:
    """Return the LoRA parameters of these layers; as `lora_parameters`, for who has them."""
    found = [p for layer in layers.values() for p in adapter_parameters(layer)]
    return sum({id(p): p.numel() for p in found}.values())


def targets_of(model: nn.Module) -> list[Target]:
    """Return the targets of a model that already carries adapters: its linear ones."""
    seen = look_at(model)
    features = {
        name: (layer.in_features, layer.out_features) for name, layer in seen.linear.items()
    }
    return describe_targets(base_of(seen.model), features)


class Parked(nn.Module):
    """The A and B of a rank-0 adapter: empty parameters that keep their place in the optimizer and
    can grow again.

    They are no part of the state dict, so that nobody saves or expects them.
    """

    def __init__(self, lora_a: nn.Linear, lora_b: nn.Linear) -> None:
        super().__init__()
        self.pair = (lora_a, lora_b)  # a tuple: only the parameters are registered
        for dim, linear in enumerate(self.pair):
            # Never while an optimizer holds them: a resize comes here with parameters that are
            # empty. A clone, as a view would keep the whole storage.
            if linear.weight.numel():
                linear.weight = nn.Parameter(linear.weight.detach().narrow(dim, 0, 0).clone())
        # Registered: the optimizer's groups are then the same in a fresh and in a resumed run.
        self.a, self.b = lora_a.weight, lora_b.weight

    # PEFT takes an empty tensor in a save for a shard that was not gathered, and warns.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def park(layer: Any) -> None:
    """Take a rank-0 adapter out of the forward pass: PEFT skips a layer without the active key."""
    adapter = layer.active_adapters[0]
    layer.lora_parked = Parked(layer.lora_A.pop(adapter), layer.lora_B.pop(adapter))
    layer.r[adapter] = 0


def unpark(layer: Any) -> None:
    """Put a parked adapter back into the forward pass; nothing happens to any other."""
    if hasattr(layer, "lora_parked"):
        adapter = layer.active_adapters[0]
        layer.lora_A[adapter], layer.lora_B[adapter] = layer.lora_parked.pair
        del layer.lora_parked


def all_weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return (A, B) of the active adapter, parked or not; shapes (0, I) and (O, 0) at rank 0."""
    pair = weights(layer)
    return (layer.lora_parked.a, layer.lora_parked.b) if pair is None else pair


def sync_config(model: PeftModel, layers: Mapping[str, Any] | None = None) -> None:
    """Make `peft_config` describe the adapters as they are; called after any change of a rank."""
    # A copy: PEFT keeps the object it is given, which its user may give again, as TRL does for its
    # reference adapter.
    config: Any = copy(model.peft_config[model.active_adapter])
    model.peft_config[model.active_adapter] = config
    layers = adapters(model) if layers is None else layers
    # Rank 0 is left out: PEFT cannot create it when it loads.
    present = {name: layer for name, layer in layers.items() if _rank(layer) > 0}
    # What lies in an adapted module, as in a MultiheadAttention, comes with it.
    present = {name: layer for name, layer in present.items() if ".base_layer." not in name}
    modules = [name for name, layer in present.items() if not hasattr(layer, "parameter_name")]
    config.target_modules = target_modules(model.get_base_model(), modules)
    # These chose among the targets, which are now listed.
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    by_key = {_key(name, layer): layer for name, layer in present.items()}
    pattern = {key: _rank(layer) for key, layer in by_key.items()}
    scales = {key: _scale(layer) for key, layer in by_key.items()}
    for field, value in scaled_config(pattern, scales).items():
        setattr(config, field, value)


def _key(name: str, layer: Any) -> str:
    """Return by which name PEFT looks an adapter up in `rank_pattern`."""
    plain = name.replace(".base_layer", "")
    parameter = getattr(layer, "parameter_name", None)
    return plain if parameter is None else f"{plain}.{parameter}"


def _scale(layer: Any) -> float:
    """Return the factor of one adapter's update."""
    return float(layer.scaling[layer.active_adapters[0]])


def is_described(model: PeftModel) -> bool:
    """Return whether PEFT would make of `peft_config` the adapters as they are."""
    config: Any = model.peft_config[model.active_adapter]
    by_rank, by_alpha = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, layer in adapters(model).items():
        key = _key(name, layer)
        rank = _looked_up(by_rank, key, config.r)
        alpha = _looked_up(by_alpha, key, config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if rank != _rank(layer) or not math.isclose(scale, _scale(layer), rel_tol=1e-6):
            return False
    return True


def _looked_up(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return what PEFT finds for `key`. It tries every pattern in turn; ours are whole names."""
    own = f"^{re.escape(key)}"
    return (
        pattern[own]
        if own in pattern
        else pattern.get(get_pattern_key(list(pattern), key), default)
    )


def target_modules(base: nn.Module, names: Iterable[str]) -> set[str] | str:
    """Return `names` for PEFT, which takes a name for every module whose name ends like it; where
    that would mean other modules too, a regular expression that matches these names and nothing
    else.
    """
    wanted = set(names)
    others = [name for name, _ in base.named_modules() if name not in wanted]
    if any(
        name.split(".", cut)[-1] in wanted
        for name in others
        for cut in range(1, name.count(".") + 1)
    ):
        return "|".join(re.escape(name) for name in sorted(wanted))
    return wanted


def scaled_config(pattern: RankPattern, scale: float | Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of a `LoraConfig` that give every target its rank, and the same scale or
    one of its own."""
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(pattern, scale)

    def alpha(name: str) -> float:
        value = (most if one else scales[name]) * pattern[name]
        return int(value) if float(value).is_integer() else value

    largest, most = max(pattern, key=pattern.__getitem__), max(scales.values())
    # alpha / r of unequal ranks is one number only up to its last bits.
    one = most - min(scales.values()) <= 1e-6 * abs(most)
    uniform = one and len(set(pattern.values())) == 1
    # ^: a key without it means every module whose name ends so, and PEFT sorts the keys it saves.
    exact = {} if uniform else {f"^{re.escape(name)}": name for name in pattern}
    return {
        "r": pattern[largest],
        "lora_alpha": alpha(largest),
        "rank_pattern": {key: pattern[name] for key, name in exact.items()},
        # With `rank_pattern` alone PEFT would divide one lora_alpha by each rank: wrong logits.
        "alpha_pattern": {key: alpha(name) for key, name in exact.items()},
        # rsLoRA's scale would follow the rank.
        "use_rslora": False,
    }


def non_finite(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the trainable parameters that hold a NaN or an infinity."""
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all())
    )
