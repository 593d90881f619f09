"""Methods: named ways to choose ranks, each a preset of one class. `METHODS` maps names to presets.

A preset called without a budget gives its published numbers. Called with `rank=8` (as many
parameters as uniform rank 8 on the same targets) or `budget=300_000` (parameters) the shape is kept
and the total is that budget, met exactly.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.allocation.budget import Cubic
from adaptive_lora.allocation.importance import (
    GradientNorm,
    Sensitivity,
    SingularValues,
    Uniform,
    WeightDelta,
    Weighted,
)
from adaptive_lora.allocation.method import Adaptation, check_whole
from adaptive_lora.allocation.method import Method as Method
from adaptive_lora.allocation.rules import Grow, Proportional, TopK, Truncate
from adaptive_lora.allocation.shapes import (
    Shape,
    by_layer,
    by_pattern,
    depth,
    linear,
    read_ranks,
    uniform,
)
from adaptive_lora.allocation.target import Target
from adaptive_lora.allocation.when import At, OnPlateau
from adaptive_lora.errors import InputError, unknown
from adaptive_lora.model.peft_adalora import MaskedByPeft


def lora(rank: int | None = None, *, budget: int | None = None) -> Method:
    """The same rank everywhere (8 unless given).

    Source: Hu et al. 2022, LoRA, arXiv 2106.09685.
    """
    if rank is None:
        return Method(
            name="lora", shape=lambda targets: {t.name: 8 for t in targets}, budget=budget
        )
    uniform = check_whole("method 'lora': rank", rank, at_least=1)
    if budget is not None:
        raise InputError(f"method 'lora': give rank ({rank}) or budget ({budget}), not both")
    return Method(name="lora", shape=lambda targets: {t.name: uniform for t in targets})


def linear_decay(
    *, base_rank: int = 16, min_rank: int = 4, rank: int | None = None, budget: int | None = None
) -> Method:
    """High rank in early layers, falling linearly with depth: max(r_min, int(r - (r - r_min) i / (L
    - 1))).

    Source: system 1, adaptive-lora-placement (2024), strategy "linear decay".
    """
    _check_range("linear_decay", base_rank, min_rank)
    shape = linear(base_rank, min_rank, lambda target: target.layer)
    return Method(name="linear_decay", shape=shape, rank=rank, budget=budget)


def linear_increase(
    *, base_rank: int = 16, min_rank: int = 4, rank: int | None = None, budget: int | None = None
) -> Method:
    """Low rank in early layers, rising linearly with depth: `linear_decay` turned round.

    Source: Benedek & Wolf 2024, PRILoRA, Findings of EACL.
    """
    _check_range("linear_increase", base_rank, min_rank)
    shape = linear(base_rank, min_rank, lambda target: target.n_layers - 1 - target.layer)
    return Method(name="linear_increase", shape=shape, rank=rank, budget=budget)


def attention_heavy(
    *, base_rank: int = 16, min_rank: int = 4, rank: int | None = None, budget: int | None = None
) -> Method:
    """Attention at rank r, feed-forward at max(r_min, r // 2), told apart by where the module sits.

    Source: system 1, adaptive-lora-placement (2024), strategy "attention heavy".
    """
    _check_range("attention_heavy", base_rank, min_rank)

    def shape(targets: Sequence[Target]) -> dict[str, int]:
        return {
            t.name: base_rank if t.attention else max(min_rank, base_rank // 2) for t in targets
        }

    return Method(name="attention_heavy", shape=shape, rank=rank, budget=budget)


def empirical(*, base_rank: int = 16, rank: int | None = None, budget: int | None = None) -> Method:
    """Depth i / (L - 1) below 0.3: 0.6 r; below 0.7: 1.2 r; else r, rounded down.

    Source: system 1, adaptive-lora-placement (2024), strategy "empirical".
    """
    check_whole("method 'empirical': base_rank", base_rank, at_least=1)

    def at(depth: float) -> int:
        # In tenths: int(0.6 * 5) is 3 but int(1.2 * 5) would hang on the last bit of a float.
        tenths = 6 if depth < 0.3 else 12 if depth < 0.7 else 10
        return max(1, base_rank * tenths // 10)

    return Method(
        name="empirical",
        shape=lambda targets: {t.name: at(depth(t)) for t in targets},
        rank=rank,
        budget=budget,
    )


def custom(
    *,
    file: str | Path | None = None,
    pattern: Mapping[str, int] | None = None,
    layer_ranks: Sequence[int] | None = None,
    rank: int | None = None,
    budget: int | None = None,
) -> Method:
    """Your own ranks: one per layer, or a pattern by target name or regular expression; from a file
    or directly.

    A file is JSON or YAML: `{"layer_ranks": [16, 12, ...]}` (one per layer, in order) or
    `{"rank_pattern": {name: rank}}` with full target names or regular expressions (the first that
    matches a target wins). Rank 0 means no adapter there.

    Source: system 1, adaptive-lora-placement (2024), strategy "custom"; PEFT's `rank_pattern`.
    """
    given = [
        what
        for what, value in (("file", file), ("pattern", pattern), ("layer_ranks", layer_ranks))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError(
            "method 'custom' takes exactly one of file, pattern, layer_ranks; got "
            f"{given or 'none'}"
        )
    origin = "custom"
    if file is not None:
        if not isinstance(file, str | Path):
            raise InputError(f"method 'custom': file is {file!r}; expected a path")
        origin = str(file)
        pattern, layer_ranks = read_ranks(Path(file))
    if not isinstance(layer_ranks, Sequence | None):
        raise InputError(
            f"{origin}: layer_ranks is {layer_ranks!r}; expected a list, one rank per layer"
        )
    if not isinstance(pattern, Mapping | None) or not all(
        isinstance(key, str) for key in pattern or ()
    ):
        raise InputError(f"{origin}: the rank pattern is {pattern!r}; expected {{name: rank}}")
    if layer_ranks is not None:
        ranks_by_layer = [
            check_whole(f"{origin}: layer_ranks[{i}]", value, at_least=0)
            for i, value in enumerate(layer_ranks)
        ]
        shape: Shape = lambda targets: by_layer(origin, ranks_by_layer, targets)
    else:
        assert pattern is not None
        checked = {
            key: check_whole(f"{origin}: rank of {key!r}", value, at_least=0)
            for key, value in pattern.items()
        }
        shape = lambda targets: by_pattern(origin, checked, targets)
    return Method(name="custom", shape=shape, rank=rank, budget=budget)


def _check_range(name: str, base_rank: int, min_rank: int) -> None:
    check_whole(f"method {name!r}: min_rank", min_rank, at_least=1)
    check_whole(f"method {name!r}: base_rank", base_rank, at_least=1)
    if min_rank > base_rank:
        raise InputError(f"method {name!r}: min_rank {min_rank} exceeds base_rank {base_rank}")


def adalora(
    rank: int | None = None,
    *,
    budget: int | None = None,
    factor: float = 1.5,
    initial: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    min_rank: int = 0,
) -> Method:
    """Start above the budget, drop the least important components on a cubic schedule; ranks really
    shrink.

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512; on plain B A, see
    `importance.Sensitivity`.
    """
    schedule = Cubic(factor=factor, initial=initial, final=final)
    return Method(
        name="adalora",
        # Equal weights: budget and schedule alone set the ranks at the start.
        shape=uniform(1),
        rank=8 if rank is None and budget is None else rank,
        budget=budget,
        adaptation=Adaptation(
            importance=Sensitivity(beta1=beta1, beta2=beta2),
            rule=TopK(),
            when=At(start=initial, rest=final, every=every),
            schedule=schedule,
            min_rank=min_rank,
        ),
    )


def squeeze(
    rank: int | None = None,
    *,
    budget: int | None = None,
    factor: float = 2.0,
    initial: float = 0.3,
    final: float = 0.3,
    every: float = 0.1,
    min_rank: int = 0,
) -> Method:
    """Train at a high rank, then cut in stages to the largest singular components of all updates
    together.

    Source: truncation after training (2026), arXiv 2604.27796, moved into it; Eckart & Young 1936.
    """
    return Method(
        name="squeeze",
        shape=uniform(1),
        rank=8 if rank is None and budget is None else rank,
        budget=budget,
        adaptation=Adaptation(
            importance=SingularValues(),
            rule=Truncate(),
            when=At(start=initial, rest=final, every=every),
            schedule=Cubic(factor=factor, initial=initial, final=final),
            min_rank=min_rank,
        ),
    )


def peft_adalora(
    rank: int = 8,
    *,
    initial_rank: int | None = None,
    initial: float = 0.1,
    final: float = 0.3,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
) -> Method:
    """PEFT's own AdaLoRA, to compare with: ranks are masked, not removed, until the end turns them
    into plain LoRA.

    From `initial_rank` (1.5 times `rank` unless given) to an average of `rank` components a target.
    Components are counted, not parameters: targets of unequal size can end above or below the
    parameters of uniform rank `rank`.

    Source: PEFT's AdaLoraModel; Zhang et al. 2023, AdaLoRA, arXiv 2303.10512.
    """
    check_whole("method 'peft_adalora': rank", rank, at_least=1)
    start = math.ceil(1.5 * rank) if initial_rank is None else initial_rank
    if check_whole("method 'peft_adalora': initial_rank", start, at_least=1) <= rank:
        raise InputError(
            f"method 'peft_adalora': initial_rank {start} must be above the final rank {rank}"
        )
    return Method(
        name="peft_adalora",
        shape=uniform(start),
        adaptation=MaskedByPeft(
            importance=Sensitivity(beta1=beta1, beta2=beta2),
            rule=TopK(),
            when=At(start=initial, rest=final, every=every),
            schedule=Cubic(factor=start / rank, initial=initial, final=final),
            target_rank=rank,
            orthogonality=orthogonality,
        ),
    )


def grad_delta(
    rank: int | None = None,
    *,
    budget: int | None = None,
    initial_rank: int = 4,
    monitor_alpha: float = 0.5,
    monitor_beta: float = 0.5,
    warmup_steps: float = 0.1,
    min_rank: int = 2,
    max_rank: int = 16,
) -> Method:
    """After a warm-up, ranks by gradient norm and weight change: s = α G + β W; what was learned is
    kept.

    Without a budget r = r_min + s (r_max − r_min), as published; with one, in proportion to that,
    met exactly.

    Source: system 2, Adaptive LoRA by gradient norms and weight deltas (2024).
    """
    return Method(
        name="grad_delta",
        shape=uniform(initial_rank),
        rank=rank,
        budget=budget,
        adaptation=Adaptation(
            importance=Weighted(
                parts=((monitor_alpha, GradientNorm()), (monitor_beta, WeightDelta()))
            ),
            # s plus this floor is in proportion to the published r_min + s (r_max - r_min).
            rule=Proportional(floor=min_rank / max(max_rank - min_rank, 1)),
            when=At(start=warmup_steps),
            min_rank=min_rank,
            max_rank=max_rank,
        ),
    )


def plateau(
    rank: int | None = None,
    *,
    budget: int | None = None,
    initial_rank: int = 2,
    max_rank: int = 8,
    rank_step: int = 2,
    patience: int = 1,
    threshold: float = 0.0,
    per_target: bool = False,
) -> Method:
    """Start small; when the validation loss stops falling, every target grows (per_target: the most
    sensitive third).

    Source: system 3, LoRA with growth on plateau (2024).
    """
    check_whole("method 'plateau': rank_step", rank_step, at_least=1)
    _check_range("plateau", max_rank, initial_rank)
    return Method(
        name="plateau",
        shape=uniform(initial_rank),
        rank=rank,
        budget=budget,
        raw_start=True,
        adaptation=Adaptation(
            importance=Sensitivity() if per_target else Uniform(),
            rule=Grow(step=rank_step, share=1 / 3 if per_target else 1.0),
            when=OnPlateau(patience=patience, threshold=threshold),
            min_rank=initial_rank,
            max_rank=max_rank,
        ),
    )


METHODS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (
        lora,
        linear_decay,
        linear_increase,
        attention_heavy,
        empirical,
        custom,
        grad_delta,
        adalora,
        squeeze,
        peft_adalora,
        plateau,
    )
}


def build(name: str, arguments: Mapping[str, Any]) -> Method:
    """Return the method called `name` with `arguments`: for the command line and recipes; in Python
    call the preset.

    >>> build("lora", {"rank": 4}).name
    'lora'
    """
    if name not in METHODS:
        raise InputError(unknown(f"unknown method {name!r}", name, METHODS))
    accepted = inspect.signature(METHODS[name]).parameters
    for key in arguments:
        if key not in accepted:
            raise InputError(
                unknown(f"method {name!r} has no argument {key!r}", key, accepted, "It takes")
            )
    return METHODS[name](**arguments)


def describe(name: str) -> tuple[str, str]:
    """Return (what the method does in one line, its source), read from the preset's docstring."""
    text = inspect.getdoc(METHODS[name]) or ""
    source = re.search(r"^Source: (.+)$", text, re.MULTILINE)
    return " ".join(text.split("\n\n")[0].split()), source.group(1) if source else ""
