"""A run directory as a record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_lora.adapter_file import tensor_ranks
from adaptive_lora.errors import InputError, IntegrityError

LORA_A = ".lora_A.weight"
PREFIX = "base_model.model."
KEYS = {
    "status",
    "reason",
    "method",
    "task",
    "model",
    "seed",
    "metrics",
    "ranks",
    "lora_parameters",
    "budget_parameters",
}


@dataclass(frozen=True)
class RunRecord:
    """What a report needs of a run. `ranks` are those of the saved tensors; a target without tensors has rank 0."""

    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    ranks: dict[str, int]


def read_run(folder: str | Path) -> RunRecord:
    """Read the run in `folder`.

    Raises `InputError` when there is no finished run, `IntegrityError` when a file is damaged or the saved tensors do
    not have the ranks that `result.json` states.
    """
    path = Path(folder)
    result_file = path / "result.json"
    if not result_file.is_file():
        raise InputError(f"{path} holds no finished run: it has no result.json")
    try:
        result = json.loads(result_file.read_text(encoding="utf-8"))
        lines = (
            (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if (path / "metrics.jsonl").is_file()
            else []
        )
        metrics = [json.loads(line) for line in lines]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"a file in {path} is damaged: {error}") from error
    missing = KEYS - result.keys() if isinstance(result, dict) else KEYS
    if missing:
        raise IntegrityError(f"{result_file} is not the result of a run: it lacks {', '.join(sorted(missing))}")
    if not all(isinstance(row, dict) for row in metrics):
        raise IntegrityError(f"{path / 'metrics.jsonl'} is damaged: a line is not an object")
    ranks = dict(result["ranks"])
    if result["status"] == "ok":
        tensors = tensor_ranks(path / "adapter" / "adapter_model.safetensors")
        saved = {name: tensors.pop(name, 0) for name in ranks} | tensors
        if saved != ranks:
            odd = next(name for name in saved if saved[name] != ranks.get(name))
            raise IntegrityError(
                f"{path}: the saved adapter has rank {saved[odd]} for {odd!r}, result.json says {ranks.get(odd)}"
            )
    return RunRecord(path, result, metrics, ranks)
