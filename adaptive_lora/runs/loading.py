"""From the names in a recipe to a task with its tokenizer, and to the base model. Every failure is
a clear message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer

from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import Base, Loaded, access, class_names, read_config
from adaptive_lora.model.quantization import (
    Quantization,
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
from adaptive_lora.naming import inside
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks import TASKS, Task


def load_task(config: RunConfig) -> Task:
    """Return the task of a recipe, bound to the tokenizer (or image processor) and configuration of
    its model. A recipe without a task is given one first: `tasks.guess.with_task`."""
    if config.task is None:
        raise InputError(f"task is missing; expected one of {', '.join(TASKS)}")
    model_config = read_config(config.model, trust_remote_code=config.trust_remote_code)
    images = config.task == "image_classification"
    try:
        processor: Any = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(
            config.model, **access(config.model, trust_remote_code=config.trust_remote_code)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "image processor" if images else "tokenizer"
        raise InputError(f"cannot load the {what} of {config.model!r}: {error}") from error
    if not images:
        # transformers makes a tokenizer up if there is none.
        if len(set(processor.get_vocab()) - set(processor.all_special_tokens)) < 2:
            raise InputError(
                f"{config.model!r} has no tokenizer: no tokenizer.json, vocabulary or the like "
                "beside the model"
            )
        if processor.pad_token is None:
            processor.pad_token = _own_padding(processor, model_config) or processor.eos_token
        if processor.pad_token is None:
            raise InputError(
                f"the tokenizer of {config.model!r} has no padding token and no end token to stand "
                "in for it"
            )
    return TASKS[config.task](config, processor, model_config)


def _own_padding(tokenizer: Any, model_config: Any) -> str | None:
    """Return the padding token that the model knows, where its tokenizer names none: a head that
    looks for the last token of a text passes over this one alone."""
    known = getattr(model_config, "pad_token_id", None)
    if not isinstance(known, int) or not 0 <= known < len(tokenizer):
        return None
    return str(tokenizer.convert_ids_to_tokens(known))


def load_model(
    config: RunConfig, task: Task, *, random_weights: bool = False
) -> tuple[Any, list[str], list[str]]:
    """Return the base model with the head of the task, the modules outside its head whose weights
    the checkpoint lacks, and what to say of its head.

    Those modules were drawn at random just now (a masked-language model has no pooler). Frozen and
    not saved they would make an adapter that works nowhere else, so they are trained and saved in
    full. With `random_weights` all weights are drawn and no file of weights is read. The base is
    quantised as the recipe says.
    """
    quantized = config.quantization != "none"
    if quantized:
        check_available()
        check_plain(task.model_config, config.model)
    dtype = compute_dtype(config.dtype) if quantized or config.dtype != "auto" else None
    base = Base(config.model, task.auto_class, task.model_arguments(), config.trust_remote_code)
    if random_weights:
        loaded = Loaded(base.draw(dtype=dtype), [], {})
        if quantized:
            quantize_in_place(loaded.model, config.quantization, dtype or torch.float32)
    elif quantized:
        loaded = _load_quantized(base, config.quantization, dtype or torch.float32)
    else:
        loaded = base.load(**({} if dtype is None else {"dtype": dtype}))
    model = loaded.model
    pad = getattr(task.tokenizer, "pad_token_id", None)
    if getattr(model.config, "pad_token_id", None) is None and pad is not None:
        model.config.pad_token_id = pad
    if quantized:
        keep_trainable(model)
        for head in head_modules(model):  # trained in full, and small
            model.get_submodule(head).float()
    notes = _head_notes(loaded, task.model_config)
    notes += task.start_head(model, {*loaded.missing, *loaded.resized})
    return model, _modules_of(loaded.missing, model), notes


def _head_notes(loaded: Loaded, model_config: Any) -> list[str]:
    """Return a line about a trained head of the base that has another size than the task's."""
    for found, made in loaded.resized.values():
        names = class_names(model_config) or []
        shown = ", ".join(f"{name:.30}" for name in names[:6]) + (", ..." if names[6:] else "")
        return [
            f"the base's head of {found[0]} {'classes' if names else 'outputs'}"
            f"{f' ({shown})' if names else ''} is not used: a new head of {made[0]} is drawn"
        ]
    return []


def _load_quantized(base: Base, quantization: Quantization, dtype: torch.dtype) -> Loaded:
    absent: list[str] = []
    skeleton = base.draw(device="meta", dtype=dtype)
    while True:
        left = skipped(skeleton, quantization, dtype, absent)
        settings = bitsandbytes_config(quantization, dtype, left)
        loaded = base.load(dtype=dtype, quantization_config=settings)
        # transformers leaves a module that has no weights in the files half converted: it must not
        # be quantised.
        lacking = [
            name for name in _modules_of(loaded.missing, skeleton) if name in quantizable(skeleton)
        ]
        if set(lacking) <= set(absent):
            _leave_the_file(loaded.model)
            return loaded
        absent = [*absent, *lacking]


def _leave_the_file(model: Any) -> None:
    """Copy the tensors that were not quantised: one of them keeps the whole file of weights mapped,
    all its pages resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _modules_of(missing_keys: Iterable[str], model: Any) -> list[str]:
    heads = head_modules(model)
    return sorted({name.rpartition(".")[0] for name in missing_keys if not inside(name, heads)})
