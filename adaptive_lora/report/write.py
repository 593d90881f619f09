"""The report of one run: tables on the terminal, figures in `RUN/report/`."""

from __future__ import annotations

from pathlib import Path

from adaptive_lora.report.figures import rank_heatmap, training_curve
from adaptive_lora.report.read import read_run
from adaptive_lora.report.tables import rank_table, show, summary_table


def report(folder: str | Path) -> list[Path]:
    """Print the tables of the run in `folder`, draw its figures, and return their paths."""
    run = read_run(folder)
    show(summary_table(run))
    show(rank_table(run.ranks))
    target = run.folder / "report"
    return [
        rank_heatmap({f"{run.result['method']}: rank by layer and module kind": run.ranks}, target / "ranks.png"),
        training_curve(run, target / "loss.png"),
    ]
