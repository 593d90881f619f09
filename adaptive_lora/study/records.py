"""What a study directory holds, and the record that `analyse` makes of it. No torch.

STUDY_DIR/
  study.yaml        the study as resolved: name, base, grid, baseline, select, report, threads
  plan.json         every run: id, settings, resolved configuration
  claims/ID/N/      the N-th worker that took the run; see `claims`
  runs/ID/          the run directory, as `adaptive-lora train` makes it
  outcomes/ID.json  an `Outcome`, written when the run is over; with digests of its files
  logs/ID.log       what the run printed
  results.json      a `StudyRecord`: the same bytes however often the study was killed, and for any
                    number of workers
  costs.json        {ID: Costs}: seconds and bytes, which do differ
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

VERSION = 1
STUDY_FILE, PLAN_FILE, RESULTS_FILE, COSTS_FILE = (
    "study.yaml",
    "plan.json",
    "results.json",
    "costs.json",
)
RUNS, OUTCOMES, CLAIMS, LOGS = "runs", "outcomes", "claims", "logs"

Status = Literal["ok", "failed", "missing", "skipped"]
"""ok; failed, with the reason; missing: not run yet; skipped: its files are not what the run left,
and count for nothing."""
Verdict = Literal["better", "worse", "tie"]


class Costs(TypedDict):
    """What a run took. `attempts` above 1: it was cut off and resumed, and the seconds are those of
    the last attempt."""

    train_seconds: float | None
    peak_memory_bytes: int | None  # CUDA's allocator; without CUDA the resident set of the process
    attempts: int


class Outcome(TypedDict):
    """How a run ended. `files` has the SHA-256 of each file of the run directory that is read
    later."""

    version: int
    id: str
    status: Literal["ok", "failed"]
    reason: str | None
    files: dict[str, str]
    # of the costliest target: the unit in which budgets can differ
    component_parameters: int | None
    costs: Costs


class PlannedRun(TypedDict):
    """One run of the plan. `settings` has the label of its value on every axis; the flat keys are
    what tables group by."""

    id: str
    settings: dict[str, Any]
    method: str
    task: str
    model: str
    budget: str
    learning_rate: float | None
    seed: int
    config: dict[str, Any]  # the resolved recipe without `output`


class RunRow(TypedDict):
    """One run of the grid, whatever became of it. Where `status` is not ok, what the run does not
    have is None or empty."""

    id: str
    status: Status
    reason: str | None
    method: str
    task: str
    model: str
    budget: str
    learning_rate: float | None
    seed: int
    settings: dict[str, Any]
    # without seconds and speeds; eval_main, eval_test_main: the task's first metric
    metrics: dict[str, float | None]
    lora_parameters: int | None
    budget_parameters: int | None
    initial_ranks: dict[str, int]
    ranks: dict[str, int]
    steps: int | None
    memory: NotRequired[dict[str, Any] | None]  # exact bytes, as the run counted them


class Comparison(TypedDict):
    """A method against the baseline, pair by pair of equal seeds; the difference is method minus
    baseline."""

    pairs: int
    difference: float | None
    ci95: tuple[float, float] | None  # Student's t on the differences
    p_t: float | None  # paired t test: the verdict rests on this one
    p_bootstrap: float | None
    p_wilcoxon: float | None  # with n pairs never below 2^(1 - n)
    p_holm: float | None  # p_t, corrected over the methods of the same comparison
    noise_floor: float | None
    verdict: Verdict | None  # None: fewer than two pairs


class TableRow(TypedDict):
    """One method under one set of conditions (task, model, budget, and further axes in `settings`),
    over its seeds."""

    method: str
    task: str
    model: str
    budget: str
    settings: dict[str, Any]  # axes beside those above, selected ones excepted
    chosen: dict[str, Any]  # the selected axes: what the rule chose
    learning_rate: float | None
    trials: int  # settings tried before this one was chosen
    runs: list[str]  # ids of the runs behind the figures
    seeds: int  # runs that ended well
    failed: int
    mean: float | None
    sd: float | None
    ci95: tuple[float, float] | None
    lora_parameters: int | None  # the mean over seeds, where they differ
    # to the baseline's, within one component; None: nothing to compare with
    parameters_equal: bool | None
    note: str | None
    comparison: Comparison | None  # None for the baseline


class NoiseFloor(TypedDict):
    """The baseline against itself under other seeds: 95 % of such differences of two means lie
    within ± `floor`."""

    task: str
    model: str
    budget: str
    settings: dict[str, Any]
    seeds: int
    sd: float | None
    floor: float | None


class Selection(TypedDict):
    """How one setting a method was chosen for the table."""

    rule: str
    metric: str
    axes: list[str]
    description: str


class StudyHead(TypedDict):
    """What was asked."""

    name: str
    axes: dict[str, list[Any]]  # axis -> the labels of its values
    baseline: str
    metric: str
    greater_is_better: bool
    selection: Selection


class StudyRecord(TypedDict):
    """A whole study: a pure function of its directory."""

    version: int
    study: StudyHead
    environment: dict[str, Any]
    runs: list[RunRow]
    table: list[TableRow]
    noise_floor: list[NoiseFloor]
    wins: dict[str, dict[str, int]]  # method -> {"win", "tie", "loss"} over all comparisons
    notes: list[str]
    costs: NotRequired[dict[str, Costs]]  # id -> what it took; not in results.json
