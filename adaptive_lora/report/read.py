"""A run directory as a record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_lora.allocation.history import Decision, from_json, replay
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import ADAPTER_FOLDER, HISTORY_FILE, METRICS_FILE, RESULT_FILE
from adaptive_lora.model.adapter_file import WEIGHTS_NAME, tensor_ranks

KEYS = {
    "status",
    "reason",
    "method",
    "task",
    "model",
    "seed",
    "metrics",
    "initial_ranks",
    "ranks",
    "lora_parameters",
    "budget_parameters",
}


@dataclass(frozen=True)
class RunRecord:
    """What a report needs of a run. `ranks` are those of the saved tensors; a target without
    tensors has rank 0.

    `history` has one `Decision` a row of `allocations.jsonl`, and none when the method never
    changes ranks.
    """

    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    ranks: dict[str, int]
    initial_ranks: dict[str, int]
    history: list[Decision]


def read_run(folder: str | Path) -> RunRecord:
    """Read the run in `folder`.

    Raises `InputError` when there is no finished run, `IntegrityError` when a file is damaged, the
    saved tensors do not have the ranks that `result.json` states, or the decisions do not lead from
    the initial ranks to those.
    """
    path = Path(folder)
    result_file = path / RESULT_FILE
    if not result_file.is_file():
        raise InputError(f"{path} holds no finished run: it has no {RESULT_FILE}")
    result = _json(result_file)
    missing = KEYS - result.keys() if isinstance(result, dict) else KEYS
    if missing:
        raise IntegrityError(
            f"{result_file} is not the result of a run: it lacks {', '.join(sorted(missing))}"
        )
    metrics = read_metrics(path / METRICS_FILE)
    ranks, initial = dict(result["ranks"]), dict(result["initial_ranks"])
    if result["status"] == "ok":
        check_tensors(path, ranks)
    return RunRecord(
        path,
        result,
        metrics,
        ranks,
        initial,
        read_history(path / HISTORY_FILE, initial, ranks),
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}") from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, [] without it. Raises `IntegrityError` when a line is
    not an object."""
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            rows.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} is damaged: line {len(rows) + 1}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise IntegrityError(f"{file} is damaged: a line is not an object")
    return rows


def check_tensors(folder: Path, ranks: dict[str, int]) -> None:
    """Raise `IntegrityError` unless the tensors saved in the run directory have `ranks`; one
    without tensors has 0."""
    tensors = tensor_ranks(folder / ADAPTER_FOLDER / WEIGHTS_NAME)
    saved = {name: tensors.pop(name, 0) for name in ranks} | tensors
    if saved != ranks:
        odd = next(name for name in saved if saved[name] != ranks.get(name))
        raise IntegrityError(
            f"{folder}: the saved adapter has rank {saved[odd]} for {odd!r}, result.json says "
            f"{ranks.get(odd)}"
        )


def read_history(file: Path, initial: dict[str, int], final: dict[str, int]) -> list[Decision]:
    """Return the decisions in `file`, [] without it, after replaying them from `initial` to
    `final`."""
    if not file.is_file():
        return []
    history: list[Decision] = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = from_json(json.loads(line))
            _check(row, history[-1] if history else None, initial)
            history.append(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{file} is damaged: row {len(history) + 1} is not a decision: {error}"
        ) from error
    last = history[-1].pattern if history else initial
    if last != final:
        odd = next(name for name in last | final if last.get(name) != final.get(name))
        raise IntegrityError(
            f"{file}: the decisions end with rank {last.get(odd)} for {odd!r}, the run with "
            f"{final.get(odd)}"
        )
    return history


def _check(row: Decision, before: Decision | None, initial: dict[str, int]) -> None:
    """Raise `ValueError` unless `row` follows from the row `before` it."""
    if not {"adapters", "gradients", "optimizer"} <= row.bytes_after.keys():
        raise ValueError(f"bytes_after has only {sorted(row.bytes_after)}")
    for numbers in ({"seconds": row.seconds}, row.scores, *row.parts.values()):
        if not all(isinstance(number, int | float) for number in numbers.values()):
            raise ValueError("a score, or seconds, is not a number")
    counts = {
        "step": row.step,
        "parameters_before": row.parameters_before,
        "parameters_after": row.parameters_after,
    }
    for name, count in (
        counts | row.bytes_after | row.pattern | {"budget": row.budget or 0}
    ).items():
        if not isinstance(count, int):
            raise ValueError(f"{name} is {count!r}, expected an integer")
    if row.pattern != replay(before.pattern if before else initial, [row]):
        raise ValueError(f"the pattern after step {row.step} is not what its changes lead to")
    if before and (row.step < before.step or row.parameters_before != before.parameters_after):
        raise ValueError(f"step {row.step} does not go on from step {before.step}")
