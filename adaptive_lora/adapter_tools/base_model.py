"""The base model an adapter belongs to, in full precision: where it is, of which class, with which
head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from adaptive_lora.errors import InputError
from adaptive_lora.hub import locate_model

BY_TASK_TYPE = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Base:
    """A base model that can be loaded again and again, each time with the same weights.

    Args:
        name: a folder, or a name on the hub.
        kind: a class of transformers, or one of its Auto classes.
        arguments: for `from_pretrained`: what shapes the head.
    """

    name: str
    kind: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Return the model in float32, in evaluation mode. Raises `InputError` when it cannot be
        had.

        Weights the checkpoint lacks (a head) are drawn with a fixed seed, so that two loads are
        equal.
        """
        where = {"local_files_only": locate_model(self.name)}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                model = self.kind.from_pretrained(
                    self.name, dtype=torch.float32, **where, **self.arguments
                )
            # transformers and safetensors raise many kinds; all mean the same to the caller
            except Exception as error:
                raise InputError(
                    f"cannot load the base model {self.name!r} as {self.kind.__name__}: {error}"
                ) from error
        return model.eval()

    def config(self) -> Any:
        """Return the configuration in the base model's folder."""
        local = locate_model(self.name)
        try:
            return AutoConfig.from_pretrained(self.name, local_files_only=local)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"cannot load the configuration of the base model {self.name!r}: {error}"
            ) from error


def base_of_adapter(
    config: Mapping[str, Any], heads: Mapping[str, torch.Tensor], name: str | None = None
) -> Base | None:
    """Return the base model of a PEFT adapter; None when nothing says which one it is.

    The class comes from PEFT's record of it (`auto_mapping`), else from `task_type`, else from the
    base model's own `architectures`; the number of labels from the trained head.

    Args:
        config: the content of `adapter_config.json`.
        heads: the adapter's tensors of modules trained whole.
        name: where the base model is now, if not where `config` says.
    """
    name = name or config.get("base_model_name_or_path")
    if not name:
        return None
    name = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    recorded = (config.get("auto_mapping") or {}).get("base_model_class", "")
    kind = getattr(transformers, recorded, None) or BY_TASK_TYPE.get(config.get("task_type") or "")
    base = Base(name, kind)
    if kind is None:
        architectures = base.config().architectures or [""]
        base = Base(name, getattr(transformers, architectures[0], transformers.AutoModel))
    widths = [tensor.shape[0] for tensor in heads.values() if tensor.dim() == 2]
    if widths and ("Classification" in base.kind.__name__):
        return Base(name, base.kind, {"num_labels": min(widths)})
    return base


def is_quantised(base: Base) -> bool:
    """True when the base model's files hold quantised weights."""
    return getattr(base.config(), "quantization_config", None) is not None


def check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, int]], name: str) -> None:
    """Raise `InputError` unless every target {name: (I, O)} is a module of `model` with these
    features."""
    from adaptive_lora.model.targets import linear_features

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
                f"{name!r}; the adapter is for "
                f"{in_features} and {out_features}: wrong --model?"
            )
