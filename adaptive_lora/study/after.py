"""Runs that are not trained but made of a trained run's adapter, by a function.

    after: {run: {method.rank: 32}, do: "adaptive_lora.study.after:compress"}

in a recipe of a study says: do this to the adapter of the run whose recipe is this one, but for
`method.rank`, which is 32 there. The study must hold that run. What comes out is a run directory
like any other, evaluated on the same records, so that one table compares what was trained and what
was made of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.files import ADAPTER_FOLDER, CONFIG_FILE, RESULT_FILE, write_json, write_text

if TYPE_CHECKING:
    from adaptive_lora.recipe.config import RunConfig

Change = Callable[[Path, "RunConfig", Path], Any]
"""(a finished run, the recipe of the new one, a folder to be) -> None: writes an adapter there."""
KEPT = ("task", "model", "seed", "total_parameters", "metric", "data", "steps", "skipped_steps")
"""What the new run's result has from the run it was made of."""


def compress(run: Path, config: RunConfig, output: Path) -> None:
    """Cut the adapter of `run` to the rank or budget of the method in `config`: one budget for all
    targets, see `adaptive_lora.compress`."""
    from adaptive_lora.adapter_tools.compress import compress as cut

    method = config.method.arguments
    cut(run, rank=method.get("rank"), budget=method.get("budget"), output=output)


def make(config: RunConfig, *, source: Path, do: Change, resume: bool = False) -> None:
    """Make the run directory `config.output`: its adapter by `do` of the run in `source`, its
    metrics by evaluating that adapter as the run was.

    Raises `InputError` when the run in `source` did not succeed.
    """
    from adaptive_lora.model.adapters import lora_parameters, ranks
    from adaptive_lora.runs import use
    from adaptive_lora.runs.run import versions
    from adaptive_lora.tasks.data import load_splits

    use.finished_task(source)
    folder = Path(config.output)
    adapter = folder / ADAPTER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    do(source, config, adapter)
    seconds = time.perf_counter() - started
    made = use.open_run(source, adapter=adapter)
    made.task.tokenizer.save_pretrained(adapter)
    splits = load_splits(made.config.data)
    parts = {"eval": splits.eval, **{f"eval_{name}": split for name, split in splits.extra.items()}}
    metrics: dict[str, float] = {}
    for name, split in parts.items():
        metrics |= use.score(made, made.task.features(split), name)
    trained = json.loads((source / RESULT_FILE).read_text(encoding="utf-8"))
    after = ranks(made.model)
    result = {
        "status": "ok",
        "reason": None,
        "made_of": source.name,
        "method": config.method.name,
        **{key: trained[key] for key in KEPT},
        "initial_ranks": after,
        "ranks": after,
        "lora_parameters": lora_parameters(made.model),
        "budget_parameters": None,
        "metrics": metrics,
        "train_seconds": seconds,
        "versions": versions(),
    }
    write_text(folder / CONFIG_FILE, config.to_yaml())
    write_json(folder / RESULT_FILE, result, indent=2)
