"""Tables for the terminal, at most 100 columns wide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_lora.allocation.history import Decision
from adaptive_lora.naming import by_kind
from adaptive_lora.report.read import RunRecord

WIDTH, ROWS = 100, 12


def show(table: Table) -> None:
    """Print `table` at the terminal's width, at most 100 columns."""
    console = Console()
    Console(width=min(console.width, WIDTH)).print(table)


def rank_table(ranks: dict[str, int]) -> Table:
    """One row a module kind: its ranks from the first layer to the last."""
    table = Table(title="LoRA rank of every target, first layer to last")
    table.add_column("module kind", overflow="fold")
    table.add_column("ranks", overflow="fold")
    table.add_column("sum", justify="right")
    for kind, row in by_kind(ranks).items():
        table.add_row(
            kind, " ".join(f"{row[layer]:>2}" for layer in sorted(row)), str(sum(row.values()))
        )
    return table


def summary_table(run: RunRecord) -> Table:
    """What the run was and what came out."""
    table = Table(title=escape(str(run.folder)), show_header=False)
    result = run.result
    table.add_row(
        "status",
        result["status"] if result["status"] == "ok" else escape(f"failed: {result['reason']}"),
    )
    table.add_row("model, task", escape(f"{result['model']}, {result['task']}"))
    table.add_row("method, seed", f"{result['method']}, {result['seed']}")
    budget = result["budget_parameters"]
    table.add_row(
        "LoRA parameters",
        f"{result['lora_parameters']:,}" + (f" of a budget of {budget:,}" if budget else ""),
    )
    if "train_seconds" in result:
        table.add_row("seconds, steps", f"{result['train_seconds']:.1f}, {result['steps']}")
    if "memory" in result:
        table.add_row("memory", _memory(result))
    # there with training.eval_on_start
    before = next((row for row in run.metrics if row.get("step") == 0), {})
    names = [
        n
        for n in result["metrics"]
        if n.startswith("eval_") and not n.endswith(("runtime", "per_second"))
    ]
    for name in sorted(names, key=lambda name: name != result.get("metric")):
        start = f"{_number(before[name])} before training, " if name in before else ""
        table.add_row(name.removeprefix("eval_"), start + _number(result["metrics"][name]))
    return table


def _memory(result: dict[str, Any]) -> str:
    """Return the account of the end of the training, and the measured peak beside it."""
    parts = {
        name: sum(part.values()) if isinstance(part, dict) else part
        for name, part in result["memory"].items()
    }
    shown = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items() if size)
    peak, before = (
        result["peak_memory_bytes"] / 2**20,
        result["process_memory_before_bytes"] / 2**20,
    )
    return (
        f"MiB: {shown}; peak of the process {peak:,.0f}, before the model was loaded {before:,.0f}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def decision_table(history: Sequence[Decision]) -> Table:
    """At most 12 decisions, evenly spaced from the first to the last, and how many of which status
    there were."""
    shown = sorted({round(i * (len(history) - 1) / (ROWS - 1)) for i in range(ROWS)})
    counts = ", ".join(
        f"{n} {status}" for status, n in Counter(row.status for row in history).items()
    )
    left_out = len(history) - len(shown)
    rest = f"; {left_out} {'row' if left_out == 1 else 'rows'} left out" if left_out else ""
    table = Table(title=f"Rank decisions: {counts}{rest}")
    for name in ("step", "status", "budget", "parameters", "ranks", "MiB", "ms"):
        table.add_column(name, justify="left" if name == "status" else "right", overflow="fold")
    for row in (history[i] for i in shown):
        memory = sum(row.bytes_after[kind] for kind in ("adapters", "gradients", "optimizer"))
        table.add_row(
            f"{row.step:,}",
            escape(f"refused: {row.reason}") if row.status == "refused" else row.status,
            "none" if row.budget is None else f"{row.budget:,}",
            f"{row.parameters_after:,}",
            f"{min(row.pattern.values())}..{max(row.pattern.values())}",
            f"{memory / 2**20:,.2f}",
            f"{1000 * row.seconds:,.1f}",
        )
    table.caption = (
        "parameters and ranks after the decision; MiB of adapters, their gradients and optimizer "
        "state"
    )
    return table


def adapter_table(rows: Sequence[tuple[str, ...]], title: str) -> Table:
    """One row a target of an adapter: (module kind, layer, shape, rank, scale, norm, effective
    rank, needed for 99 % and 99.9 %)."""
    table = Table(title=escape(title))
    table.add_column("module kind", overflow="fold")
    for name in ("layer", "O x I", "rank", "scale", "norm", "eff.", "99 %", "99.9 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    table.caption = (
        "norm: Frobenius norm of scale B A\neff.: effective rank (Roy & Vetterli 2007)\n"
        "99 %, 99.9 %: components that hold this share of\nthe target's squared singular values"
    )
    return table


def kept_table(after: dict[str, int], kept: dict[str, float]) -> Table:
    """One row a module kind: its new ranks and the energy kept, from the first layer to the
    last."""
    table = Table(title="After compression, first layer to last")
    table.add_column("module kind", overflow="fold")
    table.add_column("ranks", overflow="fold")
    table.add_column("energy kept, %", overflow="fold")
    shares = by_kind(kept)
    for kind, row in by_kind(after).items():
        layers = sorted(row)
        percents = " ".join(_percent(shares[kind][layer]) for layer in layers)
        table.add_row(kind, " ".join(f"{row[layer]:>3}" for layer in layers), percents)
    table.caption = "energy: the share of a target's squared singular values"
    return table


def _percent(share: float) -> str:
    """Return whole percent, rounded down, so that 100 means all; `-` where there was nothing to
    keep."""
    return "  -" if share != share else f"{int(100 * share + 1e-9):>3}"
