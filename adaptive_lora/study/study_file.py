"""The study file: a base recipe, a grid over it, and how its results are to be read. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from adaptive_lora.errors import InputError, unknown
from adaptive_lora.files import load_yaml, once, read_file, read_recipe, set_key
from adaptive_lora.recipe.strict import Strict, check
from adaptive_lora.study.selection import RULES

LEARNING_RATE = "training.learning_rate"
# What metrics that are better when lower end with.
FALLS = ("loss", "perplexity", "bits_per_byte", "mse")
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, strict=True)]


class Select(Strict):
    """How one setting is chosen for each method. None: as a `Study` fills it in."""

    axes: list[str] | None = None  # over which the rule goes; None: the learning rate
    by: str | None = None  # what it looks at; None: `report.metric`, optimistic and said to be
    rule: str = "best_mean"  # a name in `selection.RULES`

    @field_validator("rule")
    @classmethod
    def _rule_is_known(cls, rule: str) -> str:
        if rule not in RULES:
            raise InputError(unknown(f"select.rule is {rule!r}", rule, RULES))
        return rule


class Report(Strict):
    """What is reported."""

    # such as eval_test_accuracy, for the records of `data.extra_eval: {test: ...}`
    metric: Text
    # None says it by the metric's name: losses, perplexity, bits and squared errors fall
    greater_is_better: bool | None = None


class Study(Strict):
    """What a study file says, every default filled in.

    Args:
        name: of the study; a folder holds one study.
        base: the recipe all runs share. `output` is not part of it.
        grid: axis -> list of values. An axis is a key of the recipe (`seed`, `method`,
            `training.learning_rate`), or any name whose values are mappings with a `label` and the
            recipe keys that it sets together.
        baseline: the label of the method that the others are compared with.
        select, report: how the table is made.
        threads: CPU threads of every run, part of its identity: results must not depend on the
            number of workers.
        slurm: parameters for submitit, such as {timeout_min: 240, slurm_partition: gpu}.
        ray: resources for each Ray task, such as {num_gpus: 1}.
    """

    name: Text
    base: Annotated[dict[str, Any], Field(min_length=1)]
    grid: dict[str, list[Any]]
    baseline: Text
    select: Select = Field(default_factory=Select)
    report: Report
    threads: Count = 1
    slurm: dict[str, Any] = Field(default_factory=dict)
    ray: dict[str, Any] = Field(default_factory=dict)

    @field_validator("grid", mode="before")
    @classmethod
    def _axes_have_values(cls, grid: Any) -> Any:
        if not grid:
            raise InputError("the study is empty: it has no grid")
        for axis, values in grid.items() if isinstance(grid, dict) else ():
            if not isinstance(values, list):
                raise InputError(
                    f"axis {axis} is {values!r}; expected a list, such as [{values!r}]"
                )
            if not values:
                raise InputError(
                    f"axis {axis} has no values, so there is nothing to run; give one, or leave it "
                    "out"
                )
        return grid

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        select, report = self.select, self.report
        if select.axes is None:
            select.axes = [LEARNING_RATE] if LEARNING_RATE in self.grid else []
        for axis in select.axes:
            if axis not in self.grid:
                raise InputError(unknown(f"select.axes names {axis!r}", axis, self.grid, "Axes"))
        select.by = select.by or report.metric
        if report.greater_is_better is None:
            report.greater_is_better = rises(report.metric)
        return self


def rises(metric: str) -> bool:
    """Return whether a higher value of a metric of that name is better.

    >>> rises("eval_test_accuracy"), rises("eval_token_loss")
    (True, False)
    """
    return not metric.endswith(FALLS)


def read_study(file: str | Path, assignments: Sequence[str] = ()) -> Study:
    """Return the study in a YAML file, after `key=value` assignments such as base.model=FOLDER or
    grid.seed=[0,1]. `base` may be the path of a recipe."""
    values = read_file(Path(file), "study")
    if not isinstance(values, dict):
        raise InputError(
            f"{file} holds a {type(values).__name__}; expected a mapping of study keys"
        )
    values = dict(values)
    base = values.get("base")
    if isinstance(base, str):
        values["base"] = read_recipe(Path(file).parent / base)
    for assignment in once(assignments):
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
        given = dict(values)
        paths = given.pop("paths", None) or {}
        if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
            raise InputError(
                f"paths is {paths!r:.60}; expected a mapping of names to folders, files or hub "
                "names"
            )
        given |= {key: _with_paths(given[key], paths) for key in ("base", "grid") if key in given}
        return check(Study, given)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


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
