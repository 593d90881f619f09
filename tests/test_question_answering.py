"""Question answering: windows cover the context, labels point at the answer, and what points at it is read back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from model_folders import Prepared, prepare, questions, recipe, rows_of, write_jsonl

from adaptive_lora.config import parse
from adaptive_lora.errors import InputError
from adaptive_lora.run import run
from adaptive_lora.tasks.base import ROW
from adaptive_lora.tasks.question_answering import ANSWERS, CONTEXT, SPANS

pytest_plugins = ("model_folders",)

STRIDE = 4


def prepared_questions(model: str, folder: Path, records: list[dict[str, Any]], **data: Any) -> Prepared:
    """Return training features of all the records, in windows of 20 tokens unless told."""
    file = write_jsonl(folder / "x.jsonl", records)
    settings: dict[str, Any] = {"longest": 20, "stride": STRIDE, "eval": file, **data}
    return prepare(model, file, task="question_answering", **settings)


def logits_on_the_labels(features: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end logits (N, T) of 10 at the label of each window and 0 elsewhere; padded, as batches are."""
    width = max(map(len, features["input_ids"])) + 3
    parts = []
    for column in ("start_positions", "end_positions"):
        logits = np.zeros((len(features), width))
        logits[np.arange(len(features)), features[column]] = 10
        parts.append(logits)
    return parts[0], parts[1]


@pytest.mark.parametrize("longest", [12, 20, 48])
def test_a_label_points_at_the_answer_and_no_answer_is_lost(longest: int, bert_folder: str, tmp_path: Path) -> None:
    """Answers are no longer than the stride, so one window at least holds them whole."""
    features = prepared_questions(bert_folder, tmp_path, questions(30), longest=longest).train
    answered = set()
    for item in features:
        start, end = item["start_positions"], item["end_positions"]
        assert len(item["input_ids"]) <= longest
        if start:
            answered.add(item[ROW])
            assert item[CONTEXT][item[SPANS][start][0] : item[SPANS][end][1]] == item[ANSWERS][0]
        else:
            assert end == 0
    assert answered == set(range(30))
    assert (len(features) > 30) == (longest < 48)


def test_windows_cover_the_context_and_share_the_stride(bert_folder: str, tmp_path: Path) -> None:
    features = prepared_questions(bert_folder, tmp_path, questions(30)).train
    windows: dict[int, list[list[tuple[int, int]]]] = {}
    for item in features:
        windows.setdefault(item[ROW], []).append([tuple(span) for span in item[SPANS] if span[0] >= 0])
    assert max(map(len, windows.values())) > 2
    for row, spans in windows.items():
        for before, after in pairwise(spans):
            assert before[-STRIDE:] == after[:STRIDE]
        words = {text for window in spans for text in window}
        assert len(words) == len(questions(30)[row]["context"].split())


def test_an_answer_that_occurs_twice_is_where_the_record_says(bert_folder: str, tmp_path: Path) -> None:
    context = "one day and one night"
    records = [
        {"question": "the sum", "context": context, "answers": {"text": ["one"], "answer_start": [12]}},
        {"question": "the sum", "context": context, "answers": {"text": ["one"], "answer_start": None}},
    ]
    features = prepared_questions(bert_folder, tmp_path, records).train
    begins = [item[SPANS][item["start_positions"]][0] for item in features]
    assert begins == [12, 0]


@pytest.mark.parametrize("longest", [12, 48])
def test_logits_that_point_at_the_labels_give_100(longest: int, bert_folder: str, tmp_path: Path) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, questions(30), longest=longest)
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None) == {"exact_match": 100.0, "f1": 100.0}
    order = np.random.default_rng(0).permutation(len(prepared.train))  # evaluation goes by length
    shuffled, mixed = prepared.train.select(order), (outputs[0][order], outputs[1][order])
    assert prepared.task.score(mixed, None, shuffled, None)["exact_match"] == 100.0
    found = [row["prediction"] for row in prepared.task.predict(mixed, shuffled, None)]
    assert found == [record["answers"]["text"][0] for record in questions(30)]


def test_an_answer_is_never_the_question_nor_too_long_nor_backwards(bert_folder: str, tmp_path: Path) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, questions(8), longest=48, max_answer_length=3)
    rows, width = len(prepared.train), 48
    draw = np.random.default_rng(0)
    for _ in range(20):
        outputs = draw.normal(size=(2, rows, width)) * 10
        outputs[:, :, :4] += 100  # [CLS] and the question
        for row, item in zip(prepared.task.predict(outputs, prepared.train, None), prepared.train, strict=True):
            assert 1 <= len(row["prediction"].split()) <= 4
            assert row["prediction"] in item[CONTEXT]


