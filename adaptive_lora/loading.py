"""From the names in a recipe to a task with its tokenizer, and to the base model. Every failure is a clear message."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from adaptive_lora.config import RunConfig
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.hub import locate_model
from adaptive_lora.targets import head_modules
from adaptive_lora.tasks import TASKS, Task


def load_task(config: RunConfig) -> Task:
    """Return the task of a recipe, bound to the tokenizer (or image processor) and configuration of its model."""
    arguments = _locate(config)
    images = config.task == "image_classification"
    try:
        model_config = AutoConfig.from_pretrained(config.model, **arguments)
        processor: Any = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(config.model, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "image processor" if images else "tokenizer"
        raise InputError(f"cannot load the configuration or {what} of {config.model!r}: {error}") from error
    if not images:
        # transformers makes a tokenizer up if there is none.
        if len(set(processor.get_vocab()) - set(processor.all_special_tokens)) < 2:
            raise InputError(
                f"{config.model!r} has no tokenizer: no tokenizer.json, vocabulary or the like beside the model"
            )
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        if processor.pad_token is None:
            raise InputError(
                f"the tokenizer of {config.model!r} has no padding token and no end token to stand in for it"
            )
    return TASKS[config.task](config, processor, model_config)


def load_model(config: RunConfig, task: Task, *, random_weights: bool = False) -> tuple[Any, list[str]]:
    """Return the base model with the head of the task, and the modules outside its head whose weights the checkpoint lacks.

    Those were drawn at random just now (a masked-language model has no pooler). Frozen and not saved they would make an
    adapter that works nowhere else, so they are trained and saved in full. With `random_weights` all weights are drawn
    and no file of weights is read.
    """
    where, arguments = _locate(config), task.model_arguments()
    try:
        if random_weights:
            model_config = AutoConfig.from_pretrained(config.model, **where, **arguments)
            code = {"trust_remote_code": config.trust_remote_code}
            model, missing_keys = task.auto_class.from_config(model_config, **code), []
        else:
            loaded: Any = task.auto_class.from_pretrained(config.model, **where, **arguments, output_loading_info=True)
            model, missing_keys = loaded[0], loaded[1]["missing_keys"]
    except SafetensorError as error:
        raise IntegrityError(f"the weights of {config.model!r} are damaged: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"cannot load the model {config.model!r} for {config.task}: {error}") from error
    pad = getattr(task.tokenizer, "pad_token_id", None)
    if getattr(model.config, "pad_token_id", None) is None and pad is not None:
        model.config.pad_token_id = pad
    heads = tuple(f"{head}." for head in head_modules(model))
    missing = {name.rpartition(".")[0] for name in missing_keys if not name.startswith(heads)}
    return model, sorted(missing)


def _locate(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for `from_pretrained`, after making sure that the model can be had."""
    return {"trust_remote_code": config.trust_remote_code, "local_files_only": locate_model(config.model)}
