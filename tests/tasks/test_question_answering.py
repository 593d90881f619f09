"""Question answering: windows cover the context, labels point at the answer, and what points at it
is read back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from model_folders import Prepared, prepare, questions, recipe, rows_of, write_jsonl

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.base import ROW
from adaptive_lora.tasks.data import load_splits
from adaptive_lora.tasks.question_answering import ANSWERS, CONTEXT, SPANS

pytest_plugins = ("model_folders",)

STRIDE = 4


def prepared_questions(
    model: str, folder: Path, records: list[dict[str, Any]], **data: Any
) -> Prepared:
    """Return training features of all the records, in windows of 20 tokens unless told."""
    file = write_jsonl(folder / "x.jsonl", records)
    settings: dict[str, Any] = {"longest": 20, "stride": STRIDE, "eval": file, **data}
    return prepare(model, file, task="question_answering", **settings)


def logits_on_the_labels(features: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end logits (N, T) of 10 at the label of each window and 0 elsewhere; padded,
    as batches are."""
    width = max(map(len, features["input_ids"])) + 3
    parts = []
    for column in ("start_positions", "end_positions"):
        logits = np.zeros((len(features), width))
        logits[np.arange(len(features)), features[column]] = 10
        parts.append(logits)
    return parts[0], parts[1]


@pytest.mark.parametrize("longest", [12, 20, 48])
def test_a_label_points_at_the_answer_and_no_answer_is_lost(
    longest: int, bert_folder: str, tmp_path: Path
) -> None:
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
        windows.setdefault(item[ROW], []).append(
            [tuple(span) for span in item[SPANS] if span[0] >= 0]
        )
    assert max(map(len, windows.values())) > 2
    for row, spans in windows.items():
        for before, after in pairwise(spans):
            assert before[-STRIDE:] == after[:STRIDE]
        words = {text for window in spans for text in window}
        assert len(words) == len(questions(30)[row]["context"].split())


def test_an_answer_that_occurs_twice_is_where_the_record_says(
    bert_folder: str, tmp_path: Path
) -> None:
    context = "one day and one night"
    records = [
        {
            "question": "the sum",
            "context": context,
            "answers": {"text": ["one"], "answer_start": [12]},
        },
        {
            "question": "the sum",
            "context": context,
            "answers": {"text": ["one"], "answer_start": None},
        },
    ]
    features = prepared_questions(bert_folder, tmp_path, records).train
    begins = [item[SPANS][item["start_positions"]][0] for item in features]
    assert begins == [12, 0]


@pytest.mark.parametrize("longest", [12, 48])
def test_logits_that_point_at_the_labels_give_100(
    longest: int, bert_folder: str, tmp_path: Path
) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, questions(30), longest=longest)
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None) == {
        "exact_match": 100.0,
        "f1": 100.0,
    }
    order = np.random.default_rng(0).permutation(len(prepared.train))  # evaluation goes by length
    shuffled, mixed = prepared.train.select(order), (outputs[0][order], outputs[1][order])
    assert prepared.task.score(mixed, None, shuffled, None)["exact_match"] == 100.0
    found = [row["prediction"] for row in prepared.task.predict(mixed, shuffled, None)]
    assert found == [record["answers"]["text"][0] for record in questions(30)]


def test_an_answer_is_never_the_question_nor_too_long_nor_backwards(
    bert_folder: str, tmp_path: Path
) -> None:
    prepared = prepared_questions(
        bert_folder, tmp_path, questions(8), longest=48, max_answer_length=3
    )
    rows, width = len(prepared.train), 48
    draw = np.random.default_rng(0)
    for _ in range(20):
        outputs = draw.normal(size=(2, rows, width)) * 10
        outputs[:, :, :4] += 100  # [CLS] and the question
        for row, item in zip(
            prepared.task.predict(outputs, prepared.train, None), prepared.train, strict=True
        ):
            assert 1 <= len(row["prediction"].split()) <= 4
            assert row["prediction"] in item[CONTEXT]


def unanswerable(form: Any) -> dict[str, Any]:
    return {
        "id": "none",
        "question": "the sum is",
        "context": "day night and film",
        "answers": form,
    }


EMPTY = [
    {"text": [], "answer_start": []},
    None,
    {"text": [""], "answer_start": [0]},
    {"text": [" "], "answer_start": [0]},
    {"text": ["", ""], "answer_start": [-1, -1]},
]


