"""Adapters on a model: attach, look at, save, load. The layers are PEFT's own `LoraLayer`s,
unchanged.

The scale of every adapter is the same constant, update = scale · B A, whatever its rank. After
`attach` the model's `peft_config` always describes the tensors that are really there, so any save
(ours, PEFT's, the Trainer's checkpoints) writes a checkpoint that stock PEFT reloads exactly.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import PeftType, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.allocate import RankPattern
from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.files import move, read_file
from adaptive_lora.model.adapter_file import CONFIG_NAME, WEIGHTS_NAME, check_files, tensor_shapes
from adaptive_lora.model.base_model import write_base
from adaptive_lora.model.fingerprint import check_fingerprint, write_fingerprint
from adaptive_lora.model.quantization import keep_trainable
from adaptive_lora.model.targets import (
    ALL_LINEAR,
    describe_targets,
    find_targets,
    head_modules,
    linear_features,
)
from adaptive_lora.naming import inside

if TYPE_CHECKING:
    from adaptive_lora.allocation.method import Method


def attach(
    model: nn.Module,
    method: Method,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    scale: float = 2.0,
    dropout: float = 0.0,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """Put LoRA adapters with the initial rank pattern of `method` on `model` and freeze the rest,
    except the head.

    W x + scale · B A x on every target, A (R, I) Kaiming-uniform, B (O, R) zero: the function is
    unchanged at first.

    Args:
        model: a base model; its modules are replaced in place, as PEFT does.
        method: how ranks are chosen, for example `adaptive_lora.methods.lora(rank=8)`.
        targets: `"all-linear"`, a regular expression over full names, or a list of names (see
            `find_targets`).
        scale: the constant factor of every update; `lora_alpha / r` of a PEFT config.
        dropout: probability of LoRA dropout, in [0, 1).
        task_type: PEFT's task type; None derives it from the model's class. The head is trained and
            saved either way.
        modules_to_save: full names of further modules to train and save whole, and not to adapt.

    Returns a `PeftModel` with plain LoRA layers (PEFT's AdaLoRA layers for `methods.peft_adalora`).
    Raises `InputError` on a model that already has adapters, on targets that match nothing, and on
    ranks the targets cannot have. Source: Hu et al. 2022, LoRA, arXiv 2106.09685, section 4.1.

    >>> from transformers import BertConfig, BertModel
    >>> from adaptive_lora import methods
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=2, **sizes))
    >>> model = attach(tiny, methods.linear_decay(base_rank=4, min_rank=2), targets=["query"])
    >>> list(ranks(model).values())
    [4, 2]
    """
    _check_base(model)
    # First of all: one evaluation before it would pack 4-bit weights for inference, for good.
    keep_trainable(model)
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(
            f"scale is {scale}; expected a finite number above 0, such as 2.0 (lora_alpha 16 at "
            "rank 8)"
        )
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; expected a probability in [0, 1)")
    # Named here: without a task type PEFT would leave the head frozen, and out of every save.
    whole = [*head_modules(model), *modules_to_save]
    found = [t for t in find_targets(model, targets) if not inside(t.name, whole)]
    pattern = method.initial_pattern(found)
    if not any(pattern.values()):
        raise InputError(
            f"method {method.name!r} gives every target rank 0; at least one must be above 0"
        )
    # PEFT cannot create rank 0: such a target starts at rank 1 and is parked.
    created = {name: max(rank, 1) for name, rank in pattern.items()}
    modules = [model.get_submodule(target.name) for target in found]
    common: dict[str, Any] = {
        "target_modules": target_modules(model, created),
        "lora_dropout": dropout,
        "modules_to_save": whole or None,
        # PEFT's AdaLoRA adds its penalty to the loss only of a model that has one.
        "task_type": task_type or infer_task_type(model),
        # Conv1D stores its weight transposed; PEFT finds out by itself, but warns.
        "fan_in_fan_out": all(isinstance(module, Conv1D) for module in modules),
    }
    adaptation, largest = method.adaptation, max(created.values())
    own = None if adaptation is None else adaptation.peft_config(largest, scale, common)
    return _created(model, own or LoraConfig(**common, **scaled_config(created, scale)), pattern)


def _created(model: nn.Module, config: LoraConfig, pattern: RankPattern) -> PeftModel:
    """Have PEFT make the adapters, and check that they are those of `pattern`."""
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:  # such as the modules of Mamba whose weights a fused kernel takes
        raise InputError(f"PEFT refuses these targets: {error}") from error
    layers = adapters(peft_model)
    for name in (name for name, rank in pattern.items() if rank == 0):
        park(layers[name])
    made = ranks(peft_model)
    # Looked at on the tensors, for PEFT passes over targets without a word.
    if made != pattern:
        raise InputError(
            "the adapters PEFT created are not those asked for: "
            f"{sorted(set(made.items()) ^ set(pattern.items()))[:6]}. PEFT adapts no module whose "
            "name holds that of a head module: leave it out of the targets"
        )
    # The config of PEFT's AdaLoRA has other fields, and masks where LoRA has its ranks.
    if not is_masked(peft_model):
        sync_config(peft_model)
    return peft_model


def is_masked(model: PeftModel) -> bool:
    """True while the adapters are PEFT's AdaLoRA, whose gates mask components;
    `RankController.finish` ends that."""
    return model.peft_config[model.active_adapter].peft_type == PeftType.ADALORA


def _check_base(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or any(
        isinstance(module, LoraLayer) for module in model.modules()
    ):
        raise InputError(
            "the model already has adapters; expected a base model: load a fresh one, or merge "
            "first"
        )


def infer_task_type(model: nn.Module) -> TaskType | None:
    """Return PEFT's task type by transformers' naming of classes (`BertForSequenceClassification`),
    None if no match.

    None too for speech and images: PEFT's task classes would pass `input_ids` on.
    """
    by_suffix = {
        "ForSequenceClassification": TaskType.SEQ_CLS,
        "ForTokenClassification": TaskType.TOKEN_CLS,
        "ForQuestionAnswering": TaskType.QUESTION_ANS,
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    }
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    name = type(model).__name__
    task = next((task for suffix, task in by_suffix.items() if name.endswith(suffix)), None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", True)
    # LLaVA generates conditionally
    return TaskType.CAUSAL_LM if task == TaskType.SEQ_2_SEQ_LM and not encodes else task


def base_of(model: Any) -> nn.Module:
    """Return the Hugging Face model inside a `PeftModel`; any other model is its own base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters(model: nn.Module) -> dict[str, Any]:
    """Return {full target name: PEFT's `LoraLayer`} of the active adapter, in module order;
    `InputError` without any."""
    layers = {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, LoraLayer)
    }
    # `r` and not `lora_A`: a parked adapter has left `lora_A`, and is a target all the same.
    found = {name: layer for name, layer in layers.items() if layer.active_adapters[0] in layer.r}
    if not found:
        raise InputError(
            "the model has no LoRA adapters; attach some first: adaptive_lora.attach(model, method)"
        )
    return found


def weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Return (A, B) of the active adapter, of shapes (R, I) and (O, R); None at rank 0."""
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A:
        return None
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    # AdaLoRA's are bare parameters
    return (a, b) if isinstance(a, nn.Parameter) else (a.weight, b.weight)


def ranks(model: nn.Module) -> RankPattern:
    """Return {full target name: rank}, read from the shapes of the tensors, never from a config, a
    plan or a mask."""
    return {
        name: 0 if (pair := weights(layer)) is None else pair[0].shape[0]
        for name, layer in adapters(model).items()
    }


def lora_parameters(model: nn.Module) -> int:
    """Return the trainable LoRA parameters, Σ R (I + O), counted on the tensors; with AdaLoRA's
    gates where there are."""
    layers = adapters(model).values()
    gates = [gate for layer in layers for gate in getattr(layer, "lora_E", {}).values()]
    return sum(
        tensor.numel()
        for tensor in [*gates, *(p for pair in map(weights, layers) if pair for p in pair)]
    )


def scale_of(model: nn.Module) -> float:
    """Return the one scale of the model's adapters. Raises `InputError` when they have several."""
    scales = {layer.scaling[layer.active_adapters[0]] for layer in adapters(model).values()}
    # alpha / r of unequal ranks is one number only up to its last bits.
    if max(scales) - min(scales) > 1e-6 * max(scales):
        raise InputError(
            f"the adapters have different scales, {sorted(scales)[:5]}; adaptive-lora keeps one "
            "constant scale. Attach with adaptive_lora.attach, or set alpha_pattern so that alpha "
            "/ r is equal everywhere"
        )
    return float(max(scales))


