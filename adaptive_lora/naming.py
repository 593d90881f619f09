"""Dotted names, of modules and of keys inside mappings. Pure text, so that reports can use it
without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from adaptive_lora.errors import InputError

Value = TypeVar("Value")


def split_name(name: str) -> tuple[str, int | None, str]:
    """Split a dotted name at its first index into (stack, index, kind); without an index: ("",
    None, name).

    >>> split_name("bert.encoder.layer.3.attention.self.query")
    ('bert.encoder.layer', 3, 'attention.self.query')
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :]) or name
    return "", None, name


def by_kind(values: Mapping[str, Value]) -> dict[str, dict[int, Value]]:
    """Group {target: value} as {module kind: {layer index: value}}, in the order they come.

    A kind is named with its stack when the model has several (an encoder and a decoder). A target
    outside every layer has layer index 0.

    >>> by_kind({"layer.0.q": 4, "layer.1.q": 2, "pooler": 3})
    {'q': {0: 4, 1: 2}, 'pooler': {0: 3}}
    """
    stacks = {stack for stack, index, _ in map(split_name, values) if index is not None}
    table: dict[str, dict[int, Value]] = {}
    for name, value in values.items():
        stack, index, kind = split_name(name)
        label = f"{stack}.*.{kind}" if index is not None and len(stacks) > 1 else kind
        table.setdefault(label, {})[index or 0] = value
    return table


def inside(name: str, parents: Iterable[str]) -> bool:
    """True when `name` is one of `parents`, or a module or tensor below one.

    >>> [inside(name, ["score"]) for name in ("score", "score.weight", "scores", "layer.0.score")]
    [True, True, False, False]
    """
    return any(f"{name}.".startswith(f"{parent}.") for parent in parents)


def passes(name: str, parts: Iterable[str]) -> bool:
    """True when `name` is, or is below, a module whose name ends with one of `parts`, as PEFT
    understands `modules_to_save`.

    >>> [passes(name, ["score"]) for name in ("score", "model.score.weight", "model.scores")]
    [True, True, False]
    """
    return any(f".{part}." in f".{name}." for part in parts)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as {dotted key: value}; a mapping without keys is a value.

    >>> flatten({"training": {"seed": 1, "more": {}}})
    {'training.seed': 1, 'training.more': {}}
    """
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: value
        for name, below in values.items()
        for key, value in flatten(below, f"{prefix}.{name}".lstrip(".")).items()
    }


def set_dotted(values: dict[str, Any], key: str, value: Any, *, origin: str) -> None:
    """Set a dotted key of nested mappings in place, making those that are missing. Raises
    `InputError` beginning with `origin` where something else than a mapping is in the way.

    >>> recipe = {"training": {"seed": 1}}
    >>> set_dotted(recipe, "data.text", "sentence", origin="command line")
    >>> recipe
    {'training': {'seed': 1}, 'data': {'text': 'sentence'}}
    """
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{origin}: {parent} is {values!r}; expected a mapping")
    values[last] = value
