"""A study from its file to its results: plan, workers, record. Run it again and only what is
missing is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_lora.errors import AdaptiveLoraError, InputError
from adaptive_lora.files import write_json
from adaptive_lora.study.analysis import analyse
from adaptive_lora.study.executors import Executor, Local
from adaptive_lora.study.outcomes import UnusableError, read_outcome
from adaptive_lora.study.plan import make_plan, plan_of, write_plan
from adaptive_lora.study.progress import Bar, Watch
from adaptive_lora.study.records import COSTS_FILE, OUTCOMES, RESULTS_FILE, RUNS, StudyRecord
from adaptive_lora.study.study_file import Study
from adaptive_lora.study.worker import TRAIN

# seconds: between two looks; for workers to see that nothing is left, before they are ended
POLL, SETTLE = (0.5, 10.0)


def run_study(
    study: Study,
    output: str | Path,
    *,
    recipes: Callable[[], Iterable[Mapping[str, Any]]] | None = None,
    workers: int = 1,
    executor: type[Executor] = Local,
    train: str = TRAIN,
    retry_failed: bool = False,
) -> StudyRecord:
    """Do every run of `study` that `output` does not hold yet, write results.json and costs.json,
    and return the record.

    Args:
        study: what to run and how to read it.
        output: the study's folder; made if absent. Whatever is killed, the same call goes on.
        recipes: a function that returns the recipes to run, instead of the grid of `study`.
        workers: how many at a time. Results do not depend on it: each run has `study.threads`
            threads.
        executor: where workers run, a class of `executors`.
        train: "module:function" that trains one run; see `worker.Train`.
        retry_failed: do runs again that failed.

    Raises `InputError` on a bad study or a folder that holds something else, `AdaptiveLoraError`
    when all workers ended early.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; expected a whole number >= 1")
    folder = Path(output)
    plan = make_plan(study) if recipes is None else plan_of(study, recipes())
    write_plan(folder, study, plan)
    if retry_failed:
        forget_failures(folder, [one["id"] for one in plan])
    watch = Watch.of(folder, (one["id"] for one in plan))
    if len(watch.over) < len(plan):
        pool = executor(
            study, folder, workers=min(workers, len(plan) - len(watch.over)), train=train
        )
        pool.start()
        try:
            with Bar(watch, study.name) as bar:
                while not watch.look():
                    bar.show()
                    if not pool.living(finished=len(watch.over)) and not watch.look():
                        raise AdaptiveLoraError(
                            f"all workers ended and {len(plan) - len(watch.over)} runs are not "
                            f"over; the same command goes on. {pool.last_words()}"
                        )
                    time.sleep(POLL)
                settled = time.monotonic() + SETTLE
                while pool.living(finished=len(plan)) and time.monotonic() < settled:
                    time.sleep(POLL)
        finally:
            pool.stop()
    return write_results(folder)


def write_results(folder: Path) -> StudyRecord:
    """Read the study in `folder`, write results.json and costs.json there, and return the
    record."""
    record = analyse(folder)
    # Apart: seconds and bytes differ each time, and results.json must not.
    write_json(folder / COSTS_FILE, record["costs"])
    lasting = {key: value for key, value in record.items() if key != "costs"}
    write_json(folder / RESULTS_FILE, lasting)
    return record


def forget_failures(folder: Path, runs: Iterable[str]) -> None:
    """Remove the outcomes of failed runs, and what those runs left."""
    for run in runs:
        try:
            outcome = read_outcome(folder, run)
        except UnusableError:
            continue
        if outcome is not None and outcome["status"] == "failed":
            if outcome["files"]:  # of ours; what was there before the run has no digests
                shutil.rmtree(folder / RUNS / run, ignore_errors=True)
            (folder / OUTCOMES / f"{run}.json").unlink()