def targets_of(model: nn.Module) -> list[Target]:
    """Return the targets of a model that already carries adapters."""
    layers = adapters(model)
    by_name = {}
    for name, layer in layers.items():
        features = linear_features(layer.get_base_layer())
        if features is None:
            raise InputError(
                f"{name!r} is a {type(layer.get_base_layer()).__name__}; only linear targets are "
                "supported"
            )
        by_name[name] = features
    return describe_targets(base_of(model), by_name)


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
    layer.parked = Parked(layer.lora_A.pop(adapter), layer.lora_B.pop(adapter))
    layer.r[adapter] = 0


def unpark(layer: Any) -> None:
    """Put a parked adapter back into the forward pass; nothing happens to any other."""
    if hasattr(layer, "parked"):
        adapter = layer.active_adapters[0]
        layer.lora_A[adapter], layer.lora_B[adapter] = layer.parked.pair
        del layer.parked


def all_weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return (A, B) of the active adapter, parked or not; shapes (0, I) and (O, 0) at rank 0."""
    pair = weights(layer)
    return (layer.parked.a, layer.parked.b) if pair is None else pair


def sync_config(model: PeftModel) -> None:
    """Make `peft_config` describe the adapters as they are; called after any change of a rank."""
    config: Any = model.peft_config[model.active_adapter]
    # Rank 0 is left out: PEFT cannot create it when it loads.
    present = {name: rank for name, rank in ranks(model).items() if rank > 0}
    config.target_modules = target_modules(model.get_base_model(), present)
    for field, value in scaled_config(present, scale_of(model)).items():
        setattr(config, field, value)


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


def scaled_config(pattern: RankPattern, scale: float) -> dict[str, Any]:
    """Return the fields of a `LoraConfig` that give every target its rank and the same scale."""

    def alpha(rank: int) -> float:
        return int(scale * rank) if float(scale * rank).is_integer() else scale * rank

    largest = max(pattern.values())
    uniform = set(pattern.values()) == {largest}
    # ^: a key without it means every module whose name ends so, and PEFT sorts the keys it saves.
    exact = {} if uniform else {f"^{re.escape(name)}": rank for name, rank in pattern.items()}
    return {
        "r": largest,
        "lora_alpha": alpha(largest),
        "rank_pattern": exact,
        # With `rank_pattern` alone PEFT would divide one lora_alpha by each rank: wrong logits.
        "alpha_pattern": {key: alpha(rank) for key, rank in exact.items()},
        # rsLoRA's scale would follow the rank.
        "use_rslora": False,
    }


def non_finite(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the trainable parameters that hold a NaN or an infinity."""
    trainable = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    return tuple(name for name, parameter in trainable if not bool(torch.isfinite(parameter).all()))


