"""A study directory as a record: `results.json`, and what the run directories beside it hold.

Whatever is damaged is left out and named in `problems`; only without a readable `results.json`
there is nothing to report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from adaptive_lora.allocation.history import Decision
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import ADAPTER_FOLDER, HISTORY_FILE, METRICS_FILE, RESULT_FILE
from adaptive_lora.report.read import check_tensors, read_history, read_metrics
from adaptive_lora.study.analysis import analyse
from adaptive_lora.study.records import (
    COSTS_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    RUNS,
    VERSION,
    Costs,
    NoiseFloor,
    RunRow,
    StudyHead,
    TableRow,
)

MEMORY_PARTS = ("base", "head", "adapters", "gradients", "optimizer", "statistics")
NO_COSTS: Costs = {"train_seconds": None, "peak_memory_bytes": None, "attempts": 1}
Row = TypeVar("Row")


@dataclass(frozen=True)
class Details:
    """What the run directory holds: log rows, decisions, and bytes by `MEMORY_PARTS` where the run
    says so."""

    folder: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    history: list[Decision] = field(default_factory=list)
    memory: dict[str, int] | None = None


@dataclass(frozen=True)
class StudyFolder:
    """A study as its reports need it: the record without what is damaged in it, and what the run
    directories add. `details` and `costs` have an entry for each run."""

    folder: Path
    head: StudyHead
    environment: dict[str, Any]
    runs: list[RunRow]
    table: list[TableRow]
    noise_floor: list[NoiseFloor]
    wins: dict[str, dict[str, int]]
    notes: list[str]
    costs: dict[str, Costs]
    details: dict[str, Details]
    problems: list[str]

    @property
    def methods(self) -> list[str]:
        """Every method, the baseline first, then in the order of the grid."""
        known = [str(name) for name in self.head["axes"].get("method", [])]
        names = dict.fromkeys(
            [*known, *(row["method"] for row in self.table), *(run["method"] for run in self.runs)]
        )
        return sorted(names, key=lambda name: name != self.head["baseline"])

    @property
    def in_table(self) -> set[str]:
        """The ids of the runs behind the figures of the table."""
        return {identity for row in self.table for identity in row["runs"]}

    def value(self, run: RunRow) -> float | None:
        """Return the run's figure in the metric of the table."""
        return run["metrics"].get(self.head["metric"]) if run["status"] == "ok" else None

    def representative(self, method: str) -> RunRow | None:
        """Return the run of `method` whose ranks are shown: in the table, with decisions, the first
        seed; None without."""
        runs = [
            run
            for run in self.runs
            if run["method"] == method and run["ranks"] and run["status"] == "ok"
        ]
        return min(
            runs,
            key=lambda run: (run["id"] not in self.in_table, not self.details[run["id"]].history),
            default=None,
        )


def is_study(folder: str | Path) -> bool:
    """Say whether `folder` is the directory of a study, finished or not, and not that of a run."""
    return any((Path(folder) / name).is_file() for name in (RESULTS_FILE, PLAN_FILE))


def read_study(folder: str | Path) -> StudyFolder:
    """Read the study in `folder`: its `results.json`, or, while there is none, what its runs have
    left so far.

    Raises `InputError` when there are no results, `IntegrityError` when `results.json` is damaged
    or of another version.
    """
    path, problems = Path(folder), list[str]()
    file = path / RESULTS_FILE
    if not is_study(path):
        raise InputError(f"{path} holds no study: it has neither {RESULTS_FILE} nor {PLAN_FILE}")
    # whose notes say what is missing
    record = _read_json(file) if file.is_file() else dict(analyse(path))
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise IntegrityError(
            f"{file} has version {version!r}, this release reads version {VERSION}"
        )
    try:
        head = _checked(TypeAdapter(StudyHead), record.get("study"))
    except ValueError as error:
        raise IntegrityError(f"{file} is damaged: study: {_first(error)}") from error
    runs = _unique(
        _rows(TypeAdapter(RunRow), record.get("runs"), "run", file, problems), file, problems
    )
    details = {run["id"]: _details(path / RUNS / run["id"], run, problems) for run in runs}
    costs = _costs(record.get("costs"), path / COSTS_FILE, problems)
    return StudyFolder(
        folder=path,
        head=head,
        environment=_mapping(record, "environment", file, problems),
        runs=runs,
        table=_rows(TypeAdapter(TableRow), record.get("table"), "table row", file, problems),
        noise_floor=_rows(
            TypeAdapter(NoiseFloor), record.get("noise_floor"), "noise floor", file, problems
        ),
        wins=_wins(_mapping(record, "wins", file, problems), file, problems),
        notes=[str(note) for note in record.get("notes") or []],
        costs={run["id"]: costs.get(run["id"], NO_COSTS) for run in runs},
        details=details,
        problems=problems,
    )


