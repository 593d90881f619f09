"""One run: a recipe in, a run directory out. Readable from top to bottom."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from adaptive_lora import methods
from adaptive_lora.errors import DivergedError, InputError, NothingLearnedError, unknown
from adaptive_lora.files import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    RESULT_FILE,
    write_json,
    write_text,
)
from adaptive_lora.model.adapters import lora_parameters, ranks, targets_of
from adaptive_lora.model.attach import attach
from adaptive_lora.model.memory import account, peak_memory, process_memory
from adaptive_lora.model.quantization import compute_dtype, left_out
from adaptive_lora.model.saving import save
from adaptive_lora.model.targets import coverage, find_targets
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.runs.dry_run import few, soon, two_steps
from adaptive_lora.runs.loading import load_model, load_task
from adaptive_lora.runs.resuming import check_folder, with_task_of
from adaptive_lora.runs.task_trainer import TaskTrainer
from adaptive_lora.tasks import Task
from adaptive_lora.tasks.guess import with_task
from adaptive_lora.tasks.streaming import Stream, splits_of
from adaptive_lora.training.callback import AdaptiveRankCallback
from adaptive_lora.training.controller import NeverDecidedError
from adaptive_lora.training.trainer import MetricsFile, use_progress

# keys of `data` that the model's window and the training records may complete
LEARNED = {
    "max_length", "text", "label", "classes", "class_numbers", "label_form", "class_order",
    "unanswerable",
}  # fmt: skip
WIDTH = 100  # columns of the terminal


def run(config: RunConfig, *, resume: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Train as `config` says and return the content of `result.json`.

    Everything that can be wrong with the request is found before the run directory is made.
    Training that diverges or changes nothing leaves `result.json` with status "failed" and raises.
    A dry run draws the model's weights at random and takes two steps.

    Raises `InputError` (bad request), `DivergedError` (NaN or infinity), `NothingLearnedError` (no
    update), `NeverDecidedError` (no decision), `IntegrityError` (a damaged file, or a run that
    cannot be resumed as asked).
    """
    folder = Path(config.output)
    if resume:
        config = with_task_of(folder, config)
    checkpoint = check_folder(folder, config, resume=resume)
    config, guessed = with_task(config)
    existed = folder.is_dir()
    try:
        return _train(config, folder, checkpoint, guessed, dry_run=dry_run)
    except InputError:
        # Some faults come out only when the Trainer starts. What is in the folder then is ours: it
        # was empty or absent.
        metrics = folder / METRICS_FILE
        trained = (folder / ADAPTER_FOLDER).is_dir()
        if not resume and not trained and not (metrics.is_file() and metrics.stat().st_size):
            shutil.rmtree(folder, ignore_errors=True)
            if existed:
                folder.mkdir()
        raise


