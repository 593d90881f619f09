"""kill -9 on a real process: `adaptive-lora train` killed at awkward moments, and `--resume` in
another process.

BERT of two layers, CPU, float32, dropout on, two micro-steps to each of 12 steps, a checkpoint
every second step. What a run killed several times leaves is what an undisturbed process leaves, bit
for bit; a checkpoint that the kill left half written is named and passed over.
(`test_kill_and_resume.py` has many more moments, and kills by an exception.)

The undisturbed and the killed processes are forks of one that has only imported the package, which
takes seconds; the last resume of the first chain of kills is `python -m adaptive_lora.cli` from
nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from model_folders import TIMES, recipe, result_of, rows_of, weights_of

pytest_plugins = ("model_folders",)

STEPS = 12
# A threshold that no loss can beat: every evaluation finds a plateau.
GROWING = {"name": "plateau", "initial_rank": 1, "max_rank": 7, "threshold": 100.0}
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"name": "adalora", "rank": 2, "factor": 2.0, "initial": 2, "final": 2, "every": 2},
    "grad_delta": {
        "name": "grad_delta",
        "warmup_steps": 5,
        "initial_rank": 3,
        "min_rank": 1,
        "max_rank": 6,
    },
    "plateau": GROWING,
    "plateau per target": {**GROWING, "per_target": True},
}
TRAINING = {
    "num_train_epochs": 3,  # of 32 records
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
}


class Kill(NamedTuple):
    """SIGKILL when `step` steps are done: "before" or "after" a method runs, or halfway through a
    file it writes.

    Expected then: the steps of the rows in `allocations.jsonl`, the checkpoint that `--resume`
    starts from, and what it says of `checkpoint-{step}` when that is not whole.
    """

    method: str
    moment: str
    step: int
    decided: list[int]
    resumed_from: int
    refused: str = ""


FROM_NOTHING = "adalora"
UNFINISHED = r"has no trainer_state\.json"  # the last file that the Trainer writes
# A chain of kills to each method; each one strikes the resumed run of the one before.
CHAINS = {
    "adalora": [
        Kill("AdaptiveRankCallback.on_step_end", "before", 4, [2], 2),  # stepped, not decided
        Kill("Trainer.training_step", "after", 4, [2, 4], 4),  # between the micro-steps of step 5
        Kill(
            "Trainer._save_optimizer_and_scheduler", "optimizer.pt", 8, [2, 4, 6, 8], 6, UNFINISHED
        ),
    ],
    "grad_delta": [
        # ranks changed, row written, nothing saved
        Kill("AdaptiveRankCallback.on_step_end", "after", 5, [5], 4),
        Kill(
            "AdaptiveRankCallback.on_save", "before", 6, [5], 4, r"has no rank_state\.json"
        ),  # the Trainer's part only
        Kill("Trainer._save_rng_state", "before", 8, [5], 6, UNFINISHED),
    ],
    "plateau": [
        Kill("AdaptiveRankCallback.on_evaluate", "before", 6, [3], 4),  # evaluated, not decided
        Kill("Trainer.save_model", "adapter_model.safetensors", 6, [3, 6], 4, UNFINISHED),
        # trained, no adapter written
        Kill("AdaptiveRankCallback.on_train_end", "after", 12, [3, 6, 9], 12),
    ],
    "plateau per target": [
        Kill("AdaptiveRankCallback.on_save", "rank_state.json", 6, [3, 6], 4, "is damaged"),
        Kill("AdaptiveRankCallback.on_save", "rank_state.safetensors", 6, [3, 6], 4, "is damaged"),
    ],
}

# python -c PROCESSES '[[run directory, null or [method, moment, step], [word of the command line,
# ...]], ...]' A fork for each, one after the other; a line of JSON for each: [exit code, output,
# content of allocations.jsonl].
PROCESSES = """
import json, os, signal, sys
from pathlib import Path
from tempfile import TemporaryFile

import adaptive_lora.report, adaptive_lora.runs.run
from adaptive_lora.training.callback import AdaptiveRankCallback
from adaptive_lora.cli.main import main
from transformers import Trainer, TrainerState

def arm(folder, place, moment, step):
    owner, name = place.split(".")
    owner = {"Trainer": Trainer, "AdaptiveRankCallback": AdaptiveRankCallback}[owner]
    plain = getattr(owner, name)

    def struck(self, *args, **kwargs):
        values = (getattr(self, "state", None), *args)
        state = next(value for value in values if isinstance(value, TrainerState))
        if state.global_step != step:
            return plain(self, *args, **kwargs)
        if moment != "before":
            plain(self, *args, **kwargs)
        if moment not in ("before", "after"):
            file = folder / "checkpoints" / f"checkpoint-{step}" / moment
            os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, struck)

