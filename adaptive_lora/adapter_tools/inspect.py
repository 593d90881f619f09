"""What is in an adapter: ranks, scales, sizes, spectra, what is wasted and what is wrong. No model
is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adaptive_lora.adapter_tools.compress import choose
from adaptive_lora.adapter_tools.folder import StoredAdapter, read_adapter
from adaptive_lora.allocation.singular import singular_values
from adaptive_lora.files import check_new_file, finite
from adaptive_lora.naming import by_kind, split_name

FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class TargetFacts:
    """One target. What needs finite weights is NaN, and an empty spectrum, without them.

    Args:
        in_features, out_features: I and O.
        rank: R, of the tensors.
        scale: what PEFT multiplies B A with.
        norm: ||scale · B A||_F.
        effective_rank: see `effective_rank`; 0 for a target that learned nothing.
        needed_99, needed_999: components that hold 99 % and 99.9 % of this target's Σ σ².
        spectrum: σ of scale · B A, falling.
        finite: no NaN and no infinity in A and B.
    """

    in_features: int
    out_features: int
    rank: int
    scale: float
    norm: float
    effective_rank: float
    needed_99: int
    needed_999: int
    spectrum: tuple[float, ...]
    finite: bool


@dataclass(frozen=True)
class Inspection:
    """The facts of an adapter.

    Args:
        base: the base model's name, as the config has it.
        parameters: LoRA parameters.
        needed_99, needed_999: parameters that hold 99 % and 99.9 % of Σ σ² over all targets
            together, None where that is not defined; what is above them is wasted.
        other_tensors: names of the tensors that are no LoRA weights (a trained head).
        warnings: what is wrong, or will be with some readers; each a sentence.
    """

    folder: str
    base: str | None
    parameters: int
    needed_99: int | None
    needed_999: int | None
    targets: dict[str, TargetFacts]
    other_tensors: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for strict JSON; a number that is not finite becomes
        None."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def effective_rank(values: Sequence[float]) -> float:
    """Return exp(−Σ p_k ln p_k) with p_k = σ_k / Σ σ: R for equal singular values, 1 for one; 0
    when all are zero.

    Raises `ValueError` for negative values; NaN gives NaN. Source: Roy & Vetterli 2007, "The
    effective rank: a measure of effective dimensionality", EUSIPCO, definition 1.

    >>> effective_rank([2.0, 2.0, 0.0]), effective_rank([0.0])
    (2.0, 0.0)
    """
    if any(value < 0 for value in values):
        raise ValueError(f"singular values are never negative; got {min(values)}")
    total = math.fsum(values)
    if total == 0:
        return 0.0
    return round(math.exp(-math.fsum(p * math.log(p) for v in values if (p := v / total) != 0)), 12)


def inspect(path: str | Path) -> Inspection:
    """Return the facts of the adapter in the folder `path` (or in `adapter` of a run directory).

    Weights that are not finite are reported, not refused. Raises otherwise as `read_adapter`.
    """
    adapter = read_adapter(path, finite=False)
    targets = {}
    for name, update in adapter.updates.items():
        finite = bool(torch.isfinite(update.a).all()) and bool(torch.isfinite(update.b).all())
        values = singular_values(update.a.double(), update.b.double()) if finite else torch.empty(0)
        spectrum = tuple((abs(update.scale) * values).tolist())
        learned = any(spectrum)
        targets[name] = TargetFacts(
            in_features=update.a.shape[1],
            out_features=update.b.shape[0],
            rank=update.rank,
            scale=update.scale,
            norm=math.sqrt(math.fsum(v**2 for v in spectrum)) if finite else math.nan,
            effective_rank=effective_rank(spectrum) if finite else math.nan,
            needed_99=_needed({name: spectrum}, {name: 1}, 0.99) if learned else 0,
            needed_999=_needed({name: spectrum}, {name: 1}, 0.999) if learned else 0,
            spectrum=spectrum,
            finite=finite,
        )
    spectra = {name: facts.spectrum for name, facts in targets.items()}
    defined = all(facts.finite for facts in targets.values()) and any(map(any, spectra.values()))
    return Inspection(
        folder=str(adapter.folder),
        base=adapter.base,
        parameters=adapter.parameters,
        needed_99=_needed(spectra, adapter.costs, 0.99) if defined else None,
        needed_999=_needed(spectra, adapter.costs, 0.999) if defined else None,
        targets=targets,
        other_tensors=tuple(adapter.rest),
        warnings=(*_faults(adapter, targets), *_misreadings(adapter, targets)),
    )


def _needed(spectra: dict[str, tuple[float, ...]], costs: dict[str, int], energy: float) -> int:
    pattern = choose(spectra, costs, budget=None, energy=energy)
    return sum(rank * costs[name] for name, rank in pattern.items())


def _faults(adapter: StoredAdapter, targets: dict[str, TargetFacts]) -> list[str]:
    """Return what is wrong with the weights."""
    found = []
    broken = [name for name, facts in targets.items() if not facts.finite]
    broken += [
        key for key, tensor in adapter.rest.items() if not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        found.append(
            f"NaN or infinite values in {len(broken)} places, first {broken[0]!r}: the training "
            "diverged"
        )
    idle = [name for name, facts in targets.items() if facts.finite and facts.norm == 0]
    if len(idle) == len(targets):
        found.append("the adapter learned nothing: every update is zero (B as it starts)")
    elif idle:
        found.append(
            f"{len(idle)} of {len(targets)} targets learned nothing (their update is zero), first "
            f"{idle[0]!r}"
        )
    return found


def _misreadings(adapter: StoredAdapter, targets: dict[str, TargetFacts]) -> list[str]:
    """Return what some readers refuse, or read otherwise than PEFT."""
    found = []
    for kind, layers, expected in _gaps(targets):
        found.append(
            f"{kind!r} is adapted in {len(layers)} of {len(expected)} layers (not in "
            f"{_some(expected - layers)}): TGI and LoRAX then drop the whole kind; adaptive-lora "
            "export --to uniform fills the gaps"
        )
    ranks = {facts.rank for facts in targets.values()}
    scales = sorted({facts.scale for facts in targets.values()})
    config = adapter.config
    if any(not math.isclose(scale, config.lora_alpha / config.r, rel_tol=1e-6) for scale in scales):
        spread = f"{scales[0]:.4g}" + (f" to {scales[-1]:.4g}" if len(scales) > 1 else "")
        found.append(
            f"PEFT's scales are {spread}, but lora_alpha / r is "
            f"{config.lora_alpha / config.r:.4g}, which readers like vLLM apply to every target: "
            "adaptive-lora export writes one that is right everywhere"
        )
    if len(ranks) > 1:
        found.append(
            f"ranks differ ({min(ranks)}..{max(ranks)}): PEFT and vLLM read that; llama.cpp takes "
            "another scale, SGLang, TGI and LoRAX refuse: adaptive-lora export --to uniform"
        )
    return found


def _gaps(names: Any) -> list[tuple[str, set[int], set[int]]]:
    """Return (module kind, its layers, the layers of its stack) for kinds that some layers of their
    stack lack."""
    layers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        stack, index, kind = split_name(name)
        if index is not None:
            layers.setdefault((stack, kind), set()).add(index)
    stacks: dict[str, set[int]] = {}
    for (stack, _), indices in layers.items():
        stacks.setdefault(stack, set()).update(indices)
    return [
        (kind, here, stacks[stack])
        for (stack, kind), here in layers.items()
        if here != stacks[stack]
    ]


def _some(indices: set[int]) -> str:
    shown = sorted(indices)
    return ", ".join(map(str, shown[:6])) + (" ..." if len(shown) > 6 else "")


def rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """Return the cells of a table, one row a target, by module kind and layer."""
    return [
        (
            kind,
            str(layer),
            f"{facts.out_features}x{facts.in_features}",
            str(facts.rank),
            f"{facts.scale:.4g}",
            f"{facts.norm:.3g}",
            f"{facts.effective_rank:.1f}",
            str(facts.needed_99),
            str(facts.needed_999),
        )
        for kind, layers in by_kind(inspection.targets).items()
        for layer, facts in layers.items()
    ]


def summary(inspection: Inspection) -> list[str]:
    """Return what is true of the whole adapter in sentences, warnings last."""
    others = (
        f", and {len(inspection.other_tensors)} other tensors" if inspection.other_tensors else ""
    )
    lines = [
        f"base model: {inspection.base or 'not named'}",
        f"{inspection.parameters:,} LoRA parameters on {len(inspection.targets)} targets{others}",
    ]
    for share, needed in (("99", inspection.needed_99), ("99.9", inspection.needed_999)):
        if needed is not None:
            wasted = 100 * (1 - needed / inspection.parameters)
            lines.append(
                f"{needed:,} parameters hold {share} % of the squared singular values, and the "
                f"other {wasted:.1f} % the rest: adaptive-lora compress ADAPTER --energy "
                f"0.{share.replace('.', '')} --output NEW"
            )
    return [*lines, *(f"warning: {one}" for one in inspection.warnings)]


def check_figure(path: Path) -> None:
    """Raise `InputError` for a figure that exists, has no folder to go to, or an ending that
    matplotlib does not know."""
    check_new_file(path, "figure", FIGURES)
