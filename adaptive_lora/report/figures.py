"""Figures. Each function draws one file and returns its path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

# Files only: a display is not needed, and there may be none.
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from adaptive_lora.allocation.history import Decision
from adaptive_lora.naming import by_kind
from adaptive_lora.report.read import RunRecord


def rank_heatmap(patterns: dict[str, dict[str, int]], path: Path) -> Path:
    """Draw layers x module kinds, one panel for each {title: {target: rank}}, all on one colour
    scale."""
    return save(rank_figure(patterns), path)


def rank_figure(patterns: dict[str, dict[str, int]]) -> Figure:
    """Return the figure of `rank_heatmap`."""
    highest = max(max(ranks.values()) for ranks in patterns.values())
    figure, axes = _panels(patterns)
    for axis, (title, ranks) in zip(axes, patterns.items(), strict=True):
        image = _heatmap(axis, title, ranks, highest, "{:.0f}")
    figure.colorbar(image, ax=axes, label="rank", shrink=0.8, ticks=MaxNLocator(integer=True))
    return figure


def saliency(row: Decision, path: Path) -> Path:
    """Draw the scores of `row` over layers x module kinds: one panel for each part, one for the
    total.

    Parts have units of their own, so each panel has its own colour scale, in a power of ten that
    leaves two digits.
    """
    grids = {f"{part} at step {row.step}": scores for part, scores in row.parts.items()}
    grids[f"score at step {row.step}" if not row.parts else f"total score at step {row.step}"] = (
        row.scores
    )
    figure, axes = _panels(grids)
    for axis, (title, scores) in zip(axes, grids.items(), strict=True):
        highest = max((score for score in scores.values() if math.isfinite(score)), default=0.0)
        power = math.floor(math.log10(highest)) - 1 if highest > 0 else 0
        scaled = {name: score / 10.0**power for name, score in scores.items()}
        image = _heatmap(axis, title, scaled, highest / 10.0**power or 1.0, "{:.0f}")
        figure.colorbar(
            image, ax=axis, label=f"value / 1e{power}" if power else "value", shrink=0.9
        )
    return save(figure, path)


def _panels(grids: Mapping[str, Mapping[str, float]]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel for each grid: two side by side unless the model is deep."""
    tables = [by_kind(values) for values in grids.values()]
    n_layers = 1 + max(layer for table in tables for row in table.values() for layer in row)
    columns = min(len(tables), 2 if n_layers <= 16 else 1)
    rows = -(-len(tables) // columns)
    size = (columns * max(4.0, 0.38 * n_layers + 2.4), rows * (1.3 + 0.34 * len(tables[0])))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    return figure, list(axes.flat[: len(tables)])


def _heatmap(
    axis: Axes, title: str, values: Mapping[str, float], highest: float, text: str
) -> AxesImage:
    """Draw {target: value}, from 0 to `highest`, with every value written into its cell; NaN stays
    white."""
    table = by_kind(values)
    n_layers = 1 + max(layer for row in table.values() for layer in row)
    grid = np.full((len(table), n_layers), np.nan)
    for y, row in enumerate(table.values()):
        for layer, value in row.items():
            grid[y, layer] = value
    image = axis.imshow(grid, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "black" if value > 0.6 * highest else "white"
            axis.text(x, y, text.format(value), ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(table)), list(table), fontsize=7)
    axis.set_xticks(range(0, n_layers, max(1, n_layers // 12)))
    axis.set_xlabel("layer")
    axis.set_title(title, fontsize=9)
    return image


def rank_steps(run: RunRecord, path: Path) -> Path:
    """Draw the rank of every target over optimizer steps: a panel for each module kind, a colour
    for each layer.

    A kind that occurs once (a pooler) is black.
    """
    end = _last_step(run)
    steps = [0, *(row.step for row in run.history), end]
    patterns = [run.initial_ranks, *(row.pattern for row in run.history), run.ranks]
    table = by_kind({name: [pattern[name] for pattern in patterns] for name in run.ranks})
    n_layers = 1 + max(layer for row in table.values() for layer in row)
    columns = min(len(table), 4 if len(table) in (4, 7, 8) or len(table) > 9 else 3)
    rows = -(-len(table) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.0 + 2.8 * columns, 0.8 + 2.0 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colours = matplotlib.colormaps["viridis"].resampled(n_layers)
    for axis, (kind, row) in zip(axes.flat, table.items(), strict=False):
        axis.set_title(kind, fontsize=8)
        _layer_steps(axis, steps, row, colours)
    for axis in axes.flat[len(table) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(table) - columns) : len(table)]:
        axis.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("rank (lines shifted by up to ±0.25, by layer)", fontsize=9)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-0.5, n_layers - 0.5), colours)
    bar = figure.colorbar(scale, ax=axes, label="layer", shrink=0.9)
    bar.set_ticks(list(range(0, n_layers, max(1, n_layers // 12))))
    return save(figure, path)


def _layer_steps(
    axis: Axes, steps: Sequence[int], row: Mapping[int, Sequence[int]], colours: Colormap
) -> None:
    """Draw the ranks of one module kind, {layer: rank at every step}, with a colour a layer."""
    for layer, ranks in row.items():
        once = len(row) == 1
        # equal ranks would hide one another
        shift = 0.0 if once else 0.5 * layer / (colours.N - 1) - 0.25
        colour = "black" if once else colours(layer)
        axis.step(
            steps, [rank + shift for rank in ranks], where="post", color=colour, linewidth=1.1
        )
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def parameter_steps(run: RunRecord, path: Path) -> Path:
    """Draw the LoRA parameters over optimizer steps, and the budget each decision had."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    first, end = run.history[0], _last_step(run)
    budgets = [(row.step, row.budget) for row in run.history if row.budget is not None]
    if budgets:
        steps, values = zip(*budgets, strict=True)
        axis.step(
            [*steps, end],
            [*values, values[-1]],
            where="post",
            color="#f0a860",
            linewidth=4,
            label="budget",
        )
    steps = (0, *(row.step for row in run.history), end)
    counts = (first.parameters_before, *(row.parameters_after for row in run.history))
    axis.step(
        steps,
        (*counts, counts[-1]),
        where="post",
        color="#1f4e79",
        linewidth=1.3,
        label="LoRA parameters",
    )
    for status, marker, colour in (
        ("changed", "o", "#1f4e79"),
        ("kept", "|", "#777777"),
        ("refused", "x", "#c0392b"),
    ):
        points = [(row.step, row.parameters_after) for row in run.history if row.status == status]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                marker,
                color=colour,
                markersize=4,
                label=f"decision: {status}",
            )
    axis.set_ylim(0, 1.08 * max(*counts, *(value for _, value in budgets)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("trainable LoRA parameters")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="lower left")
    return save(figure, path)


def _last_step(run: RunRecord) -> int:
    return max(run.result.get("steps") or run.result.get("step") or 0, run.history[-1].step)


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
    return save(figure, path)


def accuracy_bars(rows: list[tuple[str, float, float]], path: Path, *, label: str) -> Path:
    """Draw one horizontal bar for each (name, value, half width of its interval), the first on
    top."""
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
    names, values, errors = zip(*rows, strict=True)
    axis.barh(names, values, xerr=errors, color="#3b7dbb", ecolor="#222222", capsize=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel(label)
    return save(figure, path)


def adapter_spectra(
    effective: Mapping[str, float],
    norms: Mapping[str, float],
    spectra: Mapping[str, Sequence[float]],
    path: Path,
) -> Path:
    """Draw an adapter: effective rank and norm over layers x module kinds, and the singular values
    of every target.

    Values that are not finite stay white; a target without an update has no line.
    """
    table = by_kind(norms)
    n_layers = 1 + max(layer for row in table.values() for layer in row)
    size = (max(9.0, 0.38 * n_layers + 2.4), 2 * (1.3 + 0.34 * len(table)) + 3.6)
    heights = [1.3 + 0.34 * len(table)] * 2 + [3.6]
    figure, axes = plt.subplots(3, 1, figsize=size, height_ratios=heights, layout="constrained")
    for axis, title, values, text in (
        (axes[0], "effective rank", effective, "{:.1f}"),
        (axes[1], "Frobenius norm of the update", norms, "{:.2g}"),
    ):
        highest = max((value for value in values.values() if math.isfinite(value)), default=0.0)
        image = _heatmap(axis, title, values, highest or 1.0, text)
        figure.colorbar(image, ax=axis, shrink=0.9)
    colours = plt.get_cmap("tab10")
    kinds = {kind: list(row.values()) for kind, row in by_kind(dict(spectra)).items()}
    for number, (kind, rows) in enumerate(kinds.items()):
        for row in rows:
            positive = [value for value in row if value > 1e-9 * max(row)]
            axes[2].plot(
                range(1, len(positive) + 1),
                positive,
                color=colours(number % 10),
                alpha=0.55,
                linewidth=1,
            )
        axes[2].plot([], [], color=colours(number % 10), label=kind)
    if any(max(row, default=0.0) > 0 for row in spectra.values()):
        axes[2].set_yscale("log")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].set_xlabel("component")
    axes[2].set_ylabel("singular value of scale B A")
    axes[2].set_title("spectra, one line a target", fontsize=9)
    axes[2].grid(alpha=0.25)
    axes[2].legend(fontsize=7, loc="upper right", ncols=2)
    return save(figure, path)


def save(figure: Figure, path: Path, *, close: bool = True) -> Path:
    """Write `figure` as the file's suffix says, the same bytes for the same figure, and return the
    path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        # or the same figure has other ids at every call
        with plt.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(path, metadata={"Date": None})
    else:
        figure.savefig(path, dpi=130)
    if close:
        plt.close(figure)
    return path
