"""In which condition a model is: the one place that looks at a PEFT model as PEFT, transformers,
TRL or its user left it.

Adapters can be merged, disabled, frozen or several at once; they can lie on embeddings, or be of a
kind that is no sum of components; the model can lie inside another module. Every public function
asks here for what it needs, first of all, and gets the `PeftModel` or one sentence:

    READ     the adapters' tensors, to be counted: what all others need too
    SAVE     the function, to be read again
    CHANGE   the ranks
    TRAIN    the adapters, in a training that starts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Flag
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, get_peft_model_state_dict
from torch import nn
from torch.distributed.tensor import DTensor

from adaptive_lora.errors import InputError
from adaptive_lora.model.fingerprint import changes_base

MERGE = "merge it into the base model instead: PeftModel.merge_and_unload()"
# Fields of a LoraConfig that make the update something else than scale · B A of a linear layer.
NO_COMPONENTS = {
    "use_qalora": ("QALoRA, whose A reads pooled inputs", MERGE),
    "use_bdlora": ("block-diagonal LoRA", MERGE),
    "kasa_config": ("KaSA, which changes the base weights", MERGE),
    "monteclora_config": ("MonteCLoRA, whose updates are sampled", MERGE),
    "arrow_config": ("an Arrow router over several adapters", "give one of its adapters"),
    "layer_replication": ("layers that are replicated (layer_replication)", MERGE),
    "megatron_config": ("Megatron's parallel layers", MERGE),
}
# Starts that change the base weights, but alike whenever the adapter is put on the same base.
REPEATABLE = ("pissa", "olora", "loftq", "mica")
# What holds parameters of its own in a model's place; by name, for DeepSpeed need not be installed.
WRAPPERS = (
    "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine",
)  # fmt: skip


class Need(Flag):
    """What a function needs of a model; see the top of the file."""

    READ = 0
    SAVE = 1
    CHANGE = 2
    TRAIN = 4


@dataclass(frozen=True)
class Look:
    """A model as it is, from one walk over its modules.

    Args:
        model: the `PeftModel`.
        every: {full name: PEFT's `LoraLayer`} of all adapters, in module order.
        layers: those of the active one, whatever they lie on.
    """

    model: PeftModel
    every: dict[str, Any]
    layers: dict[str, Any]

    @property
    def linear(self) -> dict[str, Any]:
        """Those of `layers` whose rank can change."""
        # PEFT adapts a MultiheadAttention and the projection in it as one.
        return {
            name: layer
            for name, layer in self.layers.items()
            if is_linear(layer) and ".base_layer." not in name
        }

    @property
    def name(self) -> str:
        """The active adapter."""
        return str(self.model.active_adapter)

    @property
    def config(self) -> Any:
        """PEFT's config of the active adapter."""
        return self.model.peft_config[self.name]

    @property
    def active(self) -> list[str]:
        """The active adapters as the model has them; those of the layers may differ."""
        return list(self.model.active_adapters) or [self.name]


def look_at(model: Any, need: Need = Need.READ) -> Look:
    """Return the adapters of the `PeftModel` that `model` is or holds, fit for `need`.

    Raises `InputError` in one sentence: what is in the way, of which adapter, and what to do.
    """
    if need & Need.CHANGE:
        _check_own(model)
    found = model if isinstance(model, PeftModel) else _found_in(model)
    every = {}
    for name, module in _base_of(found).named_modules():
        if isinstance(module, LoraLayer):
            every[name] = module
        elif isinstance(module, PeftModel):
            raise _too_many(model, "one inside the other (get_peft_model on a PeftModel)")
    # `r` and not `lora_A`: a parked adapter has left `lora_A`, and is a target all the same.
    layers = {name: layer for name, layer in every.items() if _active(layer) & layer.r.keys()}
    seen = Look(found, every, layers)
    for needs, obstacles in OBSTACLES:
        if needs == Need.READ or needs & need:
            for obstacle in obstacles(seen):
                raise InputError(obstacle)
    return seen


def peft_model(model: Any, need: Need = Need.READ) -> PeftModel:
    """Return the `PeftModel` that `model` is or holds; as `look_at`."""
    return look_at(model, need).model


def _check_own(model: Any) -> None:
    """Raise `InputError` for a model whose parameters are not its own to change."""
    # FSDP puts its own parameter back where one is replaced: the resize would be undone, unseen.
    sharded = isinstance(model, nn.Module) and any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
    name = type(model).__name__
    if sharded or name in WRAPPERS:
        kind = "PeftModel sharded by FSDP" if sharded and isinstance(model, PeftModel) else name
        raise InputError(
            f"the model is a {kind}; expected the PeftModel that adaptive_lora.attach returned. "
            "Ranks cannot change inside DistributedDataParallel, FSDP or DeepSpeed, whose copies "
            "keep the old shapes: train on one device, unwrapped"
        )


def _base_of(model: PeftModel) -> nn.Module:
    # Not `get_base_model`, which wants an active adapter that is there.
    tuner: Any = model.base_model
    return tuner.model if isinstance(tuner, BaseTuner) else model


def _found_in(model: Any) -> PeftModel:
    """Return the one `PeftModel` in a module that is none itself."""
    if isinstance(model, PeftMixedModel):
        raise InputError(
            "the model is a PeftMixedModel, which mixes kinds of adapters; expected a PeftModel "
            "from adaptive_lora.attach or peft.get_peft_model"
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"got a {type(model).__name__}; expected a model with LoRA adapters, from "
            "adaptive_lora.attach(model, method)"
        )
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    outer = [one for one in found if not any(one in set(two.modules()) - {two} for two in found)]
    if len(outer) == 1:
        return outer[0]
    if found:
        raise _too_many(model, "side by side")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise InputError(
            f"the {type(model).__name__} has LoRA layers but is no PeftModel (transformers' "
            "add_adapter, or PEFT's inject_adapter_in_model); expected one from "
            "adaptive_lora.attach or peft.get_peft_model, which can be saved and read again"
        )
    raise InputError(
        "the model has no LoRA adapters; attach some first: adaptive_lora.attach(model, method)"
    )


def _too_many(model: nn.Module, how: str) -> InputError:
    return InputError(
        f"the {type(model).__name__} holds several PeftModels, {how}; expected one: give the one "
        "that is meant, or put further adapters on with add_adapter"
    )


def _active(layer: Any) -> set[str]:
    return set(layer.active_adapters)


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(repr, names[:2])) + more


