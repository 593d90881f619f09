"""The two signals of `grad_delta` in a study: does the gradient norm say what the weight change
says, target by target?

    python studies/signals.py runs/gradient_delta --output studies/results/gradient_delta

Reads `allocations.jsonl` of every run of the study and writes signals.json and signals.png:
Pearson's and Spearman's correlation of G (mean gradient norm) and W (weight change) over targets,
and of each with the rank decided.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.markup import escape
from rich.table import Table
from scipy.stats import pearsonr, spearmanr

from adaptive_lora.errors import AdaptiveLoraError, InputError
from adaptive_lora.report import read_run
from adaptive_lora.report.tables import show
from adaptive_lora.study.analysis import analyse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "study", type=Path, help="the folder of a finished study with grad_delta among its methods"
    )
    parser.add_argument("--output", type=Path, help="default: the study's folder")
    options = parser.parse_args()
    output = options.output or options.study
    points: dict[str, list[tuple[list[float], list[float], list[int]]]] = {}
    for row in analyse(options.study)["runs"]:
        if (
            row["status"] == "ok"
            and (signals := signals_of(options.study / "runs" / row["id"])) is not None
        ):
            points.setdefault(row["method"], []).append(signals)
    if not points:
        raise InputError(
            f"{options.study} holds no run that decided by gradient norms and weight changes"
        )
    rows = [summary(method, runs) for method, runs in points.items()]
    table = Table(
        title="Gradient norm G and weight change W over targets: mean over runs (lowest .. highest)"
    )
    for column in (
        "method",
        "runs",
        "Pearson G, W",
        "Spearman G, W",
        "Spearman G, rank",
        "Spearman W, rank",
    ):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for row in rows:
        cells = [
            span(row[key])
            for key in ("pearson_gw", "spearman_gw", "spearman_g_rank", "spearman_w_rank")
        ]
        table.add_row(escape(row["method"]), str(len(row["pearson_gw"])), *cells)
    show(table)
    output.mkdir(parents=True, exist_ok=True)
    (output / "signals.json").write_text(
        json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    draw(points, output / "signals.png")
    print(f"{output}: signals.json, signals.png")


def signals_of(run: Path) -> tuple[list[float], list[float], list[int]] | None:
    """Return (G, W, rank) of every target at the run's decision, None when there is no such
    decision."""
    for decision in read_run(run).history:
        if {"GradientNorm", "WeightDelta"} <= decision.parts.keys():
            g, w = decision.parts["GradientNorm"], decision.parts["WeightDelta"]
            return [g[t] for t in g], [w[t] for t in g], [decision.pattern[t] for t in g]
    return None


def summary(method: str, runs: list[tuple[list[float], list[float], list[int]]]) -> dict[str, Any]:
    """Return the correlations of each run of a method."""
    return {
        "method": method,
        "targets": len(runs[0][0]),
        "pearson_gw": [float(pearsonr(g, w).statistic) for g, w, _ in runs],
        "spearman_gw": [float(spearmanr(g, w).statistic) for g, w, _ in runs],
        "spearman_g_rank": [float(spearmanr(g, r).statistic) for g, _, r in runs],
        "spearman_w_rank": [float(spearmanr(w, r).statistic) for _, w, r in runs],
    }


def span(values: list[float]) -> str:
    """Return the mean of some values and their ends."""
    return f"{statistics.fmean(values):+.2f} ({min(values):+.2f} .. {max(values):+.2f})"


def draw(points: dict[str, list[tuple[list[float], list[float], list[int]]]], path: Path) -> None:
    """Draw W over G, one panel a method, one colour a run."""
    figure, axes = plt.subplots(
        1, len(points), figsize=(3.4 * len(points), 3.3), layout="constrained", squeeze=False
    )
    for axis, (method, runs) in zip(axes[0], points.items(), strict=True):
        for g, w, _ in runs:
            axis.plot(g, w, "o", markersize=3, alpha=0.7)
        axis.set_title(method.replace("monitor_", "").replace("grad_delta ", ""), fontsize=8)
        axis.set_xlabel("gradient norm G")
    axes[0][0].set_ylabel("weight change W")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
