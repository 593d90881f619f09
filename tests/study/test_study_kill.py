"""kill -9 to a study and its workers, all at once, at random moments: the results are those of a
clean run, byte for byte.

Two workers that really train (a tiny BERT, dropout on, a checkpoint every second step); the study
is started again after each kill. `benchmarks/kill_study.py` kills twenty times, and through the
command line.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from model_folders import recipe
from study_data import in_a_group_of_its_own, progress_of

from adaptive_lora.runs.run import run
from adaptive_lora.study import claims
from adaptive_lora.study.plan import make_plan, write_plan
from adaptive_lora.study.records import StudyRecord
from adaptive_lora.study.study import write_results
from adaptive_lora.study.study_file import Study
from adaptive_lora.study.worker import work

pytest_plugins = ("model_folders",)
KILLS = 3
OFTEN = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def killed(child: int, folder: Path, at: int) -> bool:
    """Kill the group when the study has left `at` files; return False when it was over before."""
    while progress_of(folder) < at:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def test_a_study_killed_at_random_moments_ends_as_a_clean_one(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    base = recipe(
        bert_folder,
        reviews_file,
        "",
        adapters={"dropout": 0.1},
        training=OFTEN,
    )
    del base["output"]
    made = Study(
        name="killed",
        base=base,
        grid={
            "method": [
                {"name": "lora", "rank": 2},
                {"name": "adalora", "rank": 2, "initial": 2, "final": 2, "every": 2},
            ],
            "training.learning_rate": [
                1e-2,
                1e30,
            ],  # the second diverges: a failed run is a row in both
            "seed": [0, 1],
        },
        baseline="lora",
        report={"metric": "eval_accuracy"},
    )
    clean, folder = tmp_path / "clean", tmp_path / "killed"
    assert os.waitpid(in_a_group_of_its_own(made, clean, workers=1), 0)[1] == 0
    whole, draw, kills = progress_of(clean), random.Random(0), 0
    for number in range(KILLS):
        # Somewhere in the next part of the work: what was left before stays, so counts only grow.
        at = round(whole * (number + draw.random()) / (KILLS + 1)) + 1
        kills += killed(in_a_group_of_its_own(made, folder, workers=2), folder, at)
        assert not (folder / "results.json").exists()
    assert kills == KILLS
    assert os.waitpid(in_a_group_of_its_own(made, folder, workers=2), 0)[1] == 0
    assert (folder / "results.json").read_bytes() == (clean / "results.json").read_bytes()
    statuses = [row["status"] for row in read(folder)["runs"]]
    assert statuses == ["ok", "ok", "failed", "failed"] * 2
    work(folder, run)  # nothing is left to do
    assert any(cost["attempts"] > 1 for cost in read(folder)["costs"].values())


@pytest.mark.parametrize(
    ("save", "evaluate"), [("steps", "epoch"), ("epoch", "epoch"), ("steps", "no")]
)
def test_a_run_goes_on_from_the_checkpoint_at_the_end_of_an_epoch(
    save: str, evaluate: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    training = {"save_strategy": save, "save_steps": 4, "eval_strategy": evaluate}
    base = recipe(bert_folder, reviews_file, "", adapters={"dropout": 0.1}, training=training)
    del base["output"]
    made = Study(
        name="cut",
        base=base,
        grid={"seed": [0]},
        baseline="linear_decay",
        report={"metric": "eval_accuracy"},
    )
    for folder in (tmp_path / "clean", tmp_path / "cut"):
        write_plan(folder, made, make_plan(made))
    work(tmp_path / "clean", run)
    (run_id,) = (path.name for path in (tmp_path / "clean" / "runs").iterdir())
    begun = claims.take(tmp_path / "cut" / "claims", run_id)
    assert begun is not None
    shutil.copytree(tmp_path / "clean" / "runs" / run_id, tmp_path / "cut" / "runs" / run_id)
    left = tmp_path / "cut" / "runs" / run_id
    (left / "result.json").unlink()
    shutil.rmtree(left / "checkpoints" / "checkpoint-8")
    begun.release()
    work(tmp_path / "cut", run)
    assert read(tmp_path / "cut")["runs"] == read(tmp_path / "clean")["runs"]
    assert "step      1/8" not in (tmp_path / "cut" / "logs" / f"{run_id}.log").read_text()


def read(folder: Path) -> StudyRecord:
    return write_results(folder)
