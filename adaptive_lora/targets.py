"""Targets: the linear modules of a model that may carry an adapter, found by introspection.

No table of model names: what is linear is read from the module's class, how deep it sits from its dotted name, whether
it belongs to attention from the modules it sits in, and which modules form the head from `base_model_prefix`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.errors import InputError, nearest
from adaptive_lora.naming import split_name

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Target:
    """A linear module that carries an adapter. B A has shape (out_features, in_features)."""

    name: str  # full dotted name in the base model
    kind: str  # the name inside its layer, such as "attention.self.query": the same in every layer
    stack: str  # the list of layers it belongs to, such as "encoder.layer"; "" when the model has none
    layer: int  # 0-based among the layers of this stack that carry targets
    n_layers: int  # how many such layers the stack has
    attention: bool  # inside an attention module (otherwise: feed-forward)
    in_features: int  # I
    out_features: int  # O

    @property
    def cost(self) -> int:
        """Trainable parameters of one component: I + O."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank B A can have: min(I, O)."""
        return min(self.in_features, self.out_features)


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the top-level modules outside the pretrained base (`classifier`, `score`, `qa_outputs` ...).

    They are trained in full beside the adapters. What holds the output embeddings of a language model is not a head.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    output_embeddings = model.get_output_embeddings()
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model
        and not any(module is output_embeddings for module in child.modules())
        and any(True for _ in child.parameters())
    ]


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a `Linear` (also 4/8-bit) or GPT-2's `Conv1D`; None for anything else."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return in_features, out_features
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def find_targets(model: nn.Module, targets: str | Iterable[str] = ALL_LINEAR) -> list[Target]:
    """Return the targets that `targets` names, in module order.

    Args:
        model: the base model, without adapters.
        targets: `"all-linear"` (every linear module outside the head and the output embeddings), a regular expression
            that must match full names, or a list of names, each a full dotted name or its last parts (PEFT's meaning).

    Raises `InputError` when nothing matches, or one of several names matches nothing; both list what there is.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    >>> [t.name for t in find_targets(tiny, ["query"])]
    ['encoder.layer.0.attention.self.query', 'encoder.layer.1.attention.self.query']
    """
    heads = head_modules(model)
    output_embeddings = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {
        name: features
        for name, module in model.named_modules()
        if (features := linear_features(module)) is not None
        and module is not output_embeddings
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    if not linear:
        raise InputError(f"{type(model).__name__} has no linear module that could carry an adapter")
    return describe_targets(model, {name: linear[name] for name in _select(list(linear), targets)})


def _select(names: Sequence[str], targets: str | Iterable[str]) -> list[str]:
    """Return those of `names` that `targets` means."""
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return list(names)
        try:
            chosen = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise InputError(f"targets {targets!r} is not a valid regular expression: {error}") from None
        if not chosen:
            raise InputError(
                f"targets {targets!r} match no linear module: a string is a regular expression over full names; "
                f"give a list for last parts of names.{_listing(names, nearest(targets, [ALL_LINEAR]))}"
            )
        return chosen
    wanted = list(targets)
    if not wanted:
        raise InputError(f"targets is an empty list.{_listing(names)}")
    chosen_names: set[str] = set()
    for want in wanted:
        hits = {name for name in names if name == want or name.endswith(f".{want}")}
        if not hits:
            endings = {name.split(".", cut)[-1] for name in names for cut in range(name.count(".") + 1)}
            raise InputError(
                f"target {want!r} matches no linear module.{_listing(names, nearest(want, sorted(endings)))}"
            )
        chosen_names |= hits
    return [name for name in names if name in chosen_names]


def _listing(names: Sequence[str], hint: str = "") -> str:
    kinds = dict.fromkeys(split_name(name)[2] for name in names)
    return f"{hint} Linear modules of this model: {', '.join(kinds)}; or {ALL_LINEAR!r}"


def describe_targets(model: nn.Module, features: dict[str, tuple[int, int]]) -> list[Target]:
    """Return a `Target` for each {full name: (in_features, out_features)} of `model`, in the same order."""
    # A target outside every layer (an input projection, a pooler) takes the depth of the layer before it, or of the
    # first one when none comes before: a shape over depth then has an answer for it.
    places: list[tuple[str, int] | None] = []
    for name in features:
        stack, index, _ = split_name(name)
        places.append((stack, index) if index is not None else (places[-1] if places else None))
    first = next((place for place in places if place is not None), ("", 0))
    filled = [place or first for place in places]
    indices = {stack: sorted({i for s, i in filled if s == stack}) for stack, _ in filled}
    return [
        Target(
            name=name,
            kind=split_name(name)[2],
            stack=stack,
            layer=indices[stack].index(index),
            n_layers=len(indices[stack]),
            attention=_in_attention(model, name),
            in_features=features[name][0],
            out_features=features[name][1],
        )
        for name, (stack, index) in zip(features, filled, strict=True)
    ]


def _in_attention(model: nn.Module, name: str) -> bool:
    """True when a module between the layer and this target is called attention, by attribute or by class."""
    stack, index, _ = split_name(name)
    inside_from = len(f"{stack}.{index}".split(".")) if index is not None else 0
    parts = name.split(".")
    for end in range(inside_from + 1, len(parts)):
        parent = model.get_submodule(".".join(parts[:end]))
        if re.search(r"attn|attention", f"{parts[end - 1]} {type(parent).__name__}", re.IGNORECASE):
            return True
    return False
