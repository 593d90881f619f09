"""Search over recipe fields with Optuna: each trial a run directory named by its configuration, as
in studies.

The search is a file in the output folder: killed and started again it goes on, and a trial whose
run is there is not trained again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from adaptive_lora.errors import AdaptiveLoraError, InputError, unknown
from adaptive_lora.files import once, read_file, set_key, write_json
from adaptive_lora.recipe.strict import Strict, check
from adaptive_lora.study import claims
from adaptive_lora.study.grid import expand
from adaptive_lora.study.outcomes import UnusableError, is_over, read_outcome, read_result
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.records import CLAIMS, PlannedRun
from adaptive_lora.study.study_file import Count, Report, Study, Text, rises
from adaptive_lora.study.worker import TRAIN, load, perform

STORAGE_FILE, TRIALS_FILE = "tune.log", "trials.json"
PARAMETERS = "lora_parameters"  # an objective that is no metric: fewer is better


class Range(Strict):
    """The numbers that a recipe key may take. Whole-number ends give whole numbers."""

    low: int | float
    high: int | float
    log: bool = False  # by factors and not by differences
    step: int | float | None = None

    @model_validator(mode="after")
    def _something_is_between(self) -> Self:
        said = f"{{low: {self.low}, high: {self.high}}}"
        if not self.low < self.high:
            raise InputError(f"{said}; expected low below high")
        if self.log and not (self.low > 0 and self.step is None):
            raise InputError(f"{said}; with log: true low must be above 0, and there is no step")
        return self


class Tuning(Strict):
    """What a tune file says.

    Args:
        name: of the search.
        base: the recipe all trials share.
        search: recipe key -> what it may be: a list of choices, or a `Range`.
        objectives: metrics, and `lora_parameters`. With several the result is a Pareto front.
        trials: how many in all.
        seed: of the search; the same seed proposes the same trials.
        threads: CPU threads of each run.
    """

    name: Text
    base: Annotated[dict[str, Any], Field(min_length=1)]
    search: dict[str, Range | list[Any]]
    objectives: Annotated[list[str], Field(min_length=1)]
    trials: Count = 20
    seed: int = 0
    threads: Count = 1

    @field_validator("search", mode="before")
    @classmethod
    def _spaces_are_lists_or_ranges(cls, search: Any) -> Any:
        if not search:
            raise InputError("search is empty; give recipe keys and what they may be")
        return (
            {key: _space(key, space) for key, space in search.items()}
            if isinstance(search, dict)
            else search
        )


def _space(key: str, space: Any) -> Range | list[Any]:
    if isinstance(space, Range) or (isinstance(space, list) and space):
        return space
    if not isinstance(space, dict):
        raise InputError(
            f"search.{key} is {space!r}; expected a list of choices, or {{low: NUMBER, high: "
            "NUMBER} with log: true or step: NUMBER"
        )
    try:
        return check(Range, space)
    except InputError as error:
        raise InputError(f"search.{key}: {error}") from None


@dataclass(frozen=True)
class Trial:
    """One trial: what was tried, its figures in the order of the objectives, and whether nothing
    beats it."""

    number: int
    run: str
    values: dict[str, Any]
    figures: list[float] | None  # None: the run failed, for the reason
    reason: str | None
    best: bool = False


def read_tuning(file: str | Path, assignments: list[str]) -> Tuning:
    """Return the search in a YAML file, after `key=value` assignments."""
    values = read_file(Path(file), "tune file")
    if not isinstance(values, dict):
        raise InputError(f"{file} holds a {type(values).__name__}; expected a mapping")
    for assignment in once(assignments):
        set_key(values, assignment)
    try:
        return check(Tuning, values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def tune(tuning: Tuning, output: str | Path, *, train: str = TRAIN) -> list[Trial]:
    """Run trials until `tuning.trials` are over, and return them all; the best, or those on the
    Pareto front, are marked.

    A run that fails is a failed trial, which the sampler learns nothing from. Raises `InputError`
    on a bad search, or without Optuna.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise InputError(
            "tune needs Optuna; get it with: pip install 'adaptive-lora[tune]'"
        ) from None
    folder = Path(output)
    _planned(tuning, _first_values(tuning))  # a wrong key is found before anything is made
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STORAGE_FILE).is_file():
        raise InputError(
            f"output folder {folder} is not empty and holds no search; choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: Any = [
        "maximize" if name != PARAMETERS and rises(name) else "minimize"
        for name in tuning.objectives
    ]
    storage = JournalStorage(JournalFileBackend(str(folder / STORAGE_FILE)))
    search: Any = optuna.create_study(
        storage=storage, study_name=tuning.name, directions=directions, load_if_exists=True
    )
    if [d.name.lower() for d in search.directions] != directions:
        raise InputError(f"{folder} holds a search with other objectives; choose another --output")
    function = load(train)
    for cut in search.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        # cut off; its run is taken up if it is proposed again
        search.tell(cut.number, state=optuna.trial.TrialState.FAIL)
        search.enqueue_trial(cut.params)
    while (number := _over(search)) < tuning.trials:
        search.sampler = _sampler(optuna, tuning, number)
        trial: Any = search.ask()
        planned = _planned(
            tuning, {key: _suggest(trial, key, space) for key, space in tuning.search.items()}
        )
        trial.set_user_attr("run", planned["id"])
        figures, reason = _figures(folder.resolve(), planned, tuning, function)
        if figures is None:
            trial.set_user_attr("reason", reason)
            search.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            search.tell(trial, figures)
    return _result(folder, search, tuning)