# Each of these yields what is in the way, the most telling first.


def _kind(seen: Look) -> Iterator[str]:
    for name in seen.active:
        config = seen.model.peft_config.get(name)
        if config is None:
            yield (
                f"the active adapter {name!r} is not there any more (deleted, or renamed); "
                f"model.set_adapter one of {_listed(seen.model.peft_config)}"
            )
        elif config.peft_type not in (PeftType.LORA, PeftType.ADALORA):
            kind = str(PeftType(config.peft_type).value)
            yield (
                f"the adapter {name!r} is of kind {kind}; expected LORA: attach one with "
                "adaptive_lora.attach(model, method)"
            )


def _several(seen: Look) -> Iterator[str]:
    active = {name for layer in seen.layers.values() for name in _active(layer) & layer.r.keys()}
    active |= set(seen.active) & seen.model.peft_config.keys()
    if len(active) > 1:
        yield (
            f"{len(active)} adapters are active together, {_listed(sorted(active))}, and which one "
            "is meant is open: activate one with model.set_adapter(NAME), or make one of them with "
            "model.add_weighted_adapter"
        )
    elif not seen.layers:
        there = _listed(seen.model.peft_config)
        yield (
            f"no layer has an active adapter (there are {there}); activate one with "
            "model.set_adapter(NAME)"
        )
    elif seen.name not in active:
        yield (
            f"the layers' active adapter is {_listed(active)}, the model's {seen.name!r}: activate "
            "one for both with model.set_adapter(NAME)"
        )


