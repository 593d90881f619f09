"""Names that may be local folders or live on the hub: what is tried, and a quick clear answer when
neither is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from adaptive_lora.errors import InputError

SECONDS_TO_WAIT = 3.0


def is_local(source: str) -> bool:
    """True when `source` exists here, or is written as a path and can be nothing else."""
    path = Path(source).expanduser()
    return (
        path.exists()
        or path.is_absolute()
        or source.startswith((".", "~"))
        or source.count("/") > 1
    )


# Asked once: offline, the model, its tokenizer and every data set would wait again.
@cache
def reachable() -> bool:
    """True when the hub answers within a few seconds and offline mode is off."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_WAIT)
    except Exception:
        # Which HTTP library this is, and so its errors, changes with the hub client's version.
        return False
    return True


def locate_model(source: str) -> bool:
    """Return True when the model is here (a folder, or in the cache with no hub to ask), False when
    on the hub.

    Raises `InputError` saying what was tried.
    """
    if is_local(source):
        if not Path(source).is_dir():
            raise InputError(
                f"model folder {source} does not exist; give a folder with config.json, or a hub "
                "name"
            )
        if not (Path(source) / "config.json").is_file():
            raise InputError(
                f"model folder {source} has no config.json; expected a Hugging Face model folder"
            )
        return True
    if reachable():
        return False
    if cached(source):
        return True
    raise InputError(
        explain_missing("model", source, tried=[f"local folder {Path(source).resolve()}"])
    )


def cached(repository: str) -> bool:
    """True when the local hub cache holds the model repository."""
    return isinstance(try_to_load_from_cache(repository, "config.json"), str)


def explain_missing(what: str, name: str, *, tried: Sequence[str]) -> str:
    """Return the message for something found neither here nor on the hub."""
    if constants.HF_HUB_OFFLINE:
        hub = "the hub (not asked: HF_HUB_OFFLINE is set)"
    else:
        hub = f"the hub at {constants.ENDPOINT} (no answer within {SECONDS_TO_WAIT:g} s)"
    cache_dir = os.path.relpath(constants.HF_HUB_CACHE, Path.home())
    return (
        f"{what} {name!r} was not found. Tried: "
        f"{', '.join([*tried, f'the local cache ~/{cache_dir}', hub])}. Give an existing local "
        "path, or connect to the network"
    )
