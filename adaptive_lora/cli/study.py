"""The commands of studies: `study` and `tune`. Each reads arguments, calls one function, and
prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptive_lora.cli.once import App
from adaptive_lora.errors import AdaptiveLoraError

app = App()
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the file: base.model=FOLDER, grid.seed=[0,1]."),
]
Output = Annotated[Path, typer.Option(help="The folder of the results; give it again to go on.")]


@app.command()
def study(
    file: Annotated[
        Path,
        typer.Argument(metavar="STUDY.yaml", help="What to run: base, grid, baseline, report."),
    ],
    output: Output,
    workers: Annotated[int, typer.Option(help="Runs at a time. Results do not depend on it.")] = 1,
    executor: Annotated[
        str, typer.Option(help="Where workers run: local, slurm or ray.")
    ] = "local",
    set_: Set = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do failed runs again.")
    ] = False,
) -> None:
    """Run a grid of methods, tasks, learning rates and seeds, and compare. Given again, only what
    is missing is done."""
    from adaptive_lora.report import report
    from adaptive_lora.study.executors import executor_named
    from adaptive_lora.study.study import run_study
    from adaptive_lora.study.study_file import read_study

    where = executor_named(executor)
    record = run_study(
        read_study(file, set_ or []),
        output,
        workers=workers,
        executor=where,
        retry_failed=retry_failed,
    )
    typer.echo(f"results: {output / 'results.json'}")
    for file_made in report(output):
        typer.echo(f"report: {file_made}")
    if not any(run["status"] == "ok" for run in record["runs"]):
        raise AllFailedError(
            f"every run of the study failed, the first for: {record['runs'][0]['reason']}"
        )


@app.command()
def tune(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="TUNE.yaml", help="What to search: base, search, objectives, trials."
        ),
    ],
    output: Output,
    set_: Set = None,
) -> None:
    """Search recipe fields with Optuna for quality, parameters, or both. Given again, it goes
    on."""
    from adaptive_lora.study.show import show_trials
    from adaptive_lora.study.tune import read_tuning
    from adaptive_lora.study.tune import tune as run_search

    tuning = read_tuning(file, set_ or [])
    trials = run_search(tuning, output)
    show_trials(tuning, trials)
    typer.echo(f"trials: {output / 'trials.json'}")
    if not any(trial.figures for trial in trials):
        raise AllFailedError(f"every trial failed, the first for: {trials[0].reason}")


class AllFailedError(AdaptiveLoraError):
    """A study without a single run that ended well."""

    exit_code = 2