for folder, kill, words in json.loads(sys.argv[1]):
    with TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            if kill:
                arm(Path(folder), *kill)
            sys.argv[1:] = words
            main()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        rows = (Path(folder) / "allocations.jsonl").read_text()
        print(json.dumps([code, output.read().decode(), rows]), flush=True)
"""


class Ended(NamedTuple):
    code: int
    output: str
    allocations: str


def process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )


def train(name: str, recipes: Path, folder: Path) -> list[str]:
    return ["train", "--config", str(recipes / f"{name}.yaml"), "--output", str(folder)]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, bert_folder: str, reviews_file: str) -> Path:
    """Return a folder with the recipe of every method."""
    folder = tmp_path_factory.mktemp("recipes")
    values = recipe(
        bert_folder, reviews_file, "unset", adapters={"dropout": 0.1}, training=TRAINING
    )
    for name, method in METHODS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | {"method": method}))
    return folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, recipes: Path
) -> tuple[Path, dict[str, list[Ended]]]:
    """Return a folder with `undisturbed/NAME` and `killed/NAME`, and how each process of a chain
    ended: the killed ones, and the one that came through."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[tuple[str, tuple[str, str, int] | None, list[str]]] = []
    for name, kills in CHAINS.items():
        whole, broken = folder / "undisturbed" / name, folder / "killed" / name
        jobs.append((str(whole), None, train(name, recipes, whole)))
        for i, kill in enumerate(kills):
            resume = ["--resume"] if i else []
            jobs.append((str(broken), kill[:3], [*train(name, recipes, broken), *resume]))
        if name != FROM_NOTHING:
            jobs.append((str(broken), None, [*train(name, recipes, broken), "--resume"]))
    done = process("-c", PROCESSES, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    ended = iter([Ended(*json.loads(line)) for line in done.stdout.splitlines()])
    killed = {}
    for name, kills in CHAINS.items():
        whole = next(ended)
        assert whole.code == 0, whole.output
        killed[name] = [next(ended) for _ in kills]
        if name == FROM_NOTHING:
            line = [*train(name, recipes, folder / "killed" / name), "--resume"]
            last = process("-m", "adaptive_lora.cli", *line)
            killed[name].append(Ended(last.returncode, last.stdout + last.stderr, ""))
        else:
            killed[name].append(next(ended))
    return folder, killed


def decisions(text: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in text.splitlines()
    ]


def lasting(folder: Path) -> dict[str, Any]:
    """Return what result.json says, without the clock and the memory."""
    result = result_of(folder)
    metrics = {key: value for key, value in result["metrics"].items() if not key.endswith(TIMES)}
    measured = ("train_seconds", "peak_memory_bytes", "process_memory_before_bytes")
    return {k: v for k, v in result.items() if k not in measured} | {"metrics": metrics}


@pytest.mark.parametrize("name", CHAINS)
def test_a_killed_process_resumed_equals_an_undisturbed_one(
    name: str, runs: tuple[Path, dict[str, list[Ended]]]
) -> None:
    whole, folder = runs[0] / "undisturbed" / name, runs[0] / "killed" / name
    *struck, last = runs[1][name]
    assert last.code == 0, last.output
    outputs = [ended.output for ended in runs[1][name]]
    for kill, ended, resumed in zip(CHAINS[name], struck, outputs[1:], strict=True):
        assert ended.code == -signal.SIGKILL, (kill, ended.output)
        assert [row["step"] for row in decisions(ended.allocations)] == kill.decided, kill
        steps = re.findall(r"^step +(\d+)/12 ", resumed, re.MULTILINE)
        assert steps[:1] == ([str(kill.resumed_from + 1)] if kill.resumed_from < STEPS else []), (
            kill,
            resumed,
        )
        named = rf"checkpoint-{kill.step} {kill.refused}.*; "
        named += rf"resuming from checkpoint-{kill.resumed_from}$"
        assert (
            resumed.count("; resuming from")
            == len(re.findall(named, resumed, re.MULTILINE))
            == bool(kill.refused)
        )

    assert weights_of(folder) == weights_of(whole)
    mine, theirs = ((run / "allocations.jsonl").read_text() for run in (folder, whole))
    assert decisions(mine) == decisions(theirs)
    assert rows_of(folder) == rows_of(whole)
    assert lasting(folder) == lasting(whole)


@pytest.mark.parametrize("name", CHAINS)
def test_ranks_change_around_the_kills(
    name: str, runs: tuple[Path, dict[str, list[Ended]]]
) -> None:
    """Else the comparison above would be of trainings that restore nothing."""
    rows = decisions((runs[0] / "undisturbed" / name / "allocations.jsonl").read_text())
    changed = [row["step"] for row in rows if row["status"] == "changed"]
    # Which of the later steps change anything is the rounding's to say, and processors differ.
    assert set(changed) >= {"adalora": {4, 6}, "grad_delta": {5}}.get(name, {6, 9})