def _sampler(optuna: Any, tuning: Tuning, number: int) -> Any:
    """Return the sampler of the next trial, seeded for it: a search that was cut off proposes the
    same as one that was not."""
    kind = (
        optuna.samplers.NSGAIISampler if len(tuning.objectives) > 3 else optuna.samplers.TPESampler
    )
    # Far apart: searches of neighbouring seeds share no sampler.
    return kind(seed=tuning.seed * 100_003 + number)


def _over(search: Any) -> int:
    """Return how many trials are over: those with figures, and those whose run failed."""
    return sum(
        t.state.name == "COMPLETE" or "reason" in t.user_attrs
        for t in search.get_trials(deepcopy=False)
    )


def _figures(
    study: Path, planned: PlannedRun, tuning: Tuning, train: Any
) -> tuple[list[float] | None, str | None]:
    if not is_over(study, planned["id"]):
        claim = claims.take(study / CLAIMS, planned["id"])
        if claim is None:
            raise AdaptiveLoraError(
                f"another process works on run {planned['id']} in {study}; wait for it, or end it"
            )
        perform(study, planned, claim, train, threads=tuning.threads)
        claim.release()
    try:
        outcome = read_outcome(study, planned["id"])
        assert outcome is not None
        if outcome["status"] == "failed":
            return None, outcome["reason"]
        result = read_result(study, planned, outcome, threads=tuning.threads)
    except UnusableError as error:
        return None, str(error)
    figures = []
    for name in tuning.objectives:
        known = {PARAMETERS: result["lora_parameters"], **result["metrics"]}
        value = known.get(name)
        if value is None or not math.isfinite(value):
            raise InputError(
                unknown(f"the run has no metric {name!r}", name, sorted(known), "It has")
            )
        figures.append(float(value))
    return figures, None


def _result(folder: Path, search: Any, tuning: Tuning) -> list[Trial]:
    finished = [t for t in search.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    best = {t.number for t in search.best_trials} if finished else set()
    trials = [
        Trial(
            t.number,
            t.user_attrs["run"],
            dict(t.params),
            t.values and list(t.values),
            t.user_attrs.get("reason"),
            t.number in best,
        )
        for t in search.get_trials(deepcopy=False)
        if t.state.name == "COMPLETE" or "reason" in t.user_attrs
    ]
    rows = [trial.__dict__ for trial in trials]
    record = {"name": tuning.name, "objectives": tuning.objectives, "trials": rows}
    write_json(folder / TRIALS_FILE, record)
    return trials


def _planned(tuning: Tuning, values: Mapping[str, Any]) -> PlannedRun:
    """Return the run of one trial, its configuration checked."""
    grid = {key: [value] for key, value in values.items()}
    method = next(recipe for _, recipe in expand(tuning.base, grid)).get("method") or {
        "name": "lora"
    }
    study = Study(
        name=tuning.name,
        base=tuning.base,
        grid=grid,
        baseline=str(method.get("name")),
        report=Report(metric="none"),
        threads=tuning.threads,
    )
    return make_plan(study)[0]


def _suggest(trial: Any, key: str, space: Range | list[Any]) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(key, space.low, space.high, log=space.log, step=space.step or 1)
    return trial.suggest_float(key, space.low, space.high, log=space.log, step=space.step)


def _first_values(tuning: Tuning) -> dict[str, Any]:
    return {
        key: space[0] if isinstance(space, list) else space.low
        for key, space in tuning.search.items()
    }
