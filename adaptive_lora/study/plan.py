"""The plan of a study: every run with its resolved configuration and the hash that names it.
Written once, read by workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from adaptive_lora.errors import InputError, IntegrityError, nearest, unknown
from adaptive_lora.files import read_file, write_text
from adaptive_lora.naming import flatten
from adaptive_lora.recipe.strict import Strict, check
from adaptive_lora.study.grid import expand, is_labelled
from adaptive_lora.study.records import PLAN_FILE, STUDY_FILE, VERSION, After, PlannedRun
from adaptive_lora.study.study_file import Study

AFTER = "after"  # the one key of a run that is none of its recipe
UNUSED = "set by the study"  # the recipe must name an output; the worker does


def make_plan(study: Study) -> list[PlannedRun]:
    """Return the runs of a study in the order of its grid, each configuration checked.

    Raises `InputError` on an unknown axis or key (with the nearest name), a value that the recipe
    refuses, a baseline that is no method of the study, or two runs of one configuration.
    """
    for axis, values in study.grid.items():
        if not all(is_labelled(value) for value in values):
            _check_axis(axis)
    return _checked(
        study,
        [_planned(study, labels, recipe) for labels, recipe in expand(study.base, study.grid)],
    )


def plan_of(study: Study, recipes: Iterable[Mapping[str, Any]]) -> list[PlannedRun]:
    """Return the runs of recipes made by a function. The axes are the keys in which they differ;
    `method` is one axis."""
    resolved = [_resolve(recipe, f"run {number}") for number, recipe in enumerate(recipes, start=1)]
    flat = [flatten(recipe) for recipe in resolved]
    keys = _differing(flat)
    arguments = [
        k
        for k in keys
        if k.startswith(("method.", "after."))
        and k not in ("method.name", "method.rank", "method.budget")
    ]
    plan = []
    for recipe, one in zip(resolved, flat, strict=True):
        told = " ".join(f"{k.removeprefix('method.')} {one[k]}" for k in arguments if k in one)
        labels: dict[str, Any] = {
            "method": " ".join(filter(None, [recipe["method"]["name"], told]))
        }
        labels |= {k: one.get(k) for k in keys if k not in arguments and k != "method.name"}
        plan.append(_planned(study, labels, recipe))
    return _checked(study, plan)


def _differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of which there are several values; a key that is missing is None."""
    keys = dict.fromkeys(key for one in flat for key in one)
    return [key for key in keys if len({str(one.get(key)) for one in flat}) > 1]


def _checked(study: Study, plan: list[PlannedRun]) -> list[PlannedRun]:
    if not plan:
        raise InputError(f"study {study.name}: there is nothing to run")
    seen: dict[str, PlannedRun] = {}
    for one in plan:
        if (first := seen.setdefault(one["id"], one)) is not one:
            raise InputError(
                f"study {study.name}: two runs have one configuration ({one['id']}): {_say(first)} "
                f"and {_say(one)}. Do two axes set one key, or does an axis set a key that its "
                "method does not read?"
            )
    for one in plan:
        if "after" in one and one["after"]["run"] not in seen:
            raise InputError(
                f"study {study.name}: {_say(one)} is made of a run that is not in the study; add "
                "it to the grid, or change after.run, the keys in which its recipe differs"
            )
    methods = list(dict.fromkeys(one["method"] for one in plan))
    if study.baseline not in methods:
        raise InputError(
            unknown(
                f"study {study.name}: baseline is {study.baseline!r}",
                study.baseline,
                methods,
                "Methods of the study",
            )
        )
    return plan


def _say(one: PlannedRun) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in one["settings"].items())


def _check_axis(axis: str) -> None:
    """Raise `InputError` unless `axis` is a key of the recipe. What is inside `method` depends on
    the method."""
    known = [*recipe_keys(), AFTER]
    if axis in known or axis.startswith("method."):
        return
    near = [key for key in known if key.rsplit(".", 1)[-1] == axis]
    guess = f" Did you mean {near[0]!r}?" if near else nearest(axis, known)
    raise InputError(
        f"study: unknown axis {axis!r}.{guess} An axis is a key of the recipe, such as method, "
        "method.rank, seed, training.learning_rate; or any name, if each of its values is a "
        "mapping with a label and the keys to set"
    )


def recipe_keys() -> list[str]:
    """Return every key of a recipe, dotted: those of its sections, and the fields of
    `TrainingArguments`."""
    from pydantic import BaseModel
    from transformers import TrainingArguments

    from adaptive_lora.recipe.config import RunConfig

    keys = []
    for name, info in RunConfig.model_fields.items():
        keys.append(name)
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{inner}" for inner in kind.model_fields]
    training = [f"training.{f.name}" for f in dataclasses.fields(TrainingArguments) if f.init]
    return [
        key
        for key in keys + training + ["method.rank", "method.budget"]
        if key not in ("output", "training")
    ]


