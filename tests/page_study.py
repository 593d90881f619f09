"""Made-up studies with run directories, for the reports: quick to make, the same at every call, no model involved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from adaptive_lora.allocate import Resize
from adaptive_lora.history import Decision, write

KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "output.dense")
COST = 768  # parameters a component of any target
GAINS = {"lora": 0.0, "linear_decay": 0.001, "adalora": 0.02, "grad_delta": -0.015, "plateau": 0.0}
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


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
    runs, rows, costs = [], [], {}
    for task in shape.tasks:
        for rank in shape.ranks:
            for method in shape.methods:
                groups: dict[float, list[dict[str, Any]]] = {}
                for rate in shape.rates:
                    for seed in range(shape.seeds):
                        run = _write_run(folder, shape, method, task, rank, rate, seed, len(runs))
                        runs.append(run)
                        costs[run["id"]] = _costs(run, len(runs))
                        groups.setdefault(rate, []).append(run)
                rows.append(_row(method, task, rank, groups))
    for row in rows:
        baseline = next(
            r for r in rows if (r["task"], r["budget"], r["method"]) == (row["task"], row["budget"], "lora")
        )
        if row is not baseline:
            row["comparison"] = _compare(row, baseline, runs)
    record = {
        "version": 1,
        "study": {
            "name": "Four ways to spend a budget",
            "axes": {
                "method": list(shape.methods),
                "task": list(shape.tasks),
                "budget": [f"rank {rank}" for rank in shape.ranks],
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
                "description": "For each method the learning rate with the best mean validation accuracy over seeds.",
            },
        },
        "environment": {"python": "3.11.2", "commit": "0123abc", "versions": {"torch": "2.13.0", "peft": "0.21.2"}},
        "runs": runs,
        "table": rows,
        "noise_floor": [
            {"task": t, "model": "bert", "budget": f"rank {r}", "settings": {}, "seeds": shape.seeds, "sd": 0.004, "floor": 0.0102}
            for t in shape.tasks for r in shape.ranks
        ],
        "wins": {
            method: {
                name: sum(r["method"] == method and r["comparison"]["verdict"] == word for r in rows)
                for name, word in (("win", "better"), ("tie", "tie"), ("loss", "worse"))
            }
            for method in shape.methods if method != "lora"
        },
        "notes": ["adalora had one trial more than lora."],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(record, allow_nan=False))
    (folder / "costs.json").write_text(json.dumps(costs))
    return record


def _value(method: str, task: str, rank: int, rate: float, random: Random) -> float:
    ground = {"sst2": 0.88}.get(task, 0.74)
    return round(
        ground + 0.01 * math.log2(rank) + GAINS[method] - (0.01 if rate < 5e-4 else 0) + random.gauss(0, 0.004), 6
    )


def _write_run(
    folder: Path, shape: Shape, method: str, task: str, rank: int, rate: float, seed: int, number: int
) -> dict[str, Any]:
    random = Random(number)
    failed = number % 11 == 7
    names = [f"encoder.layer.{layer}.{kind}" for layer in range(shape.layers) for kind in KINDS]
    slope = {"linear_decay": 1.0}.get(method, 0.0)
    initial = {
        name: max(1, round(rank * (1 + slope * (0.5 - int(name.split(".")[2]) / max(1, shape.layers - 1)))))
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
        "method": method, "task": task, "model": "bert", "budget": f"rank {rank}", "learning_rate": rate, "seed": seed,
        "settings": {"method": method, "task": task, "budget": f"rank {rank}", "learning_rate": rate, "seed": seed},
        "metrics": {} if failed else {"eval_accuracy": value, "eval_test_accuracy": value, "eval_loss": 1 - value},
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
    lines: list[dict[str, Any]] = [{"step": step, "loss": round(loss, 5)} for step, loss in decay[: int(run["steps"])]]  # type: ignore[call-overload]
    lines += [{"step": step, "eval_loss": round(loss + 0.05, 5)} for step, loss in decay[:: max(1, shape.points // 10)]]
    (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if history:
        write(home / "allocations.jsonl", history)
    sizes = {"base": 90_000_000, "adapters": 4 * run["lora_parameters"], "gradients": 4 * run["lora_parameters"]}
    memory = {**sizes, "optimizer": 8 * run["lora_parameters"], "statistics": 0}
    (home / "result.json").write_text(json.dumps({"status": run["status"], "memory": memory}))
    return run


def _history(method: str, initial: dict[str, int], shape: Shape, rank: int, random: Random) -> list[Decision]:
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
            name: Resize(tuple(range(min(pattern[name], after[name]))), max(0, after[name] - pattern[name]))
            for name in pattern if after[name] != pattern[name]
        }  # fmt: skip
        size = COST * sum(after.values())
        parts = {"G": scores, "W": {name: 40 * random.random() for name in scores}} if method == "grad_delta" else {}
        rows.append(
            Decision(
                step=(number + 1) * shape.points // (many + 1), status="changed" if changes else "kept", reason=None,
                budget=COST * rank * len(initial), parameters_before=COST * sum(pattern.values()), parameters_after=size,
                changes=changes, pattern=after, scores=scores, seconds=0.01, parts=parts,
                bytes_after={"adapters": 4 * size, "gradients": 4 * size, "optimizer": 8 * size, "statistics": 0},
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


def _row(method: str, task: str, rank: int, groups: dict[float, list[dict[str, Any]]]) -> dict[str, Any]:
    def values(rate: float) -> list[float]:
        return [run["metrics"]["eval_test_accuracy"] for run in groups[rate] if run["status"] == "ok"]

    rate = max(groups, key=lambda rate: fmean(values(rate) or [0.0]))
    good = [run for run in groups[rate] if run["status"] == "ok"]
    numbers = values(rate)
    mean, sd = fmean(numbers), stdev(numbers) if numbers[1:] else None
    half = student.ppf(0.975, len(numbers) - 1) * sd / len(numbers) ** 0.5 if sd is not None else None
    return {
        "method": method, "task": task, "model": "bert", "budget": f"rank {rank}", "settings": {}, "chosen": {"learning_rate": rate},
        "learning_rate": rate, "trials": len(groups), "runs": [run["id"] for run in good], "seeds": len(good),
        "failed": len(groups[rate]) - len(good), "mean": mean, "sd": sd, "ci95": None if half is None else [mean - half, mean + half],
        "lora_parameters": round(fmean(run["lora_parameters"] for run in good)),
        "parameters_equal": method not in ("adalora", "grad_delta"),
        "note": "2,304 parameters below the baseline's" if method in ("adalora", "grad_delta") else None, "comparison": None,
    }  # fmt: skip


def _compare(row: dict[str, Any], baseline: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    by_id = {run["id"]: run for run in runs}
    pairs = []
    for mine in (by_id[i] for i in row["runs"]):
        for other in (by_id[i] for i in baseline["runs"]):
            if mine["seed"] == other["seed"]:
                pairs.append(mine["metrics"]["eval_test_accuracy"] - other["metrics"]["eval_test_accuracy"])
    keys = ("p_t", "p_bootstrap", "p_wilcoxon", "p_holm")
    if len(pairs) < 2:
        return {
            "pairs": len(pairs),
            "difference": None,
            "ci95": None,
            **dict.fromkeys(keys),
            "noise_floor": None,
            "verdict": None,
        }
    mean, half = fmean(pairs), student.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5
    verdict = "tie" if abs(mean) < half else "better" if mean > 0 else "worse"
    p = 0.02 if verdict != "tie" else 0.6
    return {
        "pairs": len(pairs), "difference": mean, "ci95": [mean - half, mean + half], **dict.fromkeys(keys, p),
        "noise_floor": 0.0102, "verdict": verdict,
    }  # fmt: skip
