"""The command line: what it prints fits, and what flags say is what is run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import TRAIN, Command, arguments, recipe, reviews, strict_json, write_jsonl

from adaptive_lora.methods import METHODS
from adaptive_lora.recipe.config import parse

pytest_plugins = ("model_folders",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--help", ["train", "methods", "doctor", "report", "demo"]),
        ("train --help", ["--config", "--model", "--set", "--resume", "--print-config"]),
        ("methods", [*METHODS, "arXiv 2106.09685"]),
        ("doctor", ["torch", "transformers", "the hub is not reachable"]),
        (
            f"{TRAIN} --print-config",
            ["task: null", "name: lora", "learning_rate: 0.0005"],
        ),
        ("report {run}", ["linear_decay", "attention.self.query", "4  2", "ranks.png"]),
    ],
)
def test_what_is_printed_says_it_within_100_columns(
    line: str,
    words: list[str],
    files: dict[str, str],
    command: Command,
    classification_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(files["tmp"])
    shutil.copytree(classification_run, "run")
    ended = command(
        *arguments(line, files | {"run": "run", "out": "out", "model": "m", "data": "d.csv"})
    )
    assert (ended.code, ended.err) == (0, "")
    assert [word for word in words if word not in ended.out] == []
    assert max(map(len, ended.out.splitlines())) <= 100


def test_the_printed_recipe_is_the_recipe_of_the_flags_over_the_file(
    files: dict[str, str], command: Command
) -> None:
    values = recipe("a", "b", "c")
    (Path(files["tmp"]) / "r.yaml").write_text(yaml.safe_dump(values))
    line = "train --config {tmp}/r.yaml --model {model} --lr 3e-4 --text a --text b --rank 2 "
    line += "--set data.rows=9 --print-config"
    printed = command(*arguments(line, files))
    values["model"] = files["model"]
    values["method"]["rank"] = 2
    values["training"]["learning_rate"] = 3e-4
    values["data"] |= {"text": ["a", "b"], "rows": 9}
    assert parse(yaml.safe_load(printed.out)) == parse(values)


def test_a_run_from_flags_leaves_run_adapter_and_figures(
    files: dict[str, str], command: Command
) -> None:
    ended = command(
        *arguments(
            f"{TRAIN} --epochs 1 --batch-size 16 --method empirical --rank 2 --seed 3", files
        )
    )
    assert (ended.code, ended.err) == (0, "")
    out = Path(files["out"])
    result = strict_json((out / "result.json").read_text())
    assert (result["status"], result["method"], result["seed"]) == ("ok", "empirical", 3)
    assert result["lora_parameters"] <= result["budget_parameters"]
    assert ended.out.splitlines()[-3:] == [
        f"figure: {out}/report/ranks.png",
        f"figure: {out}/report/loss.png",
        f"adapter: {out}/adapter",
    ]


@pytest.mark.parametrize(("rank", "reports"), [("0", True), ("1", False)])
def test_of_several_processes_the_main_one_reports(
    rank: str,
    reports: bool,
    files: dict[str, str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun starts the command several times, with RANK set."""
    drawn = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(
        "adaptive_lora.runs.run.run",
        lambda *_, **__: {"lora_parameters": 1, "total_parameters": 2, "steps": 2},
    )
    monkeypatch.setattr("adaptive_lora.report.report", lambda folder: drawn.append(folder) or [])
    ended = command(*arguments(TRAIN, files))
    assert (ended.code, ended.err) == (0, "")
    assert bool(drawn) == bool(ended.out) == reports
    assert bool(command(*arguments(f"{TRAIN} --dry-run", files)).out) == reports


def test_a_dry_run_resumes_nothing(files: dict[str, str], command: Command) -> None:
    ended = command(*arguments(f"{TRAIN} --dry-run --resume", files))
    assert (ended.code, ended.out) == (2, "")
    assert (
        ended.err
        == "error: --dry-run keeps nothing and --resume goes on with what was kept; give one "
        "of them\n"
    )
    assert not Path(files["out"]).exists()


def test_an_interrupt_is_exit_code_130_with_the_way_to_go_on(
    files: dict[str, str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptive_lora.runs.run.load_model", press_ctrl_c)
    ended = command(*arguments(TRAIN, files))
    assert ended.code == 130
    assert ended.err == "interrupted; go on with --resume\n"


def test_a_real_process_ends_with_the_exit_code_and_no_traceback(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", reviews(4))
    line = [
        sys.executable,
        "-m",
        "adaptive_lora.cli.main",
        "train",
        "--model",
        "none",
        "--data",
        data,
        "--output",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run([*line, "--method", "lroa"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
