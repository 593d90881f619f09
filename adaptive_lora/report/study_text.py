"""A study as text: `report.md`, `results.csv`, and the table of the terminal. Pure functions of the
record."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_lora.report.page_data import (
    digits,
    environment_lines,
    facts,
    further_axes,
    label,
    noise_notes,
    remarks,
    rule,
)
from adaptive_lora.report.study_read import StudyFolder
from adaptive_lora.report.tables import ROWS, WIDTH
from adaptive_lora.study.records import RunRow, TableRow

COLUMNS = (
    "id",
    "status",
    "reason",
    "method",
    "task",
    "model",
    "budget",
    "learning_rate",
    "seed",
    "in_table",
    "lora_parameters",
    "budget_parameters",
    "steps",
    "train_seconds",
    "peak_memory_bytes",
)


def csv_text(study: StudyFolder) -> str:
    """Return one row a run: its settings, what became of it, every metric (`metric:NAME`), every
    further axis (`axis:NAME`).

    Text that a spreadsheet would take for a formula gets a quotation mark before it.
    """
    axes = further_axes(study)
    metrics = sorted({name for run in study.runs for name in run["metrics"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*COLUMNS, *(f"axis:{name}" for name in axes), *(f"metric:{name}" for name in metrics)]
    )
    for run in study.runs:
        costs = study.costs[run["id"]]
        row = {**run, **costs, "in_table": run["id"] in study.in_table}
        values = [*(row[name] for name in COLUMNS), *(run["settings"].get(name) for name in axes)]
        writer.writerow(
            [
                _harmless(value)
                for value in [*values, *(run["metrics"].get(name) for name in metrics)]
            ]
        )
    return out.getvalue()


def _harmless(value: Any) -> Any:
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def markdown(study: StudyFolder, figures: Sequence[str]) -> str:
    """Return `report.md`. `figures` are paths relative to it; text from files cannot become
    markup."""
    name = _text(study.head["name"])
    parts = [f"# {name}", _text(facts(study)), "## Results", _text(rule(study))]
    if study.table:
        header = list(_cells(study, study.table[0]))
        parts.append(_table(header, [list(_cells(study, row).values()) for row in study.table]))
    else:
        parts.append("The table is empty: no run of this study has finished.")
    notes = [*noise_notes(study), *remarks(study), *study.notes]
    parts.append(_bullets(notes))
    if study.wins:
        counts = [
            [method, *(str(wins[kind]) for kind in ("win", "tie", "loss"))]
            for method, wins in study.wins.items()
        ]
        parts += [
            f"## Against {_text(study.head['baseline'])}",
            _table(["method", "wins", "ties", "losses"], counts),
        ]
    parts += ["## Figures", "The same and more, to sort and filter: [report.html](report.html)."]
    parts += [f"![{_text(path.rsplit('/')[-1].removesuffix('.png'))}]({path})" for path in figures]
    parts += ["## Failures", _failed_runs(study)]
    if study.problems:
        parts += ["Files that could not be used:", _bullets(study.problems)]
    parts += ["## Environment", _bullets(environment_lines(study.environment)) or "Not recorded."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _failed_runs(study: StudyFolder) -> str:
    rows = [
        [
            run["id"],
            run["status"],
            run["method"],
            run["task"],
            run["budget"],
            _plain(run["learning_rate"]),
            str(run["seed"]),
            run["reason"] or "",
        ]
        for run in study.runs
        if run["status"] != "ok"
    ]
    header = ["run", "status", "method", "task", "budget", "lr", "seed", "reason"]
    if rows:
        return _table(header, rows)
    return "No run failed." if study.runs else "There are no runs."


def results_table(study: StudyFolder, width: int = WIDTH) -> Table:
    """The table of the study for the terminal, without the columns in which all rows are equal or
    that do not fit."""
    table = Table(
        title=escape(study.head["name"]),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    rows, figure = [_cells(study, row) for row in study.table], label(study.head["metric"])
    for row, cells in zip(study.table, rows, strict=True):
        if row["ci95"]:
            cells[figure] += (
                f" ± {(row['ci95'][1] - row['ci95'][0]) / 2:.{digits(study).get(row['task'], 4)}f}"
            )
    shown = _shown(rows, figure, width)
    for name in shown:
        table.add_column(
            name,
            justify="left" if name in ("method", "task", "model", "budget", "verdict") else "right",
            overflow="fold",
        )
    for cells in rows:
        table.add_row(*(escape(cells[name]) for name in shown))
    return table


def _shown(rows: Sequence[dict[str, str]], figure: str, width: int) -> list[str]:
    """Return the columns in which rows differ, without those that do not fit into `width`."""
    always = {"method", figure, "difference", "verdict", "parameters", "seeds"}
    dropped = {"95 % interval", "its 95 % interval", "sd", "trials"}
    shown = [
        name
        for name in (rows[0] if rows else [])
        if name in always or (name not in dropped and len({row[name] for row in rows}) > 1)
    ]
    needed = {name: max(len(name), *(len(row[name]) for row in rows)) + 2 for name in shown}
    for name in ("lr", "model", "p (Holm)", "parameters", "seeds"):
        if sum(needed[column] for column in shown) > width and name in shown:
            shown.remove(name)  # it is in report.md
    return shown


def _cells(study: StudyFolder, row: TableRow) -> dict[str, str]:
    """Return {column: text} of one row of the table."""
    places = digits(study).get(row["task"], 4)
    comparison = row["comparison"]
    settings = {
        name: _plain({**row["settings"], **row["chosen"]}.get(name)) for name in further_axes(study)
    }
    return {
        "method": row["method"],
        "task": row["task"],
        "model": row["model"],
        "budget": row["budget"],
        **settings,
        label(study.head["metric"]): _number(row["mean"], places),
        "sd": _number(row["sd"], places + 1),
        "95 % interval": _interval(row["ci95"], places),
        "difference": _number(comparison["difference"] if comparison else None, places, sign="+"),
        "its 95 % interval": _interval(
            comparison["ci95"] if comparison else None, places, sign="+"
        ),
        "p (Holm)": _p(comparison["p_holm"] if comparison else None),
        "verdict": (
            comparison["verdict"]
            if comparison
            else "baseline"
            if row["method"] == study.head["baseline"]
            else None
        )
        or "–",
        "parameters": _count(row["lora_parameters"])
        + (" ≠" if row["parameters_equal"] is False else ""),
        "lr": _plain(row["learning_rate"]),
        "trials": str(row["trials"]),
        "seeds": str(row["seeds"])
        if row["seeds"] == len(row["runs"])
        else f"{row['seeds']} of {len(row['runs'])}",
    }


def _number(value: float | None, places: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{places}f}"


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _number(value, 3)


def _interval(interval: tuple[float, float] | None, places: int, sign: str = "") -> str:
    return "–" if interval is None else " … ".join(f"{end:{sign}.{places}f}" for end in interval)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(value: str) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    >>> print(_text("a|b <i> [x](y) *z*"))
    a\|b &lt;i&gt; \[x\](y) \*z\*
    """
    line = " ".join(str(value).split())
    for mark in "\\`*_[]|#~$":
        line = line.replace(mark, f"\\{mark}")
    return (
        line.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("://", ":&#47;/")
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [_text(name) for name in header],
        ["---"] * len(header),
        *([_text(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_study(study: StudyFolder) -> None:
    """Print the size of the study, its table, and what is missing from it, within 100 columns."""
    console = Console(width=min(Console().width, WIDTH))
    console.print(escape(facts(study)))
    if study.table:
        console.print(results_table(study, console.width))
        for note in [rule(study), *noise_notes(study), *remarks(study), *study.notes]:
            console.print(escape(note))
    else:
        console.print("The table is empty: no run of this study has finished.")
    for line in _failures(study):
        console.print(escape(line))
    for problem in study.problems:
        console.print(escape(f"not used: {problem}"))


def _failures(study: StudyFolder) -> list[str]:
    """Return a line for each run that is not ok, one for all that have the same reason, at most
    12."""
    alike: dict[tuple[str, str], list[RunRow]] = {}
    for run in study.runs:
        if run["status"] != "ok":
            reason = " ".join((run["reason"] or "no reason is recorded").split())
            alike.setdefault((run["status"], reason), []).append(run)
    lines = []
    for (status, reason), runs in alike.items():
        one = f"{runs[0]['id']}, {runs[0]['method']}, seed {runs[0]['seed']}"
        lines.append(f"{status}: {one if len(runs) == 1 else f'{len(runs)} runs'}: {reason}")
    return (
        lines
        if len(lines) <= ROWS
        else [*lines[:ROWS], f"and {len(lines) - ROWS} more; all are in report.md"]
    )
