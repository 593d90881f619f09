"""A finished run at work: evaluate it, predict, generate. Everything comes from the saved
adapter."""

from __future__ import annotations

import base64
import csv
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset
from peft import PeftModel

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    RESULT_FILE,
    check_new_file,
    read_file,
    read_recipe,
    to_json,
    whole,
)
from adaptive_lora.model.saving import load
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.runs.loading import load_model, load_task
from adaptive_lora.runs.task_trainer import TaskTrainer
from adaptive_lora.tasks import Task
from adaptive_lora.tasks.base import ROW
from adaptive_lora.tasks.data import Split, columns_of, read_records
from adaptive_lora.tasks.language_model import WritingTask
from adaptive_lora.tasks.streaming import splits_of
from adaptive_lora.training.trainer import use_progress

WRITERS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class FinishedRun:
    """A run's recipe, its task as it was trained, and the base model with the saved adapter."""

    config: RunConfig
    task: Task
    model: PeftModel


def open_run(
    folder: str | Path,
    *,
    model: str | None = None,
    adapter: str | Path | None = None,
    **generation: Any,
) -> FinishedRun:
    """Return the run in `folder`, ready to use.

    Args:
        model: where the base model is now, if not where the recipe says.
        adapter: the folder of an adapter to use instead of the run's own.
        generation: fields of the recipe's `generation` to replace; None leaves one as it is.

    Raises `InputError` when the folder holds no finished run, `IntegrityError` when a file of it is
    damaged.
    """
    config, task = finished_task(folder, model=model, **generation)
    base, *_ = load_model(config, task)
    with warnings.catch_warnings():
        # PEFT looks where the base model was
        warnings.filterwarnings("ignore", message="Could not find a config file")
        loaded = load(base, adapter or Path(folder) / ADAPTER_FOLDER)
    with tempfile.TemporaryDirectory() as empty:
        device = config.training_arguments(output_dir=empty).device  # the one a Trainer would use
    return FinishedRun(config, task, loaded.to(device))


def run_of(adapter: str | Path) -> Path:
    """Return the run directory that `adapter` is, or lies in. Raises `InputError` without one."""
    folder = Path(adapter)
    for candidate in (folder, folder.parent):
        if (candidate / CONFIG_FILE).is_file() and (candidate / RESULT_FILE).is_file():
            return candidate
    raise InputError(
        f"{folder} lies in no finished run, so nothing says which model, task and columns to "
        "measure it with; name one: --run RUN"
    )


def finished_task(
    folder: str | Path, *, model: str | None = None, **generation: Any
) -> tuple[RunConfig, Task]:
    """Return the recipe of the run in `folder` and its task as it was trained; arguments and errors
    as of `open_run`."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / RESULT_FILE).is_file():
        raise InputError(
            f"{folder} holds no finished run; expected {CONFIG_FILE} and {RESULT_FILE} there"
        )
    try:
        result = read_file(folder / RESULT_FILE, "result")
    except InputError as error:
        raise IntegrityError(f"the result of the run in {folder} cannot be read: {error}") from None
    if (
        not isinstance(result, dict)
        or result.get("status") != "ok"
        or not isinstance(result.get("data"), dict)
    ):
        reason = result.get("reason") if isinstance(result, dict) else "no result"
        raise InputError(f"the run in {folder} did not succeed: {reason}")
    try:
        config = parse(read_recipe(folder / CONFIG_FILE), origin=str(folder / CONFIG_FILE))
        data = config.data.model_validate({**config.data.model_dump(), **result["data"]})
    except ValueError as error:
        raise IntegrityError(f"the recipe of the run in {folder} cannot be read: {error}") from None
    replaced = {name: value for name, value in generation.items() if value is not None}
    changes = {
        "data": data,
        "generation": config.generation.model_copy(update=replaced),
        "model": model or config.model,
    }
    config = config.model_copy(update=changes)
    return config, load_task(config)


def evaluate(run: FinishedRun, source: str | None = None) -> dict[str, float]:
    """Return the metrics of the run on the records of `source`, or on the evaluation records of its
    recipe.

    `records` is how many were scored; `run.task.notes` then says what was cut or dropped.
    """
    split = (
        splits_of(run.config.data).eval if source is None else _records(run, source, "evaluation")
    )
    features = run.task.features(split)
    return {"records": len(set(features[ROW])), **score(run, features, "eval")}


def score(run: FinishedRun, features: Dataset, name: str) -> dict[str, float]:
    """Return the loss and the task's metrics on features of its records: {NAME_loss: ...}."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = _trainer(run, folder).evaluate(features, metric_key_prefix=name)
    names = [f"{name}_{metric}" for metric in (*run.task.metrics, "loss")]
    return {metric: metrics[metric] for metric in names if metric in metrics}


def predict(run: FinishedRun, source: str, output: str | Path) -> int:
    """Write the records of `source` with the run's predictions to `output` and return how many
    there are.

    Columns are added: `prediction`, and what the task knows of its certainty. Raises `InputError`
    before anything is computed when `output` exists, has an unknown ending, or a column is there
    already.
    """
    output = check_new_file(output, endings=WRITERS)
    split = _records(run, source, "input")
    columns = columns_of(split.records)
    taken = [name for name in ("prediction", "probability", "score") if name in columns]
    if taken:
        raise InputError(f"{source} has a column {taken[0]!r} already; rename it")
    features = run.task.features(split, labelled=False)
    with tempfile.TemporaryDirectory() as folder:
        predictions = _trainer(run, folder).predict_rows(features)
    table: pa.Table = split.records.select_columns(columns).with_format("arrow")[:]
    for name in predictions[0]:
        table = table.append_column(name, pa.array([found[name] for found in predictions]))
    try:
        with whole(output) as staging:
            _write(staging, table)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}") from error
    return table.num_rows


def generate(run: FinishedRun, prompts: list[str]) -> list[str]:
    """Return what the model writes after each prompt, put into the form of the training records."""
    if not isinstance(run.task, WritingTask):
        raise InputError(f"the run's task is {run.config.task}, which writes no text; use predict")
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"prompt {prompt!r} is empty; expected text")
    return run.task.write([run.task.prompt_ids(prompt) for prompt in prompts], run.model)


def _records(run: FinishedRun, source: str, part: str) -> Split:
    data = run.config.data
    return read_records(data, source, data.eval_split or "train").split(part)


def _trainer(run: FinishedRun, folder: str) -> TaskTrainer:
    arguments = run.config.training_arguments(
        **run.task.training, output_dir=folder, report_to="none", eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = TaskTrainer(model=run.model, args=arguments, task=run.task)
    use_progress(trainer, quiet=True)
    return trainer


def _write(path: Path, table: pa.Table) -> None:
    if path.suffix.lower() == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            writer = csv.writer(file)
            writer.writerow(table.column_names)
            writer.writerows([_cell(value) for value in row.values()] for row in table.to_pylist())
        else:
            file.writelines(_json(row) + "\n" for row in table.to_pylist())


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return _json(value)
    return value if value is None or isinstance(value, str | int | float) else _text(value)


def _json(value: Any) -> str:
    return to_json(value, ensure_ascii=False, default=_text)


def _text(value: Any) -> str:
    """Return what JSON has no form for as text: dates and times as ISO 8601 has them, bytes in base
    64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value.isoformat()) if isinstance(value, date | time) else str(value)