def _tensors(seen: Look) -> Iterator[str]:
    for name, layer in seen.layers.items():
        if any(p.is_meta for p in adapter_parameters(layer)):
            yield (
                f"the adapter's weights at {name!r} have no storage (device meta); load them "
                "first: model.load_adapter, or attach without low_cpu_mem_usage"
            )


def _others_merged(seen: Look) -> Iterator[str]:
    merged = {one for layer in seen.every.values() for one in layer.merged_adapters}
    others = merged - set(seen.active)
    if others:
        yield (
            f"the adapter {_listed(sorted(others))} is merged into the base weights, and what is "
            f"saved of {seen.name!r} alone would answer otherwise; call "
            "model.unmerge_adapter() first"
        )


def _unsaved(seen: Look) -> Iterator[str]:
    """What is trained, or made, and is in no adapter's folder."""
    name, config = seen.name, seen.config
    start = getattr(config, "init_lora_weights", None)
    if changes_base(start) and str(start).lower() not in REPEATABLE:
        yield (
            f"the adapter {name!r} was started with init_lora_weights={start!r}, which changed the "
            "base weights in a way that no reader can repeat: save it as ordinary LoRA instead, "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), or "
            f"{MERGE}"
        )
    if getattr(config, "arrow_config", None):
        yield f"the adapter {name!r} is an Arrow router over several adapters; save one of these"
    saved = get_peft_model_state_dict(seen.model, adapter_name=name, save_embedding_layers=False)
    there = {tensor.data_ptr() for tensor in saved.values() if isinstance(tensor, torch.Tensor)}
    lost = [
        key
        for key, parameter in seen.model.named_parameters()
        if parameter.requires_grad
        and parameter.numel()
        and not parameter.is_meta
        and parameter.data_ptr() not in there
        and ".lora_" not in key
    ]
    if lost:
        yield (
            f"{len(lost)} weights of the base are trainable, first {lost[0]!r}, and no adapter's "
            "folder holds them: name their modules in modules_to_save when adapters are put on, or "
            "freeze them"
        )


def _merged(seen: Look) -> Iterator[str]:
    merged = {name: layer for name, layer in seen.layers.items() if layer.merged}
    if merged:
        adapters = sorted({one for layer in merged.values() for one in layer.merged_adapters})
        yield (
            f"the adapter {_listed(adapters)} is merged into the base weights of {_listed(merged)}"
            "; call model.unmerge_adapter() first"
        )


def _components(seen: Look) -> Iterator[str]:
    name, config = seen.name, seen.config
    for field, (what, remedy) in NO_COMPONENTS.items():
        if getattr(config, field, None):
            yield f"the adapter {name!r} is {what}: not a sum of components of B A; {remedy}"
    start = getattr(config, "init_lora_weights", None)
    if changes_base(start):
        yield (
            f"the adapter {name!r} was started with init_lora_weights={start!r}, which changes the "
            "base weights each time it is loaded, by its rank: its ranks cannot change. Start with "
            "init_lora_weights=True, or save it as ordinary LoRA first: "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)"
        )
    if nested := [one for one in seen.layers if ".base_layer." in one]:
        yield (
            f"the adapter {name!r} lies on a MultiheadAttention, in which PEFT adapts "
            f"{nested[0]!r} too, and gives it the rank of no pattern when it loads: no rank can "
            "change beside it. Leave it out of target_modules"
        )
    if not seen.linear:
        kinds = sorted({type(layer).__name__ for layer in seen.layers.values()})
        yield (
            f"the adapter {name!r} lies on no linear module ({', '.join(kinds)} only), so there is "
            "no rank to change"
        )
    owners: dict[int, str] = {}
    for layer_name, layer in seen.layers.items():
        for parameter in adapter_parameters(layer):
            if parameter.is_meta or not parameter.numel():
                continue
            # By storage: PEFT makes a parameter of its own of what it ties.
            place = parameter.untyped_storage().data_ptr()
            other = owners.setdefault(place, layer_name)
            if other != layer_name:
                yield (
                    f"{other!r} and {layer_name!r} share one adapter (ensure_weight_tying): its "
                    "rank cannot change in one of them. Leave one out of target_modules"
                )


