"""Every task once, on real data: what a small model reaches in minutes, beside the majority class
or the untrained model.

    python studies/tasks.py --encoder FOLDER --causal FOLDER --data FOLDER [--only sst2 cola]

One seed and small samples: this shows that each path works from the files to the metric, not what a
model can reach. `--data` holds the files that tasks.yaml names; without it the presets read the
hub. Writes one run for each task, `tasks.json`, `tasks.md` and `tasks.png` to the output folder; a
finished run is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from adaptive_lora.cli.quiet import quiet
from adaptive_lora.errors import AdaptiveLoraError
from adaptive_lora.files import METRICS_FILE, RESULT_FILE, read_recipe
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.report.read import read_run
from adaptive_lora.report.tables import show
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.data import load_splits

COLUMNS = ("task", "model", "train / eval", "metric", "reference", "trained", "minutes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or hub name"
    )
    parser.add_argument(
        "--causal", required=True, help="folder or hub name of a causal language model"
    )
    parser.add_argument("--data", type=Path, help="folder with the files that tasks.yaml names")
    parser.add_argument("--only", nargs="+", help="names in tasks.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/tasks"))
    options = parser.parse_args()
    study = read_recipe(Path(__file__).with_suffix(".yaml"))
    quiet()
    rows = []
    try:
        for name, recipe in study["runs"].items():
            if options.only and name not in options.only:
                continue
            config = configure(recipe, study["common"], options, options.output / name)
            if not (Path(config.output) / RESULT_FILE).is_file():
                print(f"\n=== {name}", flush=True)
                run(config)
            rows += figures(name, config)
            write(rows, options.output)
    except AdaptiveLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    show(table(rows))


def configure(
    recipe: dict[str, Any], common: dict[str, Any], options: argparse.Namespace, output: Path
) -> RunConfig:
    """Return the run's configuration: the study's defaults, the task's recipe, and where models and
    files are."""
    recipe = dict(recipe)
    files = recipe.pop("files")
    data = dict(recipe.get("data", {}))
    if options.data is not None:
        data |= {key: str(options.data / file) for key, file in files.items()}
    return parse(
        {
            **common,
            **recipe,
            "model": getattr(options, recipe["model"]),
            "data": data,
            "training": {**common["training"], **recipe.get("training", {})},
            "output": str(output),
        }
    )


def figures(name: str, config: RunConfig) -> list[dict[str, Any]]:
    """Return a row for each metric worth reporting, all read from the run's files."""
    folder = Path(config.output)
    result = read_run(folder).result
    log = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    before: dict[str, Any] = next(
        (row for row in log if row["step"] == 0 and "eval_loss" in row), {}
    )
    splits = load_splits(config.data)
    counts = {"train": len(splits.train.records), "eval": len(splits.eval.records)}
    majority = None
    if config.task == "classification":
        labels = Counter(splits.eval.records[result["data"]["label"]])
        majority = max(labels.values()) / counts["eval"]
    wanted = {
        "classification": ["accuracy", *(["matthews"] if config.metric == "matthews" else [])],
        "question_answering": ["exact_match", "f1"],
        "causal_lm": ["token_loss", "perplexity", "bits_per_byte"],
        "summarization": ["rouge1", "rouge2", "rougeL", "rougeLsum", "bits_per_byte"],
    }[config.task]
    return [
        {
            "task": name,
            "model": Path(config.model).name
            if config.task in ("causal_lm", "summarization")
            else "MiniLM-L6",
            **counts,
            "metric": metric,
            "reference": (majority if metric == "accuracy" else 0.0)
            if majority
            else before.get(f"eval_{metric}"),
            "reference_is": "majority class" if majority else "before training",
            "trained": result["metrics"][f"eval_{metric}"],
            "half_width": half_width(result["metrics"][f"eval_{metric}"], counts["eval"])
            if metric == "accuracy"
            else None,
            "minutes": result["train_seconds"] / 60,
        }
        for metric in wanted
    ]


def half_width(p: float, n: int) -> float:
    """Return half the 95 % interval of a proportion."""
    return 1.96 * math.sqrt(p * (1 - p) / n)


def cells(row: dict[str, Any]) -> list[str]:
    reference = "-" if row["reference"] is None else f"{row['reference']:.3f}"
    trained = f"{row['trained']:.3f}" + (f" ± {row['half_width']:.3f}" if row["half_width"] else "")
    return [
        row["task"], row["model"], f"{row['train']:,} / {row['eval']:,}", row["metric"],
        reference, trained,
        f"{row['minutes']:.1f}",
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        title="reference: majority class, or before training; one seed, 95 % interval of a "
        "proportion"
    )
    for column in COLUMNS:
        made.add_column(column)
    for row in rows:
        made.add_row(*cells(row))
    return made


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    (folder / "tasks.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = [
        "| " + " | ".join(line) + " |"
        for line in [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    ]
    (folder / "tasks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, folder / "tasks.png")


PANELS = {
    "accuracy, %": (100.0, ["accuracy"]),
    "exact match and F1, %": (1.0, ["exact_match", "f1"]),
    "ROUGE, %": (1.0, ["rouge1", "rouge2", "rougeLsum"]),
    "bits per byte": (1.0, ["bits_per_byte"]),
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each kind of metric: the reference beside what training made of it."""
    panels = {t: (k, [r for r in rows if r["metric"] in m]) for t, (k, m) in PANELS.items()}
    panels = {title: (k, found) for title, (k, found) in panels.items() if found}
    widths = [len(found) for _, found in panels.values()]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.2 + 0.95 * sum(widths), 3.6),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, (factor, found)) in zip(axes[0], panels.items(), strict=True):
        several = title != "accuracy, %" and title != "bits per byte"
        names = [
            r["metric"].replace("_", " ") if several else r["task"].replace("_", "\n")
            for r in found
        ]
        references = [factor * (r["reference"] or 0.0) for r in found]
        trained = [factor * r["trained"] for r in found]
        # no interval where none is known
        errors = [factor * r["half_width"] for r in found if r["half_width"]] or None
        place = range(len(found))
        axis.bar(
            [i - 0.2 for i in place],
            references,
            0.38,
            color="#b8b8b8",
            label="majority class / untrained",
        )
        axis.bar(
            [i + 0.2 for i in place],
            trained,
            0.38,
            yerr=errors,
            capsize=3,
            color="#2a6f97",
            label="trained",
        )
        axis.set_xticks(list(place), names, fontsize=8)
        suffix = f"\n{found[0]['task'].replace('_', ' ')}" if several else ""
        axis.set_title(title + suffix, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(
        frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, -0.36), ncols=2
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
