"""A study's table on the terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_lora.study.records import StudyRecord, TableRow
from adaptive_lora.study.tune import Trial, Tuning

WIDTH = 100


def show_study(record: StudyRecord) -> None:
    """Print one table a task, model and budget, the counts of wins, the failures, and every note."""
    console = Console()
    out = Console(width=min(console.width, WIDTH))
    groups: dict[str, list[TableRow]] = {}
    for row in record["table"]:
        axes = record["study"]["axes"]
        budget = row["budget"] if any(axis in axes for axis in ("budget", "method.rank", "method.budget")) else ""
        more = [
            f"{axis} {label}" for axis, label in row["settings"].items() if axis not in ("method.rank", "method.budget")
        ]
        groups.setdefault(", ".join(filter(None, [row["task"], row["model"], budget, *more])), []).append(row)
    for title, rows in groups.items():
        out.print(_table(f"{title}: {record['study']['metric']}", rows, record))
    for method, wins in record["wins"].items():
        out.print(f"{escape(method)} against {escape(record['study']['baseline'])}: "
                  f"{wins['win']} won, {wins['tie']} tied, {wins['loss']} lost")  # fmt: skip
    for run in record["runs"]:
        if run["status"] == "failed":
            what = ", ".join(f"{axis} {label}" for axis, label in run["settings"].items())
            out.print(escape(textwrap.shorten(f"failed: {run['id']} ({what}): {run['reason']}", 3 * WIDTH)))
    for note in record["notes"]:
        out.print(escape(f"- {note}"))


def _table(title: str, rows: list[TableRow], record: StudyRecord) -> Table:
    table = Table(title=escape(title))
    chosen = record["study"]["selection"]["axes"]
    names = [axis.rsplit(".", 1)[-1].replace("learning_rate", "lr") for axis in chosen]
    columns = [
        "method",
        *names,
        "trials",
        "seeds",
        "mean ± sd",
        "95 %",
        "parameters",
        "difference [95 %]",
        "p Holm",
        "",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "") else "right", overflow="fold")
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        comparison = row["comparison"]
        parameters = "-" if row["lora_parameters"] is None else f"{row['lora_parameters']:,}"
        table.add_row(
            escape(row["method"]),
            *(escape(_value(row["chosen"][axis])) for axis in chosen),
            str(row["trials"]),
            f"{row['seeds']}{failed}",
            _mean(row),
            _interval(row["ci95"]),
            parameters + (" ≠" if row["parameters_equal"] is False else ""),
            ""
            if comparison is None
            else f"{_number(comparison['difference'], '+')} {_interval(comparison['ci95'], '+')}",
            "" if comparison is None or comparison["p_holm"] is None else f"{comparison['p_holm']:.2g}",
            "baseline" if comparison is None else comparison["verdict"] or "-",
        )
    return table


def _mean(row: TableRow) -> str:
    return _number(row["mean"]) + ("" if row["sd"] is None else f" ± {_number(row['sd'])}")


def _interval(ends: tuple[float, float] | None, sign: str = "") -> str:
    return "" if ends is None else f"\\[{_number(ends[0], sign)}, {_number(ends[1], sign)}]"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else format(value, f"{sign}.4g")


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_trials(tuning: Tuning, trials: list[Trial]) -> None:
    """Print every trial; those that nothing beats are marked."""
    console = Console()
    table = Table(
        title=escape(f"{tuning.name}: {len(trials)} trials"), caption="* nothing is better on every objective"
    )
    table.add_column("trial", justify="right")
    for name in [*(key.rsplit(".", 1)[-1] for key in tuning.search), *tuning.objectives]:
        table.add_column(escape(name), justify="right", overflow="fold")
    for trial in trials:
        tried = [escape(_value(trial.values.get(key))) for key in tuning.search]
        found = [f"{f:,.6g}" for f in trial.figures] if trial.figures else ["failed"] * len(tuning.objectives)
        table.add_row(f"{trial.number}{' *' if trial.best else ''}", *tried, *found)
    Console(width=min(console.width, WIDTH)).print(table)
    for trial in trials:
        if trial.figures is None:
            console.print(escape(textwrap.shorten(f"failed: {trial.run}: {trial.reason}", 3 * WIDTH)))
