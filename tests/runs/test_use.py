"""A finished run at work: what it gives comes from the saved adapter and agrees with what the run
reported."""

from __future__ import annotations

import csv
import datetime
import json
import re
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from datasets import Dataset
from model_folders import (
    Command,
    articles,
    instructions,
    pictures,
    questions,
    ratings,
    recipe,
    result_of,
    reviews,
    strict_json,
    write_jsonl,
)
from safetensors.torch import load_file, save_file

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs import use
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.data import read_table

pytest_plugins = ("model_folders",)

SHORT: dict[str, Any] = {
    "num_train_epochs": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
}


def trained(folder: Path, model: str, task: str, file: str, **sections: Any) -> Path:
    run(parse(recipe(model, file, folder / "run", task=task, training=SHORT, **sections)))
    return folder / "run"


@pytest.fixture(scope="module")
def regression_run(tmp_path_factory: pytest.TempPathFactory, bert_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("regression")
    file = write_jsonl(folder / "x.jsonl", ratings(40))
    return trained(
        folder, bert_folder, "regression", file, data={"text": ["sentence1", "sentence2"]}
    )


@pytest.fixture(scope="module")
def question_run(tmp_path_factory: pytest.TempPathFactory, bert_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    none = {"question": "the sum", "context": "a day", "answers": {"text": [], "answer_start": []}}
    file = write_jsonl(folder / "x.jsonl", [*questions(40), none])
    return trained(
        folder, bert_folder, "question_answering", file, data={"max_length": 20, "stride": 4}
    )


@pytest.fixture(scope="module")
def summary_run(tmp_path_factory: pytest.TempPathFactory, t5_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("summaries")
    file = write_jsonl(folder / "x.jsonl", articles(40))
    return trained(folder, t5_folder, "summarization", file, generation={"max_new_tokens": 6})


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory, vit_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return trained(folder, vit_folder, "image_classification", pictures(folder / "images", 24))


RUNS = [
    "classification_run",
    "causal_run",
    "regression_run",
    "question_run",
    "summary_run",
    "image_run",
]


@pytest.mark.parametrize("name", RUNS)
def test_evaluating_the_saved_adapter_gives_the_metrics_of_the_run(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    reported = result_of(folder)["metrics"]
    found = use.evaluate(use.open_run(folder))
    assert found.pop("records") == 8
    assert len(found) >= 3
    assert found == {
        metric: pytest.approx(reported[metric], rel=1e-6, abs=1e-6) for metric in found
    }
    assert next(iter(found)) == result_of(folder)["metric"]


@pytest.mark.parametrize("name", RUNS)
def test_a_record_has_its_prediction_beside_it_in_the_order_of_the_file(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every record predicted for alone gives the same as among the others."""
    folder = request.getfixturevalue(name)
    source = yaml.safe_load((folder / "config.yaml").read_text())["data"]["train"]
    records = read_table(source).to_list()[:12]
    file = write_jsonl(tmp_path / "in.jsonl", records)
    opened = use.open_run(folder)
    assert use.predict(opened, file, tmp_path / "out.jsonl") == 12
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    added = {"prediction", "probability", "score"}
    assert [{k: v for k, v in row.items() if k not in added} for row in rows] == records
    for i in (0, 5, 11):
        single = write_jsonl(tmp_path / f"{i}.jsonl", records[i : i + 1])
        use.predict(opened, single, tmp_path / f"{i}-out.jsonl")
        alone = strict_json((tmp_path / f"{i}-out.jsonl").read_text())
        for column in added & set(alone):
            expected = rows[i][column]
            assert alone[column] == (
                pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected
            )


def test_predictions_agree_with_the_reported_accuracy(
    classification_run: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", reviews(40))
    opened = use.open_run(classification_run)
    accuracy = use.evaluate(opened, file)["eval_accuracy"]
    use.predict(opened, file, tmp_path / "out.jsonl")
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert accuracy == pytest.approx(sum(row["prediction"] == row["label"] for row in rows) / 40)
    assert {row["prediction"] for row in rows} <= {"positive", "negative"}
    assert all(0.5 <= row["probability"] <= 1 for row in rows)


def test_the_three_formats_hold_the_same_and_labels_are_not_needed(
    classification_run: Path, tmp_path: Path
) -> None:
    records = [{"text": f"{record['text']}, é", "n": i} for i, record in enumerate(reviews(9))]
    file = write_jsonl(tmp_path / "in.jsonl", records)
    opened = use.open_run(classification_run)
    for suffix in ("jsonl", "csv", "parquet"):
        use.predict(opened, file, tmp_path / f"out.{suffix}")
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert list(rows[0]) == ["text", "n", "prediction", "probability"]
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as table:
        assert list(csv.DictReader(table)) == [{k: str(v) for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("record", "output", "message"),
    [
        ({"text": "a day"}, "there.jsonl", "there.jsonl exists"),
        (
            {"text": "a day"},
            "out.txt",
            "has the ending '.txt'; expected one of .jsonl, .csv, .parquet",
        ),
        ({"text": "a day"}, "no/out.csv", "the folder of output .*no/out.csv does not exist"),
        (
            {"text": "a day", "prediction": 1},
            "out.csv",
            "has a column 'prediction' already; rename it",
        ),
        (
            {"text": "a day", "probability": 1},
            "out.csv",
            "has a column 'probability' already; rename it",
        ),
        ({"txt": "a day"}, "out.csv", r"in.jsonl has no column 'text'\. Did you mean 'txt'\?"),
        ({"text": ""}, "out.csv", "in.jsonl, record 1: column 'text' is ''; expected text"),
    ],
)
def test_what_cannot_be_predicted_or_written_is_refused(
    record: dict[str, Any],
    output: str,
    message: str,
    classification_run: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [record])
    (tmp_path / "there.jsonl").write_text("mine")
    ended = command("predict", classification_run, "--input", file, "--output", tmp_path / output)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    with pytest.raises(InputError, match=message):
        use.predict(use.open_run(classification_run), file, tmp_path / output)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "there.jsonl"}
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_a_model_writes_on_from_a_prompt_in_the_form_of_its_training(
    causal_run: Path, command: Command, tmp_path: Path
) -> None:
    """As `predict` does for a record of the same instruction; twice the same."""
    instruction = instructions(1)[0]["instruction"]
    written = use.generate(use.open_run(causal_run, max_new_tokens=5), [instruction, "a good day"])
    assert len(written) == 2
    assert 0 < len(written[0].split()) <= 5
    file = write_jsonl(tmp_path / "in.jsonl", [{"instruction": instruction}])
    opened = use.open_run(causal_run, max_new_tokens=5)
    use.predict(opened, file, tmp_path / "out.jsonl")
    assert strict_json((tmp_path / "out.jsonl").read_text())["prediction"] == written[0]
    line = [
        "generate",
        causal_run,
        "--prompt",
        instruction,
        "--prompt",
        "a good day",
        "--max-new-tokens",
        5,
    ]
    ended = command(*line)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == ["--- prompt 1", written[0], "--- prompt 2", written[1]]
    assert command(*line[:4], "--max-new-tokens", 5).out.splitlines() == written[:1]


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        (
            "classification_run",
            "a day",
            "the run's task is classification, which writes no text; use predict",
        ),
        ("causal_run", " ", "prompt ' ' is empty"),
        ("causal_run", "day " * 60, "leaves no room in the model's 48 positions"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    name: str, prompt: str, message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InputError, match=message):
        use.generate(use.open_run(request.getfixturevalue(name)), [prompt])


def test_evaluating_on_a_file_says_how_many_records_and_writes_strict_json(
    regression_run: Path, tmp_path: Path, command: Command
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ratings(11))
    ended = command("evaluate", regression_run, "--data", file, "--output", tmp_path / "m.json")
    assert (ended.code, ended.err) == (0, "")
    found = strict_json((tmp_path / "m.json").read_text())
    assert list(found) == ["records", "eval_pearson", "eval_spearman", "eval_mse", "eval_loss"]
    assert found["records"] == 11
    assert f"eval_mse                    {found['eval_mse']:.6g}\n" in ended.out
    again = command("evaluate", regression_run, "--data", file, "--output", tmp_path / "m.json")
    assert (again.code, "m.json exists" in again.err) == (2, True)


def test_a_folder_for_the_metrics_that_is_missing_is_found_before_evaluating(
    regression_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use, "evaluate", lambda *_: pytest.fail("evaluated"))
    ended = command("evaluate", regression_run, "--output", tmp_path / "no" / "m.json")
    assert (ended.code, ended.out) == (2, "")
    assert f"the folder of output {tmp_path}/no/m.json does not exist" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_cuts_and_drops_are_printed_and_only_scored_records_counted(
    causal_run: Path, tmp_path: Path, command: Command
) -> None:
    """Outputs without text teach nothing; a prediction is made for every record."""
    records = [
        record | {"output": record["output"] * (i > 2)} for i, record in enumerate(instructions(10))
    ]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    ended = command("evaluate", causal_run, "--data", file)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^evaluation: 10 records of", ended.out, re.MULTILINE)
    assert "3 records dropped" in ended.out
    assert re.search(r"^records +7$", ended.out, re.MULTILINE)
    assert max(map(len, ended.out.splitlines())) <= 100
    line = [
        "predict",
        causal_run,
        "--input",
        file,
        "--output",
        tmp_path / "o.csv",
        "--max-new-tokens",
        1,
    ]
    ended = command(*line)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^input: 10 records of ", ended.out, re.MULTILINE)
    assert ended.out.endswith(f"10 predictions: {tmp_path}/o.csv\n")


def test_a_hub_set_is_read_as_the_recipe_reads_it_for_evaluation(
    classification_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, config: str | None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_list(reviews(4))

    monkeypatch.setattr("adaptive_lora.tasks.tables.reachable", lambda: True)
    monkeypatch.setattr("adaptive_lora.tasks.tables.load_dataset", load)
    folder = Path(
        shutil.copytree(
            classification_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
        )
    )
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["data"] |= {"config": "sst2", "eval_split": "validation"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert use.evaluate(use.open_run(folder), "some/set")["records"] == 4
    assert use.evaluate(use.open_run(classification_run), "some/set")["records"] == 4
    assert asked == [("some/set", "sst2", "validation"), ("some/set", None, "train")]


ODD = pa.table(
    {
        "text": ["a good day", "a bad night"],
        "small": pa.array([1, -2], pa.int8()),
        "day": [datetime.date(2024, 1, 2), None],
        "at": pa.array([datetime.datetime(2024, 1, 2, 3, 4)] * 2, pa.timestamp("ms")),
        "hour": [datetime.time(5, 6)] * 2,
        "price": [Decimal("1.50")] * 2,
        "raw": [b"\xff\x00"] * 2,
        "rate": [float("nan"), float("inf")],
        "list": [[1.5, float("nan")], []],
        "struct": [{"day": datetime.date(2024, 1, 2), "é": "x"}] * 2,
    }
)


def test_values_that_json_does_not_know_are_written_as_text_and_parquet_keeps_types(
    classification_run: Path, tmp_path: Path
) -> None:
    pyarrow.parquet.write_table(ODD, tmp_path / "in.parquet")
    opened = use.open_run(classification_run)
    for suffix in ("jsonl", "csv", "parquet"):
        use.predict(opened, str(tmp_path / "in.parquet"), tmp_path / f"out.{suffix}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.parquet",
        "out.jsonl",
        "out.csv",
        "out.parquet",
    }
    written = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert written.column_names == [*ODD.column_names, "prediction", "probability"]
    assert written.select(ODD.column_names).schema.remove_metadata() == ODD.schema
    assert [row["small"] for row in written.to_pylist()] == [1, -2]
    first, second = map(strict_json, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    expected = {
        "text": "a good day",
        "small": 1,
        "day": "2024-01-02",
        "at": "2024-01-02T03:04:00",
        "hour": "05:06:00",
        "price": "1.50",
        "raw": "/wA=",
        "rate": None,
        "list": [1.5, None],
        "struct": {"day": "2024-01-02", "é": "x"},
    }
    assert {name: first[name] for name in expected} == expected
    assert (second["day"], second["rate"]) == (None, None)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as table:
        row = next(csv.DictReader(table))
    assert (row["day"], row["at"], row["raw"]) == ("2024-01-02", "2024-01-02T03:04:00", "/wA=")
    assert strict_json(row["list"]) == expected["list"]
    assert strict_json(row["struct"]) == expected["struct"]


def test_dates_of_a_csv_come_through(
    classification_run: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "in.csv").write_text("text,day\na good day,2024-01-02\n")
    ended = command(
        "predict",
        classification_run,
        "--input",
        tmp_path / "in.csv",
        "--output",
        tmp_path / "out.jsonl",
    )
    assert (ended.code, ended.err) == (0, "")
    assert strict_json((tmp_path / "out.jsonl").read_text())["day"] == "2024-01-02"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_writing_that_fails_leaves_nothing(
    suffix: str, classification_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, table: pa.Table) -> None:
        path.write_text("half")
        raise OSError("disk full")

    file = write_jsonl(tmp_path / "in.jsonl", reviews(2))
    monkeypatch.setattr(use, "_write", fail)
    with pytest.raises(InputError, match=r"cannot write .*: disk full"):
        use.predict(use.open_run(classification_run), file, tmp_path / f"out.{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_labels_outside_the_classes_of_the_training_are_refused(
    classification_run: Path, tmp_path: Path, command: Command
) -> None:
    """The classes are the run's, whatever the new file holds."""
    file = write_jsonl(tmp_path / "x.jsonl", [*reviews(3), {"text": "a day", "label": "neutral"}])
    ended = command("evaluate", classification_run, "--data", file)
    assert ended.code == 2
    assert "x.jsonl, record 4: label 'neutral'" in ended.err
    only = write_jsonl(tmp_path / "one.jsonl", [r for r in reviews(8) if r["label"] == "positive"])
    # one class is enough to be scored
    assert use.evaluate(use.open_run(classification_run), only)["records"] == 4


def test_a_base_model_that_was_moved_is_found_where_one_says(
    bert_folder: str, reviews_file: str, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(bert_folder, tmp_path / "before")
    folder = trained(tmp_path, str(tmp_path / "before"), "classification", reviews_file)
    (tmp_path / "before").rename(tmp_path / "after")
    gone = command("evaluate", folder)
    assert (gone.code, "before does not exist" in gone.err) == (2, True)
    ended = command("evaluate", folder, "--model", tmp_path / "after")
    assert ended.code == 0
    assert f"{result_of(folder)['metrics']['eval_accuracy']:.6g}" in ended.out


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def poison(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / name)


def pickled(folder: Path, name: str) -> None:
    (folder / name).rename((folder / name).with_name("adapter_model.bin"))


def failed(folder: Path, name: str) -> None:
    (folder / name).write_text(
        json.dumps(result_of(folder) | {"status": "failed", "reason": "step 3: the loss is nan"})
    )


@pytest.mark.parametrize(
    ("do", "name", "code", "message"),
    [
        (without, "adapter/adapter_model.safetensors", 2, "has no adapter_model.safetensors"),
        (without, "adapter/adapter_config.json", 2, "is no adapter: it has no adapter_config.json"),
        (pickled, "adapter/adapter_model.safetensors", 2, "as a pickle (adapter_model.bin)"),
        (cut, "adapter/adapter_model.safetensors", 4, "safetensors is missing or damaged"),
        (cut, "adapter/adapter_config.json", 4, "adapter_config.json is damaged"),
        (poison, "adapter/adapter_model.safetensors", 4, "holds NaN or infinite values"),
        (without, "result.json", 2, "holds no finished run; expected config.yaml and result.json"),
        (without, "config.yaml", 2, "holds no finished run; expected config.yaml and result.json"),
        (cut, "result.json", 4, "result.json is not valid JSON"),
        (failed, "result.json", 2, "did not succeed: step 3: the loss is nan"),
    ],
)
def test_a_run_that_failed_or_is_damaged_is_refused_in_one_line(
    do: Any,
    name: str,
    code: int,
    message: str,
    classification_run: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    folder = Path(
        shutil.copytree(
            classification_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
        )
    )
    do(folder, name)
    file = write_jsonl(tmp_path / "in.jsonl", reviews(3))
    for line in (
        ["evaluate", folder],
        ["predict", folder, "--input", file, "--output", tmp_path / "out.csv"],
    ):
        ended = command(*line)
        assert (ended.code, ended.out) == (code, "")
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert message in ended.err
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises((InputError, IntegrityError)):
        use.open_run(folder)


def test_a_damaged_recipe_of_a_run_is_damage(
    classification_run: Path, tmp_path: Path, command: Command
) -> None:
    folder = Path(
        shutil.copytree(
            classification_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
        )
    )
    (folder / "config.yaml").write_text("model: [")
    ended = command("evaluate", folder)
    assert (ended.code, "cannot be read" in ended.err) == (4, True)
