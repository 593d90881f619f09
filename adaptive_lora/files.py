"""Files: what those of a run are called; YAML and JSON in; text, strict JSON and folders out, whole
or not at all. Light, so that the command line can fail fast."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from adaptive_lora.errors import InputError
from adaptive_lora.naming import set_dotted

# A run directory.
CONFIG_FILE, RESULT_FILE = "config.yaml", "result.json"
METRICS_FILE, HISTORY_FILE = "metrics.jsonl", "allocations.jsonl"
CHECKPOINT_FOLDER, ADAPTER_FOLDER = "checkpoints", "adapter"


def load_yaml(text: str) -> Any:
    """Return what YAML text holds. Raises `yaml.YAMLError` whatever is wrong with it."""
    try:
        return yaml.safe_load(text)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets these through: the date 2001-99-99, `!!int abc`, a thousand brackets.
        raise yaml.YAMLError(str(error)) from None


def read_file(path: Path, what: str) -> Any:
    """Return what a JSON (by its ending) or YAML file holds. Raises `InputError` with line and
    column when broken; `what` says in messages what the file is for."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else load_yaml(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(
            f"{path} is not valid YAML: {where}{getattr(error, 'problem', error)}"
        ) from None


def read_recipe(file: str | Path) -> dict[str, Any]:
    """Return the mapping a recipe holds. Raises `InputError` as `read_file`, or without one."""
    values, path = read_file(Path(file), "recipe"), Path(file)
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds a {type(values).__name__}; expected a mapping of recipe keys"
        )
    return values


def set_key(values: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=value` (value in YAML) to a nested mapping, in place.

    >>> recipe = {"training": {"seed": 1}}
    >>> set_key(recipe, "training.learning_rate=0.001")
    >>> recipe
    {'training': {'seed': 1, 'learning_rate': 0.001}}
    """
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise InputError(
            f"--set {assignment!r}: expected key=value, such as training.learning_rate=0.0003"
        )
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"--set {assignment!r}: the value is not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    set_dotted(values, path.strip(), value, origin=f"--set {assignment!r}")


def once(assignments: Iterable[str]) -> Iterator[str]:
    """Yield assignments as for `set_key`. Raises `InputError` at a key that is set twice."""
    seen: dict[str, str] = {}
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        if key in seen:
            raise InputError(
                f"--set {seen[key]!r} and {assignment!r} set one key; give one of them"
            )
        seen[key] = assignment
        yield assignment


def finite(value: Any) -> Any:
    """Return plain data with None for every float that is not finite: strict JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, **layout: Any) -> str:
    """Return strict JSON; a float that is not finite becomes null. `layout` is for `json.dumps`.

    >>> to_json({"loss": float("nan"), "step": 3})
    '{"loss": null, "step": 3}'
    """
    return json.dumps(finite(value), allow_nan=False, **layout)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to make a file or a folder at; when the block ends without an
    error, that is moved to `path`.

    Whoever reads, and whatever is killed: at `path` is what was there before, or all of the new. A
    file is replaced. Raises `InputError` for a folder where something is already.
    """
    # Beside the target: a move is a single step only within one file system.
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        staging = Path(folder) / path.name
        yield staging
        if staging.is_dir():
            check_new(path)
        move(staging, path)


def move(source: Path, path: Path) -> None:
    """Move a file or folder to `path` on the same disk, in one step, once its content is on the
    disk: else a power failure could leave the name without the content."""
    for file in [source, *source.rglob("*")] if source.is_dir() else [source]:
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    os.replace(source, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; the same bytes on every system."""
    with whole(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write a strict JSON file, whole or not at all; see `to_json`."""
    write_text(path, to_json(value, indent=indent) + "\n")


def check_new(output: str | Path, what: str = "output") -> Path:
    """Return the path of a file or folder to be made. Raises `InputError` if something is there."""
    path = Path(output).expanduser()
    if path.exists() or path.is_symlink():
        raise InputError(f"{what} {path} exists; give another name or remove it")
    return path


def check_new_file(output: str | Path, what: str = "output", endings: Sequence[str] = ()) -> Path:
    """Return the path of a file to be made. Raises `InputError` as `check_new`, when there is no
    folder for it, or its ending is none of `endings`."""
    path = Path(output).expanduser()
    if endings and path.suffix.lower() not in endings:
        raise InputError(
            f"{what} {path} has the ending {path.suffix!r}; expected one of {', '.join(endings)}"
        )
    check_new(path, what)
    if not path.parent.is_dir():
        raise InputError(
            f"the folder of {what} {path} does not exist; make it, or give another name"
        )
    return path
