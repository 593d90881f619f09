"""The base model an adapter belongs to, as the adapter says it, in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from adaptive_lora.adapter_tools.folder import StoredAdapter
from adaptive_lora.errors import InputError
from adaptive_lora.model.adapter_file import WEIGHTS_NAME, tensor_shapes
from adaptive_lora.model.base_model import (
    Base,
    architectures,
    model_class,
    read_base,
    read_config,
)
from adaptive_lora.model.saving import other_vocabulary
from adaptive_lora.model.targets import linear_features

BY_TASK_TYPE = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}


def base_of_adapter(
    adapter: StoredAdapter, name: str | None = None, *, trust_remote_code: bool = False
) -> Base:
    """Return the base model of an adapter.

    Class and head come from the adapter's own record. One without (of PEFT alone, or of version 0.1
    at first) leaves them to be derived: the class from PEFT's `auto_mapping` or `task_type`, else
    from the base model's `architectures`; the number of labels from the trained head.

    Args:
        name: where the base model is now, if not where the adapter says.
        trust_remote_code: whether the user lets code that comes with the base model run; that it
            ran in the training is no leave to.

    Raises `InputError` when nothing says which base model it is, or it needs code that may not run.
    """
    name = name or adapter.base
    if not name:
        raise InputError(f"the adapter in {adapter.folder} does not say which base model it is for")
    name = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    record = None if adapter.folder is None else read_base(adapter.folder)
    if record is not None and record["remote_code"] and not trust_remote_code:
        raise InputError(
            f"the base model {name!r} is made by code of its own, which runs only if you trust it: "
            "--trust-remote-code"
        )
    kind = model_class(record["class"]) if record is not None else None
    if kind is None:
        kind = _derived_class(adapter, name, trust_remote_code=trust_remote_code)
    return Base(
        name,
        kind,
        _head(adapter, kind) if record is None else record["head"],
        trust_remote_code,
    )


def _derived_class(adapter: StoredAdapter, name: str, *, trust_remote_code: bool) -> Any:
    """Return the class of the base model as PEFT says it, else as the base model itself does."""
    mapping: Mapping[str, Any] = adapter.config.auto_mapping or {}
    kind = model_class(mapping.get("base_model_class"))
    kind = kind or BY_TASK_TYPE.get(adapter.config.task_type or "")
    if kind is None:
        config = read_config(name, trust_remote_code=trust_remote_code)
        kind = model_class(next(iter(architectures(config)), None)) or transformers.AutoModel
    return kind


def _head(adapter: StoredAdapter, kind: Any) -> dict[str, Any]:
    """Return the number of labels by the width of the trained head."""
    widths = [tensor.shape[0] for tensor in adapter.rest.values() if tensor.dim() == 2]
    return {"num_labels": min(widths)} if widths and "Classification" in kind.__name__ else {}


def load_base(base: Base, adapter: Path | None = None) -> Any:
    """Return the model in float32, in evaluation mode. Weights its files lack (a head) are drawn
    with a fixed seed, so that two loads are equal. Raises as `Base.load`.

    Args:
        adapter: the folder of an adapter that will be put on it: a vocabulary that was grown for
            it is grown here too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Whatever the files have: the rounding of 16 bits would hide what a check looks for.
        model = base.load(dtype=torch.float32).model
        if adapter is not None:
            tokens = other_vocabulary(model, adapter, tensor_shapes(adapter / WEIGHTS_NAME))
            if tokens is not None:
                model.resize_token_embeddings(tokens, mean_resizing=False)
    return model.eval()


def is_quantised(base: Base) -> bool:
    """True when the base model's files hold quantised weights."""
    return getattr(base.config(), "quantization_config", None) is not None


def check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, int]], name: str) -> None:
    """Raise `InputError` unless every target {name: (I, O)} is a module of `model` with these
    features."""
    modules = dict(model.named_modules())
    for target, (in_features, out_features) in shapes.items():
        if target not in modules:
            raise InputError(
                f"the base model {name!r} has no module {target!r}, which the adapter changes: "
                "wrong --model?"
            )
        found = linear_features(modules[target])
        if found is not None and found != (in_features, out_features):
            raise InputError(
                f"{target!r} has {found[0]} inputs and {found[1]} outputs in the base model "
                f"{name!r}; the adapter is for {in_features} and {out_features}: wrong --model?"
            )
