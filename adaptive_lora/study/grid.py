"""A grid over a recipe: axes -> (label of every axis, recipe), one for each run. Pure; no torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_lora.errors import InputError
from adaptive_lora.naming import set_dotted

LABEL = "label"


def expand(
    base: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (axis -> label, recipe) for every combination, the last axis of the grid fastest.

    Keys are set from the outside in, so that `method.rank` finds the `method` that another axis has
    set.

    >>> grid = {"method": [{"name": "lora"}, {"name": "adalora"}], "method.rank": [4]}
    >>> [labels for labels, _ in expand({}, grid)]
    [{'method': 'lora', 'method.rank': 4}, {'method': 'adalora', 'method.rank': 4}]
    """
    labels = {axis: labels_of(axis, values) for axis, values in grid.items()}
    for places in itertools.product(*(range(len(values)) for values in grid.values())):
        chosen = dict(zip(grid, places, strict=True))
        assignments = [
            pair for axis, place in chosen.items() for pair in _assignments(axis, grid[axis][place])
        ]
        recipe = copy.deepcopy(dict(base))
        for key, value in sorted(assignments, key=lambda pair: pair[0].count(".")):
            # A copy: another axis may set keys inside, and the grid's own value must stay.
            set_dotted(recipe, key, copy.deepcopy(value), origin=f"study: axis {key}")
        yield {axis: labels[axis][place] for axis, place in chosen.items()}, recipe


def is_labelled(value: Any) -> bool:
    """True for a value that names itself and sets several keys: {label: ..., KEY: ..., KEY:
    ...}."""
    return isinstance(value, Mapping) and LABEL in value


def labels_of(axis: str, values: Sequence[Any]) -> list[Any]:
    """Return one label a value, all different: its own, the value itself, or of mappings the name
    and what differs.

    >>> plateaus = [{"name": "plateau", "patience": patience} for patience in (1, 2)]
    >>> labels_of("method", [{"name": "lora"}, *plateaus])
    ['lora', 'plateau patience 1', 'plateau patience 2']
    """
    labels = [_label(value, values) for value in values]
    for place, label in enumerate(labels):
        if label in labels[:place]:
            made = any(isinstance(value, Mapping) for value in values)
            what = f"{label!r} twice" if made else f"the value {label!r} twice"
            raise InputError(
                f"study: axis {axis} has {what}; give each value once, with labels of their own"
            )
    return labels


def _label(value: Any, values: Sequence[Any]) -> Any:
    if is_labelled(value):
        return str(value[LABEL])
    if not isinstance(value, Mapping):
        return value if isinstance(value, str | int | float | bool | None) else str(value)
    name = value.get("name")
    same = [other for other in values if isinstance(other, Mapping) and other.get("name") == name]
    told = [
        f"{k} {v}"
        for k, v in value.items()
        if k != "name" and (not name or any(other.get(k) != v for other in same))
    ]
    return " ".join([str(name), *told] if name else told)


def _assignments(axis: str, value: Any) -> list[tuple[str, Any]]:
    if is_labelled(value):
        return [(str(key), item) for key, item in value.items() if key != LABEL]
    return [(axis, value)]
