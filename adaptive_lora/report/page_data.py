"""What the page shows, as one JSON value: the record of a study, long series thinned, numbers
rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from adaptive_lora.allocation.history import Decision
from adaptive_lora.naming import by_kind
from adaptive_lora.report.study_read import StudyFolder
from adaptive_lora.study.records import RunRow, TableRow

Item = TypeVar("Item")
# With these two the page of 200 runs of 1,000 steps weighs 1.6 MB.
CURVE_POINTS = 120  # of one curve
CELLS = 600_000  # ranks and scores of all runs and decisions together
COLOURS = 9  # --m0 ... --m8 in page.css; 0 is the baseline's


def page_data(study: StudyFolder) -> dict[str, Any]:
    """Return the data of the page, in JSON's types and without NaN: what is not finite is null. A
    pure function."""
    methods = study.methods
    number = {method: i for i, method in enumerate(methods)}
    axes = further_axes(study)
    kept = decisions_kept(study)
    grids: list[dict[str, Any]] = []
    runs = [_run(study, run, number[run["method"]], axes, grids, kept) for run in study.runs]
    return {
        "study": {
            "metric": label(study.head["metric"]),
            "greater_is_better": study.head["greater_is_better"],
        },
        "facts": facts(study),
        "rule": rule(study),
        "notes": [*noise_notes(study), *remarks(study), *study.notes],
        "problems": study.problems,
        "footer": [*environment_lines(study.environment), _thinning(study, kept)],
        "methods": [
            {
                "name": name,
                "colour": colour_number(study, name),
                "baseline": name == study.head["baseline"],
            }
            for name in methods
        ],
        "tasks": _distinct(
            [*(run["task"] for run in study.runs), *(row["task"] for row in study.table)]
        ),
        "models": _distinct(
            [*(run["model"] for run in study.runs), *(row["model"] for row in study.table)]
        ),
        "budgets": _distinct(
            [*(run["budget"] for run in study.runs), *(row["budget"] for row in study.table)]
        ),
        "axes": axes,
        "digits": digits(study),
        "table": [_table_row(row, number[row["method"]], axes) for row in study.table],
        "wins": [
            {"method": number[method], **counts}
            for method, counts in study.wins.items()
            if method in number
        ],
        "grids": grids,
        "runs": runs,
    }


def colour_number(study: StudyFolder, method: str) -> int:
    """Return which colour a method has everywhere: 0 is the baseline's, the others follow the order
    of the grid."""
    place = study.methods.index(method)
    first = 0 if study.methods[0] == study.head["baseline"] else 1
    return 0 if (place, first) == (0, 0) else 1 + (place - 1 + first) % (COLOURS - 1)


def label(metric: str) -> str:
    """Return a metric's name for a heading.

    >>> label("eval_test_accuracy")
    'test accuracy'
    """
    return metric.removeprefix("eval_").replace("_", " ")


def axis_name(axis: str) -> str:
    """Return an axis' name for a sentence.

    >>> axis_name("training.learning_rate")
    'learning rate'
    """
    return axis.rsplit(".", 1)[-1].replace("_", " ")


def further_axes(study: StudyFolder) -> list[str]:
    """Return the axes of the grid that have no column of their own; the label of a budget is made
    of rank or budget."""
    known = {"method", "task", "model", "budget", "learning_rate", "training.learning_rate", "seed"}
    return [
        axis for axis in study.head["axes"] if axis not in known | {"method.rank", "method.budget"}
    ]


def facts(study: StudyFolder) -> str:
    """Return the size of the study in a sentence."""
    states = {
        state: sum(run["status"] == state for run in study.runs)
        for state in ("ok", "failed", "missing", "skipped")
    }
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count) or "none"
    sizes = ((len(values), axis_name(axis)) for axis, values in study.head["axes"].items())
    shape = " × ".join(
        f"{size} {axis}{'s' if size != 1 and not axis.endswith('s') else ''}"
        for size, axis in sizes
    )
    return f"{shape or 'No axes'}. {len(study.runs)} runs: {counted}."


def rule(study: StudyFolder) -> str:
    """Return by which rule settings were chosen, from how many trials, and what is reported."""
    trials = sorted({row["trials"] for row in study.table})
    many = (
        f"; trials a row: {trials[0]}" + (f" to {trials[-1]}" if trials[1:] else "")
        if trials
        else ""
    )
    choice = study.head["selection"]
    better = "higher" if study.head["greater_is_better"] else "lower"
    chosen = ", ".join(axis_name(axis) for axis in choice["axes"])
    selected = (
        f"Selection of {chosen}: {choice['rule']}, {choice['description']} of "
        f"{label(choice['metric'])}{many}."
        if choice["axes"]
        else f"Nothing was selected{many}."
    )
    return (
        f"{selected} Reported: {label(study.head['metric'])}, {better} is better. Intervals are 95 "
        f"% over seeds; differences are against {study.head['baseline']} on equal seeds, their p "
        "corrected over methods (Holm)."
    )


def noise_notes(study: StudyFolder) -> list[str]:
    """Return the noise floors in one sentence, and those that are unknown in another."""
    precision = digits(study)
    floors, unknown, further = [], [], further_axes(study)
    several: list[Literal["task", "model", "budget"]] = [
        name for name in ("task", "model", "budget") if len({row[name] for row in study.table}) > 1
    ]
    for floor in study.noise_floor:
        where = [floor[name] for name in several]
        where += [f"{name} {value}" for name, value in floor["settings"].items() if name in further]
        place = ", ".join(where)
        if floor["floor"] is None:
            unknown.append(place)
        else:
            size = (
                f"± {floor['floor']:.{precision.get(floor['task'], 4)}f} ({floor['seeds']} seeds)"
            )
            floors.append(f"{place}: {size}" if place else size)
    notes = []
    if floors:
        notes.append(
            f"Noise floor: 95 % of the differences between two means of {study.head['baseline']}, "
            f"from other seeds each, lie within {'; '.join(floors)}."
        )
    if unknown:
        of = f" of {'; '.join(unknown)}" if any(unknown) else ""
        notes.append(
            f"The noise floor{of} is unknown: it takes two seeds of {study.head['baseline']}."
        )
    return notes


def environment_lines(environment: Mapping[str, Any]) -> list[str]:
    """Return the environment as lines of text, a nested mapping on a line of its own."""
    flat = [
        f"{name}: {value}" for name, value in environment.items() if not isinstance(value, Mapping)
    ]
    nested = {name: value for name, value in environment.items() if isinstance(value, Mapping)}
    lines = [" · ".join(flat)] if flat else []
    return lines + [
        f"{name}: " + " · ".join(f"{k} {v}" for k, v in value.items())
        for name, value in nested.items()
    ]


def digits(study: StudyFolder) -> dict[str, int]:
    """Return the decimals of each task's figures: those that show two digits of the median half
    interval, 1 to 5."""
    halves: dict[str, list[float]] = {}
    for row in study.table:
        if row["ci95"] is not None and row["ci95"][1] > row["ci95"][0]:
            halves.setdefault(row["task"], []).append((row["ci95"][1] - row["ci95"][0]) / 2)
    return {
        task: min(5, max(1, 1 - math.floor(math.log10(median(values)))))
        for task, values in halves.items()
    }


def remark(row: TableRow) -> str | None:
    """Return what must be said beside a row, such as that its parameters are not the baseline's;
    None where nothing."""
    if row["parameters_equal"] is False:
        return (
            row["note"] or "LoRA parameters differ from the baseline's by more than one component"
        )
    return row["note"]


def remarks(study: StudyFolder) -> list[str]:
    """Return the remarks on rows, one sentence for all rows of a method with the same."""
    rows: dict[tuple[str, str], list[TableRow]] = {}
    for row in study.table:
        if (said := remark(row)) is not None:
            rows.setdefault((row["method"], said), []).append(row)
    where = {
        key: "; ".join(" ".join(filter(None, (row["task"], row["budget"]))) for row in some)
        for key, some in rows.items()
    }
    return [
        f"{method}: {said}" + (f" ({where[method, said]})." if where[method, said] else ".")
        for method, said in rows
    ]


def _distinct(values: Sequence[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]


def _table_row(row: TableRow, method: int, axes: Sequence[str]) -> dict[str, Any]:
    comparison = row["comparison"]
    low, high = row["ci95"] or (None, None)
    difference_low, difference_high = (comparison and comparison["ci95"]) or (None, None)
    return {
        "method": method,
        "task": row["task"],
        "model": row["model"],
        "budget": row["budget"],
        "settings": [_plain({**row["settings"], **row["chosen"]}.get(axis)) for axis in axes],
        "learning_rate": row["learning_rate"],
        "trials": row["trials"],
        "seeds": row["seeds"],
        "runs": len(row["runs"]),
        "mean": _round(row["mean"], 7),
        "low": _round(low, 7),
        "high": _round(high, 7),
        "parameters": row["lora_parameters"],
        "remark": remark(row),
        "unequal": row["parameters_equal"] is False,
        "difference": _round(comparison["difference"], 7) if comparison else None,
        "difference_low": _round(difference_low, 7),
        "difference_high": _round(difference_high, 7),
        "p": _round(comparison["p_holm"], 4) if comparison else None,
        "verdict": comparison["verdict"] if comparison else None,
    }


def _run(
    study: StudyFolder,
    run: RunRow,
    method: int,
    axes: Sequence[str],
    grids: list[dict[str, Any]],
    kept: int,
) -> dict[str, Any]:
    details, costs = study.details[run["id"]], study.costs[run["id"]]
    row: dict[str, Any] = {
        "id": run["id"],
        "href": f"runs/{quote(run['id'])}/" if details.folder else None,
        "status": run["status"],
        "reason": run["reason"],
        "method": method,
        "task": run["task"],
        "model": run["model"],
        "budget": run["budget"],
        "learning_rate": run["learning_rate"],
        "seed": run["seed"],
        "settings": [_plain(run["settings"].get(axis)) for axis in axes],
        "value": _round(study.value(run), 7),
        "parameters": run["lora_parameters"],
        "steps": run["steps"],
        "seconds": _round(costs["train_seconds"], 4),
        "memory": costs["peak_memory_bytes"],
        "parts": details.memory,
        "chosen": run["id"] in study.in_table,
        "curves": _curves(details.metrics),
    }
    if run["ranks"]:
        names = list(run["ranks"])
        shown = evenly(details.history, kept)
        row |= {
            "grid": _grid(names, grids),
            "initial": [run["initial_ranks"].get(name, 0) for name in names],
            "final": list(run["ranks"].values()),
            "decided": len(details.history),
            "decisions": [_decision(number, decision, names) for number, decision in shown],
        }
    return row


def _grid(names: list[str], grids: list[dict[str, Any]]) -> int:
    """Return the number of the grid of these targets, adding it when it is new: most runs share
    one."""
    for number, grid in enumerate(grids):
        if grid["names"] == names:
            return number
    table = by_kind({name: i for i, name in enumerate(names)})
    places = {
        i: (kind, layer) for kind, row in enumerate(table.values()) for layer, i in row.items()
    }
    # two names with one kind and layer: rows of their own
    lost = [i for i in range(len(names)) if i not in places]
    for extra, i in enumerate(lost):
        places[i] = (len(table) + extra, 0)
    grids.append(
        {
            "names": names,
            "kinds": [*table, *(names[i] for i in lost)],
            "layers": 1 + max(layer for _, layer in places.values()),
            "cells": [list(places[i]) for i in range(len(names))],
        }
    )
    return len(grids) - 1


def _decision(number: int, decision: Decision, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": number,
        "step": decision.step,
        "status": decision.status,
        "parameters": decision.parameters_after,
        "budget": decision.budget,
        "ranks": [decision.pattern.get(name, 0) for name in names],
    }
    if decision.reason:
        row["reason"] = decision.reason
    if any(decision.scores.values()) or decision.parts:
        row["scores"] = [_round(decision.scores.get(name), 3) for name in names]
        row["parts"] = {
            part: [_round(scores.get(name), 3) for name in names]
            for part, scores in decision.parts.items()
        }
    return row


def decisions_kept(study: StudyFolder) -> int:
    """Return how many decisions of a run are kept, at least 2, so that all runs together have at
    most `CELLS` cells."""
    cells = 0
    for run in study.runs:
        history = study.details[run["id"]].history
        parts = 2 + max((len(decision.parts) for decision in history), default=0)
        cells += len(run["ranks"]) * parts if history else 0
    return max(2, CELLS // cells) if cells else CELLS


def evenly(items: Sequence[Item], most: int) -> list[tuple[int, Item]]:
    """Return at most `most` (2 or more) of `items` with their numbers from 1, evenly spaced, the
    first and last among them.

    >>> evenly("abcdefg", 3)
    [(1, 'a'), (4, 'd'), (7, 'g')]
    """
    if len(items) <= most:
        return list(enumerate(items, start=1))
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    return [(place + 1, items[place]) for place in places]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Return {"loss": [steps, values], "eval_loss": ...} of at most `CURVE_POINTS` points each."""
    curves: dict[str, list[list[float | None]]] = {}
    for name in ("loss", "eval_loss"):
        points = curve(metrics, name)
        if points:
            shown = [point for _, point in evenly(points, CURVE_POINTS)]
            curves[name] = [[step for step, _ in shown], [_round(value, 4) for _, value in shown]]
    return curves


def curve(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """Return the (step, value) of `name`; a value that is not a finite number is None."""
    return [
        (row["step"], _round(row[name], 7))
        for row in metrics
        if name in row and isinstance(row.get("step"), int | float) and math.isfinite(row["step"])
    ]


def _round(value: Any, figures: int) -> float | None:
    """Return a number with so many significant figures; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{figures}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _plain(value: Any) -> str | int | float | bool | None:
    return (
        value
        if isinstance(value, str | int | bool) or value is None
        else _round(value, 7) or str(value)
    )


def _thinning(study: StudyFolder, kept: int) -> str:
    longest = max((len(details.history) for details in study.details.values()), default=0)
    cut = (
        f"; of more than {kept} decisions in a run, {kept} are kept, evenly spaced"
        if longest > kept
        else ""
    )
    return (
        f"Curves are thinned to {CURVE_POINTS} points, evenly spaced{cut}. Losses have 4 "
        "significant figures, scores 3."
    )
