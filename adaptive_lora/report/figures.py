"""Figures. Each function draws one file and returns its path."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from adaptive_lora.naming import by_kind
from adaptive_lora.report.read import RunRecord


def rank_heatmap(patterns: dict[str, dict[str, int]], path: Path) -> Path:
    """Draw layers x module kinds, one panel for each {title: {target: rank}}, all on one colour scale."""
    tables = {title: by_kind(ranks) for title, ranks in patterns.items()}
    highest = max(max(ranks.values()) for ranks in patterns.values())
    kinds = list(next(iter(tables.values())))
    n_layers = 1 + max(layer for table in tables.values() for row in table.values() for layer in row)
    columns = min(len(tables), 2)
    rows = -(-len(tables) // columns)
    size = (columns * max(4.0, 0.38 * n_layers + 2.4), rows * (1.3 + 0.34 * len(kinds)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
        grid = np.full((len(table), n_layers), np.nan)
        for y, row in enumerate(table.values()):
            for layer, rank in row.items():
                grid[y, layer] = rank
        image = axis.imshow(grid, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        for (y, x), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                colour = "black" if rank > 0.6 * highest else "white"
                axis.text(x, y, f"{rank:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_yticks(range(len(table)), list(table), fontsize=7)
        axis.set_xticks(range(0, n_layers, max(1, n_layers // 12)))
        axis.set_xlabel("layer")
        axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="rank", shrink=0.8)
    return _save(figure, path)


def training_curve(run: RunRecord, path: Path) -> Path:
    """Draw training and evaluation loss over optimizer steps."""
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    axis.legend()
    return _save(figure, path)


def accuracy_bars(rows: list[tuple[str, float, float]], path: Path, *, label: str) -> Path:
    """Draw one horizontal bar for each (name, value, half width of its interval), the first on top."""
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
    names, values, errors = zip(*rows, strict=True)
    axis.barh(names, values, xerr=errors, color="#3b7dbb", ecolor="#222222", capsize=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel(label)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
