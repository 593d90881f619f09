"""Targets: the linear modules of a model that may carry an adapter, found by introspection.

No table of model names: what is linear is read from the module's class, how deep it sits from its
dotted name, whether it belongs to attention from the modules it sits in, and which modules form the
head from `base_model_prefix`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peft import LoraConfig
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import InputError, nearest
from adaptive_lora.naming import inside, split_name

ALL_LINEAR = "all-linear"


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the top-level modules outside the pretrained base (`classifier`, `score`,
    `qa_outputs` ...).

    They are trained in full beside the adapters. What holds the output embeddings of a language
    model is not a head.
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
    """Return (in_features, out_features) of a `Linear` (also 4/8-bit) or GPT-2's `Conv1D`; None for
    anything else."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return in_features, out_features
    # MultiheadAttention reads its out_proj's weight and never calls it: no adapter would run.
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return module.in_features, module.out_features
    return None


def find_targets(model: nn.Module, targets: str | Iterable[str] = ALL_LINEAR) -> list[Target]:
    """Return the targets that `targets` names, in module order.

    Args:
        model: the base model, without adapters.
        targets: `"all-linear"` (every linear module outside the head and the output embeddings, but
            not one of a single input or output, such as the gate of a shared expert, nor one PEFT
            takes for an expert), a regular expression that must match full names, or a list of
            names, each a full dotted name or its last parts (PEFT's meaning). Output embeddings,
            such as `lm_head`, are a target where a name or an expression means them.

    Raises `InputError` when nothing matches, or one of several names matches nothing: what it is
    if it is something else, and what there is. Also for a module that PEFT takes for an expert.
    What a model holds besides linear modules: `coverage`.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> tiny = BertModel(BertConfig(num_hidden_layers=2, **sizes))
    >>> [t.name for t in find_targets(tiny, ["query"])]
    ['encoder.layer.0.attention.self.query', 'encoder.layer.1.attention.self.query']
    """
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    linear = _linear(model, output_embeddings=not everything)
    names = _select(model, list(linear), targets) if linear else []
    claimed = _claimed_by_peft(model, names)
    if everything:
        # One component on a single input or output costs more than the module itself.
        names = [name for name in names if name not in claimed and min(linear[name]) > 1]
    elif claimed:
        raise InputError(
            f"PEFT takes {', '.join(_kinds(claimed))} for the fused experts of "
            f"{type(model).__name__} and puts no adapter there: leave them out of the targets, as "
            f"{ALL_LINEAR!r} does"
        )
    if not names:
        packed = "".join(
            f": {line}; load it with its weights unpacked, in bf16" for line in _packed(model)
        )
        raise InputError(
            f"{type(model).__name__} has no linear module that could carry an adapter{packed}"
        )
    return describe_targets(model, {name: linear[name] for name in names})


def _linear(model: nn.Module, *, output_embeddings: bool = False) -> dict[str, tuple[int, int]]:
    """Return {full name: (in_features, out_features)} of the linear modules outside the head, and
    outside the output embeddings unless those are asked for."""
    heads = head_modules(model)
    left_out = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: features
        for name, module in model.named_modules()
        if (features := linear_features(module)) is not None
        and (output_embeddings or module is not left_out)
        and not inside(name, heads)
    }


def _claimed_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of `names` that PEFT reads as something else: where transformers 5 fused the
    experts of a family, it takes every `gate_proj`, `up_proj` and `down_proj` for an expert, also
    of a dense layer, at attaching and at loading.
    """
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers as convert,
        )
    except ImportError:  # an older PEFT
        return []

    def keeps(leaf: str) -> bool:
        # PEFT itself is asked: what it takes for experts differs between some 30 model types.
        config = LoraConfig(target_modules=[leaf])
        try:
            convert(config, model=model, conversions=None)
        except ValueError:  # half of what is fused
            return False
        return set(config.target_modules or ()) == {leaf}

    leaves = {leaf: keeps(leaf) for leaf in {name.split(".")[-1] for name in names}}
    return [name for name in names if not leaves[name.split(".")[-1]]]


def _kinds(names: Iterable[str]) -> list[str]:
    """Return the kinds of these modules or parameters, each once, in order."""
    return list(dict.fromkeys(split_name(name)[2] for name in names))


def coverage(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Return what a user should know of these targets before training, a line each; [] when nothing
    is remarkable.

    - Layers that share weights, as in ALBERT: an adapter serves them all, and counts once in the
      budget.
    - Weights in 3-D parameters, such as fused experts, packed linear modules, and linear modules
      PEFT takes for experts: no adapter reaches them.

    Args:
        model: the base model, without adapters.
        targets: from `find_targets(model, ...)`.

    >>> from transformers import AlbertConfig, AlbertModel
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = AlbertConfig(vocab_size=16, embedding_size=8, num_hidden_layers=12, **sizes)
    >>> tiny = AlbertModel(config)
    >>> coverage(tiny, find_targets(tiny, ["query", "value"]))  # doctest: +ELLIPSIS
    ['its layers share weights: each of these 2 adapters serves all 12 layers, and shapes over ...']
    """
    left_out = _claimed_by_peft(model, _linear(model))
    claimed = (
        f"{', '.join(_kinds(left_out))}: no adapter, as PEFT takes these names for the fused "
        "experts of such a model"
    )
    return [
        *_shared(model, targets),
        *_three_dimensional(model, targets),
        *_packed(model),
        *([claimed] if left_out else []),
    ]