@pytest.mark.parametrize("form", EMPTY)
def test_a_record_without_an_answer_teaches_to_answer_nothing(
    form: Any, bert_folder: str, tmp_path: Path
) -> None:
    prepared = prepared_questions(bert_folder, tmp_path, [*questions(9), unanswerable(form)])
    assert prepared.task.data.unanswerable
    assert any("may answer nothing" in note for note in prepared.task.notes)
    last = prepared.train[-1]
    assert (last["start_positions"], last["end_positions"], last[ANSWERS]) == (0, 0, [])
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None) == {
        "exact_match": 100.0,
        "f1": 100.0,
    }
    assert prepared.task.predict(outputs, prepared.train, None)[-1] == {
        "prediction": "",
        "score": 20.0,
    }


def test_columns_of_plain_text_will_do_and_an_empty_one_is_no_answer(
    bert_folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.csv"
    file.write_text(
        "question,context,answers\nthe sum,a day and one,one\nthe sum,a night and two,two\nthe "
        "sum,a film,\n"
    )
    prepared = prepare(bert_folder, file, task="question_answering", eval=str(file), stride=STRIDE)
    assert list(prepared.train[ANSWERS]) == [["one"], ["two"], []]
    assert prepared.task.data.unanswerable
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None)["exact_match"] == 100.0


def test_answering_nothing_is_not_learned_from_records_that_all_have_answers(
    bert_folder: str, tmp_path: Path
) -> None:
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
            r"record 4: the answer 'one' is not in the context at character 2;",
        ),
        (
            {"answers": {"text": ["poor"], "answer_start": None}},
            {},
            "record 4: the answer 'poor' is not in the context;",
        ),
        (
            {"answers": {"text": ["one"], "answer_start": []}},
            {},
            "record 4: 1 answers and 0 values of 'answer_start'",
        ),
        (
            {"question": "the sum " * 9},
            {},
            "record 4: a question of 18 tokens leaves 0 of 20 for the context",
        ),
        (
            {"question": "the sum " * 7},
            {},
            "record 4: a question of 14 tokens leaves 3 of 20 .* data.stride 4",
        ),
        (
            {"question": "the sum " * 9},
            {"too_long": "refuse"},
            "record 4: a question of 18 tokens leaves 0",
        ),
        (
            {"answers": {"text": ["one"], "answer_start": [2.5]}},
            {},
            "record 4: the answer 'one' is not .* character 2.5;",
        ),
        (
            {"answers": {"text": [None], "answer_start": [2]}},
            {},
            "record 4: the answer is None; expected text, a whole",
        ),
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
            bert_folder,
            tmp_path,
            [unanswerable({"text": [], "answer_start": []})] * 3,
            duplicate_ids="keep",
        )


CONTEXTS = {"spaces": "day and three is one", "years": "day 1999 and one"}


def one_of_each(**change: Any) -> list[dict[str, Any]]:
    return [{"question": "the sum is", "context": CONTEXTS["spaces"]} | change] * 3


@pytest.mark.parametrize("start", [7, None])
@pytest.mark.parametrize("text", [" three", " three ", "three ", "\tthree"])
def test_white_space_around_an_answer_is_not_part_of_it(
    text: str, start: int | None, bert_folder: str, tmp_path: Path
) -> None:
    at = start if start is None or text[0].isspace() else start + 1
    records = one_of_each(answers={"text": [text], "answer_start": [at]})
    prepared = prepared_questions(bert_folder, tmp_path, records, longest=48)
    item = prepared.train[0]
    assert (
        item[CONTEXT][
            item[SPANS][item["start_positions"]][0] : item[SPANS][item["end_positions"]][1]
        ]
        == "three"
    )
    assert item[ANSWERS] == ["three"]
    assert not prepared.task.data.unanswerable


@pytest.mark.parametrize(
    ("answers", "text", "first"),
    [
        ([{"text": "one", "answer_start": 17}], ["one"], 17),
        (
            [{"text": "three", "answer_start": 8}, {"text": "one", "answer_start": 17}],
            ["three", "one"],
            8,
        ),
        ([{"text": "one"}], ["one"], 17),
        ({"text": ["one"], "answer_start": [17.0]}, ["one"], 17),
        (["", "one"], ["one"], 17),
    ],
)
def test_answers_are_read_in_the_forms_they_come_in(
    answers: Any, text: list[str], first: int, bert_folder: str, tmp_path: Path
) -> None:
    item = prepared_questions(
        bert_folder, tmp_path, one_of_each(answers=answers), longest=48
    ).train[0]
    assert item[ANSWERS] == text
    assert item[SPANS][item["start_positions"]][0] == first