def _trained(seen: Look) -> Iterator[str]:
    name, layers = seen.name, seen.layers
    if off := [one for one, layer in layers.items() if layer.disable_adapters]:
        yield (
            f"the adapter {name!r} is disabled in {_listed(off)}; call "
            "model.base_model.enable_adapter_layers() first"
        )
    broken = [
        one for one, layer in layers.items() if not all(map(_is_finite, adapter_parameters(layer)))
    ]
    if broken:
        yield f"the adapter {name!r} holds NaN or infinite values in {_listed(broken)}"
    if nowhere := [one for one, weight in seen.model.named_parameters() if not _is_finite(weight)]:
        yield (
            f"the base model holds NaN or infinite values in {_listed(nowhere)}: no loss of it "
            "would be finite. Load it anew"
        )
    frozen = [
        one
        for one, layer in layers.items()
        if not all(p.requires_grad for p in adapter_parameters(layer))
    ]
    if frozen:
        yield (
            f"the adapter {name!r} is frozen in {_listed(frozen)}: nothing of it would be trained. "
            "Load it with is_trainable=True (adaptive_lora.load: trainable=True), or call "
            "model.set_adapter(NAME)"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    if weight.is_meta or not weight.is_floating_point():
        return True
    # One pass, and no mask as large as the weight; the sum of finite values may overflow.
    values = weight.detach()
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """Return the parameters of the active adapter of one layer: A and B, and whatever else its kind
    has, such as gates (AdaLoRA) and magnitudes (DoRA)."""
    adapter, found = layer.active_adapters[0], list[nn.Parameter]()
    for kind, parts in layer._modules.items():
        if not kind.startswith("lora_"):
            continue
        if isinstance(parts, nn.ParameterDict):
            found += [parts[adapter]] if adapter in parts else []
        elif isinstance(parts, nn.ModuleDict):
            found += parts[adapter].parameters() if adapter in parts else []
    parked = getattr(layer, "lora_parked", None)
    return found if parked is None else [*found, *parked.parameters()]


OBSTACLES: tuple[tuple[Need, Callable[[Look], Iterator[str]]], ...] = (
    (Need.READ, _kind),
    (Need.READ, _several),
    (Need.SAVE, _others_merged),
    (Need.SAVE | Need.TRAIN, _unsaved),
    (Need.SAVE | Need.CHANGE | Need.TRAIN, _tensors),
    (Need.CHANGE | Need.TRAIN, _merged),
    (Need.CHANGE, _components),
    (Need.TRAIN, _trained),
)


def is_linear(layer: Any) -> bool:
    """Return whether the active adapter of a layer is a pair A (R, I), B (O, R) on a linear module;
    false for embeddings, convolutions, experts and the like."""
    adapter = layer.active_adapters[0]
    if hasattr(layer, "lora_parked"):
        return True
    if adapter not in layer.lora_A:
        return False
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(a, nn.Parameter):  # of PEFT's AdaLoRA
        return True
    plain = type(a) is nn.Linear and type(b) is nn.Linear and not hasattr(layer, "parameter_name")
    return plain and (a.in_features, b.out_features) == (layer.in_features, layer.out_features)


def is_compiled(model: nn.Module) -> bool:
    """Return whether `model`, or a module in it, is compiled by torch."""
    # By name: dynamo takes seconds to import.
    return any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
