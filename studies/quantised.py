"""The published methods on a 4-bit base, beside float32: accuracy, bytes, step time, peak.

    python studies/quantised.py --model MINILM --data SST2-TRAIN --eval SST2-DEV --seeds 0 --output
    runs/quantised

The settings of studies/methods.yaml. Each training is a process of its own, so that its peak is its
own; finished ones are kept. Step times are those of one method on either base, taken in turns in
one process. Writes studies/quantised.json and docs/quantised.png. Expected: accuracies within the
noise of a seed, 1.05 to 1.2 times the step time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

import adaptive_lora as al
from adaptive_lora.files import read_recipe
from adaptive_lora.recipe.config import parse
from adaptive_lora.report.memory import memory_bars, parts_of
from adaptive_lora.report.tables import show
from adaptive_lora.runs.loading import load_model, load_task
from adaptive_lora.runs.plan import plan
from adaptive_lora.tasks.data import load_splits

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "grad_delta": {"name": "grad_delta", "rank": 8, "min_rank": 2, "max_rank": 16},
    "adalora": {"name": "adalora", "rank": 8},
    "plateau": {"name": "plateau", "rank": 8, "initial_rank": 2, "max_rank": 8, "threshold": 0.05},
}
ARMS = [("none", "lora"), *(("nf4", name) for name in METHODS)]


def recipe(options: argparse.Namespace, scheme: str, method: str, seed: int) -> dict[str, Any]:
    """Return one training's recipe."""
    values = read_recipe(HERE / "methods.yaml")
    data = {
        key: value for key, value in values["data"].items() if key not in ("config", "eval_split")
    }
    values["data"] = {**data, "train": options.data, "eval": options.eval}
    if method != "plateau":  # which alone looks at evaluations
        values["training"] = {k: v for k, v in values["training"].items() if k != "eval_steps"} | {
            "eval_strategy": "no"
        }
    output = str(options.output / f"{scheme}-{method}-{seed}")
    return {
        **values, "model": options.model, "method": METHODS[method], "quantization": scheme,
        "seed": seed, "output": output
    }  # fmt: skip


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Run one training in a process of its own unless it is there, and return its result."""
    result = Path(values["output"]) / "result.json"
    if not result.is_file():
        Path(values["output"]).parent.mkdir(parents=True, exist_ok=True)
        file = Path(f"{values['output']}.json")
        file.write_text(json.dumps(values), encoding="utf-8")
        command = [sys.executable, "-m", "adaptive_lora.cli", "train", "--config", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def step_ratios(options: argparse.Namespace, name: str, steps: int = 4) -> list[float]:
    """Return the step time of a method on a 4-bit base over that on float32, once a pair, in
    alternating order."""
    arms = {}
    for scheme in ("none", "nf4"):
        config = parse(recipe(options, scheme, name, 0))
        task = load_task(config)
        task.learn(load_splits(config.data).train)
        set_seed(0)
        method = al.methods.build(config.method.name, config.method.arguments)
        model = al.attach(load_model(config, task)[0], method, config.adapters.targets).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        # So many steps to come that ranks stay as they start, and both arms do the same work.
        controller = (
            al.RankController(model, optimizer, method, total_steps=10**6)
            if method.adaptation
            else None
        )
        arms[scheme] = model, optimizer, controller
    batch = {
        "input_ids": torch.randint(1000, 20000, (32, 32)),
        "labels": torch.randint(0, 2, (32,)),
    }

    def seconds(scheme: str) -> float:
        model, optimizer, controller = arms[scheme]
        started = time.perf_counter()
        for _ in range(steps):
            model(**batch).loss.backward()
            if controller is not None:
                controller.observe()
            optimizer.step()
            optimizer.zero_grad()
            if controller is not None:
                controller.step()
        return time.perf_counter() - started

    for scheme in arms:
        seconds(scheme)
    ratios = []
    for pair in range(options.pairs):
        times = {scheme: seconds(scheme) for scheme in list(arms)[:: 1 if pair % 2 else -1]}
        ratios.append(times["nf4"] / times["none"])
    return ratios


def main() -> None:
    """Train what is missing, time the steps, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--model", "--data", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quantised"))
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    for scheme, method in ARMS:
        results = [train(recipe(options, scheme, method, seed)) for seed in options.seeds]
        first = results[0]
        rows.append(
            {
                "base": "float32" if scheme == "none" else scheme,
                "method": method,
                "accuracy": [result["metrics"]["eval_accuracy"] for result in results],
                "lora_parameters": first["lora_parameters"],
                "memory": parts_of(first["memory"]),
                "planned_peak": max(
                    stage.peak
                    for stage in plan(
                        parse(recipe(options, scheme, method, 0)), device="cpu"
                    ).stages
                ),
                "growth_at_peak": max(
                    r["peak_memory_bytes"] - r["process_memory_before_bytes"] for r in results
                ),
                "train_seconds": [result["train_seconds"] for result in results],
            }
        )
    for row in (row for row in rows if row["base"] != "float32"):
        low, median, high = statistics.quantiles(step_ratios(options, row["method"]), n=4)
        row["step_time_ratio"] = {
            "median": median,
            "quartiles": [low, high],
            "pairs": options.pairs,
        }
    found = {"seeds": options.seeds, "torch": torch.__version__, "rows": rows}
    (HERE / "quantised.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table(title="SST-2, 3,000 training rows, 872 evaluation records")
    for name in (
        "base",
        "method",
        "accuracy %",
        "LoRA params",
        "base MB",
        "plan MB",
        "peak MB",
        "step time",
    ):
        table.add_column(name, justify="left" if name in ("base", "method") else "right")
    for row in rows:
        accuracy = ", ".join(f"{100 * value:.2f}" for value in row["accuracy"])
        peaks = (f"{row[key] / 1e6:,.0f}" for key in ("planned_peak", "growth_at_peak"))
        sizes = (f"{row['memory']['base'] / 1e6:.1f}", *peaks)
        ratio = row.get("step_time_ratio")
        steps = "1" if ratio is None else f"{ratio['median']:.2f}"
        table.add_row(
            row["base"], row["method"], accuracy, f"{row['lora_parameters']:,}", *sizes, steps
        )
    show(table)
    print(
        "plan: the tensors at their peak, batches of 64 tokens; peak: the growth of the process, "
        "with what glibc keeps"
    )
    print("step time: of the same method, over that on float32; median of pairs")
    memory_bars(
        {f"{row['base']}, {row['method']}": row["memory"] for row in rows},
        HERE.parent / "docs" / "quantised.png",
    )


if __name__ == "__main__":
    main()
