"""Data: every format gives the same records, every bad record is named, and the loss falls on the
answer alone."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from model_folders import HEADINGS, instructions, prepare, reviews, write_jsonl
from transformers import AutoTokenizer

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig
from adaptive_lora.tasks.base import IGNORED
from adaptive_lora.tasks.causal_lm import prompt_of
from adaptive_lora.tasks.data import load_splits, read_table
from adaptive_lora.tasks.tables import READERS
from adaptive_lora.tasks.text_files import Form

TABLES = [suffix for suffix in READERS if suffix != ".txt"]  # which is no table
pytest_plugins = ("model_folders",)


def encode(suffix: str, records: list[dict[str, str]]) -> bytes:
    if suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), sink)
        return sink.getvalue().to_pybytes()
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return (
        "[" + ",\n".join(lines) + "]" if suffix == ".json" else "\r\n".join(lines) + "\n\n"
    ).encode()


@pytest.mark.parametrize("suffix", TABLES)
def test_every_format_gives_the_same_records(suffix: str, tmp_path: Path) -> None:
    """Quotes, separators, line breaks, accents, and U+2028 and U+0085, at which Python's
    splitlines() splits."""
    odd = {"text": 'he said "a, b"\tand\nleft \u2028 naïve \x85 ok', "label": "negative"}
    records = [odd, *reviews(5), {"text": "", "label": "positive"}]
    file = tmp_path / f"records{suffix.upper()}"
    file.write_bytes(encode(suffix, records))
    form = Form(quoting="quotes" if suffix == ".tsv" else None)
    assert read_table(str(file), form=form).to_list() == records


@pytest.mark.parametrize("suffix", [suffix for suffix in TABLES if suffix != ".parquet"])
def test_a_byte_order_mark_is_no_part_of_the_data(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"records{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + encode(suffix, reviews(3)))
    assert read_table(str(file)).to_list() == reviews(3)


def test_a_key_that_only_later_json_records_have_is_a_column(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"output": "a"}, {"output": "b", "input": "c"}])
    assert read_table(file).to_list() == [
        {"output": "a", "input": None},
        {"output": "b", "input": "c"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', "a.jsonl, line 3, column 9: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, record 2: expected an object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 3}\n',
            "a.jsonl, record 2: the values of 'text' do not fit one type",
        ),
        (
            "a.jsonl",
            b'{"text": 1%s}\n' % (b"0" * 30),
            "a.jsonl, record 1: the values of 'text' do not fit one type",
        ),
        ("a.json", b'[{"text": "a"},\n{]', "a.json, line 2, column 2: not valid JSON"),
        (
            "a.json",
            b'{"text": "a"}',
            "a.json holds a dict without records in it; expected a list of records",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "ä"}\n'.encode("latin-1"),
            "a.jsonl, line 2: not UTF-8",
        ),
        ("a.csv", "text,label\na,b\nä,b\n".encode("latin-1"), "a.csv, line 3: not UTF-8"),
        ("a.csv", "täxt,label\na,b\n".encode("latin-1"), "a.csv, line 1: not UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "a.csv, line 1: not UTF-8"),
        (
            "a.csv",
            b"text,label\na,b,c\n",
            "a.csv, record 1 (line 2): 3 values where the header names 2 columns",
        ),
        ("a.csv", b"text,text\na,b\n", "a.csv has two columns of one name"),
        ("a.parquet", b"hello", "cannot read"),
        ("a.doc", b"hello", "a.doc has the ending '.doc'; expected one of .csv"),
        *((f"a{suffix}", b"", f"a{suffix}") for suffix in READERS),
        ("a.csv", b"text,label\n", "a.csv has no records"),
        ("a.json", b"[]", "a.json has no records"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_table(str(tmp_path / name))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.csv", "does not exist"),
        ("a/b/c", "does not exist"),
        (".", "is a folder without images"),
    ],
)
def test_a_missing_file_and_a_folder_are_told_apart(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read_table(source)


def test_an_unknown_hub_name_offline_says_what_was_tried_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        read_table("nobody/nothing-of-this-name")
    assert time.monotonic() - started < 5
    for part in (
        "nobody/nothing-of-this-name",
        "local file",
        "local cache",
        "HF_HUB_OFFLINE is set",
    ):
        assert part in str(error.value)


def split_texts(file: str, **data: Any) -> tuple[list[str], list[str]]:
    splits = load_splits(DataConfig(train=file, **data))
    return list(splits.train.records["text"]), list(splits.eval.records["text"])


def test_200_rows_with_an_eval_size_of_20_are_180_and_20_disjoint_records(tmp_path: Path) -> None:
    records = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(300)]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    train, held_out = split_texts(file, rows=200, eval_size=20)
    assert (len(train), len(held_out)) == (180, 20)
    assert len({*train, *held_out}) == 200
    assert split_texts(file, rows=200, eval_size=20) == (train, held_out)
    assert split_texts(file, rows=200, eval_size=20, seed=1) != (train, held_out)
    assert split_texts(file, rows=200, eval_size=0.1) == (train, held_out)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval_size": 40}, "leaves 0 to train on and 40 to evaluate on"),
        ({"eval_size": 0.001}, "leaves 40 to train on and 0 to evaluate on"),
        ({"rows": 41}, "data.rows asks for 41 records; .* has 40"),
    ],
)
def test_a_split_without_records_is_refused(
    data: dict[str, Any], message: str, reviews_file: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_splits(DataConfig(train=reviews_file, **data))


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({}, {"text": "txt"}, "has no column 'txt'. Did you mean 'text'? Its columns: text, label"),
        (
            {},
            {"label": "lable"},
            "has no column 'lable'. Did you mean 'label'? Its columns: text, label",
        ),
        (
            {},
            {"classes": ["negative", "neutral"]},
            "label 'positive' in column 'label' is outside the classes",
        ),
        ({}, {"classes": ["positive", "negative", "positive"]}, "data.classes names a class twice"),
        (
            {"label": ""},
            {"classes": ["negative", "positive"]},
            ", record 38: column 'label' is ''; expected a text",
        ),
        ({"label": None}, {}, ", record 38: column 'label' is None"),
        ({"text": " "}, {}, ", record 38: column 'text' is ' '; expected text"),
        ({"text": None}, {}, ", record 38: column 'text' is None; expected text"),
    ],
)
def test_a_column_or_record_that_cannot_be_classified_is_named_as_the_file_counts(
    change: dict[str, Any], data: dict[str, Any], message: str, bert_folder: str, tmp_path: Path
) -> None:
    records = reviews(40)
    records[37] |= change
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(InputError) as error:
        prepare(bert_folder, file, **data)
    assert file in str(error.value) or "data.classes" in message
    assert message in str(error.value)


def test_labels_of_one_class_or_of_no_plain_type_are_refused(
    bert_folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.jsonl"
    write_jsonl(file, [record | {"label": "positive"} for record in reviews(20)])
    with pytest.raises(InputError, match=r"'label' holds one class only, \['positive'\]"):
        prepare(bert_folder, file)
    write_jsonl(file, [record | {"label": [0]} for record in reviews(20)])
    with pytest.raises(InputError, match=r"column 'label' is \[0\]; expected a text or a number"):
        prepare(bert_folder, file)


def test_a_label_of_the_evaluation_file_outside_the_classes_is_named_there(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    held_out = write_jsonl(
        tmp_path / "held_out.jsonl", [*reviews(6), {"text": "a day", "label": "neutral"}]
    )
    with pytest.raises(
        InputError, match=r"held_out.jsonl, record 7: label 'neutral' .* \['negative', 'positive'\]"
    ):
        prepare(bert_folder, reviews_file, eval=held_out)


def test_integer_classes_sort_as_numbers(bert_folder: str, tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "x.jsonl", [{"text": "a day", "label": i % 11} for i in range(99)]
    )
    prepared = prepare(bert_folder, file)
    names = prepared.task.model_arguments()["id2label"]
    assert list(names.values()) == [str(i) for i in range(11)]
    record = prepared.train[0]
    assert names[record["labels"]] == str(record["labels"])


def test_inputs_longer_than_the_limit_are_cut_and_counted(bert_folder: str, tmp_path: Path) -> None:
    records = [
        record | {"text": "good day " * (10 if i < 5 else 1)}
        for i, record in enumerate(reviews(40))
    ]
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", records), longest=8)
    assert (
        max(len(ids) for part in (prepared.train, prepared.eval) for ids in part["input_ids"]) == 8
    )
    cut = [re.search(r"; (\d+) longer than 8 and cut$", note) for note in prepared.task.notes]
    assert sum(int(found[1]) for found in cut if found) == 5


def test_only_the_output_and_its_end_bear_loss(llama_folder: str, tmp_path: Path) -> None:
    records = instructions(12)
    prepared = prepare(
        llama_folder, write_jsonl(tmp_path / "x.jsonl", records), task="causal_lm", eval_size=4
    )
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    found = {}
    for item in [*prepared.train, *prepared.eval]:
        length = sum(label == IGNORED for label in item["labels"])
        # one masked stretch, at the start
        assert item["labels"][length:] == item["input_ids"][length:]
        found[tuple(item["input_ids"][:length])] = item["input_ids"][length:]
    expected = {
        tuple(tokenizer(prompt_of(r["instruction"], r["input"]))["input_ids"]): [
            *tokenizer(r["output"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for r in records
    }
    assert found == expected
    # the vocabulary knows the headings
    assert tokenizer.unk_token_id not in {i for prompt in found for i in prompt}
    assert all(prompt[0] == tokenizer.bos_token_id for prompt in found)
    assert [heading in prompt_of("a", "b") for heading in HEADINGS] == [True, True, True]
    assert [heading in prompt_of("a", "") for heading in HEADINGS] == [True, False, True]


def test_a_prompt_that_fills_the_limit_is_dropped_and_counted(
    llama_folder: str, tmp_path: Path
) -> None:
    """Prompts with an input have 25 tokens here, those without 17: at 25 tokens only the latter
    reach their answer."""
    file = write_jsonl(tmp_path / "x.jsonl", instructions(40))
    prepared = prepare(llama_folder, file, task="causal_lm", longest=25)
    found = [
        re.search(r"(\d+) records dropped \(no token to learn from\)$", note)
        for note in prepared.task.notes
    ]
    dropped = [int(match[1]) for match in found if match]
    assert len(prepared.train) + len(prepared.eval) == 20
    assert sum(dropped) == 20
    assert all(
        item["labels"][-1] != IGNORED for part in (prepared.train, prepared.eval) for item in part
    )
    with pytest.raises(
        InputError, match="no training record has a token to learn from within 17 tokens"
    ):
        prepare(llama_folder, file, task="causal_lm", longest=17)


@pytest.mark.parametrize(
    ("column", "value"),
    [("output", None), ("instruction", None), ("instruction", ""), ("input", None)],
)
def test_an_instruction_record_needs_text_to_ask_and_to_learn(
    column: str, value: str | None, llama_folder: str, tmp_path: Path
) -> None:
    """A missing input is no input; a missing instruction or output is an error at its record; never
    the word None."""
    records = instructions(40)
    records[37][column] = value
    file = write_jsonl(tmp_path / "x.jsonl", records)
    if value is None and column != "input":
        with pytest.raises(
            InputError, match=rf"record 38: column {column!r} is None; expected text"
        ):
            prepare(llama_folder, file, task="causal_lm")
    else:
        prepared = prepare(llama_folder, file, task="causal_lm")
        assert len(prepared.train) + len(prepared.eval) == 40


def test_plain_text_bears_loss_from_its_first_token(llama_folder: str, reviews_file: str) -> None:
    prepared = prepare(llama_folder, reviews_file, task="causal_lm", text="text")
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    for item in prepared.train:
        assert item["input_ids"][0] == tokenizer.bos_token_id
        assert item["labels"] == [IGNORED, *item["input_ids"][1:]]
        assert item["labels"][-1] == tokenizer.eos_token_id
