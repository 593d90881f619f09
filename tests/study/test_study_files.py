"""Every study that is shipped, and every one in the documentation, resolves to its runs; the
commands on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from model_folders import Command, recipe
from study_data import plan_in, study

from adaptive_lora.runs.run import run
from adaptive_lora.study.analysis import analyse
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.study_file import parse_study, read_study
from adaptive_lora.study.tune import Tuning
from adaptive_lora.study.worker import work

pytest_plugins = ("model_folders",)
ROOT = Path(__file__).parent.parent.parent
FILES = sorted(
    path
    for path in (ROOT / "studies").rglob("*.yaml")
    if "grid:" in path.read_text(encoding="utf-8")
)
SYSTEMS = {"placement", "gradient_delta", "adalora_budgets", "plateau", "quantised"}
QUESTIONS = {"methods", "compress", "tasks"}
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


def test_the_published_systems_are_studied_in_two_sizes() -> None:
    small = {path.stem for path in FILES if path.parent.name == "studies"}
    assert small == SYSTEMS | QUESTIONS
    assert {path.stem for path in FILES if path.parent.name == "full"} == SYSTEMS


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_study_resolves_and_says_what_to_expect(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head = text.split("name:")[0]
    assert all(word in head for word in ("adaptive-lora study", "Time expected", "Result expected"))
    plan = make_plan(read_study(file))
    counted = re.search(r"Time expected: (\d+) runs", head)
    assert counted is not None
    assert len(plan) == int(counted[1])
    assert len({one["seed"] for one in plan}) >= (1 if file.stem == "tasks" else 3)
    if file.stem in SYSTEMS:
        assert len({one["learning_rate"] for one in plan}) >= 2


def test_the_study_of_compression_on_a_small_model(
    bert_folder: str, reviews_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file as it is shipped, but for its model, data and sizes."""
    monkeypatch.syspath_prepend(ROOT)  # where its header says to start it
    shipped = read_study(ROOT / "studies" / "compress.yaml").model_dump()
    base = recipe(bert_folder, reviews_file, "")
    del base["output"]
    grid = {**shipped["grid"], "seed": [0], "method.rank": [4, 2]}
    for arm in grid["method"][1:]:
        arm["after"]["run"] = {"method.rank": 4}
    plan_in(tmp_path, parse_study({**shipped, "base": base, "grid": grid}))
    work(tmp_path, run)
    record = analyse(tmp_path)
    assert [row["reason"] for row in record["runs"]] == [None] * 6
    ranks = {(row["method"], row["settings"]["method.rank"]): set(row["ranks"].values())
             for row in record["runs"]}  # fmt: skip
    assert ranks["trained", 2] == ranks["PEFT per layer", 2] == {2}
    assert len(ranks["compress", 2]) > 1
    whole = {
        row["method"]: row["metrics"]["eval_loss"]
        for row in record["runs"]
        if row["settings"]["method.rank"] == 4
    }
    assert whole["compress"] == pytest.approx(whole["trained"], rel=1e-5)
    assert whole["PEFT per layer"] == pytest.approx(whole["trained"], rel=1e-5)


def test_the_files_of_the_page_are_right() -> None:
    study_file, made_of_runs, tune_file = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(make_plan(parse_study(yaml.safe_load(study_file)))) == 2 * 2 * 2 * 5 * 2
    plan = make_plan(study(**yaml.safe_load(made_of_runs), baseline="trained", select={}))
    assert sum("after" in one for one in plan) == len(plan) / 2 == 9
    assert Tuning(**yaml.safe_load(tune_file)).trials == 40


def test_study_and_tune_as_commands(
    bert_folder: str,
    reviews_file: str,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real training, through the worker's own process; then nothing is left to do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # the study's count of threads wins
    base = recipe(
        bert_folder,
        reviews_file,
        "",
        training={"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no"},
    )
    del base["output"]
    values = {
        **study().model_dump(),
        "base": base,
        "select": {"by": "eval_accuracy"},
        "report": {"metric": "eval_accuracy"},
    }
    values["grid"] = {
        "method": [{"name": "lora", "rank": 2}, {"name": "linear_decay", "rank": 2}],
        "seed": [0, 1],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    for _ in range(2):
        ended = command(
            "study",
            tmp_path / "study.yaml",
            "--output",
            tmp_path / "out",
            "--set",
            "base.adapters.dropout=0.1",
        )
        assert ended.code == 0, ended.err
        assert "linear_decay" in ended.out
        assert "results.json" in ended.out
        # paths aside
        assert max(map(len, ended.out.splitlines())) <= max(100, len(str(tmp_path)) + 60)
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert all(
        cost["attempts"] == 1 and cost["train_seconds"] > 0 and cost["peak_memory_bytes"] > 0
        for cost in costs.values()
    )
    ended = command(
        "study", tmp_path / "study.yaml", "--output", tmp_path / "out", "--executor", "slrum"
    )
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: unknown executor 'slrum'. Did you mean 'slurm'?")
    assert command("study", tmp_path / "nowhere.yaml", "--output", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    search = {"name": "t", "base": base, "search": {"method.rank": [1, 2]}, "trials": 2}
    (tmp_path / "tune.yaml").write_text(
        yaml.safe_dump({**search, "objectives": ["eval_accuracy", "lora_parameters"]})
    )
    ended = command("tune", tmp_path / "tune.yaml", "--output", tmp_path / "tuned")
    assert ended.code == 0, ended.err
    assert "2 trials" in ended.out