def _train(
    config: RunConfig, folder: Path, checkpoint: str | None, guessed: list[str], *, dry_run: bool
) -> dict[str, Any]:
    method = methods.build(config.method.name, config.method.arguments)
    task = load_task(config)
    overrides: dict[str, Any] = {"output_dir": str(folder / CHECKPOINT_FOLDER), **task.training}
    if checkpoint is not None:
        overrides["eval_on_start"] = False  # the log of the resumed run has that row
    if dry_run:
        method = soon(method)
        overrides |= two_steps(config)
    overrides |= _streaming_fields(config)
    arguments = config.training_arguments(**overrides, disable_tqdm=not sys.stderr.isatty())
    train, held_out, extra = _prepare(config, task, arguments, dry_run=dry_run)

    before = process_memory()
    set_seed(config.seed)  # the head and A are drawn here
    model, notes = _attach(config, task, method, dry_run=dry_run)
    initial_ranks = ranks(model)

    try:
        # Is the optimizer installed?
        TaskTrainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
        trainer = TaskTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            task=task,
            callbacks=[MetricsFile(folder / METRICS_FILE), *_rank_callback(method, folder)],
            on_non_finite=config.on_non_finite,
            max_skipped=config.max_skipped,
        )
        main_process = trainer.is_world_process_zero()
        folder.mkdir(parents=True, exist_ok=True)
        if main_process:
            write_text(folder / CONFIG_FILE, config.to_yaml())
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error}") from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"training: {error}") from error
    if main_process:
        _say([*guessed, *task.notes, *notes, _describe(model, method)])
    use_progress(trainer)

    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
        if main_process:  # first of all: nothing that goes wrong from here on may cost the training
            save(model, folder / ADAPTER_FOLDER)
            task.tokenizer.save_pretrained(folder / ADAPTER_FOLDER)
        metrics = _final_metrics(trainer)
        constant = _constant(trainer, held_out, quiet=dry_run)
        for name, features in extra.items():
            metrics |= trainer.evaluate(features, metric_key_prefix=f"eval_{name}")
    except Exception as error:
        failed = isinstance(error, DivergedError | NeverDecidedError | NothingLearnedError)
        # Whatever goes wrong after the training: it is over, and its adapter is there.
        if main_process and (failed or (folder / ADAPTER_FOLDER).is_dir()):
            failure = _failure(error, trainer, folder)
            facts = _facts(config, model, method, initial_ranks, trainer.optimizer, before)
            write_json(folder / RESULT_FILE, {**failure, **facts, "metrics": {}}, indent=2)
        raise
    result = {
        "status": "ok",
        "reason": None,
        **_facts(config, model, method, initial_ranks, trainer.optimizer, before),
        "metric": f"eval_{config.metric or task.metrics[0]}",
        "metrics": metrics,
        "constant_predictions": constant,
        "data": task.data.model_dump(mode="json", include=LEARNED),
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "train_seconds": seconds,
    }
    if main_process:
        write_json(folder / RESULT_FILE, result, indent=2)
    return result


def _say(notes: list[str]) -> None:
    for note in notes:
        print(textwrap.fill(note, WIDTH, subsequent_indent="    "), flush=True)


def _prepare(
    config: RunConfig, task: Task, arguments: TrainingArguments, *, dry_run: bool
) -> tuple[Dataset | Stream, Dataset, dict[str, Dataset]]:
    """Return the features to train on, to evaluate on, and to evaluate on once at the end."""
    splits = splits_of(config.data)
    task.learn(splits.train)
    _check_arguments(arguments, task, config.metric)
    if config.data.streaming:
        _check_streaming(arguments)
    train: Dataset | Stream = task.features(splits.train)
    if config.data.streaming:  # the first records have been looked at
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        train = Stream(task.data, task.features_alone, seed)
    held_out = task.features(splits.eval)
    extra = {name: task.features(split) for name, split in splits.extra.items()}
    if dry_run:  # every record has been looked at
        held_out = few(held_out, arguments)
        extra = {name: few(features, arguments) for name, features in extra.items()}
    return train, held_out, extra


def _check_arguments(arguments: TrainingArguments, task: Task, metric: str | None) -> None:
    """Raise `InputError` for what the Trainer would find out only when it gets there."""
    if metric is not None and metric not in task.metrics:
        raise InputError(unknown(f"metric is {metric!r}", metric, task.metrics, "Known here"))
    known = [f"{prefix}{name}" for prefix in ("", "eval_") for name in ("loss", *task.metrics)]
    wanted = arguments.metric_for_best_model
    if wanted is not None and wanted not in known:
        raise InputError(unknown(f"training.metric_for_best_model is {wanted!r}", wanted, known))
    if arguments.fp16 and arguments.device.type == "cpu":
        raise InputError(
            "training.fp16 is true and there is no GPU; expected bf16, or neither for float32"
        )
    if arguments.dataloader_num_workers < 0:
        raise InputError(
            f"training.dataloader_num_workers is {arguments.dataloader_num_workers}; expected a "
            "whole number >= 0"
        )


