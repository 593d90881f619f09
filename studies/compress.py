"""What compression costs: a trained adapter cut to 1/2 ... 1/16 of its parameters, three ways, over
seeds.

    python studies/compress.py                       # MiniLM and SST-2 from the hub, rank 32, seeds
    0 1 2 python studies/compress.py --model FOLDER --data FILE --eval FILE --text sentence --label
    label

At each size: `adaptive_lora.compress` (one budget over all layers), PEFT's `save_as_lora` (the same
rank for every layer, dense SVD), and training at that rank from the start. Settings of
`methods.yaml`, without evaluations on the way. Writes `compress.json`, `compress.md` and
`compress.png` to the output folder. Started again it goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FuncFormatter
from peft import save_as_lora
from rich.markup import escape
from rich.table import Table
from scipy.stats import t as student

import adaptive_lora as al
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.errors import InputError
from adaptive_lora.files import CONFIG_FILE, RESULT_FILE, read_recipe
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.report.tables import show
from adaptive_lora.runs import use
from adaptive_lora.runs.run import run

GLOBAL, PER_LAYER, TRAINED = "compress", "PEFT per layer", "trained at that rank"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "eval", "text", "label"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter that is compressed")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[16, 8, 4, 2], help="sizes: these uniform ranks"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/compress"))
    options = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already")
    recipe = recipe_of(options)
    rows: list[Row] = []
    # seeds outside: when cut off, the pairs so far are whole
    for seed in dict.fromkeys(options.seeds):
        full = trained(recipe, options.rank, seed, options.output)
        rows += cached(options.output / f"cut-{seed}.json", lambda: cuts(full, seed, options))  # noqa: B023
        for rank in options.ranks:
            rows.append(measured(trained(recipe, rank, seed, options.output), TRAINED, seed, rank))
            print(line(rows[-1]), flush=True)
    settings = {
        "rank": options.rank,
        **{key: recipe["data"].get(key) for key in ("rows", "max_length")},
        "targets": recipe["adapters"]["targets"],
        "scale": recipe["adapters"]["scale"],
        "training": recipe["training"],
    }
    text = json.dumps({"settings": settings, "rows": rows}, indent=2, allow_nan=False)
    (options.output / "compress.json").write_text(text + "\n", encoding="utf-8")
    columns, cells, notes = table(rows)
    shown = Table(title="Accuracy, %", caption=escape("\n".join(notes)), caption_justify="left")
    for column in columns:
        shown.add_column(escape(column), justify="right")
    for row in cells:
        shown.add_row(*map(escape, row))
    show(shown)
    body = [columns, ["---:"] * len(columns), *cells]
    markdown = (
        "\n".join("| " + " | ".join(row) + " |" for row in body) + "\n\n" + "\n".join(notes) + "\n"
    )
    (options.output / "compress.md").write_text(markdown, encoding="utf-8")
    draw(rows, options.output / "compress.png")
    print(f"{options.output}: compress.json, compress.md, compress.png")


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of `methods.yaml` without evaluations during training, with what the
    command line says."""
    recipe = read_recipe(Path(__file__).with_name("methods.yaml"))
    training = {key: value for key, value in recipe["training"].items() if key != "eval_steps"}
    recipe["training"] = {**training, "eval_strategy": "no"}
    if options.data is not None:  # a file has no splits
        recipe["data"] = {
            k: v for k, v in recipe["data"].items() if k not in ("config", "eval_split")
        }
    given = {
        "train": options.data,
        "eval": options.eval,
        "text": options.text,
        "label": options.label,
    }
    recipe["data"] |= {key: value for key, value in given.items() if value is not None}
    return recipe | ({"model": options.model} if options.model else {})


