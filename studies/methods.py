"""Methods at one final budget, over seeds: uniform LoRA and four that change ranks while the model
trains.

    python studies/methods.py                         # MiniLM and SST-2 from the hub, rank 8, seeds
    0 1 2 python studies/methods.py --model FOLDER --data FILE --eval FILE --text sentence --label
    label --seeds 0 1 2 3 4

Writes one run and one log per method and seed, `methods.json`, `methods.md` and `methods.png` to
the output folder. Started again with the same arguments it goes on where it was cut off: a finished
run is read, not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.markup import escape
from rich.table import Table
from scipy.stats import t as student
from transformers import AutoConfig, AutoModelForSequenceClassification

from adaptive_lora.cli.quiet import quiet
from adaptive_lora.errors import AdaptiveLoraError, InputError
from adaptive_lora.files import CONFIG_FILE, RESULT_FILE, read_recipe
from adaptive_lora.hub import locate_model
from adaptive_lora.model.targets import find_targets
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.report import read_run
from adaptive_lora.report.tables import show
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.data import load_splits

BASELINE = "lora"
RATES = {"peft_adalora-10x": 10.0}  # times the learning rate of the others
COLUMNS = (
    "method",
    "parameters, start → end",
    "accuracy %",
    "min..max, sd",
    f"difference to {BASELINE}",
)


def recipes(rank: int) -> dict[str, dict[str, Any]]:
    """Return the recipe of each arm, all of which may end with the parameters of uniform rank
    `rank`."""
    return {
        BASELINE: {"name": BASELINE, "rank": rank},
        "grad_delta": {
            "name": "grad_delta",
            "rank": rank,
            "min_rank": min(2, rank),
            "max_rank": 2 * rank,
        },
        "adalora": {"name": "adalora", "rank": rank},
        "peft_adalora": {"name": "peft_adalora", "rank": rank},
        # Gates that start at 0 between factors of size 0.02 are slow: at the rate of LoRA it has
        # hardly begun to learn.
        "peft_adalora-10x": {"name": "peft_adalora", "rank": rank},
        # With a threshold of 0 the loss of this training stalls once, and half of the budget stays
        # unspent.
        "plateau": {
            "name": "plateau",
            "rank": rank,
            "initial_rank": min(2, rank),
            "max_rank": rank,
            "threshold": 0.05,
        },
    }


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run. Ranks and parameters are those of the tensors; what a failed run does not have is
    None."""

    method: str  # the name of the arm
    seed: int
    status: str
    reason: str | None = None
    accuracy: float | None = None
    eval_loss: float | None = None
    parameters_start: int | None = None
    parameters_end: int | None = None
    rank_min: int | None = None
    rank_max: int | None = None
    steps: int | None = None
    parameters_untrained: int | None = None  # added by the evaluation after the last optimizer step
    seconds: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a local model folder, or a name on the hub")
    parser.add_argument("--data", help="training file")
    parser.add_argument(
        "--eval", help="evaluation file; with --data and without this, a seeded 10 %% cut"
    )
    parser.add_argument("--text", help="text column")
    parser.add_argument("--label", help="label column")
    parser.add_argument(
        "--targets", help="regular expression over full module names; all targets of one shape"
    )
    parser.add_argument("--rows", type=int, help="training records, the same in every run (3000)")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--learning-rate", type=float, help="the same for every method (0.001)")
    parser.add_argument(
        "--rank", type=int, default=8, help="the budget: the parameters of this uniform rank"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(recipes(8)), default=list(recipes(8)))
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    recipe = read_recipe(Path(__file__).with_suffix(".yaml"))
    # a file has no splits: without --eval the records must be cut, not used twice
    if options.data is not None:
        recipe["data"] = {
            k: v for k, v in recipe["data"].items() if k not in ("config", "eval_split")
        }
    for section, key, value in (
        (recipe, "model", options.model),
        (recipe["data"], "train", options.data),
        (recipe["data"], "eval", options.eval),
        (recipe["data"], "text", options.text),
        (recipe["data"], "label", options.label),
        (recipe["data"], "rows", options.rows),
        (recipe["adapters"], "targets", options.targets),
        (recipe["training"], "num_train_epochs", options.epochs),
        (recipe["training"], "learning_rate", options.learning_rate),
    ):
        if value is not None:
            section[key] = value
    quiet()
    names = [name for name in recipes(options.rank) if name in options.methods]
    arms = [
        (name, configure(name, seed, recipe, options))
        for seed in dict.fromkeys(
            options.seeds
        )  # seeds outside: when cut off, the pairs so far are whole
        for name in names
    ]
    first = arms[0][1]
    costs = equal_costs(first)
    n_eval = len(load_splits(first.data)[1])
    runs = []
    for number, (name, config) in enumerate(arms, start=1):
        runs.append(train_or_read(name, config, costs))
        print(f"[{number:>{len(str(len(arms)))}}/{len(arms)}] {line(runs[-1])}", flush=True)

    budget = options.rank * sum(costs.values())
    title = f"Final budget {budget:,} LoRA parameters (rank {options.rank} on {len(costs)} targets)"
    notes = [
        f"{n_eval:,} evaluation records, so one is {100 / n_eval:.2f} points; the model at the "
        "end, no checkpoint chosen.",
        "sd: standard deviation over seeds. Difference: mean over seeds, run with run of the same "
        "seed, and its 95 % "
        "interval (Student's t); no correction for several methods.",
        f"Learning rate {recipe['training']['learning_rate']:g}, ten times that in arms named 10x; "
        "tuned for none. The "
        "training records are the same for all.",
        *(
            ["plateau watches the loss of the records it is measured on."]
            if "plateau" in names
            else []
        ),
        *remarks(runs, budget),
    ]
    cells = rows(runs)
    table = Table(title=escape(title), caption=escape("\n".join(notes)), caption_justify="left")
    for column in COLUMNS:
        table.add_column(escape(column), justify="left" if column == "method" else "right")
    for row in cells:
        table.add_row(*map(escape, row))
    show(table)
    (options.output / "methods.md").write_text(markdown(title, cells, notes), encoding="utf-8")
    settings = {
        "budget_parameters": budget,
        "targets": first.adapters.targets,
        "n_targets": len(costs),
        "rows": first.data.rows,
        "eval_records": n_eval,
        "max_length": first.data.max_length,
        "scale": first.adapters.scale,
        "training": recipe["training"],
        "rates": RATES,
        "methods": {m: recipes(options.rank)[m] for m in names},
    }
    text = json.dumps(
        {"settings": settings, "runs": [asdict(one) for one in runs]}, indent=2, allow_nan=False
    )
    (options.output / "methods.json").write_text(text + "\n", encoding="utf-8")
    draw(runs, options.output / "methods.png", title=title)
    print(f"{options.output}: methods.json, methods.md, methods.png")


