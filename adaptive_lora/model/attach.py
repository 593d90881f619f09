"""Put adapters on a base model: PEFT's LoRA with the ranks a method begins with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.allocate import RankPattern
from adaptive_lora.errors import InputError
from adaptive_lora.model.adapters import (
    adapters,
    is_masked,
    park,
    ranks,
    scaled_config,
    sync_config,
    target_modules,
)
from adaptive_lora.model.fingerprint import keep_fingerprint
from adaptive_lora.model.following import follow
from adaptive_lora.model.quantization import keep_trainable
from adaptive_lora.model.targets import ALL_LINEAR, find_targets, head_modules
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
    check_base(model)
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
    config = own or LoraConfig(**common, **scaled_config(created, scale))
    with undone_on_failure(model):
        attached = _created(model, config, pattern)
    follow(attached, ranks=adaptation is not None)
    return attached


def _created(model: nn.Module, config: LoraConfig, pattern: RankPattern) -> PeftModel:
    """Have PEFT make the adapters, and check that they are those of `pattern`."""
    try:
        made = get_peft_model(model, config)
    except ValueError as error:  # such as the modules of Mamba whose weights a fused kernel takes
        raise InputError(f"PEFT refuses these targets: {error}") from error
    keep_fingerprint(made)
    layers = adapters(made)
    for name in (name for name, rank in pattern.items() if rank == 0):
        park(layers[name])
    there = ranks(made)
    # Looked at on the tensors, for PEFT passes over targets without a word.
    if there != pattern:
        raise InputError(
            "the adapters PEFT created are not those asked for: "
            f"{sorted(set(there.items()) ^ set(pattern.items()))[:6]}. PEFT adapts no module whose "
            "name holds that of a head module: leave it out of the targets"
        )
    # The config of PEFT's AdaLoRA has other fields, and masks where LoRA has its ranks.
    if not is_masked(made):
        sync_config(made)
    return made


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Put `model` back as it was when what follows raises: PEFT replaces modules and freezes
    weights one by one, and leaves off where something is wrong."""
    modules = [(m, dict(m._modules), dict(m._parameters), dict(vars(m))) for m in model.modules()]
    weights = [(p, p.requires_grad, p.data) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, children, parameters, attributes in modules:
            for name in set(vars(module)) - attributes.keys():
                delattr(module, name)
            module.training = attributes["training"]
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for parameter, trainable, data in weights:
            # A start such as PiSSA's puts other weights in their place.
            parameter.data = data
            parameter.requires_grad_(trainable)
        raise


def check_base(model: nn.Module) -> None:
    """Raise `InputError` for a model that has adapters, of whatever kind, already."""
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