@pytest.mark.parametrize("answer", [1999, 1999.0, [1999], "1999"])
def test_a_whole_number_is_the_text_of_it(answer: Any, bert_folder: str, tmp_path: Path) -> None:
    records = one_of_each(context=CONTEXTS["years"], answers=answer)
    item = prepared_questions(bert_folder, tmp_path, records, longest=48).train[0]
    assert (item[ANSWERS], item[SPANS][item["start_positions"]]) == (["1999"], [4, 8])


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (2.5, "2.5"),
        (True, "True"),
        ([None], "None"),
        ({"text": [True]}, "True"),
        ([["one"]], r"\['one'\]"),
    ],
)
def test_an_answer_that_is_no_text_is_named(
    answer: Any, shown: str, bert_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError,
        match=rf"x\.jsonl, record 1: the answer is {shown}; expected text, a whole number",
    ):
        prepared_questions(bert_folder, tmp_path, one_of_each(answers=answer))


def test_an_empty_text_in_a_list_is_no_answer(bert_folder: str, tmp_path: Path) -> None:
    records = [*one_of_each(answers=["one"]), *one_of_each(answers=[""])]
    prepared = prepared_questions(bert_folder, tmp_path, records, longest=48)
    assert prepared.task.data.unanswerable
    assert (prepared.train[-1]["start_positions"], prepared.train[-1][ANSWERS]) == (0, [])


def test_records_whose_answer_is_in_no_window_are_counted(bert_folder: str, tmp_path: Path) -> None:
    """A window of 20 tokens has room for 14 of the context: an answer of 16 words is never
    whole."""
    answers = {"text": [" ".join(["day"] * 16)], "answer_start": [0]}
    long = one_of_each(context="day " * 20 + "one", answers=answers)[:1]
    prepared = prepared_questions(bert_folder, tmp_path, [*long, *questions(8), unanswerable(None)])
    assert any(
        "; 1 records have an answer that no window holds" in note for note in prepared.task.notes
    )


def test_records_with_too_long_a_question_can_be_dropped(bert_folder: str, tmp_path: Path) -> None:
    records = questions(8)
    records[3]["question"] = "the sum " * 9
    prepared = prepared_questions(bert_folder, tmp_path, records, too_long="drop")
    assert sorted(set(prepared.train[ROW])) == [0, 1, 2, 4, 5, 6, 7]
    assert all(item[CONTEXT] == records[item[ROW]]["context"] for item in prepared.train)
    assert any(
        note.startswith("training: 1 records dropped (the question") for note in prepared.task.notes
    )
    assert any(note.startswith("training: 7 records in ") for note in prepared.task.notes)
    outputs = logits_on_the_labels(prepared.train)
    assert prepared.task.score(outputs, None, prepared.train, None)["exact_match"] == 100.0
    split = load_splits(prepared.task.data).eval
    # each is there for an answer
    with pytest.raises(InputError, match="record 4: a question of 18 tokens"):
        prepared.task.features(split, labelled=False)
    with pytest.raises(InputError, match=r"record 1: a question .*\(8 such records\)"):
        prepared_questions(
            bert_folder, tmp_path, [r | {"question": "the " * 18} for r in records], too_long="drop"
        )


def test_a_run_learns_to_find_the_answer(bert_folder: str, tmp_path: Path) -> None:
    """The answer is the only number in the context."""
    file = write_jsonl(tmp_path / "x.jsonl", questions(60))
    values = recipe(bert_folder, file, tmp_path / "run", task="question_answering")
    values["data"] |= {"max_length": 24, "stride": STRIDE}
    values["training"] |= {
        "num_train_epochs": 12,
        "learning_rate": 0.03,
        "eval_on_start": True,
        "save_strategy": "no",
    }
    run(parse(values))
    scores = [row["eval_exact_match"] for row in rows_of(tmp_path / "run") if "eval_f1" in row]
    assert scores[-1] > 2 * scores[0]
