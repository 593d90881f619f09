"""System 1's study, done right: every strategy trains the ranks it computed, and says so from the saved tensors.

    python studies/placement.py                       # DialoGPT-medium and Alpaca from the hub, 180 / 20 records
    python studies/placement.py --model FOLDER --data FILE --targets all-linear --rows 1300 --eval-size 100

Writes one run per strategy, `placement.json` and two figures to the output folder. One seed: a look, not a ranking.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from adaptive_lora.cli import quiet
from adaptive_lora.config import parse
from adaptive_lora.recipe import read_recipe
from adaptive_lora.report import read_run
from adaptive_lora.report.figures import rank_heatmap
from adaptive_lora.report.tables import show
from adaptive_lora.run import run

STRATEGIES = {
    "baseline, rank 16": {"name": "lora", "rank": 16},
    "linear decay": {"name": "linear_decay"},
    "baseline, rank 8": {"name": "lora", "rank": 8},
    "attention heavy": {"name": "attention_heavy"},
    "empirical": {"name": "empirical"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--targets")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--eval-size", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/placement"))
    options = parser.parse_args()
    recipe = read_recipe(Path(__file__).with_suffix(".yaml"))
    for section, key, value in (
        (recipe, "model", options.model),
        (recipe["data"], "train", options.data),
        (recipe["data"], "rows", options.rows),
        (recipe["data"], "eval_size", options.eval_size),
        (recipe["adapters"], "targets", options.targets),
    ):
        if value is not None:
            section[key] = value
    quiet()
    runs = {}
    for title, method in STRATEGIES.items():
        folder = options.output / title.replace(", ", "-").replace(" ", "-")
        run(parse({**recipe, "method": method, "output": str(folder)}))
        runs[title] = read_run(folder)

    table = Table(title="System 1's strategies, ranks as trained (one seed)")
    for column in ("strategy", "LoRA parameters", "ranks", "loss first", "loss last", "perplexity", "steps"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    rows = []
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for title, record in runs.items():
        losses = [(row["step"], row["loss"]) for row in record.metrics if "loss" in row]
        axis.plot(*zip(*losses, strict=True), label=title)
        rows.append(
            {
                "strategy": title,
                "lora_parameters": record.result["lora_parameters"],
                "ranks": sorted(set(record.ranks.values()), reverse=True),
                "first_loss": losses[0][1],
                "last_loss": losses[-1][1],
                "perplexity": record.result["metrics"]["eval_perplexity"],
                "steps": record.result["steps"],
            }
        )
        row = rows[-1]
        spread = f"{row['ranks'][0]}..{row['ranks'][-1]}"
        table.add_row(
            title, f"{row['lora_parameters']:,}", spread, f"{row['first_loss']:.3f}", f"{row['last_loss']:.3f}",
            f"{row['perplexity']:.2f}", str(row["steps"]),
        )  # fmt: skip
    show(table)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss")
    axis.legend()
    figure.savefig(options.output / "loss.png", dpi=130)
    rank_heatmap({title: record.ranks for title, record in runs.items()}, options.output / "ranks.png")
    (options.output / "placement.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