def pareto_front(rows: Sequence[TableRow], *, greater_is_better: bool) -> list[TableRow]:
    """Return the rows that no other beats: by parameters ascending, each better than all that are
    cheaper."""
    sign = 1 if greater_is_better else -1
    front: list[TableRow] = []
    known = [
        (row["lora_parameters"], sign * row["mean"], row)
        for row in rows
        if row["mean"] is not None and row["lora_parameters"]
    ]
    best = -math.inf
    for _, quality, row in sorted(known, key=lambda item: (item[0], -item[1])):
        if quality > best:
            front.append(row)
            best = quality
    return front


def _read_json(file: Path) -> Any:
    """Return what is in `file`. NaN and infinity are no JSON, and are refused."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, OSError, RecursionError) as error:
        raise IntegrityError(f"{file} is damaged: {error}") from error


def _rows(
    kind: TypeAdapter[Row], rows: Any, name: str, file: Path, problems: list[str]
) -> list[Row]:
    """Return the rows that are what they should be; the others are named in `problems`."""
    if not isinstance(rows, list):
        problems.append(f"{file.name}: no list of {name}s; got {type(rows).__name__}")
        return []
    good = []
    for number, row in enumerate(rows, start=1):
        try:
            good.append(_checked(kind, row))
        except ValueError as error:
            known = f" ({row['id']})" if isinstance(row, dict) and "id" in row else ""
            problems.append(f"{file.name}: {name} {number}{known} is left out: {_first(error)}")
    return good


def _checked(kind: TypeAdapter[Row], value: Any) -> Row:
    """Return a value of JSON as one of the records. Raises `ValueError` unless its types are those,
    and its numbers finite."""
    # as JSON, which has no tuples: a list is one here
    return kind.validate_json(json.dumps(value, allow_nan=False), strict=True)


def _first(error: Exception) -> str:
    """Return the first thing that is wrong, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "it"
    got = "" if first["type"] == "missing" else f"; got {first['input']!r:.60}"
    return f"{where}: {first['msg']}{got}"


def _unique(runs: Sequence[RunRow], file: Path, problems: list[str]) -> list[RunRow]:
    """Return the runs whose id is the name of a directory and occurs for the first time."""
    seen: dict[str, RunRow] = {}
    for run in runs:
        if run["id"] in seen:
            problems.append(f"{file.name}: run {run['id']} occurs twice; the first is used")
        elif Path(run["id"]).name != run["id"] or run["id"] == "..":
            problems.append(
                f"{file.name}: run {run['id']!r} is left out: its id is not the name of a directory"
            )
        else:
            seen[run["id"]] = run
    return list(seen.values())


def _mapping(record: dict[str, Any], name: str, file: Path, problems: list[str]) -> dict[str, Any]:
    value = record.get(name)
    if isinstance(value, dict):
        return value
    problems.append(f"{file.name}: {name} is not a mapping; got {type(value).__name__}")
    return {}


def _wins(wins: dict[str, Any], file: Path, problems: list[str]) -> dict[str, dict[str, int]]:
    good = {}
    for method, counts in wins.items():
        try:
            good[method] = {name: int(counts[name]) for name in ("win", "tie", "loss")}
        except (KeyError, TypeError, ValueError):
            problems.append(f"{file.name}: wins of {method!r} are left out; got {counts!r:.60}")
    return good


def _costs(given: Any, file: Path, problems: list[str]) -> dict[str, Costs]:
    """Return {run id: costs}, `given` or from the file; without either, or from damaged ones,
    none."""
    try:
        entries = given if given is not None else _read_json(file) if file.is_file() else {}
        return _checked(TypeAdapter(dict[str, Costs]), entries)
    except (IntegrityError, ValueError) as error:
        problems.append(f"{file.name} is not used: {_first(error)}")
        return {}


def _details(folder: Path, run: RunRow, problems: list[str]) -> Details:
    """Return what the run directory adds to `run`. A file that contradicts it is not used, the
    others are."""
    if not folder.is_dir() or run["status"] == "skipped":
        return Details()
    metrics: list[dict[str, Any]] = []
    history: list[Decision] = []
    memory = None
    try:
        metrics = read_metrics(folder / METRICS_FILE)
    except (IntegrityError, OSError) as error:
        problems.append(str(error))
    try:
        if run["ranks"]:
            history = read_history(folder / HISTORY_FILE, run["initial_ranks"], run["ranks"])
    except (IntegrityError, OSError) as error:
        problems.append(str(error))
    try:
        if run["status"] == "ok" and (folder / ADAPTER_FOLDER).is_dir():
            check_tensors(folder, run["ranks"])
    except IntegrityError as error:
        problems.append(str(error))
    try:
        memory = _memory(folder / RESULT_FILE)
    except IntegrityError as error:
        problems.append(str(error))
    return Details(folder, metrics, history, memory)


def _memory(file: Path) -> dict[str, int] | None:
    """Return bytes by what holds them, None where the run does not say."""
    result = _read_json(file) if file.is_file() else {}
    memory = result.get("memory") if isinstance(result, dict) else None
    if not isinstance(memory, dict):
        return None
    # The base is given by type: of the floats, the packed weights, their scales.
    sums = {
        name: sum(part.values()) if isinstance(part, dict) else part
        for name, part in memory.items()
    }
    parts = {name: sums[name] for name in MEMORY_PARTS if isinstance(sums.get(name), int)}
    return parts or None
