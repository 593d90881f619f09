"""Recipes as plain mappings: read from YAML, changed by flags. Light, so that the command line can
fail fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from adaptive_lora.errors import InputError


def load_yaml(text: str) -> Any:
    """Return what YAML text holds. Raises `yaml.YAMLError` whatever is wrong with it."""
    try:
        return yaml.safe_load(text)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets these through: a date such as 2001-99-99, `!!int abc`, brackets a thousand
        # deep.
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
    """Return the mapping a recipe holds. Raises `InputError` as `read_file`, or when it is no
    mapping."""
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
    node = values
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {assignment!r}: {key!r} is not a mapping")
    node[keys[-1]] = value