def save(model: PeftModel, path: str | Path) -> Path:
    """Write the adapter (and the trained head) as a standard PEFT LoRA checkpoint and return its
    folder.

    Saved as r = max rank, lora_alpha = scale · r, rank_pattern and alpha_pattern with full names; a
    target of rank 0 is left out. Beside it lies what the base model is, for `export`, and its
    fingerprint, which `load` compares. Files are written beside and moved into place one by one,
    the config last; other files stay.

    Raises `DivergedError` on a NaN or an infinity, before anything is written.
    """
    if is_masked(model):
        raise InputError(
            "the adapters are still PEFT's AdaLoRA, which cannot be saved as LoRA: call "
            "RankController.finish() at the end of the training (AdaptiveRankCallback does), which "
            "turns them into plain LoRA"
        )
    # PEFT would save a NaN, and load it, without a word.
    bad = non_finite(model)
    if bad:
        raise DivergedError(
            f"not saved: {len(bad)} parameters are not finite, first {bad[0]}", where=bad
        )
    sync_config(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        model.save_pretrained(staging, selected_adapters=[model.active_adapter])
        write_fingerprint(model, Path(staging))
        write_base(model, Path(staging))
        files = [file for file in Path(staging).rglob("*") if file.is_file()]
        # A folder without the config is no adapter: who reads in between is refused, not misled.
        for file in sorted(files, key=lambda file: file.name == CONFIG_NAME):
            # PEFT's model card is made anew at every save; one that somebody has filled in stays.
            if file.name != "README.md" or not (folder / file.name).exists():
                move(file, folder / file.name)
    return folder


def load(model: nn.Module, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put the adapter in the folder `path` on the base `model` and return the `PeftModel`.

    The same as `PeftModel.from_pretrained`, with checks: safetensors only, every tensor expected
    and present, all finite, and the base model the one of the training where the folder says which
    that was.

    Raises `InputError` when `path` is no adapter folder or `model` already has adapters,
    `IntegrityError` when the files are damaged, do not fit, or belong to another base model.
    """
    _check_base(model)
    keep_trainable(model)
    folder = Path(path)
    check_kind(folder, read_config(folder))
    found = tensor_shapes(folder / WEIGHTS_NAME)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # of many kinds; all mean the same to the caller
        raise IntegrityError(
            f"the adapter in {folder} does not fit this model or is damaged: {error}"
        ) from error
    loaded = get_peft_model_state_dict(peft_model)
    expected = {name: list(tensor.shape) for name, tensor in loaded.items()}
    # Compared by name: PEFT takes tensors that it did not expect without a word.
    odd = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if odd:
        raise IntegrityError(
            f"the adapter in {folder} does not fit this model: {len(odd)} tensors differ, first "
            f"{odd[0]} (in the file: {found.get(odd[0])}, expected: {expected.get(odd[0])})"
        )
    check_finite(folder, loaded)
    check_fingerprint(peft_model, folder)
    return peft_model


def kind_of(config: PeftConfig) -> str:
    """Return the kind of adapter, such as "LORA"."""
    return str(PeftType(config.peft_type).value)


def read_config(folder: Path) -> PeftConfig:
    """Return PEFT's config of the adapter in `folder`, of any kind. Raises `InputError` for what is
    no adapter folder or is pickled, `IntegrityError` for a damaged config."""
    check_files(folder)
    where = folder / CONFIG_NAME
    try:
        kind = read_file(where, "adapter's config")["peft_type"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice for training
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # JSON and PEFT raise many kinds; all mean the same to the caller
        raise IntegrityError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if kind_of(config) != kind:
        raise IntegrityError(
            f"{where} has the peft_type {kind!r}, which PEFT reads as {kind_of(config)}"
        )
    return config


def check_kind(folder: Path, config: PeftConfig) -> None:
    """Raise `InputError` unless `config` is that of a LoRA adapter."""
    kind = kind_of(config)
    if kind == "ADALORA":
        raise InputError(
            f"{folder} holds an AdaLoRA adapter; expected LoRA. Convert it first: adaptive-lora "
            f"convert {folder} --output NEW"
        )
    if kind != "LORA":
        raise InputError(f"{folder} holds a {kind} adapter; expected LORA")


def check_finite(folder: Path | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `IntegrityError` when a tensor holds a NaN or an infinity."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise IntegrityError(
            f"the adapter in {folder} holds NaN or infinite values in {len(bad)} tensors, first "
            f"{bad[0]!r}"
        )
