"""Shapes: the rank of every target before training, by its place or as the user wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import InputError, nearest, unknown
from adaptive_lora.files import read_file

Shape = Callable[[Sequence[Target]], dict[str, int]]
"""Targets -> the raw rank of each: what a method gives when nobody names a budget."""


def depth(target: Target) -> float:
    """Return i / (L - 1) in [0, 1], the place of the target's layer in its stack; 0 for L = 1."""
    return target.layer / (target.n_layers - 1) if target.n_layers > 1 else 0.0


def uniform(rank: int) -> Shape:
    """Return the shape with this rank everywhere."""
    return lambda targets: {target.name: rank for target in targets}


def linear(base_rank: int, min_rank: int, position: Callable[[Target], int]) -> Shape:
    """Return max(r_min, int(r - (r - r_min) i / (L - 1))) with i = position(target)."""

    def rank(target: Target) -> int:
        fall = (base_rank - min_rank) * position(target) / max(target.n_layers - 1, 1)
        return max(min_rank, int(base_rank - fall))

    return lambda targets: {target.name: rank(target) for target in targets}


def read_ranks(file: Path) -> tuple[dict[str, int] | None, list[int] | None]:
    """Return (rank pattern, layer ranks) of a JSON or YAML file, one of them None. The ranks are
    not yet checked."""
    content = read_file(file, "rank file")
    if not isinstance(content, dict):
        raise InputError(
            f"{file} holds a {type(content).__name__}; expected an object with layer_ranks or "
            "rank_pattern"
        )
    allowed = ["layer_ranks", "rank_pattern", "strategy_name"]
    for key in content.keys() - set(allowed):
        raise InputError(unknown(f"{file}: unknown key {key!r}", key, allowed, "Expected"))
    if ("layer_ranks" in content) == ("rank_pattern" in content):
        raise InputError(
            f"{file}: expected exactly one of layer_ranks and rank_pattern, got {sorted(content)}"
        )
    if not isinstance(content.get("layer_ranks", []), list):
        raise InputError(
            f"{file}: layer_ranks is {content['layer_ranks']!r}; expected a list, one rank per "
            "layer"
        )
    if not isinstance(content.get("rank_pattern", {}), dict):
        raise InputError(
            f"{file}: rank_pattern is {content['rank_pattern']!r}; expected an object {{name: "
            f"rank}}"
        )
    return content.get("rank_pattern"), content.get("layer_ranks")


def by_layer(
    origin: str, ranks_by_layer: Sequence[int], targets: Sequence[Target]
) -> dict[str, int]:
    """Return the rank of every target from one rank for each layer, in the order of the model."""
    layers = list(
        dict.fromkeys(sorted(((t.stack, t.layer) for t in targets), key=_stack_order(targets)))
    )
    if len(layers) != len(ranks_by_layer):
        raise InputError(
            f"{origin}: layer_ranks has {len(ranks_by_layer)} ranks, expected {len(layers)}, one "
            "for each layer with targets"
        )
    by_layer = dict(zip(layers, ranks_by_layer, strict=True))
    return {t.name: by_layer[t.stack, t.layer] for t in targets}


def _stack_order(targets: Sequence[Target]) -> Callable[[tuple[str, int]], tuple[int, int]]:
    """Return a sort key: stacks as the model has them (encoder first), layers by depth."""
    stacks = list(dict.fromkeys(t.stack for t in targets))
    return lambda place: (stacks.index(place[0]), place[1])


def by_pattern(
    origin: str, pattern: Mapping[str, int], targets: Sequence[Target]
) -> dict[str, int]:
    """Return every target's rank from full names or regular expressions; the first match wins."""
    try:
        compiled = {key: re.compile(key) for key in pattern}
    except re.error as error:
        raise InputError(
            f"{origin}: {error.pattern!r} is not a valid regular expression: {error}"
        ) from None
    result: dict[str, int] = {}
    used: set[str] = set()
    for target in targets:
        key = next(
            (k for k, c in compiled.items() if k == target.name or c.fullmatch(target.name)), None
        )
        if key is None:
            raise InputError(
                f"{origin}: no entry of the rank pattern matches target {target.name!r}; add one, "
                "or a last entry '.*'"
            )
        used.add(key)
        result[target.name] = pattern[key]
    for key in pattern:
        if key not in used and not any(compiled[key].fullmatch(t.name) for t in targets):
            raise InputError(
                f"{origin}: {key!r} matches no target.{nearest(key, [t.name for t in targets])}"
            )
    return result
