"""Labels keep the form they came in, from the training file to the predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from model_folders import Command, recipe, result_of, reviews, write_jsonl

from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)


@pytest.mark.parametrize(
    ("labels", "data", "expected"),
    [
        ([0, 1], {}, {0, 1}),
        ([3, 10], {}, {3, 10}),
        ([0.0, 1.0], {}, {0.0, 1.0}),
        ([0.5, 2.0], {}, {0.5, 2.0}),
        ([True, False], {}, {True, False}),
        (["0", "1"], {}, {"0", "1"}),
        (["01", "1.0"], {}, {"01", "1.0"}),
        ([0, 1], {"classes": ["bad", "good"]}, {"bad", "good"}),
        ([0, 1], {"classes": [0, 1]}, {0, 1}),
    ],
)
def test_predictions_have_the_form_of_the_labels(
    labels: list[Any], data: dict[str, Any], expected: set[Any], bert_folder: str, tmp_path: Path,
    command: Command,
) -> None:  # fmt: skip
    records = [
        {"text": record["text"], "label": labels[record["label"] == "positive"]}
        for record in reviews(24)
    ]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    values = recipe(bert_folder, file, tmp_path / "run", data=data)
    run(parse(values))
    for name in ("out.jsonl", "out.parquet"):
        ended = command("predict", tmp_path / "run", "--input", file, "--output", tmp_path / name)
        assert (ended.code, ended.err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    for found in ([row["prediction"] for row in rows], table["prediction"].to_pylist()):
        assert {(type(value), value) for value in found} <= {
            (type(value), value) for value in expected
        }
    assert [row["label"] for row in rows] == [record["label"] for record in records]
    named = result_of(tmp_path / "run")["data"].get("label_form")
    kind = type(next(iter(expected))).__name__
    assert named == (None if kind == "str" else kind)


def test_a_run_of_truth_values_reads_their_spellings_in_a_csv(
    bert_folder: str, tmp_path: Path, command: Command
) -> None:
    records = [{"text": r["text"], "label": r["label"] == "positive"} for r in reviews(24)]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    run(parse(recipe(bert_folder, file, tmp_path / "run")))
    lines = [f"{record['text']},{str(record['label']).lower()}" for record in records]
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    found = [
        command("evaluate", tmp_path / "run", "--data", name) for name in (file, tmp_path / "x.csv")
    ]
    assert [ended.code for ended in found] == [0, 0]
    assert found[0].out.splitlines()[-4:] == found[1].out.splitlines()[-4:]
