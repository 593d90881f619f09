"""From the names in a recipe to a task with its tokenizer, and to the base model. Every failure is
a clear message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.hub import locate_model
from adaptive_lora.model.quantization import (
    bitsandbytes_config,
    check_available,
    check_plain,
    compute_dtype,
    keep_trainable,
    quantizable,
    quantize_in_place,
    skipped,
)
from adaptive_lora.model.targets import head_modules
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks import TASKS, Task


def load_task(config: RunConfig) -> Task:
    """Return the task of a recipe, bound to the tokenizer (or image processor) and configuration of
    its model."""
    arguments = _locate(config)
    images = config.task == "image_classification"
    try:
        model_config = AutoConfig.from_pretrained(config.model, **arguments)
        processor: Any = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(
            config.model, **arguments
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "image processor" if images else "tokenizer"
        raise InputError(
            f"cannot load the configuration or {what} of {config.model!r}: {error}"
        ) from error
    if not images:
        # transformers makes a tokenizer up if there is none.
        if len(set(processor.get_vocab()) - set(processor.all_special_tokens)) < 2:
            raise InputError(
                f"{config.model!r} has no tokenizer: no tokenizer.json, vocabulary or the like "
                "beside the model"
            )
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        if processor.pad_token is None:
            raise InputError(
                f"the tokenizer of {config.model!r} has no padding token and no end token to stand "
                "in for it"
            )
    return TASKS[config.task](config, processor, model_config)


def load_model(
    config: RunConfig, task: Task, *, random_weights: bool = False
) -> tuple[Any, list[str]]:
    """Return the base model with the head of the task, and the modules outside its head whose
    weights the checkpoint lacks.

    Those were drawn at random just now (a masked-language model has no pooler). Frozen and not
    saved they would make an adapter that works nowhere else, so they are trained and saved in full.
    With `random_weights` all weights are drawn and no file of weights is read. The base is
    quantised as the recipe says.
    """
    quantized = config.quantization != "none"
    if quantized:
        check_available()
        check_plain(task.model_config, config.model)
    dtype = compute_dtype(config.dtype) if quantized or config.dtype != "auto" else None
    arguments = {
        **_locate(config),
        **task.model_arguments(),
        **({} if dtype is None else {"dtype": dtype}),
    }
    missing_keys: list[str] = []
    try:
        if random_weights:
            model = _from_config(config, task, torch.device("cpu"), dtype)
            if quantized:
                quantize_in_place(model, config.quantization, dtype or torch.float32)
        elif quantized:
            model, missing_keys = _load_quantized(config, task, dtype or torch.float32, arguments)
        else:
            model, missing_keys = _from_pretrained(config, task, arguments)
    except SafetensorError as error:
        raise IntegrityError(f"the weights of {config.model!r} are damaged: {error}") from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"cannot load the model {config.model!r} for {config.task}: {error}"
        ) from error
    pad = getattr(task.tokenizer, "pad_token_id", None)
    if getattr(model.config, "pad_token_id", None) is None and pad is not None:
        model.config.pad_token_id = pad
    if quantized:
        keep_trainable(model)
        for head in head_modules(model):  # trained in full, and small
            model.get_submodule(head).float()
    return model, _modules_of(missing_keys, model)


def _from_pretrained(
    config: RunConfig, task: Task, arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    loaded: Any = task.auto_class.from_pretrained(
        config.model, **arguments, output_loading_info=True
    )
    return loaded[0], loaded[1]["missing_keys"]


def _from_config(
    config: RunConfig, task: Task, device: torch.device, dtype: torch.dtype | None
) -> Any:
    """Return the model of the recipe with weights drawn at random, or without storage on the device
    "meta"."""
    model_config = AutoConfig.from_pretrained(
        config.model, **_locate(config), **task.model_arguments()
    )
    arguments = {
        "trust_remote_code": config.trust_remote_code,
        **({} if dtype is None else {"dtype": dtype}),
    }
    with device:
        return task.auto_class.from_config(model_config, **arguments)


def _load_quantized(
    config: RunConfig, task: Task, dtype: torch.dtype, arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    absent: list[str] = []
    skeleton = _from_config(config, task, torch.device("meta"), dtype)
    while True:
        settings = bitsandbytes_config(
            config.quantization, dtype, skipped(skeleton, config.quantization, dtype, absent)
        )
        model, missing_keys = _from_pretrained(
            config, task, arguments | {"quantization_config": settings}
        )
        # transformers leaves a module that has no weights in the files half converted: it must not
        # be quantised.
        lacking = [
            name for name in _modules_of(missing_keys, skeleton) if name in quantizable(skeleton)
        ]
        if set(lacking) <= set(absent):
            _leave_the_file(model)
            return model, missing_keys
        absent = [*absent, *lacking]


def _leave_the_file(model: Any) -> None:
    """Copy the tensors that were not quantised: one of them keeps the whole file of weights mapped,
    all its pages resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _modules_of(missing_keys: Iterable[str], model: Any) -> list[str]:
    heads = tuple(f"{head}." for head in head_modules(model))
    return sorted({name.rpartition(".")[0] for name in missing_keys if not name.startswith(heads)})


def _locate(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for `from_pretrained`, after making sure that the model can be had."""
    return {
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": locate_model(config.model),
    }
