"""How runs ended: one file a run, with digests of what it left, so that a later change is noticed.
No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from adaptive_lora.files import CONFIG_FILE, HISTORY_FILE, METRICS_FILE, RESULT_FILE, write_json
from adaptive_lora.study.plan import identity
from adaptive_lora.study.records import OUTCOMES, RUNS, VERSION, Outcome, PlannedRun

DIGESTED = (RESULT_FILE, CONFIG_FILE, METRICS_FILE, HISTORY_FILE)


class UnusableError(Exception):
    """A run that must not count; the message says why."""


def is_over(study: Path, run: str) -> bool:
    """True when the run has an outcome. One that went well and whose directory the user has removed
    is to be done again."""
    outcome = study / OUTCOMES / f"{run}.json"
    if not outcome.is_file():
        return False
    return (study / RUNS / run).is_dir() or '"status": "failed"' in outcome.read_text(
        encoding="utf-8"
    )


def write_outcome(study: Path, outcome: Outcome) -> None:
    """Write the outcome of a run, whole or not at all."""
    folder = study / OUTCOMES
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{outcome['id']}.json", outcome)


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run that is read later, and exists."""
    return {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest()
        for name in DIGESTED
        if (run / name).is_file()
    }


def read_outcome(study: Path, run: str) -> Outcome | None:
    """Return the outcome of a run, None without one. Raises `UnusableError` when the file is
    damaged or of another version."""
    file = study / OUTCOMES / f"{run}.json"
    try:
        outcome = json.loads(file.read_text(encoding="utf-8"))
        if outcome["version"] != VERSION:
            raise UnusableError(
                f"outcomes/{run}.json is of format {outcome['version']!r}; this version reads "
                f"format {VERSION}"
            )
        if (
            outcome["id"] != run
            or outcome["status"] not in ("ok", "failed")
            or not isinstance(outcome["files"], dict)
        ):
            raise ValueError("it is not the outcome of this run")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"outcomes/{run}.json is damaged: {error}") from None
    return outcome


def read_result(
    study: Path, planned: PlannedRun, outcome: Outcome, *, threads: int
) -> dict[str, Any]:
    """Return result.json of a run, {} where it failed before it had one.

    Raises `UnusableError` when a file is missing or was changed since, or the directory holds
    another run.
    """
    folder = study / RUNS / planned["id"]
    now = digests(folder)
    for name, digest in outcome["files"].items():
        if name not in now:
            raise UnusableError(f"{RUNS}/{planned['id']}/{name} is missing")
        if now[name] != digest:
            raise UnusableError(
                f"{RUNS}/{planned['id']}/{name} is not as the run left it: it was changed or cut "
                "off"
            )
    try:
        if CONFIG_FILE in outcome["files"]:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            # The C loader reads a thousand of these in seconds.
            config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if identity(config, threads=threads, after=planned.get("after")) != planned["id"]:
                raise UnusableError(
                    f"{RUNS}/{planned['id']} is a run from elsewhere: its {CONFIG_FILE} is another "
                    "configuration"
                )
        result = (
            json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            if RESULT_FILE in now
            else {}
        )
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UnusableError(f"{RUNS}/{planned['id']} is damaged: {error}") from None
    if outcome["status"] == "ok" and not isinstance(result.get("metrics"), dict):
        raise UnusableError(f"{RUNS}/{planned['id']}/{RESULT_FILE} is not the result of a run")
    return result
