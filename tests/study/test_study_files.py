"""Every study that is shipped, and every one in the documentation, resolves to its runs; the
commands on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from model_folders import Command, recipe
from study_data import study

from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.study_file import parse_study, read_study
from adaptive_lora.study.tune import Tuning

pytest_plugins = ("model_folders",)
ROOT = Path(__file__).parent.parent.parent
FILES = sorted(
    path
    for path in (ROOT / "studies").rglob("*.yaml")
    if "grid:" in path.read_text(encoding="utf-8")
)
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


def test_there_are_five_studies_each_in_two_sizes() -> None:
    names = {"placement", "gradient_delta", "adalora_budgets", "plateau", "quantised"}
    assert {path.stem for path in FILES if path.parent.name == "studies"} == names
    assert {path.stem for path in FILES if path.parent.name == "full"} == names


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_study_resolves_and_says_what_to_expect(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head = text.split("name:")[0]
    assert all(word in head for word in ("adaptive-lora study", "Time expected", "Result expected"))
    if "quantization:" in text and "quantization" not in RunConfig.model_fields:
        pytest.skip("recipes have no key `quantization` here")
    plan = make_plan(read_study(file))
    counted = re.search(r"Time expected: (\d+) runs", head)
    assert counted is not None
    assert len(plan) == int(counted[1])
    assert len({one["seed"] for one in plan}) >= 3
    assert len({one["learning_rate"] for one in plan}) >= 2


def test_the_files_of_the_page_are_right() -> None:
    study_file, tune_file = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(make_plan(parse_study(yaml.safe_load(study_file)))) == 2 * 2 * 2 * 5 * 2
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
        **study().to_mapping(),
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