def _resolve(recipe: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return a recipe with every default, without `output`; `after` is left as it is."""
    from adaptive_lora.recipe.config import parse

    rest = {key: value for key, value in recipe.items() if key != AFTER}
    config = parse({**rest, "output": UNUSED}, origin=origin)
    if config.task is None:
        try:
            task = _guessed(config.model, config.trust_remote_code, config.data.model_dump_json())
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None
        config = config.with_task(task)
    resolved = config.model_dump(mode="json")
    del resolved["output"]
    return resolved | ({AFTER: recipe[AFTER]} if recipe.get(AFTER) is not None else {})


@functools.cache  # a grid has few of these, and thousands of runs
def _guessed(model: str, trust_remote_code: bool, data: str) -> Any:
    """Return the task of recipes with this model and data (JSON) that name none."""
    from adaptive_lora.recipe.config import parse
    from adaptive_lora.tasks.guess import with_task

    values = {"model": model, "trust_remote_code": trust_remote_code, "data": json.loads(data)}
    return with_task(parse({**values, "output": UNUSED}))[0].task


class _After(Strict):
    """`after` in a recipe of a study; see the module `after`."""

    do: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]  # module:function
    # keys in which the other run's recipe differs
    run: dict[str, Any] = Field(default_factory=dict)


def _after(given: Any, config: Mapping[str, Any], origin: str, *, threads: int) -> After:
    """Return what a run is made by, the run it is made of found by its recipe."""
    try:
        asked = check(_After, given)
    except InputError as error:
        raise InputError(f"{origin}: after: {error}") from None
    _, source = next(expand(config, {key: [value] for key, value in asked.run.items()}))
    resolved = _resolve(source, f"{origin}, after.run")
    return {"run": identity(resolved, threads=threads), "do": asked.do}


def _planned(study: Study, labels: dict[str, Any], recipe: Mapping[str, Any]) -> PlannedRun:
    origin = (
        f"study {study.name}, run {', '.join(f'{axis} {label}' for axis, label in labels.items())}"
    )
    config = _resolve(recipe, origin)
    given = config.pop(AFTER, None)
    after = None if given is None else _after(given, config, origin, threads=study.threads)
    method, model = config["method"], config["model"]
    budget = f"rank {method['rank']}" if method.get("rank") is not None else "as the method says"
    budget = f"{method['budget']:,} parameters" if method.get("budget") is not None else budget
    planned: PlannedRun = {
        "id": identity(config, threads=study.threads, after=after),
        "settings": labels,
        "method": str(labels.get("method", method["name"])),
        "task": str(labels.get("task", config["preset"] or config["task"])),
        "model": str(labels.get("model", Path(model).name if Path(model).is_dir() else model)),
        "budget": str(labels.get("budget", budget)),
        "learning_rate": config["training"].get("learning_rate"),
        "seed": config["seed"],
        "config": config,
    }
    if after is not None:
        planned["after"] = after
    return planned


def identity(config: Mapping[str, Any], *, threads: int, after: After | None = None) -> str:
    """Return the name of a run: the SHA-256 of all that decides its result, first 16 digits.
    `output` is left out."""
    # The number of threads decides the last bits of sums, and so belongs to what a run is.
    rest = {key: value for key, value in config.items() if key != "output"}
    decides = {"config": rest, "threads": threads} | ({} if after is None else {AFTER: after})
    text = json.dumps(decides, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_plan(folder: Path, study: Study, plan: list[PlannedRun]) -> None:
    """Write study.yaml and plan.json.

    Raises `InputError` when the folder holds something else, or another study, `IntegrityError`
    when a plan of another version lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file; expected a folder")
    before = folder / STUDY_FILE
    if before.is_file():
        name = _read_yaml(before).get("name")
        if name != study.name:
            raise InputError(
                f"{folder} holds the study {name!r}, not {study.name!r}; choose another --output"
            )
        with contextlib.suppress(ValueError, OSError):  # a damaged plan is written anew
            _check_version(folder, json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")))
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"output folder {folder} is not empty and holds no study; choose another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(before, yaml.safe_dump(study.model_dump(), sort_keys=False, allow_unicode=True))
        head = {"version": VERSION, "threads": study.threads, "axes": axes_of(plan)}
        lines = ",\n".join(json.dumps(one, allow_nan=False) for one in plan)
        write_text(folder / PLAN_FILE, json.dumps(head)[:-1] + ', "runs": [\n' + lines + "\n]}\n")
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error}") from error


def axes_of(plan: Iterable[PlannedRun]) -> dict[str, list[Any]]:
    """Return axis -> its labels, in the order of the plan."""
    axes: dict[str, list[Any]] = {}
    for one in plan:
        for axis, label in one["settings"].items():
            labels = axes.setdefault(axis, [])
            if label not in labels:
                labels.append(label)
    return axes


def _check_version(folder: str | Path, plan: Any) -> None:
    """Raise `IntegrityError` for a plan of another version, whose runs are not ours to judge."""
    version = plan.get("version") if isinstance(plan, dict) else None
    if version != VERSION:
        raise IntegrityError(
            f"{Path(folder) / PLAN_FILE} is of format {version!r}; this version reads format "
            f"{VERSION}: go on with the adaptive-lora that wrote it, or choose another --output"
        )


def read_plan(folder: str | Path) -> dict[str, Any]:
    """Return plan.json: {version, threads, axes, runs}. Raises `InputError` without one,
    `IntegrityError` on a damaged one."""
    file = Path(folder) / PLAN_FILE
    if not file.is_file():
        raise InputError(f"{folder} holds no study: it has no {PLAN_FILE}")
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        _check_version(folder, plan)
        if not all(
            one["id"] == identity(one["config"], threads=plan["threads"], after=one.get(AFTER))
            for one in plan["runs"]
        ):
            raise ValueError("a run is not named by its configuration")
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{file} is damaged ({error}); give the study file again to write it anew"
        ) from None
    return plan


def read_study_head(folder: str | Path) -> dict[str, Any]:
    """Return study.yaml as a mapping."""
    return _read_yaml(Path(folder) / STUDY_FILE)


def _read_yaml(file: Path) -> dict[str, Any]:
    values = read_file(file, "study")
    if not isinstance(values, dict):
        raise IntegrityError(f"{file} is damaged: it holds no mapping")
    return values