def trained(recipe: dict[str, Any], rank: int, seed: int, output: Path) -> Path:
    """Return the run of uniform LoRA at `rank`, after training it unless its result is there.

    Raises `InputError` when a run with other settings is there.
    """
    folder = output / f"lora-r{rank}-{seed}"
    config: RunConfig = parse(
        {**recipe, "method": {"name": "lora", "rank": rank}, "seed": seed, "output": str(folder)}
    )
    begun = (folder / CONFIG_FILE).is_file()
    if begun and parse(read_recipe(folder / CONFIG_FILE)) != config:
        raise InputError(
            f"{folder} holds a run with other settings; choose another --output, or remove it"
        )
    if not (folder / RESULT_FILE).is_file():
        output.mkdir(parents=True, exist_ok=True)
        with (
            (output / f"{folder.name}.log").open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
        ):
            run(config, resume=begun)
    return folder


def cached(path: Path, make: Any) -> list[Row]:
    """Return the rows in `path`, after making them unless they are there."""
    if not path.is_file():
        path.write_text(json.dumps(make(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return list(json.loads(path.read_text(encoding="utf-8")))


def cuts(full: Path, seed: int, options: argparse.Namespace) -> list[Row]:
    """Return the figures of the whole adapter, and of what either way of cutting leaves of it at
    every size."""
    rows = [measured(full, "whole", seed, options.rank)]
    print(line(rows[-1]), flush=True)
    for rank in options.ranks:
        ours, theirs = (
            options.output / f"{kind}-r{rank}-{seed}" for kind in ("global", "per-layer")
        )
        started = time.perf_counter()
        done = (
            al.compress(full, rank=rank)
            if ours.exists()
            else al.compress(full, rank=rank, output=ours)
        )
        rows.append(
            measured(
                full,
                GLOBAL,
                seed,
                rank,
                ours,
                energy=done.energy,
                seconds=time.perf_counter() - started,
            )
        )
        rows[-1]["ranks"] = [min(done.after.values()), max(done.after.values())]
        print(line(rows[-1]), flush=True)
        model = use.open_run(full).model
        started = time.perf_counter()
        save_as_lora(theirs, model, rank)
        seconds = time.perf_counter() - started
        whole = math.fsum(value**2 for values in done.spectra.values() for value in values)
        kept = math.fsum(value**2 for values in done.spectra.values() for value in values[:rank])
        rows.append(
            measured(full, PER_LAYER, seed, rank, theirs, energy=kept / whole, seconds=seconds)
        )
        print(line(rows[-1]), flush=True)
    return rows


def measured(
    folder: Path, kind: str, seed: int, rank: int, adapter: Path | None = None, **more: Any
) -> Row:
    """Return the figures of a run's adapter, or of another adapter on its evaluation records."""
    if adapter is None:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        found, parameters = result["metrics"], result["lora_parameters"]
        return row_of(kind, seed, rank, parameters, found, **more)
    opened = use.open_run(folder, adapter=adapter)
    with torch.random.fork_rng():
        found = use.evaluate(opened)
    return row_of(kind, seed, rank, al.lora_parameters(opened.model), found, **more)


def row_of(
    kind: str, seed: int, rank: int, parameters: int, metrics: dict[str, float], **more: Any
) -> Row:
    """Return one row of the result."""
    facts = {"kind": kind, "seed": seed, "rank": rank, "parameters": parameters}
    return {
        **facts,
        "accuracy": metrics["eval_accuracy"],
        "eval_loss": metrics["eval_loss"],
        **more,
    }


def line(row: Row) -> str:
    """Return a row as a line of progress."""
    kept = f", {100 * row['energy']:.2f} % of the energy" if "energy" in row else ""
    return (
        f"seed {row['seed']} {row['kind']}, rank {row['rank']}: {row['parameters']:,} parameters, "
        "accuracy "
        f"{100 * row['accuracy']:.2f} %, loss {row['eval_loss']:.4f}{kept}"
    )


def pick(rows: Sequence[Row], kind: str, rank: int, key: str = "accuracy") -> dict[int, float]:
    """Return {seed: value}."""
    return {row["seed"]: row[key] for row in rows if row["kind"] == kind and row["rank"] == rank}


def interval(differences: Sequence[float]) -> str:
    """Return the mean of paired differences and its 95 % interval (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = (
        student.ppf(0.975, len(differences) - 1)
        * statistics.stdev(differences)
        / math.sqrt(len(differences))
    )
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return (columns, cells, notes): one row a size, means over seeds, differences paired by
    seed."""
    columns = ["parameters", GLOBAL, PER_LAYER, TRAINED, "compress - PEFT", "compress - whole"]
    whole_rank = next(row["rank"] for row in rows if row["kind"] == "whole")
    whole = pick(rows, "whole", whole_rank)

    def mean(values: dict[int, float], digits: int = 2, factor: float = 100) -> str:
        return f"{factor * statistics.fmean(values.values()):.{digits}f}" if values else "-"

    def gap(one: dict[int, float], two: dict[int, float]) -> str:
        pairs = [100 * (one[seed] - two[seed]) for seed in one if seed in two]
        return interval(pairs) if pairs else "-"

    smaller = sorted({row["rank"] for row in rows} - {whole_rank})
    count = next(row["parameters"] for row in rows if row["kind"] == "whole")
    cells = [[f"{count:,} (whole)", mean(whole), mean(whole), mean(whole), "-", "-"]]
    for rank in reversed(smaller):
        ours, theirs = pick(rows, GLOBAL, rank), pick(rows, PER_LAYER, rank)
        size = next(row["parameters"] for row in rows if row["rank"] == rank)
        start = mean(pick(rows, TRAINED, rank))
        cells.append(
            [f"{size:,}", mean(ours), mean(theirs), start, gap(ours, theirs), gap(ours, whole)]
        )
    loss = {
        rank: [pick(rows, kind, rank, "eval_loss") for kind in (GLOBAL, PER_LAYER)]
        for rank in smaller
    }
    losses = "; ".join(
        f"rank {rank} {mean(ours, 4, 1)} / {mean(theirs, 4, 1)}"
        for rank, (ours, theirs) in loss.items()
    )
    notes = [
        f"Means over {len(whole)} seed(s); differences paired by seed with 95 % intervals "
        "(Student's t), in points.",
        f"Evaluation loss, compress / PEFT: {losses}; whole "
        f"{mean(pick(rows, 'whole', whole_rank, 'eval_loss'), 4, 1)}.",
    ]
    return columns, cells, notes


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy and evaluation loss over the parameters: means as lines, seeds as points."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ranks = sorted({row["rank"] for row in rows})
    whole_rank = next(row["rank"] for row in rows if row["kind"] == "whole")
    sizes = {row["rank"]: row["parameters"] for row in rows if row["kind"] != GLOBAL}
    styles = ((GLOBAL, "#1f4e79", "o-"), (PER_LAYER, "#c0392b", "s--"), (TRAINED, "#f0a860", "^:"))
    for axis, key, label, factor in (
        (axes[0], "accuracy", "accuracy, %", 100),
        (axes[1], "eval_loss", "loss", 1),
    ):
        for shift, (kind, colour, style) in enumerate(styles):
            points = {r: pick(rows, "whole" if r == whole_rank else kind, r, key) for r in ranks}
            points = {rank: values for rank, values in points.items() if values}
            means = [factor * statistics.fmean(values.values()) for values in points.values()]
            axis.plot([sizes[rank] for rank in points], means, style, color=colour, label=kind)
            for rank, values in points.items():
                place = [sizes[rank] * 1.06 ** (shift - 1)] * len(values)
                axis.plot(
                    place,
                    [factor * v for v in values.values()],
                    ".",
                    color=colour,
                    alpha=0.45,
                    markersize=5,
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(sizes.values()))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.set_xlabel("LoRA parameters")
        axis.set_ylabel(f"evaluation {label}")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8, loc="lower right")
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"A rank-{whole_rank} adapter cut down, and trained small ({seeds} seed(s))",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
