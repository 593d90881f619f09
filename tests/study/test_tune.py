"""The search: seeded, goes on where it was cut off, several objectives, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study_data
import yaml
from study_data import INSTANT

from adaptive_lora.errors import InputError
from adaptive_lora.study.tune import Tuning, read_tuning, tune

pytest.importorskip("optuna", reason="the extra `tune` is not installed")
SEARCH = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "method.rank": {"low": 2, "high": 16},
    "method.name": ["lora", "adalora"],
}


def tuning(**changes: Any) -> Tuning:
    base = {**study_data.study().base, "method": {"name": "lora", "rank": 4}}
    objectives = ["eval_accuracy", "lora_parameters"]
    return Tuning(
        **{
            "name": "search",
            "base": base,
            "search": SEARCH,
            "objectives": objectives,
            "trials": 8,
            **changes,
        }
    )


def tried(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in t.items() if k != "number"}
        for t in json.loads((folder / "trials.json").read_text())["trials"]
    ]


def test_the_front_is_what_nothing_beats_and_the_seed_decides(tmp_path: Path) -> None:
    trials = tune(tuning(), tmp_path / "a", train=INSTANT)
    assert len(trials) == 8
    figures = [trial.figures for trial in trials]

    def beaten(one: list[float]) -> bool:
        return any(o[0] >= one[0] and o[1] <= one[1] and o != one for o in figures if o)

    assert [trial.best for trial in trials] == [not beaten(f) for f in figures if f]
    assert any(not trial.best for trial in trials)
    ranks = {trial.values["method.rank"]: trial.figures[1] for trial in trials if trial.figures}
    assert all(parameters == 128 * rank * 16 for rank, parameters in ranks.items())
    tune(tuning(), tmp_path / "b", train=INSTANT)
    assert tried(tmp_path / "a") == tried(tmp_path / "b")
    assert {trial.run for trial in trials} == {
        path.name for path in (tmp_path / "a" / "runs").iterdir()
    }


def test_a_search_cut_off_goes_on_and_proposes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def dying(config: Any, *, resume: bool = False) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(config.output)
        study_data.train(config)

    monkeypatch.setattr(study_data, "dying", dying, raising=False)
    with pytest.raises(KeyboardInterrupt):
        tune(tuning(), tmp_path / "cut", train="study_data:dying")
    done.append("three")
    trials = tune(tuning(), tmp_path / "cut", train="study_data:dying")
    tune(tuning(), tmp_path / "whole", train=INSTANT)
    assert tried(tmp_path / "cut") == tried(tmp_path / "whole")
    assert len(done) == 1 + len({trial.run for trial in trials})  # nothing twice
    assert len(tune(tuning(trials=10), tmp_path / "cut", train=INSTANT)) == 10


def test_a_failed_run_is_a_failed_trial(tmp_path: Path) -> None:
    search = {"training.learning_rate": [1e-3, 2.0]}
    trials = tune(
        tuning(search=search, objectives=["eval_accuracy"], trials=6), tmp_path, train=INSTANT
    )
    assert {trial.figures is None for trial in trials} == {True, False}
    for trial in trials:
        assert (trial.figures is None) == (trial.values["training.learning_rate"] == 2.0)
        assert trial.reason is None or trial.reason.startswith("diverged in runs/")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no search": ({"search": {}}, "search is empty"),
    "no objective": ({"objectives": []}, r"objectives is \[\]: List should have at least 1 item"),
    "unknown key": (
        {"search": {"training.lerning_rate": [1]}},
        "Did you mean 'training.learning_rate'",
    ),
    "range": ({"search": {"seed": {"low": 3, "high": 1}}}, "low below high"),
    "range key": ({"search": {"seed": {"low": 3, "hihg": 1}}}, "Did you mean 'high'"),
    "no range": ({"search": {"seed": 3}}, "search.seed is 3; expected a list of choices"),
    "log of 0": (
        {"search": {"training.learning_rate": {"low": 0, "high": 1, "log": True}}},
        "low must be above 0",
    ),
    "log with step": (
        {"search": {"seed": {"low": 1, "high": 9, "log": True, "step": 2}}},
        "search.seed: .* there is no step",
    ),
    "trials": ({"trials": 0}, "trials is 0"),
    "metric": (
        {"objectives": ["eval_acuracy"]},
        "no metric 'eval_acuracy'. Did you mean 'eval_accuracy'",
    ),
    "misspelt": ({"serach": {}}, "unknown key serach. Did you mean 'search'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_searches_are_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump({**tuning().model_dump(), **changes}))
    with pytest.raises(InputError, match=message):
        tune(read_tuning(file, []), tmp_path / "out", train=INSTANT)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("x")
    with pytest.raises(InputError, match="holds no search"):
        tune(tuning(), tmp_path, train=INSTANT)
    tune(tuning(trials=1), tmp_path / "s", train=INSTANT)
    with pytest.raises(InputError, match="other objectives"):
        tune(tuning(objectives=["eval_loss"]), tmp_path / "s", train=INSTANT)
