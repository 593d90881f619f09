"""The trials of a search on the terminal, at most 100 columns wide. Studies are printed by
`report`."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_lora.study.tune import Trial, Tuning

WIDTH = 100


def show_trials(tuning: Tuning, trials: list[Trial]) -> None:
    """Print every trial; those that nothing beats are marked."""
    console = Console()
    table = Table(
        title=escape(f"{tuning.name}: {len(trials)} trials"),
        caption="* nothing is better on every objective",
    )
    table.add_column("trial", justify="right")
    for name in [*(key.rsplit(".", 1)[-1] for key in tuning.search), *tuning.objectives]:
        table.add_column(escape(name), justify="right", overflow="fold")
    for trial in trials:
        tried = [escape(_value(trial.values.get(key))) for key in tuning.search]
        found = (
            [f"{f:,.6g}" for f in trial.figures]
            if trial.figures
            else ["failed"] * len(tuning.objectives)
        )
        table.add_row(f"{trial.number}{' *' if trial.best else ''}", *tried, *found)
    Console(width=min(console.width, WIDTH)).print(table)
    for trial in trials:
        if trial.figures is None:
            console.print(
                escape(textwrap.shorten(f"failed: {trial.run}: {trial.reason}", 3 * WIDTH))
            )


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
