"""Search over recipe fields with Optuna: each trial a run directory named by its configuration, as
in studies.

The search is a file in the output folder: killed and started again it goes on, and a trial whose
run is there is not trained again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from adaptive_lora.errors import AdaptiveLoraError, InputError, nearest, unknown
from adaptive_lora.files import read_file, set_key, write_json
from adaptive_lora.study import claims
from adaptive_lora.study.grid import expand
from adaptive_lora.study.outcomes import UnusableError, is_over, read_outcome, read_result
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.records import CLAIMS, PlannedRun
from adaptive_lora.study.study_file import Study, rises
from adaptive_lora.study.worker import TRAIN, load, perform

STORAGE_FILE, TRIALS_FILE = "tune.log", "trials.json"
PARAMETERS = "lora_parameters"  # an objective that is no metric: fewer is better
RANGE_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a tune file says.

    Args:
        name: of the search.
        base: the recipe all trials share.
        search: recipe key -> what it may be: a list of choices, or {low, high} with `log: true` or
            a `step`. Whole-number ends give whole numbers.
        objectives: metrics, and `lora_parameters`. With several the result is a Pareto front.
        trials: how many in all.
        seed: of the search; the same seed proposes the same trials.
        threads: CPU threads of each run.
    """

    name: str
    base: dict[str, Any]
    search: dict[str, Any]
    objectives: list[str] = field(default_factory=list)
    trials: int = 20
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.search, dict) or not self.search:
            raise InputError("tune: search is empty; give recipe keys and what they may be")
        if not isinstance(self.objectives, list) or not self.objectives:
            raise InputError(
                "tune: objectives is empty; expected a list such as [eval_accuracy, "
                "lora_parameters]"
            )
        for name in ("trials", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"tune: {name} is {value!r}; expected a whole number >= 1")
        for key, space in self.search.items():
            _check_space(key, space)


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
    for assignment in assignments:
        set_key(values, assignment)
    known = list(Tuning.__dataclass_fields__)
    for key in values:
        if key not in known:
            raise InputError(unknown(f"{file}: unknown key {key}", key, known, "Known here"))
    for key in ("name", "base"):
        if not values.get(key):
            raise InputError(f"{file}: {key} is missing")
    try:
        return Tuning(**values)
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
        metric="none",
        threads=tuning.threads,
    )
    return make_plan(study)[0]


def _check_space(key: str, space: Any) -> None:
    if isinstance(space, list):
        if not space:
            raise InputError(f"tune: search.{key} is an empty list; give choices")
        return
    ends = (
        "expected a list of choices, or {low: NUMBER, high: NUMBER} with log: true or step: NUMBER"
    )
    if not isinstance(space, dict):
        raise InputError(f"tune: search.{key} is {space!r}; {ends}")
    for name in space:
        if name not in RANGE_KEYS:
            raise InputError(
                f"tune: search.{key} has {name!r}.{nearest(str(name), RANGE_KEYS)} {ends}"
            )
    low, high = space.get("low"), space.get("high")
    if not (_is_number(low) and _is_number(high) and low < high):
        raise InputError(f"tune: search.{key} is {space!r}; {ends}, low below high")
    if space.get("log") and not low > 0:
        raise InputError(f"tune: search.{key} is {space!r}; with log: true low must be above 0")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _suggest(trial: Any, key: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    low, high, rest = (
        space["low"],
        space["high"],
        {k: v for k, v in space.items() if k not in ("low", "high")},
    )
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, **rest)
    return trial.suggest_float(key, low, high, **rest)


def _first_values(tuning: Tuning) -> dict[str, Any]:
    return {
        key: space[0] if isinstance(space, list) else space["low"]
        for key, space in tuning.search.items()
    }
