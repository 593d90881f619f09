"""Dotted module names: where the layer index stands. Pure text, so that reports can use it without
a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

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
