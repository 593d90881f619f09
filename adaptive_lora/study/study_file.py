"""The study file: a base recipe, a grid over it, and how its results are to be read. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from adaptive_lora.errors import InputError, unknown
from adaptive_lora.files import load_yaml, read_file, read_recipe, set_key
from adaptive_lora.study.selection import RULES

LEARNING_RATE = "training.learning_rate"
# what metrics that are better when lower end with
FALLS = ("loss", "perplexity", "bits_per_byte", "mse")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study file says.

    Args:
        name: of the study; a folder holds one study.
        base: the recipe all runs share, or the path of one. `output` is not part of it.
        grid: axis -> list of values. An axis is a key of the recipe (`seed`, `method`,
            `training.learning_rate`), or any name whose values are mappings with a `label` and the
            recipe keys that it sets together.
        baseline: the label of the method that the others are compared with.
        metric: what is reported, such as eval_test_accuracy, for the records of `data.extra_eval:
            {test: ...}`.
        greater_is_better: None says it by the metric's name: losses, perplexity, bits and squared
            errors fall.
        select_axes: axes of which a rule chooses one setting for each method; None is the learning
            rate.
        select_metric: what the rule looks at; None is `metric`, which is then optimistic, and the
            table says so.
        select_rule: a name in `selection.RULES`.
        threads: CPU threads of every run, part of its identity: results must not depend on the
            number of workers.
        slurm: parameters for submitit, such as {timeout_min: 240, slurm_partition: gpu}.
        ray: resources for each Ray task, such as {num_gpus: 1}.
    """

    name: str
    base: dict[str, Any]
    grid: dict[str, list[Any]]
    baseline: str
    metric: str
    greater_is_better: bool | None = None
    select_axes: list[str] | None = None
    select_metric: str | None = None
    select_rule: str = "best_mean"
    threads: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InputError(f"study: name is {self.name!r}; expected a text")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise InputError(f"study: threads is {self.threads!r}; expected a whole number >= 1")
        if self.select_rule not in RULES:
            raise InputError(
                unknown(f"study: select.rule is {self.select_rule!r}", self.select_rule, RULES)
            )
        for axis, values in self.grid.items():
            if not isinstance(values, list):
                raise InputError(
                    f"study: axis {axis} is {values!r}; expected a list, such as [{values!r}]"
                )
            if not values:
                raise InputError(
                    f"study: axis {axis} has no values, so there is nothing to run; give one, or "
                    "leave it out"
                )
        for axis in self.select_axes or []:
            if axis not in self.grid:
                raise InputError(
                    unknown(f"study: select.axes names {axis!r}", axis, self.grid, "Axes")
                )

    @property
    def rises(self) -> bool:
        """True when a higher `metric` is better."""
        return rises(self.metric) if self.greater_is_better is None else self.greater_is_better

    @property
    def selected(self) -> list[str]:
        """The axes that the selection rule goes over."""
        if self.select_axes is not None:
            return self.select_axes
        return [LEARNING_RATE] if LEARNING_RATE in self.grid else []

    def to_mapping(self) -> dict[str, Any]:
        """Return the study as its file says it, every default filled in."""
        return {
            "name": self.name,
            "base": self.base,
            "grid": self.grid,
            "baseline": self.baseline,
            "select": {
                "axes": self.selected,
                "by": self.select_metric or self.metric,
                "rule": self.select_rule,
            },
            "report": {"metric": self.metric, "greater_is_better": self.rises},
            "threads": self.threads,
            "slurm": self.slurm,
            "ray": self.ray,
        }


def rises(metric: str) -> bool:
    """Return whether a higher value of a metric of that name is better.

    >>> rises("eval_test_accuracy"), rises("eval_token_loss")
    (True, False)
    """
    return not metric.endswith(FALLS)


def read_study(file: str | Path, assignments: Sequence[str] = ()) -> Study:
    """Return the study in a YAML file, after `key=value` assignments such as base.model=FOLDER or
    grid.seed=[0,1]."""
    values = read_file(Path(file), "study")
    if not isinstance(values, dict):
        raise InputError(
            f"{file} holds a {type(values).__name__}; expected a mapping of study keys"
        )
    values = dict(values)
    base = values.get("base")
    if isinstance(base, str):
        values["base"] = read_recipe(Path(file).parent / base)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if separator and key.strip().startswith("grid."):  # an axis is one key, dots and all
            grid = values.setdefault("grid", {})
            if isinstance(grid, dict):
                grid[key.strip().removeprefix("grid.")] = load_yaml(text)
        else:
            set_key(values, assignment)
    return parse_study(values, origin=str(file))


def parse_study(values: Mapping[str, Any], *, origin: str = "study") -> Study:
    """Return the `Study` of a plain mapping. Raises `InputError` naming `origin`, the key, and the
    nearest known one.

    `paths: {data: FOLDER}` in the mapping puts FOLDER for `$data` at the start of any text in
    `base` and `grid`.
    """
    try:
        values = dict(values)
        paths = values.pop("paths", None) or {}
        if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
            raise InputError(
                f"paths is {paths!r:.60}; expected a mapping of names to folders, files or hub "
                "names"
            )
        values |= {
            key: _with_paths(values[key], paths) for key in ("base", "grid") if key in values
        }
        select, report = (
            _section(values, "select", "axes", "by", "rule"),
            _section(values, "report", "metric", "greater_is_better"),
        )
        given = {k: v for k, v in values.items() if k not in ("select", "report")}
        known = {f.name for f in fields(Study)} - {
            "metric",
            "greater_is_better",
            "select_axes",
            "select_metric",
            "select_rule",
        }
        _check_keys(given, known | {"select", "report"}, "")
        for key in ("base", "grid", "slurm", "ray"):
            if not isinstance(given.get(key, {}), dict):
                raise InputError(f"{key} is {given[key]!r:.60}; expected a mapping")
        for key in ("name", "base", "grid", "baseline"):
            if not given.get(key):
                what = (
                    "the study is empty: it has no grid" if key == "grid" else f"{key} is missing"
                )
                raise InputError(what)
        if not isinstance(report.get("metric"), str):
            raise InputError(
                "report.metric is missing; expected the name of a metric, such as eval_accuracy"
            )
        named = {"axes": "select_axes", "by": "select_metric", "rule": "select_rule"}
        return Study(**given, **report, **{named[k]: v for k, v in select.items() if v is not None})
    except InputError as error:
        raise InputError(f"{origin}: {str(error).removeprefix('study: ')}") from None


def _with_paths(value: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_paths(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(item, paths) for item in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name, slash, rest = value[1:].partition("/")
    if name not in paths:
        raise InputError(unknown(f"${name} in {value!r} is not among paths", name, paths))
    return f"{paths[name]}{slash}{rest}"


def _section(values: Mapping[str, Any], name: str, *known: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise InputError(f"{name} is {section!r}; expected a mapping with {', '.join(known)}")
    _check_keys(section, known, f"{name}.")
    return dict(section)


def _check_keys(values: Mapping[str, Any], known: Any, prefix: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(
                unknown(f"unknown key {prefix}{key}", key, sorted(known), "Known here")
            )
