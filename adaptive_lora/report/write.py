"""The report of a run: tables on the terminal, figures in `RUN/report/`. That of a study is in
`study_write`."""

from __future__ import annotations

from pathlib import Path

from adaptive_lora.report.figures import (
    parameter_steps,
    rank_heatmap,
    rank_steps,
    saliency,
    training_curve,
)
from adaptive_lora.report.read import RunRecord, read_run
from adaptive_lora.report.study_read import is_study
from adaptive_lora.report.study_write import report_study
from adaptive_lora.report.tables import decision_table, rank_table, show, summary_table


def report(folder: str | Path) -> list[Path]:
    """Print the tables of the run or the study in `folder`, write its figures and files, and return
    their paths."""
    if is_study(folder):
        return report_study(folder)
    run = read_run(folder)
    show(summary_table(run))
    show(rank_table(run.ranks))
    if run.history:
        show(decision_table(run.history))
    target, method = run.folder / "report", run.result["method"]
    patterns = {f"{method}: rank by layer and module kind": run.ranks}
    if run.history:
        patterns = {
            f"{method}: initial ranks": run.initial_ranks,
            f"{method}: final ranks": run.ranks,
        }
    return [
        rank_heatmap(patterns, target / "ranks.png"),
        *(_figures_of_changes(run, target) if run.history else []),
        training_curve(run, target / "loss.png"),
    ]


def _figures_of_changes(run: RunRecord, target: Path) -> list[Path]:
    figures = [
        rank_steps(run, target / "rank_steps.png"),
        parameter_steps(run, target / "parameters.png"),
    ]
    scored = [
        row
        for row in run.history
        if row.status == "changed" and (row.parts or any(row.scores.values()))
    ]
    return [*figures, saliency(scored[-1], target / "saliency.png")] if scored else figures
