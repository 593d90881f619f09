"""kill -9 to a study and its workers, all at once, at random moments: the results are those of a clean run, byte for byte.

Two workers that really train (a tiny BERT, dropout on, a checkpoint every second step); the study is started again
after each kill. `benchmarks/kill_study.py` kills twenty times, and through the command line.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from model_folders import recipe
from study_data import in_a_group_of_its_own, progress_of

from adaptive_lora.run import run
from adaptive_lora.study.records import StudyRecord
from adaptive_lora.study.study import write_results
from adaptive_lora.study.study_file import Study
from adaptive_lora.study.worker import work

pytest_plugins = ("model_folders",)
KILLS = 3


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
        bert_folder, reviews_file, "", adapters={"dropout": 0.1}, training={"save_strategy": "steps", "save_steps": 2}
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
            "training.learning_rate": [1e-2, 1e30],  # the second diverges: a failed run is a row in both
            "seed": [0, 1],
        },
        baseline="lora",
        metric="eval_accuracy",
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


def read(folder: Path) -> StudyRecord:
    return write_results(folder)
