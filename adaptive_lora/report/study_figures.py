"""Figures of a study, each as PNG and SVG. Methods have the colours and marks that they have on the
page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from adaptive_lora.report.figures import rank_figure, save
from adaptive_lora.report.page_data import CURVE_POINTS, colour_number, curve, evenly, label
from adaptive_lora.report.study_read import StudyFolder, pareto_front
from adaptive_lora.study.records import RunRow, TableRow

# Okabe and Ito's colours, told apart with every kind of colour vision; dark grey is the baseline.
# As in page.css.
COLOURS = (
    "#3d444d",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b8548e",
    "#c98a00",
    "#3aa5dd",
    "#7a5195",
    "#8c6d46",
)
MARKERS = "os^DPv"
Item = TypeVar("Item", RunRow, TableRow)


def draw_figures(study: StudyFolder, folder: Path) -> list[Path]:
    """Draw into `folder` every figure that the study has data for, as PNG and as SVG, and return
    the PNG files."""
    drawn: list[Path] = []
    kinds: dict[str, Callable[[StudyFolder], Figure | None]] = {
        "quality": quality,
        "pareto": pareto,
        "loss": loss_curves,
        "cost": cost,
    }
    # Names are text and no formulas, whatever they contain; a sign that the font lacks is a box and
    # no warning.
    with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        for name, draw in kinds.items():
            figure = draw(study)
            if figure is not None:
                drawn.append(_save(figure, folder / f"{name}.png"))
        for number, method in enumerate(study.methods):
            run = study.representative(method)
            if run is not None:
                patterns = {
                    f"{_cut(method)}: initial ranks": run["initial_ranks"],
                    f"{_cut(method)}: final ranks": run["ranks"],
                }
                name = (
                    f"ranks-{number}-{re.sub(r'[^a-z0-9]+', '-', method.lower()).strip('-')[:40]}"
                )
                drawn.append(_save(rank_figure(patterns), folder / f"{name}.png"))
    return drawn


def _save(figure: Figure, file: Path) -> Path:
    save(figure, file.with_suffix(".svg"), close=False)
    return save(figure, file)


def quality(study: StudyFolder) -> Figure | None:
    """Draw mean and 95 % interval of every row of the table, a panel for each task and model."""
    groups = _groups(study, [row for row in study.table if row["mean"] is not None])
    if not groups:
        return None
    most = max(len(rows) for rows in groups.values())
    figure, axes = _panels(len(groups), 4.6, 1.1 + 0.32 * most)
    for axis, (title, rows) in zip(axes, groups.items(), strict=True):
        for place, row in enumerate(rows):
            style = _style(study, row["method"])
            if row["ci95"]:
                axis.plot(
                    row["ci95"],
                    (place, place),
                    color=style["color"],
                    linewidth=2.4,
                    alpha=0.55,
                    solid_capstyle="round",
                )
            axis.plot(row["mean"] or 0.0, place, **style)
        budgets = len({row["budget"] for row in rows}) > 1
        names = [
            _cut(
                f"{row['method']}, {row['budget']}" if budgets and row["budget"] else row["method"]
            )
            for row in rows
        ]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.25)
        axis.set_title(_cut(title), fontsize=9)
        axis.set_xlabel(_metric(study), fontsize=8)
    return figure


def pareto(study: StudyFolder) -> Figure | None:
    """Draw quality against parameters with the Pareto front, a panel for each task and model."""
    rows = [
        row for row in study.table if row["mean"] is not None and row["lora_parameters"] is not None
    ]
    groups = _groups(study, rows)
    if not groups:
        return None
    figure, axes = _panels(len(groups), 4.4, 3.4)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        front = pareto_front(group, greater_is_better=study.head["greater_is_better"])
        axis.plot(*_points(front), "--", color="#888888", linewidth=1.2, zorder=1)
        axis.plot(*_points(front), "o", markersize=13, markerfacecolor="none", color="#222222")
        for row in group:
            style = _style(study, row["method"])
            (x,), (y,) = _points([row])
            if row["ci95"]:
                axis.plot((x, x), row["ci95"], color=style["color"], linewidth=1.2, alpha=0.6)
            axis.plot(x, y, **style)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_title(_cut(title), fontsize=9)
        axis.set_xlabel("LoRA parameters (circles: Pareto front)", fontsize=8)
        axis.set_ylabel(_metric(study), fontsize=8)
    _legend(study, figure, [row["method"] for row in rows])
    return figure


def loss_curves(study: StudyFolder) -> Figure | None:
    """Draw the training loss of the runs in the table, a panel for each task and model."""
    drawn = [
        run
        for run in study.runs
        if run["id"] in study.in_table and curve(study.details[run["id"]].metrics, "loss")
    ]
    groups = _groups(study, drawn)
    if not groups:
        return None
    figure, axes = _panels(len(groups), 4.4, 3.2)
    for axis, (title, runs) in zip(axes, groups.items(), strict=True):
        for run in runs:
            shown = evenly(curve(study.details[run["id"]].metrics, "loss"), CURVE_POINTS)
            points = [(step, float("nan") if loss is None else loss) for _, (step, loss) in shown]
            axis.plot(
                *zip(*points, strict=True),
                color=_style(study, run["method"])["color"],
                linewidth=0.9,
                alpha=0.7,
            )
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_title(_cut(title), fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.set_ylabel("training loss", fontsize=8)
    _legend(study, figure, [run["method"] for run in drawn])
    return figure


def cost(study: StudyFolder) -> Figure | None:
    """Draw training time and peak memory of the runs in the table: the median as a bar, a run as a
    mark."""
    runs = [run for run in study.runs if run["id"] in study.in_table]
    measures = _measures(study, runs)
    methods = [method for method in study.methods if any(run["method"] == method for run in runs)]
    if not measures:
        return None
    figure, axes = _panels(len(measures), 4.4, 1.0 + 0.36 * len(methods))
    for axis, (name, values) in zip(axes, measures.items(), strict=True):
        for place, method in enumerate(methods):
            if own := values.get(method):
                axis.barh(
                    place, median(own), height=0.55, color=_style(study, method)["color"], alpha=0.8
                )
                axis.plot(own, [place] * len(own), "|", color="#222222", markersize=9)
        axis.set_yticks(range(len(methods)), [_cut(method) for method in methods], fontsize=8)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel(f"{name} (runs in the table, bar: median)", fontsize=8)
    return figure


def _measures(study: StudyFolder, runs: Sequence[RunRow]) -> dict[str, dict[str, list[float]]]:
    """Return {measure: {method: values of its runs}}; a measure that no run has is left out."""
    found: dict[str, dict[str, list[float]]] = {"seconds": {}, "peak MiB": {}}
    for run in runs:
        costs = study.costs[run["id"]]
        seconds, peak = costs["train_seconds"], costs["peak_memory_bytes"]
        if seconds is not None:
            found["seconds"].setdefault(run["method"], []).append(seconds)
        if peak:
            found["peak MiB"].setdefault(run["method"], []).append(peak / 2**20)
    return {name: values for name, values in found.items() if any(map(any, values.values()))}


def _points(rows: Sequence[TableRow]) -> tuple[list[float], list[float]]:
    return [float(row["lora_parameters"] or 0) for row in rows], [
        float(row["mean"] or 0.0) for row in rows
    ]


def _cut(text: str) -> str:
    """Return `text` on one line, its middle left out where it is longer than 60 signs: ends tell
    settings apart."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:24]} … {line[-33:]}"


def _metric(study: StudyFolder) -> str:
    better = "higher" if study.head["greater_is_better"] else "lower"
    return f"{_cut(label(study.head['metric']))}, {better} is better"


def _groups(study: StudyFolder, rows: Sequence[Item]) -> dict[str, list[Item]]:
    """Return {title: rows} for each task and model; a model is named where there are several."""
    several = len({row["model"] for row in study.table}) > 1
    groups: dict[str, list[Item]] = {}
    for row in rows:
        groups.setdefault(f"{row['task']}, {row['model']}" if several else row["task"], []).append(
            row
        )
    return groups


def _style(study: StudyFolder, method: str) -> dict[str, Any]:
    marker = MARKERS[study.methods.index(method) % len(MARKERS)]
    return {"color": COLOURS[colour_number(study, method)], "marker": marker, "linestyle": ""}


def _legend(study: StudyFolder, figure: Figure, methods: Sequence[str]) -> None:
    names = [method for method in study.methods if method in methods]
    handles = [Line2D([], [], **_style(study, name), label=_cut(name)) for name in names]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=1 if max(map(len, names)) > 24 else min(5, len(names)),
        fontsize=8,
        frameon=False,
    )


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])
