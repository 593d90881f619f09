"""Memory as tables and figures: a plan before the training, accounts after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot as plt
from rich.table import Table

from adaptive_lora.files import write_json
from adaptive_lora.report.figures import save
from adaptive_lora.report.tables import show

if TYPE_CHECKING:  # a report reads what it is given, and imports no torch to do so
    from adaptive_lora.runs.memory_plan import Plan

SIZES = {"8 GB": 8 * 10**9, "16 GB": 16 * 10**9, "24 GB": 24 * 10**9, "80 GB": 80 * 10**9}
PARTS = ("base", "head", "adapters", "gradients", "optimizer", "statistics", "activations")
COLOURS = ("#4c6a92", "#8fa3bf", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#b8b8b8")


def parts_of(account: Mapping[str, Any]) -> dict[str, int]:
    """Return an account with one number a part, in bytes."""
    return {
        name: sum(part.values()) if isinstance(part, dict) else part
        for name, part in account.items()
    }


def show_plan(plan: Plan, alternatives: Mapping[str, Plan]) -> None:
    """Print a plan, what it fits in, and the peaks of trainings that need less."""
    show(_stages(plan))
    reserve = (
        ", 1 GB of it left to CUDA and fragmentation"
        if plan.device == "cuda"
        else ", beside Python and its libraries"
    )
    fit = ", ".join(f"{name} {'yes' if plan.fits(size) else 'no'}" for name, size in SIZES.items())
    print(f"fits in: {fit}{reserve}")
    for note in plan.notes:
        print(f"note: {note}")
    if alternatives:
        show(_peaks(alternatives))


def _stages(plan: Plan) -> Table:
    """Return the table of a plan: a column for each stage, a row for each part of the memory."""
    table = Table(title=f"Memory of the training on {plan.device}, MB (10⁶ bytes)")
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.name + ("" if stage.exact else ", at most"), justify="right")
    rows = [{**parts_of(stage.account), "activations": stage.activations} for stage in plan.stages]
    for kind in dict.fromkeys(kind for stage in plan.stages for kind in stage.account["base"]):
        values = [stage.account["base"].get(kind, 0) for stage in plan.stages]
        table.add_row(f"base, {kind}", *(_mb(value) for value in values))
    for part in PARTS[1:]:
        table.add_row(part, *(_mb(row[part]) for row in rows))
    table.add_row("peak", *(_mb(stage.peak) for stage in plan.stages), style="bold")
    table.add_row("LoRA parameters", *(f"{stage.parameters:,}" for stage in plan.stages))
    return table


def _peaks(alternatives: Mapping[str, Plan]) -> Table:
    table = Table(title="What would need less")
    table.add_column("change", overflow="fold")
    table.add_column("peak, MB", justify="right")
    table.add_column("fits in", justify="right")
    for what, other in alternatives.items():
        smallest = next((name for name, size in SIZES.items() if other.fits(size)), "none of these")
        table.add_row(what, _mb(other.peak), smallest)
    return table


def write_plan(plan: Plan, folder: Path) -> list[Path]:
    """Write plan.json and plan.png to a new folder and return both."""
    folder.mkdir(parents=True)
    stages = [
        {
            "name": stage.name,
            "lora_parameters": stage.parameters,
            **stage.account,
            "activations": stage.activations,
            "peak": stage.peak,
            "exact": stage.exact,
        }
        for stage in plan.stages
    ]
    file = folder / "plan.json"
    write_json(file, {"device": plan.device, "stages": stages, "notes": plan.notes}, indent=2)
    bars = {
        stage.name: {**parts_of(stage.account), "activations": stage.activations}
        for stage in plan.stages
    }
    return [file, memory_bars(bars, folder / "plan.png")]


def memory_bars(
    bars: Mapping[str, Mapping[str, int]], path: Path, *, measured: Mapping[str, int] | None = None
) -> Path:
    """Draw one stacked bar for each name, and a mark at its measured peak where there is one."""
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.42 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [row.get(part, 0) / 1e6 for row in bars.values()]
        axis.barh(list(bars), widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, peak in (measured or {}).items():
        axis.plot(
            peak / 1e6,
            name,
            "k|",
            markersize=16,
            label="measured peak" if name == next(iter(bars)) else None,
        )
    axis.invert_yaxis()
    axis.set_xlabel("MB")
    axis.legend(
        fontsize=8,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.25 - 0.3 / len(bars)),
        frameon=False,
    )
    return save(figure, path)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