def configure(
    name: str, seed: int, recipe: dict[str, Any], options: argparse.Namespace
) -> RunConfig:
    """Return the configuration of one run."""
    rate = recipe["training"]["learning_rate"] * RATES.get(name, 1.0)
    training = {**recipe["training"], "learning_rate": rate}
    method, folder = recipes(options.rank)[name], options.output / f"{name}-{seed}"
    return parse(
        {**recipe, "method": method, "training": training, "seed": seed, "output": str(folder)}
    )


def equal_costs(config: RunConfig) -> dict[str, int]:
    """Return {target: parameters of one component}. Raises `InputError` unless they all cost the
    same."""
    local = locate_model(config.model)
    model_config = AutoConfig.from_pretrained(config.model, local_files_only=local)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(model_config)
    costs = {target.name: target.cost for target in find_targets(model, config.adapters.targets)}
    if len(set(costs.values())) > 1:
        raise InputError(
            f"the targets cost {sorted(set(costs.values()))} parameters a component; expected one "
            "cost, because PEFT's "
            "AdaLoRA counts components and would end at another budget. Choose targets of one "
            "shape: --targets"
        )
    return costs


def train_or_read(name: str, config: RunConfig, costs: dict[str, int]) -> Figures:
    """Return the figures of the run in `config.output`, after training it unless its result is
    there.

    Raises `InputError` when a run with other settings is there.
    """
    folder = Path(config.output)
    begun = (folder / CONFIG_FILE).is_file()
    if (
        begun
        and parse(read_recipe(folder / CONFIG_FILE)).model_copy(update={"output": config.output})
        != config
    ):
        raise InputError(
            f"{folder} holds a run with other settings; choose another --output, or remove it"
        )
    error: AdaptiveLoraError | None = None
    # a failed run is a result too; remove its folder to try again
    if not (folder / RESULT_FILE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            (folder.parent / f"{folder.name}.log").open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
        ):
            try:
                run(config, resume=begun)
            except AdaptiveLoraError as caught:
                error = caught
    if not (folder / RESULT_FILE).is_file():
        return Figures(method=name, seed=config.seed, status="failed", reason=str(error))
    record = read_run(folder)
    metrics, ranks = record.result["metrics"], record.ranks.values()
    return Figures(
        method=name,
        seed=config.seed,
        status="failed" if error else record.result["status"],
        reason=str(error) if error else None,
        accuracy=metrics.get("eval_accuracy"),
        eval_loss=metrics.get("eval_loss"),
        parameters_start=sum(rank * costs[name] for name, rank in record.initial_ranks.items()),
        parameters_end=record.result["lora_parameters"],
        rank_min=min(ranks),
        rank_max=max(ranks),
        steps=record.result.get("steps"),
        parameters_untrained=sum(
            max(0, row.parameters_after - row.parameters_before)
            for row in record.history
            if row.step == record.result.get("steps")
        ),
        seconds=record.result.get("train_seconds"),
    )