def _shared(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    depth = (
        getattr(model.config, "num_hidden_layers", None)
        if isinstance(model, PreTrainedModel)
        else None
    )
    # Modules in lists, with weights of their own: one to a layer at least, unless layers share.
    own = {
        found[0]
        for name, _ in model.named_parameters()
        if (found := re.match(r"(.*\.)?\d+(?=\.)", name))
    }
    inside = [target for target in targets if split_name(target.name)[1] is not None]
    if not inside or not isinstance(depth, int) or len(own) >= depth:
        return []
    share = f"{'all' if len(own) == 1 else 'several of the'} {depth} layers"
    seen = max(target.n_layers for target in inside)
    return [
        f"its layers share weights: each of these {len(inside)} adapters serves {share}, and "
        f"shapes over depth see {seen} layer{'s' if seen > 1 else ''}"
    ]


def _three_dimensional(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    convolutions = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, _ConvNd)
    )
    # (1, N, D) is an embedding of positions, or one token.
    found = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and parameter.shape[0] > 1 and not name.startswith(convolutions)
    }
    if not found:
        return []
    count, total = sum(found.values()), sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{', '.join(_kinds(found))} hold {count:,} parameters, {count / total:.0%} of the base, "
        "in 3-D parameters (as fused experts do), which LoRA on linear modules does not reach; "
        f"adapted are {', '.join(_kinds(t.name for t in targets))}"
    ]


def _packed(model: nn.Module) -> list[str]:
    found = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and {"in_features", "out_features"} <= vars(module).keys()
        and any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    }
    if not found:
        return []
    types = ", ".join(dict.fromkeys(found.values()))
    return [
        f"{len(found)} {types} modules ({', '.join(_kinds(found))}) hold packed weights and can "
        "carry no adapter"
    ]


def _select(model: nn.Module, names: Sequence[str], targets: str | Iterable[str]) -> list[str]:
    """Return those of `names` that `targets` means."""
    if isinstance(targets, str):
        return list(names) if targets.lower() == ALL_LINEAR else _matching(model, names, targets)
    wanted = list(targets)
    if not wanted:
        raise InputError(f"targets is an empty list.{_listing(names)}")
    chosen: set[str] = set()
    for want in wanted:
        hits = {name for name in names if _ends(name, want)}
        if not hits:
            raise _no_target(model, names, want)
        chosen |= hits
    return [name for name in names if name in chosen]


def _no_target(model: nn.Module, names: Sequence[str], want: str) -> InputError:
    """Return what to say of a name in a list that means none of `names`."""
    meant = [name for name, _ in model.named_modules() if name and _ends(name, want)]
    if meant:
        return InputError(f"target {_reason(model, want, meant[0])}.{_listing(names)}")
    endings = {name.split(".", cut)[-1] for name in names for cut in range(name.count(".") + 1)}
    near = nearest(want, sorted(endings))
    return InputError(f"target {want!r} matches no linear module.{_listing(names, near)}")


def _ends(name: str, ending: str) -> bool:
    """True when `ending` is a full dotted name or its last parts."""
    return f".{name}".endswith(f".{ending}")


def _matching(model: nn.Module, names: Sequence[str], pattern: str) -> list[str]:
    """Return those of `names` that a regular expression matches as a whole."""
    try:
        chosen = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(
            f"targets {pattern!r} is not a valid regular expression: {error}"
        ) from None
    if not chosen:
        meant = [name for name, _ in model.named_modules() if name and re.fullmatch(pattern, name)]
        if meant:
            raise InputError(
                f"targets {pattern!r} match {len(meant)} module{'s' if meant[1:] else ''} and no "
                f"target: {_reason(model, meant[0], meant[0])}.{_listing(names)}"
            )
        raise InputError(
            f"targets {pattern!r} match no linear module: a string is a regular expression over "
            "full names; give a list for last parts of "
            f"names.{_listing(names, nearest(pattern, [ALL_LINEAR]))}"
        )
    return chosen


def _reason(model: nn.Module, said: str, name: str) -> str:
    """Return why the module `name`, which the user calls `said`, is no target."""
    module = model.get_submodule(name)
    kind = f"{said!r} is of the class {type(module).__name__}"
    heads = head_modules(model)
    if inside(name, heads):
        head = next(head for head in heads if inside(name, [head]))
        what = "the head" if name == head else f"part of the head ({head})"
        return f"{said!r} is {what}: it is trained whole, and carries no adapter"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"{kind}, whose weight is read and which is never called: no adapter on it would run"
    within = [part for part, inner in module.named_modules() if part and linear_features(inner)]
    if within:
        return f"{kind}, which is no linear module but holds some ({', '.join(_kinds(within))})"
    if {"in_features", "out_features"} <= vars(module).keys():
        return f"{kind}, which holds packed weights and can carry no adapter"
    return f"{kind}: only linear modules carry adapters"


def _listing(names: Sequence[str], hint: str = "") -> str:
    kinds = dict.fromkeys(split_name(name)[2] for name in names)
    return f"{hint} Linear modules of this model: {', '.join(kinds)}; or {ALL_LINEAR!r}"


def describe_targets(model: nn.Module, features: dict[str, tuple[int, int]]) -> list[Target]:
    """Return a `Target` for each {full name: (in_features, out_features)}, in the same order."""
    # A target outside every layer (an input projection, a pooler) takes the depth of the layer
    # before it, else of the first: a shape over depth then has an answer for it.
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
    """True when a module between layer and target is called attention, by attribute or class."""
    # GPT-2 has a `c_proj` in attention and in the feed-forward: only the place tells them apart.
    stack, index, _ = split_name(name)
    inside_from = len(f"{stack}.{index}".split(".")) if index is not None else 0
    parts = name.split(".")
    for end in range(inside_from + 1, len(parts)):
        parent = model.get_submodule(".".join(parts[:end]))
        if re.search(r"attn|attention", f"{parts[end - 1]} {type(parent).__name__}", re.IGNORECASE):
            return True
    return False
