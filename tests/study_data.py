"""Studies whose runs are made up in an instant: the same folders, no training. Also what
benchmarks/study_overhead.py runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

from adaptive_lora.errors import DivergedError, InputError
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.study.executors import Executor
from adaptive_lora.study.plan import make_plan, write_plan
from adaptive_lora.study.records import StudyRecord
from adaptive_lora.study.study import run_study, write_results
from adaptive_lora.study.study_file import Study
from adaptive_lora.study.worker import TRAIN, load, work

INSTANT = "study_data:train"  # for --train, with tests/ on the path
TARGETS = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(4) for kind in "qkvo"]
GAIN = {"lora": 0.0, "linear_decay": 0.0, "adalora": 0.05}  # the planted truth
DIVERGES = 1.0  # learning rates from here on


def study(**changes: Any) -> Study:
    """Return a study of 2 methods x 2 learning rates x 3 seeds."""
    values: dict[str, Any] = {
        "name": "made up",
        "base": {
            "model": "nowhere/model",
            "task": "classification",
            "data": {"train": "nowhere.csv", "text": "text", "label": "label"},
        },
        "grid": {
            "method": [{"name": "lora", "rank": 4}, {"name": "adalora", "rank": 4}],
            "training.learning_rate": [1e-3, 1e-4],
            "seed": [0, 1, 2],
        },
        "baseline": "lora",
        "metric": "eval_test_accuracy",
        "select_metric": "eval_accuracy",
    }
    return Study(**{**values, **changes})


def train(config: RunConfig, *, resume: bool = False) -> None:
    """Write the run directory that `config` asks for, its figures drawn from its seed, method and
    learning rate."""
    folder, rate = Path(config.output), config.training["learning_rate"]
    if config.data.train == "refused.csv":
        raise InputError("refused.csv has no column 'text'")
    folder.mkdir(parents=True)
    # JSON is YAML
    (folder / "config.yaml").write_text(
        json.dumps(config.model_dump(mode="json")), encoding="utf-8"
    )
    rank = int(config.method.arguments.get("rank", 4))
    draw = random.Random(f"{config.method} {rate} {config.seed}")
    rows = [{"step": step, "loss": 0.7 / step, "learning_rate": rate} for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    result: dict[str, Any] = {
        "status": "ok",
        "reason": None,
        "method": config.method.name,
        "task": config.task,
        "model": config.model,
        "seed": config.seed,
        "initial_ranks": dict.fromkeys(TARGETS, rank),
        "ranks": dict.fromkeys(TARGETS, rank),
        "lora_parameters": 128 * rank * len(TARGETS),
        "budget_parameters": None,
        "versions": {"torch": "2.13.0"},
        "metrics": {},
    }
    if rate >= DIVERGES:
        result |= {"status": "failed", "reason": f"diverged in {folder}", "step": 3}
    else:
        accuracy = (
            0.7 + GAIN.get(config.method.name, 0.0) - 20 * abs(rate - 1e-3) + draw.gauss(0, 0.005)
        )
        metrics = {
            "eval_accuracy": accuracy,
            "eval_test_accuracy": accuracy - 0.01 + draw.gauss(0, 0.002),
            "eval_runtime": 1.0,
        }
        result |= {"metric": "eval_accuracy", "metrics": metrics, "steps": 10, "train_seconds": 1.5}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if rate >= DIVERGES:
        raise DivergedError(result["reason"], step=3)


def plan_in(folder: Path, made: Study) -> list[str]:
    """Write the plan of a study and return the ids of its runs."""
    plan = make_plan(made)
    write_plan(folder, made, plan)
    return [one["id"] for one in plan]


def finished(folder: Path, made: Study | None = None) -> StudyRecord:
    """Do a whole study in this process, in `folder`, and return its record."""
    plan_in(folder, made or study())
    work(folder, train)
    return write_results(folder)


class Forked(Executor):
    """Workers forked from the test's process, which has torch loaded."""

    def start(self) -> None:
        fork = multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(target=work, args=(self.folder, load(self.train)))
            for _ in range(self.workers)
        ]
        for process in self.processes:
            process.start()

    def living(self, *, finished: int) -> int:
        return sum(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.join()

    def last_words(self) -> str:
        return ""


def in_a_group_of_its_own(made: Study, folder: Path, *, workers: int) -> int:
    """Start a study that really trains, its workers with it in one process group, and return the
    group's number."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            run_study(made, folder, workers=workers, executor=Forked, train=TRAIN)
            code = 0
        finally:
            os._exit(code)
    return child


def progress_of(folder: Path) -> int:
    """Return how many files a study has left so far; what vanishes meanwhile is not counted."""
    return sum(len(files) for _, _, files in os.walk(folder))
