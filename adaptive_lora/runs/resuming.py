"""Whether a run directory is fit to start in, or to go on in, and from which checkpoint."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adaptive_lora import methods
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import CHECKPOINT_FOLDER, CONFIG_FILE, read_recipe
from adaptive_lora.model.adapter_file import WEIGHTS_NAME
from adaptive_lora.naming import flatten
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.training.controller import STATE_FILE, TENSOR_FILE


def check_folder(folder: Path, config: RunConfig, *, resume: bool) -> str | None:
    """Return the checkpoint to resume from, or None for a fresh run. Raises unless the folder is
    fit for it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file; expected a folder")
    holds_run = folder.is_dir() and any(folder.iterdir())
    if not resume:
        if holds_run:
            raise InputError(
                f"output folder {folder} is not empty; use --resume to go on with the run there, "
                "or another folder"
            )
        return None
    differing = _differences(_recipe_of(folder), config)
    if differing:
        raise IntegrityError(
            f"the run in {folder} has another configuration; differing keys: {', '.join(differing)}"
        )
    checkpoints = folder / CHECKPOINT_FOLDER
    dynamic = methods.build(config.method.name, config.method.arguments).adaptation is not None
    return _newest_whole_checkpoint(checkpoints, dynamic=dynamic)


def with_task_of(folder: Path, config: RunConfig) -> RunConfig:
    """Return a recipe that leaves the task or the length of inputs open with those of the run in
    `folder`: a guess is made once, and a run of another version goes on with its default. Raises as
    `check_folder`."""
    if config.task is not None and config.data.max_length is not None:
        return config
    before = _recipe_of(folder)
    length = config.data.max_length or before.data.max_length
    data = config.data.model_copy(update={"max_length": length})
    return config.model_copy(update={"data": data}).with_task(config.task or before.task)


def _recipe_of(folder: Path) -> RunConfig:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"nothing to resume: {folder} holds no {CONFIG_FILE}")
    try:
        return parse(read_recipe(folder / CONFIG_FILE), origin=CONFIG_FILE)
    except InputError as error:
        raise IntegrityError(f"the run in {folder} cannot be resumed: {error}") from None


def _newest_whole_checkpoint(checkpoints: Path, *, dynamic: bool) -> str | None:
    """Return the newest checkpoint that is whole, and say which newer ones are not: a kill in
    mid-save leaves one."""

    def number(path: Path) -> str:
        return path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")

    found = (
        path for path in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if number(path).isdecimal()
    )
    refused = []
    for checkpoint in sorted(found, key=lambda path: int(number(path)), reverse=True):
        try:
            _check_checkpoint(checkpoint, dynamic=dynamic)
        except IntegrityError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            print(f"{reason}; resuming from {checkpoint.name}", flush=True)
        return str(checkpoint)
    if refused:
        raise IntegrityError(
            f"{'; '.join(refused)}; remove {checkpoints} to train from the start with --resume"
        )
    return None


def _check_checkpoint(checkpoint: Path, *, dynamic: bool) -> None:
    """Raise `IntegrityError` unless all that a resume reads is there and whole; the Trainer goes on
    without a missing optimizer or random-number state."""
    for path in (checkpoint, *checkpoint.glob("*")):
        if path.is_symlink():
            raise IntegrityError(
                f"{path} is a symbolic link; a checkpoint is resumed only from files of its own"
            )
    state_files = ("trainer_state.json", *([STATE_FILE] if dynamic else []))
    tensor_files = (WEIGHTS_NAME, *([TENSOR_FILE] if dynamic else []))
    for name in (*state_files, *tensor_files, "optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        if not any(checkpoint.glob(name)):
            raise IntegrityError(f"the checkpoint {checkpoint} has no {name}")
    try:
        for name in state_files:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        # safetensors has no checksum: what can be told is that header and length fit.
        for name in tensor_files:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        # Zip archives, with a checksum for every entry.
        for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("bad checksum")
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"the checkpoint {checkpoint} is damaged: {error}") from error


def _differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the dotted keys whose values differ, except where the run is stored."""
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    return sorted(
        key for key in old.keys() | new.keys() if key != "output" and old.get(key) != new.get(key)
    )
