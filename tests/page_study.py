"""Made-up studies with run directories, for the reports: quick to make, the same at every call, no
model involved."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from adaptive_lora.allocation.allocate import Resize
from adaptive_lora.allocation.history import Decision, write
from adaptive_lora.study.records import COSTS_FILE, RESULTS_FILE, VERSION
from adaptive_lora.study.table import make_table

KINDS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "output.dense",
)
COST = 768  # parameters a component of any target
GAINS = {"lora": 0.0, "linear_decay": 0.001, "adalora": 0.02, "grad_delta": -0.015, "plateau": 0.0}
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


@dataclass(frozen=True)
class Shape:
    """How large a study is."""

    methods: Sequence[str] = ("lora", "linear_decay", "adalora", "grad_delta")
    tasks: Sequence[str] = ("sst2", "cola")
    ranks: Sequence[int] = (4, 8)
    rates: Sequence[float] = (3e-4, 1e-3)
    seeds: int = 3
    layers: int = 6
    decisions: int = 8
    points: int = 300


def write_study(folder: Path, shape: Shape | None = None) -> dict[str, Any]:
    """Write a study of `shape` into `folder` and return its record. One run in eleven fails."""
    shape = shape or Shape()
    budgets = {f"rank {rank}": rank for rank in shape.ranks}
    grid = itertools.product(
        shape.tasks, budgets.items(), shape.methods, shape.rates, range(shape.seeds)
    )
    runs = [
        _write_run(
            folder, shape, rank, number,
            {"method": method, "task": task, "budget": budget, "learning_rate": rate, "seed": seed},
        )
        for number, (task, (budget, rank), method, rate, seed) in enumerate(grid)
    ]  # fmt: skip
    head: Any = {
        "name": "Four ways to spend a budget",
        "axes": {
            "method": list(shape.methods),
            "task": list(shape.tasks),
            "budget": list(budgets),
            "learning_rate": list(shape.rates),
            "seed": list(range(shape.seeds)),
        },
        "baseline": "lora",
        "metric": "eval_test_accuracy",
        "greater_is_better": True,
        "selection": {
            "rule": "best_mean",
            "metric": "eval_accuracy",
            "axes": ["learning_rate"],
            "description": "the best mean over seeds",
        },
    }
    table = make_table(head, runs, {run["id"]: COST for run in runs})
    record = {
        "version": VERSION,
        "study": head,
        "environment": {
            "python": "3.11.2",
            "commit": "0123abc",
            "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        },
        "runs": runs,
        "table": table.rows,
        "noise_floor": table.noise,
        "wins": table.wins,
        "notes": table.notes,
    }
    (folder / RESULTS_FILE).write_text(json.dumps(record, allow_nan=False))
    (folder / COSTS_FILE).write_text(
        json.dumps({run["id"]: _costs(run, i) for i, run in enumerate(runs)})
    )
    return record


def _value(method: str, task: str, rank: int, rate: float, random: Random) -> float:
    ground = {"sst2": 0.88}.get(task, 0.74)
    return round(
        ground
        + 0.01 * math.log2(rank)
        + GAINS.get(method, 0.0)
        - (0.01 if rate < 5e-4 else 0)
        + random.gauss(0, 0.004),
        6,
    )


def _write_run(folder: Path, shape: Shape, rank: int, number: int, settings: dict[str, Any]) -> Any:
    method, task, rate, seed = (
        settings[name] for name in ("method", "task", "learning_rate", "seed")
    )
    random = Random(number)
    failed = number % 11 == 7
    names = [f"encoder.layer.{layer}.{kind}" for layer in range(shape.layers) for kind in KINDS]
    slope = {"linear_decay": 1.0}.get(method, 0.0)
    initial = {
        name: max(
            1,
            round(rank * (1 + slope * (0.5 - int(name.split(".")[2]) / max(1, shape.layers - 1)))),
        )
        for name in names
    }
    if method == "adalora":
        initial = dict.fromkeys(names, rank + rank // 2)
    history = _history(method, initial, shape, rank, random) if not failed else []
    ranks = history[-1].pattern if history else initial
    value = _value(method, task, rank, rate, random)
    run = {
        "id": f"{number:04x}{random.getrandbits(32):08x}",
        "status": "failed" if failed else "ok",
        "reason": f"training stopped at step {40 + number}: the loss is nan" if failed else None,
        "method": method, "task": task, "model": "bert", "budget": settings["budget"],
        "learning_rate": rate, "seed": seed,
        "settings": settings,
        "metrics": {} if failed else {"eval_accuracy": value, "eval_test_accuracy": value,
                                      "eval_loss": 1 - value},
        "lora_parameters": COST * sum(ranks.values()),
        "budget_parameters": COST * rank * len(names),
        "initial_ranks": initial, "ranks": ranks, "steps": 40 if failed else shape.points,
    }  # fmt: skip
    home = folder / "runs" / str(run["id"])
    home.mkdir(parents=True)
    decay = [
        (step, 0.25 + 0.6 * math.exp(-step / (30 + 9 * seed)) + random.gauss(0, 0.012))
        for step in range(1, shape.points + 1)
    ]
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": round(loss, 5)} for step, loss in decay[: int(run["steps"])]
    ]  # type: ignore[call-overload]
    lines += [
        {"step": step, "eval_loss": round(loss + 0.05, 5)}
        for step, loss in decay[:: max(1, shape.points // 10)]
    ]
    (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if history:
        write(home / "allocations.jsonl", history)
    sizes = {
        "base": 90_000_000,
        "adapters": 4 * run["lora_parameters"],
        "gradients": 4 * run["lora_parameters"],
    }
    memory = {**sizes, "optimizer": 8 * run["lora_parameters"], "statistics": 0}
    (home / "result.json").write_text(json.dumps({"status": run["status"], "memory": memory}))
    return run


def _history(
    method: str, initial: dict[str, int], shape: Shape, rank: int, random: Random
) -> list[Decision]:
    """Return decisions that shrink (adalora: many) or move (grad_delta: one) the ranks."""
    many = {"adalora": shape.decisions, "grad_delta": 1}.get(method, 0)
    rows: list[Decision] = []
    pattern = dict(initial)
    for number in range(many):
        scores = {name: random.random() / (1 + i % shape.layers) for i, name in enumerate(pattern)}
        order = sorted(pattern, key=scores.__getitem__)
        after = dict(pattern)
        for name in order[: len(order) // (2 if method == "grad_delta" else 4)]:
            after[name] = max(0 if method == "adalora" else 1, after[name] - max(1, rank // 4))
        if method == "grad_delta":
            for name in order[len(order) // 2 :]:
                after[name] += max(1, rank // 4)
        changes = {
            name: Resize(tuple(range(min(pattern[name], after[name]))),
                         max(0, after[name] - pattern[name]))
            for name in pattern if after[name] != pattern[name]
        }  # fmt: skip
        size = COST * sum(after.values())
        parts = (
            {"G": scores, "W": {name: 40 * random.random() for name in scores}}
            if method == "grad_delta"
            else {}
        )
        rows.append(
            Decision(
                step=(number + 1) * shape.points // (many + 1),
                status="changed" if changes else "kept", reason=None,
                budget=COST * rank * len(initial), parameters_before=COST * sum(pattern.values()),
                parameters_after=size,
                changes=changes, pattern=after, scores=scores, seconds=0.01, parts=parts,
                bytes_after={"adapters": 4 * size, "gradients": 4 * size, "optimizer": 8 * size,
                             "statistics": 0},
            )
        )  # fmt: skip
        pattern = after
    return rows


def _costs(run: dict[str, Any], number: int) -> dict[str, Any]:
    random = Random(-number)
    if run["status"] != "ok":
        return {"train_seconds": None, "peak_memory_bytes": None, "attempts": 1}
    return {
        "train_seconds": 61 + 9 * random.random(),
        "peak_memory_bytes": int(8e8 + 5e7 * random.random()),
        "attempts": 1,
    }
