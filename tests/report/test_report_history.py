"""Reports of runs whose ranks change: decisions are read, replayed against the tensors, tabled and
drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from model_folders import Command, recipe, result_of
from safetensors.numpy import load_file

from adaptive_lora.allocation.history import replay
from adaptive_lora.recipe.config import parse
from adaptive_lora.report import read_run, report
from adaptive_lora.report.figures import saliency
from adaptive_lora.report.tables import decision_table, show
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)
FIGURES = ["ranks.png", "rank_steps.png", "parameters.png", "saliency.png", "loss.png"]


@pytest.fixture(scope="module")
def shrinking_run(
    tmp_path_factory: pytest.TempPathFactory, bert_folder: str, reviews_file: str
) -> Path:
    """Return a finished run of 8 steps whose ranks go down from 4 with decisions at every second.
    Read only."""
    output = tmp_path_factory.mktemp("runs") / "adalora"
    method = {"name": "adalora", "rank": 2, "factor": 2.0, "initial": 1, "final": 1, "every": 2}
    run(parse(recipe(bert_folder, reviews_file, output) | {"method": method}))
    return output


@pytest.fixture
def folder(shrinking_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shrinking_run, tmp_path / "run"))


def test_the_history_leads_from_initial_to_saved_ranks(
    shrinking_run: Path, classification_run: Path
) -> None:
    record, result = read_run(shrinking_run), result_of(shrinking_run)
    assert list(record.initial_ranks.values()) == [4] * 13
    assert record.initial_ranks == result["initial_ranks"] != record.ranks
    assert replay(record.initial_ranks, record.history) == record.ranks == result["ranks"]
    tensors = load_file(shrinking_run / "adapter" / "adapter_model.safetensors")
    size = sum(tensor.size for name, tensor in tensors.items() if ".lora_" in name)
    assert record.history[-1].parameters_after == size < record.history[0].parameters_before
    assert read_run(classification_run).history == []


def test_the_figures_show_something(folder: Path) -> None:
    figures = report(folder)
    assert figures == [folder / "report" / name for name in FIGURES]
    for figure in figures:
        image = matplotlib.image.imread(figure)[..., :3]
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
        assert 0.01 < (image.min(axis=2) < 0.9).mean() < 0.9  # neither blank nor covered


def test_each_part_of_a_score_has_a_panel_and_what_is_not_finite_is_left_white(
    folder: Path,
) -> None:
    row = read_run(folder).history[-1]
    nan = dict.fromkeys(row.scores, float("nan"))
    alone, three, blank = (
        matplotlib.image.imread(saliency(replace(row, parts=parts), folder / "parts.png"))[..., :3]
        for parts in ({}, {"G": row.scores, "W": row.scores}, {"G": row.scores, "W": nan})
    )
    assert min(np.divide(three.shape, alone.shape)[:2]) > 1.5
    assert (blank.min(axis=2) > 0.99).sum() > 1.1 * (three.min(axis=2) > 0.99).sum()


def test_the_table_fits_100_columns(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended = command("report", folder)
    assert (ended.code, ended.err) == (0, "")
    table = ended.out[ended.out.index("Rank decisions") : ended.out.index("figure: ")].splitlines()
    assert max(map(len, table)) <= 100
    shown = [line.replace("│", " ").split()[:6] for line in table]
    for row in read_run(folder).history:
        ranks = f"{min(row.pattern.values())}..{max(row.pattern.values())}"
        memory = sum(size for kind, size in row.bytes_after.items() if kind != "statistics") / 2**20
        wanted = [
            f"{row.step}",
            row.status,
            f"{row.budget:,}",
            f"{row.parameters_after:,}",
            ranks,
            f"{memory:.2f}",
        ]
        assert wanted in shown


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (12, 0), (13, 1), (400, 388)])
def test_a_long_history_is_cut_to_12_rows_and_says_so(
    count: int,
    left_out: int,
    shrinking_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    row = replace(
        read_run(shrinking_run).history[0], budget=10**9, status="refused", reason="[not finite]"
    )
    show(decision_table([replace(row, step=1000 + step) for step in range(count)]))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert (
        out.count("1,000,000,000")
        == out.count("[not finite]")
        == count - left_out
        == min(count, 12)
    )
    assert ("1,000 " in out, f"{999 + count:,} " in out, f"{left_out} row" in out) == (
        True,
        True,
        left_out > 0,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "the decisions end with rank"),
        (
            lambda rows: rows[1]["pattern"].update(x=9),
            "row 2 is not a decision: the pattern after step 3 is not what",
        ),
        (
            lambda rows: rows[1].update(parameters_before=1),
            "row 2 is not a decision: step 3 does not",
        ),
        (lambda rows: rows[1].update(budget="9"), "row 2 is not a decision: budget"),
        (lambda rows: json.dumps(rows[0])[:-9], "row 1 is not a decision"),
    ],
)
def test_a_tampered_history_is_refused(
    change: Callable[[list[Any]], object], message: str, folder: Path, command: Command
) -> None:
    file = folder / "allocations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    text = change(rows)
    file.write_text(
        text if isinstance(text, str) else "".join(json.dumps(row) + "\n" for row in rows)
    )
    ended = command("report", folder)
    assert (ended.code, ended.out, message in ended.err) == (4, "", True), ended.err
