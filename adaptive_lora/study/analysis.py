"""From a study's directory to its record: what each run left, what the table says, what must be
said beside it. No torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.errors import IntegrityError, unknown
from adaptive_lora.files import RESULT_FILE
from adaptive_lora.study.outcomes import UnusableError, read_outcome, read_result
from adaptive_lora.study.plan import read_plan, read_study_head
from adaptive_lora.study.records import (
    RUNS,
    VERSION,
    Costs,
    PlannedRun,
    RunRow,
    StudyHead,
    StudyRecord,
)
from adaptive_lora.study.selection import RULES
from adaptive_lora.study.table import Table, make_table

TIMED = ("runtime", "per_second")  # ends of the names of metrics that are not the same twice
# eval_main, eval_test_main: the task's first metric under a name that all tasks share
MAIN = "main"


def analyse(folder: str | Path) -> StudyRecord:
    """Return the record of the study in `folder`, a pure function of its files.

    A run that has not been run is a row ("missing"), and so is one whose files are damaged, from
    another version, or changed since ("skipped"): they count for nothing, and the rest is unharmed.
    Raises `InputError` without a study, `IntegrityError` when its plan is damaged.
    """
    study, plan = Path(folder), read_plan(folder)
    asked = read_study_head(folder)
    try:
        head: StudyHead = {
            "name": asked["name"],
            "axes": plan["axes"],
            "baseline": asked["baseline"],
            "metric": asked["report"]["metric"],
            "greater_is_better": asked["report"]["greater_is_better"],
            "selection": {
                "rule": asked["select"]["rule"],
                "metric": asked["select"]["by"],
                "axes": [
                    axis for axis in asked["select"]["axes"] if len(plan["axes"].get(axis, [])) > 1
                ],
                "description": RULES[asked["select"]["rule"]].description,
            },
        }
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"{study}/study.yaml is damaged ({error!r}); give the study file again"
        ) from None
    rows, costs, components, versions = [], {}, {}, {}
    for one in plan["runs"]:
        row, cost, component, version = _read(study, one, threads=plan["threads"])
        rows.append(row)
        if cost is not None:
            costs[one["id"]] = cost
        if component is not None:
            components[one["id"]] = component
        if version:
            versions[one["id"]] = version
    table: Table = make_table(head, rows, components)
    notes = [
        *_notes_on_runs(study, rows),
        *_notes_on_versions(versions),
        *_notes_on_metrics(rows, head),
        *table.notes,
    ]
    return {
        "version": VERSION,
        "study": head,
        "environment": _environment(versions, plan["threads"]),
        "runs": rows,
        "table": table.rows,
        "noise_floor": table.noise,
        "wins": table.wins,
        "notes": notes,
        "costs": costs,
    }


def _read(
    study: Path, planned: PlannedRun, *, threads: int
) -> tuple[RunRow, Costs | None, int | None, dict[str, str] | None]:
    row: RunRow = {
        "id": planned["id"],
        "status": "missing",
        "reason": "not run yet",
        "method": planned["method"],
        "task": planned["task"],
        "model": planned["model"],
        "budget": planned["budget"],
        "learning_rate": planned["learning_rate"],
        "seed": planned["seed"],
        "settings": planned["settings"],
        "metrics": {},
        "lora_parameters": None,
        "budget_parameters": None,
        "initial_ranks": {},
        "ranks": {},
        "steps": None,
    }
    try:
        outcome = read_outcome(study, planned["id"])
        if outcome is None:
            if (study / RUNS / planned["id"] / RESULT_FILE).is_file():
                raise UnusableError(
                    f"{RUNS}/{planned['id']} has a result and no outcome: it is not a run of this "
                    "study, or not over"
                )
            return row, None, None, None
        result = read_result(study, planned, outcome, threads=threads)
    except UnusableError as error:
        return {**row, "status": "skipped", "reason": str(error)}, None, None, None
    metrics = {
        k: v
        for k, v in (result.get("metrics") or {}).items()
        if not k.endswith(TIMED) and k != "epoch"
    }
    main = str(result.get("metric")).removeprefix("eval_")
    metrics |= {
        k.removesuffix(main) + MAIN: v for k, v in metrics.items() if k.endswith(f"_{main}")
    }
    row |= {"status": outcome["status"], "reason": outcome["reason"], "metrics": metrics}
    for key in ("lora_parameters", "budget_parameters", "steps"):
        row[key] = result.get(key)
    if result.get("memory"):
        row["memory"] = result["memory"]
    row["initial_ranks"], row["ranks"] = (
        result.get("initial_ranks") or {},
        result.get("ranks") or {},
    )
    return row, outcome["costs"], outcome["component_parameters"], result.get("versions")


def _environment(versions: Mapping[str, Mapping[str, str]], threads: int) -> dict[str, Any]:
    """Return what the results were made with: the versions of all runs, each with the versions seen
    when they differ."""
    names = dict.fromkeys(name for one in versions.values() for name in one)
    seen = {name: sorted({one.get(name, "?") for one in versions.values()}) for name in names}
    joined = {name: ", ".join(values) for name, values in seen.items()}
    return {
        "versions": joined,
        "threads": threads,
        "machine": platform.machine(),
        "system": platform.system(),
    }


def _notes_on_runs(study: Path, rows: Sequence[RunRow]) -> list[str]:
    notes = [
        f"run {row['id']} skipped: {row['reason']}" for row in rows if row["status"] == "skipped"
    ]
    if missing := sum(row["status"] == "missing" for row in rows):
        notes.append(
            f"{missing} of {len(rows)} runs have not been run; the table is of the others."
        )
    strangers = sorted(
        {path.name for path in (study / RUNS).glob("*") if path.is_dir()}
        - {row["id"] for row in rows}
    )
    if strangers:
        few = ", ".join(strangers[:3]) + (
            f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        )
        notes.append(f"not of this study and left out: {few} in {RUNS}.")
    return notes


def _notes_on_versions(versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    notes = []
    for name in ("torch", "transformers", "peft", "adaptive-lora"):
        if len(different := {one.get(name) for one in versions.values()}) > 1:
            notes.append(
                f"the runs were made with different versions of {name}: "
                f"{', '.join(map(str, sorted(different, key=str)))}."
            )
    return notes


def _notes_on_metrics(rows: Sequence[RunRow], head: StudyHead) -> list[str]:
    notes = []
    for metric in dict.fromkeys((head["metric"], head["selection"]["metric"])):
        lacking = [
            row for row in rows if row["status"] == "ok" and row["metrics"].get(metric) is None
        ]
        if lacking:
            known = lacking[0]["metrics"]
            notes.append(
                unknown(
                    f"{len(lacking)} runs have no metric {metric!r}",
                    metric,
                    sorted(known),
                    "They have",
                )
            )
    return notes
