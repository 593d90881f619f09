"""Several classes of one text, or none: lists and columns of 0 and 1 say the same, and each class
is scored for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from model_folders import (
    Command,
    prepare,
    recipe,
    result_of,
    reviews,
    strict_json,
    topics,
    write_jsonl,
)
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers import BertForSequenceClassification as Bert

from adaptive_lora.adapter_tools.export import export
from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs import use
from adaptive_lora.runs.memory_plan import plan
from adaptive_lora.runs.run import run
from adaptive_lora.tasks import metrics

pytest_plugins = ("model_folders",)
TASK = "multi_label_classification"
CLASSES = ["film", "food", "good"]


def as_columns(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"text": r["text"], **{name: int(name in r["label"]) for name in CLASSES}} for r in records
    ]


@pytest.fixture(scope="module")
def topics_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("topics") / "topics.jsonl", topics(80))


@pytest.fixture(scope="module")
def topics_run(
    tmp_path_factory: pytest.TempPathFactory, bert_folder: str, topics_file: str
) -> Path:
    folder = tmp_path_factory.mktemp("topics-run") / "run"
    training = {"num_train_epochs": 25, "save_strategy": "no", "eval_strategy": "no"}
    run(parse(recipe(bert_folder, topics_file, folder, task=TASK, training=training)))
    return folder


tables = st.integers(2, 4).flatmap(
    lambda c: st.lists(
        st.tuples(*[st.tuples(st.booleans(), st.booleans())] * c), min_size=1, max_size=8
    )
)


@given(tables)
def test_the_scores_are_sklearns_over_the_classes_that_occur(rows: Any) -> None:
    found, wanted = (np.array([[pair[side] for pair in row] for row in rows]) for side in (0, 1))
    scores = metrics.multi_label(np.where(found, 0.3, -2.0), wanted.astype(float))
    occur = found.any(axis=0) | wanted.any(axis=0)
    macro = f1_score(wanted[:, occur], found[:, occur], average="macro", zero_division=0) if (
        occur.any()
    ) else 0.0  # fmt: skip
    assert scores == {
        "f1_micro": pytest.approx(f1_score(wanted, found, average="micro", zero_division=0)),
        "f1_macro": pytest.approx(macro),
        "exact_match": pytest.approx(accuracy_score(wanted, found)),
    }


def test_what_is_no_table_of_zeros_and_ones_is_refused() -> None:
    for logits, labels, message in (
        ([[1.0]], [[1, 0]], "expected .N, C. twice"),
        ([[1.0]], [[2]], "neither 0 nor 1"),
        (np.empty((0, 2)), np.empty((0, 2)), "expected .N, C. twice"),
    ):
        with pytest.raises(InputError, match=message):
            metrics.multi_label(logits, labels)
    broken = metrics.multi_label([[float("nan"), 1.0]], [[0, 1]])
    assert all(np.isnan(value) for value in broken.values())


def test_lists_columns_and_class_labels_are_the_same_labels(
    bert_folder: str, topics_file: str, tmp_path: Path
) -> None:
    records = topics(80)
    columns = write_jsonl(tmp_path / "columns.jsonl", as_columns(records))
    csv = tmp_path / "columns.csv"
    csv.write_text("".join(",".join(map(str, row)) + "\n" for row in (
        as_columns(records)[0], *(r.values() for r in as_columns(records))
    )))  # fmt: skip
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=CLASSES))})
    parquet = str(tmp_path / "x.parquet")
    by_column = {key: [record[key] for record in records] for key in records[0]}
    Dataset.from_dict(by_column, features=features).to_parquet(parquet)
    expected = [[float(name in record["label"]) for name in CLASSES] for record in records]
    for file, data in (
        (topics_file, {}),
        (columns, {"label": CLASSES}),
        (str(csv), {"label": CLASSES}),
        (parquet, {}),
        (topics_file, {"classes": CLASSES}),
    ):
        prepared = prepare(bert_folder, file, task=TASK, eval=file, **data)
        assert list(prepared.eval["labels"]) == expected, file
        assert prepared.task.names == CLASSES
        arguments = prepared.task.model_arguments()
        assert (arguments["num_labels"], arguments["problem_type"]) == (3, TASK)
    assert [0.0, 0.0, 0.0] in expected  # no class at all is a label too


def test_the_order_of_the_outputs_is_the_bases_own(
    bert_folder: str, topics_file: str, tmp_path: Path
) -> None:
    names = ["good", "film", "food"]
    config = BertConfig.from_pretrained(bert_folder, id2label=dict(enumerate(names)))
    Bert(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(str(tmp_path / "base"))
    prepared = prepare(str(tmp_path / "base"), topics_file, task=TASK, eval=topics_file)
    assert prepared.task.order == names
    assert list(prepared.eval["labels"]) == [
        [float(name in record["label"]) for name in names] for record in topics(80)
    ]
    (row,) = prepared.task.predict(np.array([[3.0, -3.0, 2.0]]), prepared.eval.select([0]), None)
    assert row["prediction"] == ["food", "good"]  # in the data's order
    assert list(row["probability"]) == CLASSES
    assert row["probability"]["good"] == pytest.approx(1 / (1 + np.exp(-3)))


def test_it_learns_and_what_it_saved_is_what_it_scored(
    topics_run: Path, topics_file: str, tmp_path: Path
) -> None:
    result = result_of(topics_run)
    assert (result["status"], result["metric"]) == ("ok", "eval_f1_micro")
    assert result["metrics"]["eval_f1_micro"] > 0.8
    opened = use.open_run(topics_run)
    found = use.evaluate(opened)
    assert found.pop("records") == 8
    assert found == {k: pytest.approx(result["metrics"][k], rel=1e-5) for k in found}
    assert list(found) == ["eval_f1_micro", "eval_f1_macro", "eval_exact_match", "eval_loss"]

    bare = write_jsonl(tmp_path / "in.jsonl", [{"text": r["text"]} for r in topics(80)])
    for ending in ("jsonl", "csv", "parquet"):
        assert use.predict(opened, bare, tmp_path / f"out.{ending}") == 80
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    truth = [record["label"] for record in topics(80)]
    right = np.mean([set(r["prediction"]) == set(t) for r, t in zip(rows, truth, strict=True)])
    assert use.evaluate(opened, topics_file)["eval_exact_match"] == pytest.approx(right)
    assert all(
        r["prediction"] == [name for name in CLASSES if r["probability"][name] > 0.5] for r in rows
    )
    assert any(row["prediction"] == [] for row in rows)


def test_stock_peft_and_the_exports_read_it(
    topics_run: Path, bert_folder: str, tmp_path: Path
) -> None:
    opened = use.open_run(topics_run)
    ids = {"input_ids": torch.tensor([[2, 6, 8, 12, 9, 3]])}
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3)
    stock = PeftModel.from_pretrained(base, topics_run / "adapter").eval()
    export(topics_run, "merged", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = opened.model.eval()(**ids).logits
        for other in (stock, merged):
            torch.testing.assert_close(other(**ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.problem_type == TASK
    assert merged.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("film", "record 3: column 'label' is 'film'; expected a list of classes"),
        (None, r"record 3: column 'label' is None; expected a list of classes, \[\] where there"),
        ([None], "record 3: column 'label' is None; expected a text or a number"),
        (["film", " "], "record 3: column 'label' is ' '; expected a text or a number"),
        (["sport"], r"record 3: label 'sport' in column 'label' is outside the classes \['film'"),
    ],
)
def test_a_bad_label_is_named(label: Any, message: str, bert_folder: str, tmp_path: Path) -> None:
    records = topics(20)
    good = write_jsonl(tmp_path / "good.jsonl", records)
    records[2]["label"] = label
    if label == "film":  # a column of texts
        records = [{**record, "label": "film"} for record in topics(20)[2:3] * 3]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(InputError, match=f"x.jsonl, {message.replace('record 3', 'record .')}"):
        prepare(bert_folder, good, task=TASK, eval=file)


def test_columns_that_are_no_zeros_and_ones_and_names_that_disagree_are_refused(
    bert_folder: str, tmp_path: Path
) -> None:
    records = as_columns(topics(20))
    good = write_jsonl(tmp_path / "good.jsonl", records)
    records[4]["food"] = 2
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(
        InputError, match=r"x\.jsonl, record 5: column 'food' is 2; expected 0 or 1"
    ):
        prepare(bert_folder, file, task=TASK, eval=file, label=CLASSES)
    with pytest.raises(InputError, match=r"leave data\.classes out"):
        prepare(bert_folder, good, task=TASK, label=CLASSES, classes=["a", "b"])
    with pytest.raises(InputError, match=r"has no column 'sport'"):
        prepare(bert_folder, good, task=TASK, label=["film", "sport"])
    with pytest.raises(InputError, match=r"this is what multi_label_classification reads"):
        prepare(bert_folder, good, task="classification", label=CLASSES)


def test_labels_that_leave_nothing_to_learn_are_refused(bert_folder: str, tmp_path: Path) -> None:
    for label in (["film"], []):
        file = write_jsonl(tmp_path / "x.jsonl", [{**r, "label": label} for r in topics(20)])
        with pytest.raises(InputError, match="every record has the classes"):
            prepare(bert_folder, file, task=TASK, eval=file, classes=CLASSES)


def test_other_tasks_say_what_lists_are_for(
    bert_folder: str, topics_file: str, tmp_path: Path, command: Command
) -> None:
    ended = command(
        "train", "--model", bert_folder, "--data", topics_file, "--task", "classification",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 2
    assert "--task multi_label_classification" in ended.err
    with pytest.raises(InputError, match=r"training\.label_smoothing_factor is for one class"):
        run(parse(recipe(bert_folder, topics_file, tmp_path / "out", task=TASK,
                         training={"label_smoothing_factor": 0.1})))  # fmt: skip


def test_data_check_guesses_the_task_and_counts_each_class(
    bert_folder: str, topics_file: str, tmp_path: Path, command: Command
) -> None:
    columns = write_jsonl(tmp_path / "columns.jsonl", as_columns(topics(80)))
    for data in (["--data", topics_file], ["--data", columns, "--set", f"data.label={CLASSES}"]):
        ended = command("data", "check", "--model", bert_folder, *data)
        assert (ended.code, ended.err) == (0, "")
        text = " ".join(ended.out.split())
        assert f"task {TASK}, a guess: the " in text
        assert "any of the classes of text: 3 classes (film, food, good)" in text
        assert "training: film " in text
        assert " of 72 records have none" in text


def test_a_plan_counts_the_outputs(bert_folder: str, topics_file: str) -> None:
    sizes = [
        plan(parse(recipe(bert_folder, topics_file, "never", task=task, data=data)), device="cpu")
        .stages[0].account["head"]
        for task, data in (
            (TASK, {"label": CLASSES}), ("classification", {"classes": CLASSES}),
        )
    ]  # fmt: skip
    assert sizes[0] == sizes[1]


def test_reviews_have_one_class_each(bert_folder: str, tmp_path: Path) -> None:
    """A list of one class is a list."""
    records = [{**record, "label": [record["label"]]} for record in reviews(20)]
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", records), task=TASK)
    assert {tuple(row) for row in prepared.train["labels"]} == {(1.0, 0.0), (0.0, 1.0)}