def line(one: Figures) -> str:
    """Return the run in one line."""
    if one.status != "ok":
        return f"{one.method} seed {one.seed}: failed: {one.reason}"
    return (
        f"{one.method} seed {one.seed}: accuracy {100 * one.accuracy:.2f} %, "
        f"{one.parameters_start:,} → {one.parameters_end:,} parameters, ranks "
        f"{one.rank_min}..{one.rank_max}, "
        f"{one.seconds:.0f} s"
    )


def paired_interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Return (mean, half width) of the interval d̄ ± t(1 − (1 − level) / 2, n − 1) · s / √n; n is
    at least 2."""
    n = len(differences)
    half = student.ppf((1 + level) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.fmean(differences), float(half)


def rows(runs: Sequence[Figures]) -> list[list[str]]:
    """Return the cells of the table, one row for each method in `runs`, failed runs counted and
    shown."""
    table = []
    baseline = {
        one.seed: one.accuracy for one in runs if one.method == BASELINE and one.status == "ok"
    }
    for method in dict.fromkeys(one.method for one in runs):
        mine = [one for one in runs if one.method == method]
        done = [one for one in mine if one.status == "ok"]
        points = [100 * one.accuracy for one in done]
        n_failed = len(mine) - len(done)
        if not done:
            table.append([method, "-", f"failed, {n_failed} of {len(mine)}", "-", "-"])
            continue
        failed = f" ({n_failed} of {len(mine)} failed)" if n_failed else ""
        sd = f"{statistics.stdev(points):.2f}" if len(points) > 1 else "-"
        pairs = [100 * (one.accuracy - baseline[one.seed]) for one in done if one.seed in baseline]
        difference = "-"
        if method != BASELINE and pairs:
            difference = f"{statistics.fmean(pairs):+.2f} (one pair)"
        if method != BASELINE and len(pairs) > 1:
            mean, half = paired_interval(pairs)
            difference = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        table.append(
            [
                method,
                f"{_span(one.parameters_start for one in done)} → "
                f"{_span(one.parameters_end for one in done)}",
                f"{statistics.fmean(points):.2f}{failed}",
                f"{min(points):.2f}..{max(points):.2f}, {sd}",
                difference,
            ]
        )
    return table


def _span(counts: Iterable[int]) -> str:
    values = sorted(set(counts))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}..{values[-1]:,}"


def remarks(runs: Sequence[Figures], budget: int) -> list[str]:
    """Return a sentence for each method that did not end at the budget, and for each failed run."""
    notes = []
    for method in dict.fromkeys(one.method for one in runs):
        done = [one for one in runs if one.method == method and one.status == "ok"]
        off = [one for one in done if one.parameters_end != budget]
        if off:
            notes.append(f"{method} did not end at the budget in {len(off)} of {len(done)} runs.")
        untrained = [one.parameters_untrained for one in done if one.parameters_untrained]
        if untrained:
            notes.append(
                f"{method} grew once more after its last step in {len(untrained)} of {len(done)} "
                f"runs: {_span(untrained)} of "
                "the parameters at its end were never trained."
            )
    return notes + [
        f"{one.method} seed {one.seed} failed: {one.reason}" for one in runs if one.status != "ok"
    ]


def markdown(title: str, cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the table and its notes as Markdown."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *cells]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    return f"{title}\n\n{table}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def draw(runs: Sequence[Figures], path: Path, *, title: str) -> None:
    """Draw every run's accuracy as a dot, in a column for each method, and each mean as a line; a
    colour for each seed."""
    methods, seeds = (
        list(dict.fromkeys(getattr(one, key) for one in runs)) for key in ("method", "seed")
    )
    colours = matplotlib.colormaps["viridis"].resampled(len(seeds) + 1)
    figure, axis = plt.subplots(
        figsize=(max(6.0, 1.8 + 1.3 * len(methods)), 4), layout="constrained"
    )
    labels = []
    for x, method in enumerate(methods):
        mine = [one for one in runs if one.method == method]
        done = [one for one in mine if one.status == "ok"]
        for one in done:
            place = seeds.index(one.seed)
            # equal accuracies hide one another
            shift = 0.4 * place / (len(seeds) - 1) - 0.2 if len(seeds) > 1 else 0.0
            axis.plot(x + shift, 100 * one.accuracy, "o", color=colours(place), markersize=7)
        if done:
            mean = statistics.fmean(100 * one.accuracy for one in done)
            axis.hlines(mean, x - 0.32, x + 0.32, color="#222222", linewidth=1.6)
        labels.append(
            method if len(done) == len(mine) else f"{method}\n({len(mine) - len(done)} failed)"
        )
    for place, seed in enumerate(seeds):
        axis.plot([], [], "o", color=colours(place), label=f"seed {seed}")
    axis.plot([], [], color="#222222", linewidth=1.6, label="mean")
    axis.set_xticks(range(len(methods)), labels)
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.set_ylabel("accuracy in %")
    axis.grid(axis="y", alpha=0.25)
    axis.set_title(title, fontsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
