"""What a YAML file is checked by: an unknown key is refused with the nearest spelling, a wrong
value named by its dotted key. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from adaptive_lora.errors import InputError, unknown

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def check(kind: type[Model], values: Mapping[str, Any]) -> Model:
    """Return a plain mapping as a `kind`. Raises `InputError` naming every key that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(kind, problem) for problem in error.errors())
        raise InputError("; ".join(problems)) from None


def _explain(kind: type[BaseModel], problem: Any) -> str:
    path, known, inside = _place(kind, problem["loc"])
    key = ".".join(path) or "it"
    if problem["type"] == "extra_forbidden":
        return unknown(f"unknown key {key}", path[-1], known, "Known here")
    if problem["type"] == "value_error":  # raised by a validator of ours: its message is complete
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        required = [f"{key}.{name}" for name, field in inside.items() if field.is_required()]
        return "; ".join(f"{name} is missing" for name in required or [key])
    if inside:
        return f"{key} is {problem['input']!r:.60}; expected a mapping"
    return f"{key} is {problem['input']!r}: {problem['msg']}"


def _place(
    kind: type[BaseModel], location: Iterable[Any]
) -> tuple[list[str], list[str], dict[str, FieldInfo]]:
    """Return (the parts of the key, the keys known beside it, the fields inside it). What follows
    the key in a location (positions in a list, arms of a union) is pydantic's."""
    path: list[str] = []
    beside: dict[str, FieldInfo] = {}
    inside = kind.model_fields
    for part in location:
        path.append(str(part))
        beside, inside = inside, {}
        if part in beside:
            annotation: Any = beside[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                inside = annotation.model_fields
        if not inside:
            break
    return path, list(beside), inside