def unanswerable(form: Any) -> dict[str, Any]:
    return {"id": "none", "question": "the sum is", "context": "day night and film", "answers": form}


@pytest.mark.parametrize("form", [{"text": [], "answer_start": []}, None])
def test_a_record_without_an_answer_teaches_to_answer_nothing(form: Any, bert_folder: str, tmp_path: Path) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, [*questions(9), unanswerable(form)])
    assert prepared.task.data.unanswerable
    assert any("may answer nothing" in note for note in prepared.task.notes)
    last = prepared.train[-1]
    assert (last["start_positions"], last["end_positions"], last[ANSWERS]) == (0, 0, [])
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None) == {"exact_match": 100.0, "f1": 100.0}
    assert prepared.task.predict(outputs, prepared.train, None)[-1] == {"prediction": "", "score": 20.0}


def test_columns_of_plain_text_will_do_and_an_empty_one_is_no_answer(bert_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(
        "question,context,answers\nthe sum,a day and one,one\nthe sum,a night and two,two\nthe sum,a film,\n"
    )
    prepared = prepare(bert_folder, file, task="question_answering", eval=str(file), stride=STRIDE)
    assert list(prepared.train[ANSWERS]) == [["one"], ["two"], []]
    assert prepared.task.data.unanswerable
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None)["exact_match"] == 100.0


def test_answering_nothing_is_not_learned_from_records_that_all_have_answers(bert_folder: str, tmp_path: Path) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, questions(9))
    assert not prepared.task.data.unanswerable
    outputs = np.zeros((2, len(prepared.train), 48))
    outputs[:, :, 0] = 10
    assert all(row["prediction"] for row in prepared.task.predict(outputs, prepared.train, None))


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (
            {"answers": {"text": ["one"], "answer_start": [2]}},
            {},
            r"record 4: the answer 'one' is not in the context at character \[2\]",
        ),
        (
            {"answers": {"text": ["poor"], "answer_start": None}},
            {},
            "record 4: the answer 'poor' is not in the context;",
        ),
        ({"answers": {"text": ["one"], "answer_start": []}}, {}, "record 4: 1 answers and 0 values of 'answer_start'"),
        ({"question": "the sum " * 9}, {}, "record 4: a question of 18 tokens leaves 0 of 20 for the context"),
        ({"question": "the sum " * 7}, {}, "record 4: a question of 14 tokens leaves 3 of 20 .* data.stride 4"),
        ({"question": " "}, {}, "record 4: column 'question' is ' '"),
        ({"context": ""}, {}, "record 4: column 'context' is ''"),
        ({}, {"context": "contxt"}, r"no column 'contxt'\. Did you mean 'context'\?"),
        ({}, {"answers": "answer"}, r"no column 'answer'\. Did you mean 'answers'\?"),
    ],
)
def test_a_record_that_cannot_be_learned_from_is_named(
    change: dict[str, Any], data: dict[str, Any], message: str, bert_folder: str, tmp_path: Path
) -> None:
    records = questions(8)
    records[3] |= change
    with pytest.raises(InputError, match=message):
        prepared_questions(bert_folder, tmp_path, records, **data)


def test_records_without_any_answer_are_refused(bert_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no window of any training record holds its answer"):
        prepared_questions(
            bert_folder, tmp_path, [unanswerable({"text": [], "answer_start": []})] * 3, duplicate_ids="keep"
        )


def test_a_run_learns_to_find_the_answer(bert_folder: str, tmp_path: Path) -> None:
    """The answer is the only number in the context."""
    file = write_jsonl(tmp_path / "x.jsonl", questions(60))
    values = recipe(bert_folder, file, tmp_path / "run", task="question_answering")
    values["data"] |= {"max_length": 24, "stride": STRIDE}
    values["training"] |= {"num_train_epochs": 12, "learning_rate": 0.03, "eval_on_start": True, "save_strategy": "no"}
    run(parse(values))
    scores = [row["eval_exact_match"] for row in rows_of(tmp_path / "run") if "eval_f1" in row]
    assert scores[-1] > 2 * scores[0]
