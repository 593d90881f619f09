"""Studies: plans, hashes, claims, workers, and records that do not depend on who did the work or
what was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import study_data
import yaml
from model_folders import recipe
from study_data import INSTANT, Forked, finished, plan_in, study

from adaptive_lora.errors import AdaptiveLoraError, InputError, IntegrityError
from adaptive_lora.runs.run import run
from adaptive_lora.study import claims, executors
from adaptive_lora.study.analysis import analyse
from adaptive_lora.study.grid import expand
from adaptive_lora.study.outcomes import is_over
from adaptive_lora.study.plan import identity, make_plan, plan_of
from adaptive_lora.study.progress import Watch
from adaptive_lora.study.study import run_study, write_results
from adaptive_lora.study.study_file import parse_study, read_study
from adaptive_lora.study.worker import MAX_CRASHES, work

pytest_plugins = ("model_folders",)
METHODS = [{"name": "lora", "rank": 4}, {"name": "adalora", "rank": 4}]


@pytest.fixture(autouse=True)
def _workers_find_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(study_data.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("adaptive_lora.study.study.POLL", 0.02)
    monkeypatch.setattr("adaptive_lora.study.worker.WAIT", 0.02)


# -------------------------------------------------------------------------------------------------
# the plan


def test_the_grid_is_the_product_and_a_hash_is_of_what_decides_the_result() -> None:
    plan = make_plan(study())
    assert len({one["id"] for one in plan}) == len(plan) == 12
    assert plan[0]["settings"] == {"method": "lora", "training.learning_rate": 1e-3, "seed": 0}
    first = plan[0]["config"]
    assert plan[0]["id"] == identity({**first, "output": "elsewhere"}, threads=1)
    assert identity(first, threads=1) != identity(first, threads=2)
    assert identity({**first, "seed": 7}, threads=1) != plan[0]["id"]
    assert identity(dict(reversed(first.items())), threads=1) == plan[0]["id"]


def test_settings_that_belong_together_are_one_axis() -> None:
    grid = {
        "method.rank": [2, 4],  # set after `method`, whatever the order
        "data": [
            {"label": "a", "data.train": "a.csv", "data.text": "t"},
            {"label": "b", "data.train": "b.csv"},
        ],
        "method": [{"name": "lora"}],
    }
    base = study().base
    runs = list(expand(base, grid))
    assert [labels for labels, _ in runs][1] == {"method.rank": 2, "data": "b", "method": "lora"}
    assert [recipe["data"]["train"] for _, recipe in runs] == ["a.csv", "b.csv"] * 2
    assert runs[0][1]["data"] == {"train": "a.csv", "text": "t", "label": "label"}
    assert runs[-1][1]["method"] == {"name": "lora", "rank": 4}
    assert base == study().base  # untouched


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown axis": (
        {"grid": {"method": METHODS, "sede": [0]}},
        "unknown axis 'sede'. Did you mean 'seed'",
    ),
    "unqualified": ({"grid": {"learning_rate": [1e-3]}}, "Did you mean 'training.learning_rate'"),
    "unknown training key": (
        {"grid": {"training.lerning_rate": [1]}},
        "Did you mean 'training.learning_rate'",
    ),
    "no list": ({"grid": {"seed": 3}}, r"axis seed is 3; expected a list, such as \[3\]"),
    "no values": ({"grid": {"method": METHODS, "seed": []}}, "axis seed has no values"),
    "empty": ({"grid": {}}, "the study is empty"),
    "twice": ({"grid": {"method": METHODS, "seed": [0, 0]}}, "axis seed has the value 0 twice"),
    "one hash": (
        {"grid": {"method": METHODS, "training.learning_rate": [1e-3, "1e-3"]}},
        "two runs have one configuration .* method lora, training.learning_rate 0.001 and method "
        "lora",
    ),
    "baseline": ({"baseline": "lorra"}, "baseline is 'lorra'. Did you mean 'lora'"),
    "a value the recipe refuses": (
        {"grid": {"method": METHODS, "seed": [-1]}},
        "run method lora, seed -1: seed is -1",
    ),
    "unknown method": ({"grid": {"method": [{"name": "adalorra"}]}}, "Did you mean 'adalora'"),
    "rule": (
        {"select": {"rule": "best_men"}},
        "select.rule is 'best_men'. Did you mean 'best_mean'",
    ),
    "selected axis": (
        {"select": {"axes": ["seeds"]}},
        "select.axes names 'seeds'. Did you mean 'seed'",
    ),
    "no metric": ({"report": {}}, "report.metric is missing"),
    "unknown key": ({"wokers": 2}, "unknown key wokers"),
    "unknown inner key": (
        {"select": {"bye": "x"}},
        "unknown key select.bye. Did you mean 'by'. Known here: axes, by, rule",
    ),
    "all at once": ({"report": {}, "name": ""}, "name is '': .*; report.metric is missing"),
    "threads": ({"threads": 0}, "threads is 0"),
    "section": ({"select": ["a"]}, r"select is \['a'\]; expected a mapping"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_studies_are_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**study().model_dump(), "select": {}, **changes}))
    with pytest.raises(InputError, match=message):
        run_study(read_study(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_set_changes_any_key_and_axes_keep_their_dots(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(study().base))
    file.write_text(yaml.safe_dump({**study().model_dump(), "base": "recipe.yaml"}))
    read = read_study(
        file, ["base.model=elsewhere", "grid.training.learning_rate=[0.5]", "threads=2"]
    )
    assert (read.base["model"], read.grid["training.learning_rate"], read.threads) == (
        "elsewhere",
        [0.5],
        2,
    )
    assert parse_study(read.model_dump()).model_dump() == read.model_dump()


def test_paths_are_put_for_their_names(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    values = study().model_dump()
    values["base"] = {**values["base"], "model": "$encoder"}
    values["grid"] = {**values["grid"], "data": [{"label": "a", "data.train": "$data/a.csv"}]}
    file.write_text(yaml.safe_dump({**values, "paths": {"encoder": "hub/name", "data": "runs"}}))
    read = read_study(file, ["paths.data=/elsewhere"])
    assert read.base["model"] == "hub/name"
    assert read.grid["data"] == [{"label": "a", "data.train": "/elsewhere/a.csv"}]
    with pytest.raises(
        InputError, match=r"\$encodr in '\$encodr' is not among paths. Did you mean 'encoder'"
    ):
        read_study(file, ["base.model=$encodr"])


def test_a_function_makes_recipes_and_their_differences_are_the_axes(tmp_path: Path) -> None:
    base = {**study().base, "training": {"learning_rate": 1e-3}}
    recipes = [
        {**base, "method": m, "seed": s}
        for m in [*METHODS, {"name": "adalora", "rank": 4, "every": 2}]
        for s in (0, 1)
    ]
    plan = plan_of(study(), recipes)
    assert [one["settings"] for one in plan[::2]] == [
        {"method": "lora", "seed": 0},
        {"method": "adalora", "seed": 0},
        {"method": "adalora every 2", "seed": 0},
    ]
    record = run_study(
        study(), tmp_path / "s", recipes=lambda: recipes[:4], executor=Forked, train=INSTANT
    )
    assert [row["method"] for row in record["table"]] == ["lora", "adalora"]
    with pytest.raises(InputError, match="nothing to run"):
        run_study(study(), tmp_path / "t", recipes=list)


# -------------------------------------------------------------------------------------------------
# claims


def test_of_many_claimants_one_succeeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for run in map(str, range(20)):
            taken = [
                c for c in pool.map(lambda _, run=run: claims.take(tmp_path, run), range(8)) if c
            ]
            assert len(taken) == 1
            assert taken[0].number == 0


def test_a_claim_of_a_living_process_holds_and_of_a_dead_one_is_taken_over_once(
    tmp_path: Path,
) -> None:
    assert claims.take(tmp_path, "r") is not None
    assert claims.take(tmp_path, "r") is None  # this process lives
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    # that number, if anybody's now, is not of that time
    _own(tmp_path / "r" / "0", pid=dead.pid, started=1.0)
    again = claims.take(tmp_path, "r")
    assert again is not None
    assert again.number == 1
    assert claims.take(tmp_path, "r") is None
    assert not claims.Claim(tmp_path / "r" / "0").in_force()
    assert claims.attempts(tmp_path / "r") == 2


def test_elsewhere_the_heartbeat_decides(tmp_path: Path) -> None:
    assert claims.take(tmp_path, "r") is not None
    _own(tmp_path / "r" / "0", machine="another")
    assert claims.take(tmp_path, "r") is None
    old = time.time() - claims.STALE_AFTER - 10
    os.utime(tmp_path / "r" / "0" / claims.OWNER_FILE, (old, old))
    taken = claims.take(tmp_path, "r")
    assert taken is not None
    taken.release()
    assert claims.attempts(tmp_path / "r") == 1  # given back: not an attempt
    assert claims.take(tmp_path, "r") is not None


def _own(claim: Path, **changes: Any) -> None:
    owner = json.loads((claim / claims.OWNER_FILE).read_text())
    (claim / claims.OWNER_FILE).write_text(json.dumps({**owner, **changes}))


def test_a_heart_beats_and_stops_when_superseded(tmp_path: Path) -> None:
    claim = claims.take(tmp_path, "r")
    assert claim is not None
    os.utime(claim.folder / claims.OWNER_FILE, (1, 1))
    lost: list[int] = []
    with claims.Heartbeat(claim, beat=0.02, sample=0.01, lost=lambda: lost.append(1)) as heart:
        _until(lambda: (claim.folder / claims.OWNER_FILE).stat().st_mtime > 1)
        assert not lost
        (tmp_path / "r" / "1").mkdir()
        _until(lambda: bool(lost))
    assert heart.peak_rss > 1_000_000


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


# -------------------------------------------------------------------------------------------------
# records


def test_a_study_finds_the_planted_difference_at_the_rate_chosen_on_validation(
    tmp_path: Path,
) -> None:
    record = finished(tmp_path / "s")
    lora, adalora = record["table"]
    assert (lora["method"], lora["comparison"], lora["trials"], lora["seeds"]) == (
        "lora",
        None,
        2,
        3,
    )
    assert adalora["learning_rate"] == 1e-3
    assert adalora["chosen"] == {"training.learning_rate": 1e-3}
    comparison = adalora["comparison"]
    assert comparison is not None
    assert comparison["verdict"] == "better"
    assert comparison["difference"] == pytest.approx(0.05, abs=0.02)
    assert comparison["p_wilcoxon"] == 0.25
    assert adalora["parameters_equal"] is True
    assert record["wins"] == {"adalora": {"win": 1, "tie": 0, "loss": 0}}
    assert (
        "the best mean over seeds of eval_accuracy (best_mean), of 2 tried; reported: "
        "eval_test_accuracy" in record["notes"][0]
    )
    assert all("eval_runtime" not in run["metrics"] for run in record["runs"])
    assert (
        record["runs"][0]["metrics"]["eval_test_main"]
        == record["runs"][0]["metrics"]["eval_test_accuracy"]
    )


def test_a_planted_tie_is_a_tie_and_one_metric_for_both_purposes_is_said(tmp_path: Path) -> None:
    grid = {**study().grid, "method": [METHODS[0], {"name": "linear_decay", "rank": 4}]}
    record = finished(tmp_path / "s", study(grid=grid, select={}))
    assert record["table"][1]["comparison"]["verdict"] == "tie"
    assert any(
        "both chose the settings and is reported: the figures are optimistic" in note
        for note in record["notes"]
    )


def test_a_falling_metric_is_better_when_lower(tmp_path: Path) -> None:
    falling = study(report={"metric": "eval_test_accuracy", "greater_is_better": False})
    assert finished(tmp_path / "s", falling)["table"][1]["comparison"]["verdict"] == "worse"
    assert study(report={"metric": "eval_test_perplexity"}).report.greater_is_better is False


def test_unequal_parameters_and_steps_are_said(tmp_path: Path) -> None:
    grid = {**study().grid, "method": [METHODS[0], {"name": "adalora", "rank": 8}]}
    row = finished(tmp_path / "s", study(grid=grid))["table"][1]
    assert row["parameters_equal"] is False
    assert row["note"] == "2.00 × the LoRA parameters of lora: not an equal budget"


def test_one_component_more_is_equal_and_two_are_not() -> None:
    from adaptive_lora.study.table import make_table

    head = {
        "name": "s", "axes": {}, "baseline": "lora", "metric": "m", "greater_is_better": True,
        "selection": {"rule": "best_mean", "metric": "m", "axes": [], "description": ""},
    }  # fmt: skip
    for more, equal in ((0, True), (768, True), (-768, True), (769, False)):
        runs = [
            {
                "id": f"{method}{seed}", "status": "ok", "method": method, "task": "t",
                "model": "m", "budget": "b",
                "seed": seed, "learning_rate": 1.0, "settings": {},
                "metrics": {"m": 0.5 + seed}, "steps": 9,
                "lora_parameters": 10_000 + extra,
            }
            for method, extra in (("lora", 0), ("other", more)) for seed in (0, 1)
        ]  # fmt: skip
        table = make_table(head, runs, {"lora0": 768, "other0": 512})  # type: ignore[arg-type]
        assert table.rows[1]["parameters_equal"] is equal


def test_a_difference_between_unlike_settings_is_said_at_equal_ones() -> None:
    from adaptive_lora.study.table import make_table

    head = {
        "name": "s", "axes": {}, "baseline": "lora", "metric": "test", "greater_is_better": True,
        "selection": {"rule": "best_mean", "metric": "eval_accuracy", "axes": ["rate"],
                      "description": ""},
    }  # fmt: skip

    def note(validation: dict[tuple[str, int], float], gain: float) -> str | None:
        runs = [
            {
                "id": f"{method}{rate}{seed}", "status": "ok", "method": method, "task": "t",
                "model": "m", "budget": "b",
                "seed": seed, "learning_rate": rate, "settings": {"rate": rate}, "steps": 9,
                "lora_parameters": 9,
                "metrics": {
                    "eval_accuracy": validation[method, rate],
                    "test": seed / 100
                    + 0.4 * rate
                    + (gain + seed / 1000 if method == "other" else 0.0),
                },
            }
            for method in ("lora", "other") for rate in (1, 2) for seed in (0, 1, 2)
        ]  # fmt: skip
        return make_table(head, runs, {}).rows[1]["note"]  # type: ignore[arg-type]

    apart = {("lora", 1): 0.8, ("lora", 2): 0.7, ("other", 1): 0.7, ("other", 2): 0.8}
    alike = {("lora", 1): 0.8, ("lora", 2): 0.7, ("other", 1): 0.8, ("other", 2): 0.7}
    assert (
        note(apart, 0.0)
        == "chosen at another setting than lora; differences at equal ones: +0.001 at rate 1; "
        "+0.001 at rate 2"
    )
    assert note(alike, 0.0) is None
    assert note(alike, 0.5) is None


def test_failed_runs_are_rows_with_their_reason_and_fail_nobody_else(tmp_path: Path) -> None:
    grid = {**study().grid, "training.learning_rate": [1e-3, 2.0]}
    record = finished(tmp_path / "s", study(grid=grid))
    failed = [run for run in record["runs"] if run["status"] == "failed"]
    assert len(failed) == 6
    # without the place of the study
    assert failed[0]["reason"] == f"diverged in runs/{failed[0]['id']}"
    assert [(row["learning_rate"], row["seeds"], row["failed"]) for row in record["table"]] == [
        (1e-3, 3, 0)
    ] * 2
    record = finished(
        tmp_path / "t", study(grid={**study().grid, "data.train": ["refused.csv", "good.csv"]})
    )
    refused = [run for run in record["runs"] if run["status"] == "failed"]
    assert [run["reason"] for run in refused] == ["refused.csv has no column 'text'"] * 12
    assert [row["mean"] is None for row in record["table"]] == [True, True, False, False]
    assert "6 runs behind this table failed" in record["notes"][-1]


def test_an_unexpected_error_is_a_row_too(tmp_path: Path) -> None:
    plan_in(tmp_path, study())

    def crash(config: Any, *, resume: bool = False) -> None:
        if config.seed == 1:
            raise RuntimeError("CUDA out of memory")
        study_data.train(config)

    work(tmp_path, crash)
    reasons = [run["reason"] for run in analyse(tmp_path)["runs"] if run["status"] == "failed"]
    assert reasons == ["RuntimeError: CUDA out of memory"] * 4
    assert "Traceback" in "".join(log.read_text() for log in (tmp_path / "logs").glob("*.log"))


def _edit(text: str) -> str:
    return text.replace('"eval_test_accuracy": 0.', '"eval_test_accuracy": 0.9')


DAMAGE: dict[str, tuple[str, Callable[[str], str], str]] = {
    "truncated": (
        "runs/{}/result.json",
        lambda text: text[:100],
        "result.json is not as the run left it",
    ),
    "edited by hand": (
        "runs/{}/result.json",
        _edit,
        "result.json is not as the run left it: it was changed",
    ),
    "another version": (
        "outcomes/{}.json",
        lambda text: text.replace('"version": 1', '"version": 99'),
        "is of format 99; this version reads format 1",
    ),
    "broken outcome": ("outcomes/{}.json", lambda text: text[:20], "outcomes/.* is damaged"),
    "edited config": (
        "runs/{}/config.yaml",
        lambda text: text + "\n",
        "config.yaml is not as the run left it",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_named_and_skipped_and_the_rest_is_unharmed(case: str, tmp_path: Path) -> None:
    whole = finished(tmp_path / "s")
    name, change, message = DAMAGE[case]
    victim = whole["table"][1]["runs"][0]
    file = tmp_path / "s" / name.format(victim)
    file.write_text(change(file.read_text()))
    record = analyse(tmp_path / "s")
    rows = {run["id"]: run for run in record["runs"]}
    assert rows[victim]["status"] == "skipped"
    assert any(victim in note and "skipped" in note for note in record["notes"])
    assert re.search(message, str(rows[victim]["reason"]))
    assert [run for run in record["runs"] if run["id"] != victim] == [
        r for r in whole["runs"] if r["id"] != victim
    ]
    assert record["table"][0] == whole["table"][0]
    assert record["table"][1]["seeds"] == 2


def test_run_directories_from_elsewhere_are_named_and_left_out(tmp_path: Path) -> None:
    finished(tmp_path / "s")
    other = finished(tmp_path / "o", study(grid={**study().grid, "seed": [7]}))["runs"][0]["id"]
    shutil.copytree(tmp_path / "o" / "runs" / other, tmp_path / "s" / "runs" / other)
    record = analyse(tmp_path / "s")
    assert f"not of this study and left out: {other} in runs." in record["notes"]
    assert record["table"] == analyse(tmp_path / "s")["table"]
    mine = record["runs"][0]["id"]  # another run under the name of one of ours
    shutil.rmtree(tmp_path / "s" / "runs" / mine)
    shutil.copytree(tmp_path / "o" / "runs" / other, tmp_path / "s" / "runs" / mine)
    assert analyse(tmp_path / "s")["runs"][0]["status"] == "skipped"


def test_a_folder_that_was_there_before_the_run_is_neither_used_nor_removed(tmp_path: Path) -> None:
    first = plan_in(tmp_path, study())[0]
    (tmp_path / "runs" / first).mkdir(parents=True)
    (tmp_path / "runs" / first / "precious.txt").write_text("mine")
    work(tmp_path, study_data.train)
    row = analyse(tmp_path)["runs"][0]
    assert row["status"] == "failed"
    assert "was there before the run; move it away, and use --retry-failed" in str(row["reason"])
    assert (tmp_path / "runs" / first / "precious.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no study"):
        run_study(study(), tmp_path)
    finished(tmp_path / "s")
    with pytest.raises(InputError, match="holds the study 'made up', not 'another'"):
        run_study(study(name="another"), tmp_path / "s")
    (tmp_path / "s" / "plan.json").write_text('{"version": 99}')
    with pytest.raises(IntegrityError, match="is of format 99; this version reads format 1"):
        analyse(tmp_path / "s")
    with pytest.raises(IntegrityError, match=r"format 99.*go on with the adaptive-lora that wrote"):
        run_study(study(), tmp_path / "s")
    assert (tmp_path / "s" / "plan.json").read_text() == '{"version": 99}'  # not ours to replace
    (tmp_path / "s" / "plan.json").write_text('{"version": 1')
    with pytest.raises(IntegrityError, match="is damaged"):
        analyse(tmp_path / "s")
    with pytest.raises(InputError, match="holds no study"):
        analyse(tmp_path / "nowhere")


def test_a_larger_grid_does_only_what_is_missing_and_failures_wait_to_be_retried(
    tmp_path: Path,
) -> None:
    finished(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "runs").rglob("*")}
    grid = {**study().grid, "seed": [0, 1, 2, 3], "training.learning_rate": [1e-3, 1e-4, 2.0]}
    done: list[int] = []

    def counting(config: Any, *, resume: bool = False) -> None:
        done.append(1)
        study_data.train(config)

    ids = plan_in(tmp_path / "s", study(grid=grid))
    work(tmp_path / "s", counting)
    assert len(done) == len(ids) - 12 == 12
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    work(tmp_path / "s", counting)
    assert len(done) == 12
    run_study(study(grid=grid), tmp_path / "s", executor=Forked, train=INSTANT, retry_failed=True)
    last = claims.newest(tmp_path / "s" / "claims" / ids[-1])
    assert last is not None
    assert last.number == 1
    shutil.rmtree(tmp_path / "s" / "runs" / ids[0])  # the user wants it again
    assert not is_over(tmp_path / "s", ids[0])
    work(tmp_path / "s", counting)
    assert len(done) == 13


def test_a_run_whose_workers_keep_dying_is_given_up(tmp_path: Path) -> None:
    first, second, *_ = plan_in(tmp_path, study())
    for dead in range(MAX_CRASHES):
        claim = claims.take(tmp_path / "claims", first)
        assert claim is not None
        _own(claim.folder, pid=2**22 + dead)
        claims.mark_crashed(tmp_path / "claims", 2**22 + dead)
    for _ in range(20):  # killed with everything else: that does not count
        claim = claims.take(tmp_path / "claims", second)
        assert claim is not None
        _own(claim.folder, pid=2**22 + 99)
    work(tmp_path, study_data.train)
    rows = analyse(tmp_path)["runs"]
    assert f"{MAX_CRASHES} workers died of this run" in str(rows[0]["reason"])
    assert [row["status"] for row in rows[1:]] == ["ok"] * 11


# -------------------------------------------------------------------------------------------------
# workers


def results(folder: Path) -> str:
    return (folder / "results.json").read_text()


def test_one_two_and_four_workers_give_one_result(tmp_path: Path) -> None:
    finished(tmp_path / "clean")
    for workers in (2, 4):
        run_study(study(), tmp_path / str(workers), workers=workers, executor=Forked, train=INSTANT)
        assert results(tmp_path / str(workers)) == results(tmp_path / "clean")


def test_workers_that_cannot_work_are_an_error_with_their_words(tmp_path: Path) -> None:
    with pytest.raises(
        AdaptiveLoraError,
        match=r"all workers ended and 12 runs are not over.*No module named 'nowhere'",
    ):
        run_study(study(), tmp_path / "s", train="nowhere:train")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # submitit does not wait for its processes
@pytest.mark.parametrize(("executor", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_submitit_and_ray_train_what_one_process_trains(
    executor: str, module: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    pytest.importorskip(module, reason=f"the extra `{executor}` is not installed")
    base = recipe(bert_folder, reviews_file, "", adapters={"dropout": 0.1})
    del base["output"]
    grid = {"method": METHODS[:1], "seed": [0, 1]}
    made = study(
        base=base, grid=grid, report={"metric": "eval_accuracy"}, slurm={"cluster": "local"}
    )
    plan_in(tmp_path / "clean", made)
    work(tmp_path / "clean", run)
    write_results(tmp_path / "clean")
    run_study(made, tmp_path / "s", workers=2, executor=executors.executor_named(executor))
    assert results(tmp_path / "s").count('"status": "ok"') == 2
    assert results(tmp_path / "s") == results(tmp_path / "clean")


def test_executors_are_told_apart_by_name() -> None:
    with pytest.raises(InputError, match=r"unknown executor 'slrum'. Did you mean 'slurm'"):
        executors.executor_named("slrum")


def test_progress_is_read_from_the_folder(tmp_path: Path) -> None:
    ids = plan_in(tmp_path, study(grid={**study().grid, "training.learning_rate": [1e-3, 2.0]}))
    watch = Watch.of(tmp_path, ids)
    assert (len(watch.over), watch.running, watch.time_left()) == (0, 0, None)
    claims.take(tmp_path / "claims", ids[0])
    assert not watch.look()
    assert watch.running == 1
    _own(tmp_path / "claims" / ids[0] / "0", pid=2**22 + 1)
    work(tmp_path, study_data.train)
    assert watch.look()
    assert (len(watch.over), watch.failed, watch.running, watch.time_left()) == (12, 6, 0, 0.0)