def _streaming_fields(config: RunConfig) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` that a stream overrides: each process reads it and
    takes its part, as batches differ in length."""
    given = config.training.get("accelerator_config")
    if not config.data.streaming or given is not None:
        return {}
    return {"accelerator_config": {"dispatch_batches": False}}


def _check_streaming(arguments: TrainingArguments) -> None:
    if arguments.max_steps <= 0:
        raise InputError(
            f"training.max_steps is {arguments.max_steps}; expected a number of steps, as records "
            "that are streamed have no end: data.streaming goes with training.max_steps"
        )
    if arguments.dataloader_num_workers:
        raise InputError(
            f"training.dataloader_num_workers is {arguments.dataloader_num_workers}; expected 0 "
            "with data.streaming, as each worker would read all records"
        )


def _attach(
    config: RunConfig, task: Task, method: methods.Method, *, dry_run: bool
) -> tuple[PeftModel, list[str]]:
    """Return the base model with adapters, and what its user should know of its head and of where
    they are."""
    base, newly_drawn, notes = load_model(config, task, random_weights=dry_run)
    notes += coverage(base, find_targets(base, config.adapters.targets))
    if config.quantization != "none":
        notes += left_out(base, config.quantization, compute_dtype(config.dtype))
    model = attach(
        base,
        method,
        config.adapters.targets,
        scale=config.adapters.scale,
        dropout=config.adapters.dropout,
        modules_to_save=newly_drawn,
    )
    return model, notes


def _rank_callback(method: methods.Method, folder: Path) -> list[TrainerCallback]:
    return (
        [AdaptiveRankCallback(method, folder / HISTORY_FILE)]
        if method.adaptation is not None
        else []
    )


def _describe(model: PeftModel, method: methods.Method) -> str:
    spread = sorted(ranks(model).values())
    return (
        f"method {method.name}: {len(spread)} targets, ranks {spread[0]}..{spread[-1]}, "
        f"{lora_parameters(model):,} LoRA parameters"
    )


def _final_metrics(trainer: TaskTrainer) -> dict[str, float]:
    """Return the metrics of the model as it is at the end, evaluating only if the last log row is
    not that."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    evaluated = (
        rows
        and rows[-1]["step"] == trainer.state.global_step
        and not trainer.args.load_best_model_at_end
    )
    metrics = rows[-1] if evaluated else trainer.evaluate()
    # Sorted, as the rows of a resumed run are: the Trainer's checkpoints sort them.
    return {key: value for key, value in sorted(metrics.items()) if key.startswith("eval_")}


def _constant(trainer: TaskTrainer, held_out: Dataset, *, quiet: bool) -> bool | None:
    """Return whether the model answers every evaluation record alike at the end, and say so unless
    `quiet`; None of a task that writes.

    No failure: the adapter has changed, and a rare class or an early checkpoint looks the same.
    """
    if trainer.constant is None and trainer.task.needs_outputs:
        trainer.predict(held_out)  # resumed after the last evaluation
    if trainer.constant and not quiet and trainer.is_world_process_zero():
        _say(
            [
                "every evaluation record gets the same prediction, though their labels differ: "
                "nothing that tells records apart was learned; train for longer, change the "
                "learning rate, or look at the data (constant_predictions in result.json)"
            ]
        )
    return trainer.constant


def _failure(error: Exception, trainer: TaskTrainer, folder: Path) -> dict[str, Any]:
    """Return what became of a training that failed, and the checkpoint it could go on from."""
    checkpoints = folder / CHECKPOINT_FOLDER
    good = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    failure = {"status": "failed", "reason": str(error), "step": trainer.state.global_step}
    failure["skipped_steps"] = trainer.skipped_steps
    if isinstance(error, DivergedError):
        failure |= {"step": error.step, "where": list(error.where)}
    failure["last_good_checkpoint"] = os.path.relpath(good, folder) if good else None
    return failure


def _facts(
    config: RunConfig,
    model: PeftModel,
    method: methods.Method,
    initial_ranks: dict[str, int],
    optimizer: Any,
    before: int,
) -> dict[str, Any]:
    """Return what is true of the run whether it succeeded or not, read from the model and not from
    the plan."""
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "method": method.name,
        "task": config.task,
        "model": config.model,
        "seed": config.seed,
        "initial_ranks": initial_ranks,
        "ranks": ranks(model),
        "lora_parameters": lora_parameters(model),
        "budget_parameters": method.budget_parameters(targets_of(model)),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "memory": account(model, optimizer),
        "process_memory_before_bytes": before,
        "peak_memory_bytes": max(before, peak_memory()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    from importlib.metadata import version

    names = ("adaptive-lora", "torch", "transformers", "peft", "datasets", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
