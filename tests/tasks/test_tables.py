"""Tables: what a file holds that makes no table is named with its place; text in a CSV stays
text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from model_folders import TRAIN, Command, arguments, instructions, write_jsonl

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig
from adaptive_lora.tasks.data import load_splits, read_table, text_columns

pytest_plugins = ("model_folders",)


SETTINGS = "--set training.warmup_steps=0 --set training.dataloader_pin_memory=false"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def map_column(path: Path) -> None:
    pairs = pa.array([[("k", 1)]] * 2, type=pa.map_(pa.string(), pa.int64()))
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "pairs": pairs}), path)


# Name of the file -> (its content, or what makes it; words of the message).
ODD: list[tuple[str, Any, list[str]]] = [
    ("map.parquet", map_column,
     ["map.parquet: column 'pairs' is of the type map<string, int64", "leave the column out"]),
    ("half.jsonl", '{"text": "a"}\n\n{"text": "b \\ud800"}\n',
     ["half.jsonl, record 2: ", "b \\ud800' ends in half", "remove"]),
    ("half.json", '[{"text": "a"}, {"t\\uDC00": 1}]',
     ["half.json, record 2: ", "t\\udc00' ends in half"]),
    ("half.jsonl", '{"text": [{"deep": "\\ud800"}]}\n',
     ["half.jsonl, record 1: ", "half of a surrogate pair"]),
    ("deep.jsonl", '{"text": []}\n{"text": ' + nested(300) + '}\n',
     ["deep.jsonl, record 2: the values of 'text'"]),
    ("deep.jsonl", '{"text": "a"}\n{"text": ' + nested(100_000) + '}\n',
     ["deep.jsonl, line 2: ", "too deep"]),
    ("deep.json", '[{"text": ' + nested(100_000) + '}]', ["deep.json: ", "too deep"]),
    ("long.jsonl", '{"text": 1}\n{"text": ' + "1" * 5000 + '}\n',
     ["long.jsonl, line 2: ", "4300 digits"]),
    ("kept.csv", "(record),text,label\n1,a day,x\n",
     ["kept.csv has a column '(record)'", "rename it"]),
    ("mixed.jsonl", '{"label": null}\n{"label": "a"}\n{"label": "b"}\n{"label": 3}\n{"label": 4}\n',
     ["mixed.jsonl, record 4: the values of 'label' do not fit one type: 3, and a record "
      "before it has 'a'", "make them"]),
    ("mixed.json", '[{"x": [1]}, {}, {"x": {"a": 1}}]',
     ["mixed.json, record 3: the values of 'x'", "{'a': 1}", "has [1]"]),
    ("ragged.csv", 'text,label\n"a\nb",c\n\na,b,c\nx,y\nz\n',
     ["ragged.csv, record 2 (line 5): 3 values where the header names 2 columns: 'a,b,c'",
      "put quotes"]),
    ("ragged.tsv", "text\tlabel\r\na\tb\r\na.c\r\n",
     ["ragged.tsv, record 2 (line 3): 1 values", "'a.c'"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"), ODD, ids=[f"{i} {name}" for i, (name, _, _) in enumerate(ODD)]
)
def test_what_makes_no_table_is_one_line_with_its_place(
    name: str, content: Any, words: list[str], files: dict[str, str], command: Command
) -> None:
    file = Path(files["tmp"]) / name
    if callable(content):
        content(file)
    else:
        file.write_text(content, encoding="utf-8", newline="")
    ended = command(*arguments(TRAIN, files | {"data": str(file)}))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert [word for word in words if word not in ended.err] == []
    assert len(ended.err) < 600
    assert not Path(files["out"]).exists()


def test_a_whole_surrogate_pair_is_a_character_and_an_escaped_backslash_is_none(
    tmp_path: Path,
) -> None:
    records = [{"text": "a \U0001f600"}, {"text": "the letters \\ud800"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "\\ud83d" in (tmp_path / "x.jsonl").read_text()
    assert read_table(str(tmp_path / "x.jsonl")).to_list() == records


def test_values_of_one_type_in_many_forms_are_no_mixture(tmp_path: Path) -> None:
    records = [
        {"n": 1, "l": [], "o": None},
        {"n": 2.5, "l": ["a"], "o": {"a": 1}},
        {"n": None, "l": None, "o": {"b": "c"}},
    ]
    read = read_table(write_jsonl(tmp_path / "x.jsonl", records)).to_list()
    assert [record["n"] for record in read] == [1, 2.5, None]
    assert read[2]["o"] == {"a": None, "b": "c"}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_one_column_file_is_read(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{suffix}"
    file.write_text("text\na day; a night\n")
    assert read_table(str(file)).to_list() == [{"text": "a day; a night"}]


def test_columns_read_as_text_are_text_though_they_look_like_numbers_or_dates(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.csv"
    file.write_text(
        "output,when,label,n\n" + "".join(f"0{i},2024-01-0{i},{i % 2},{i}\n" for i in range(1, 9))
    )
    splits = load_splits(DataConfig(train=str(file), text="when", eval_size=2))
    for record in [*splits.train.records, *splits.eval.records]:
        number = record["n"]
        assert record["output"] == f"0{number}"
        assert record["when"] == f"2024-01-0{number}"
        assert record["label"] == number % 2


def test_the_text_columns_are_those_the_recipe_names_and_not_the_label() -> None:
    data = DataConfig(train="x", text=["a", "b"], prompt="{c}: {d!s}", label="output", answers="e")
    usual = {"instruction", "input", "summary", "question", "context"}
    assert text_columns(data) == {*"abcde", *usual}
    assert text_columns(DataConfig(train="x", prompt="{")) == {*usual, "output", "answers"}


def test_a_csv_of_numbers_to_write_trains_and_predicts(
    files: dict[str, str], llama_folder: str, command: Command
) -> None:
    tmp = Path(files["tmp"])
    rows = [f"{i},{record['instruction']},{7 * i}" for i, record in enumerate(instructions(20))]
    (tmp / "x.csv").write_text("input,instruction,output\n" + "\n".join(rows) + "\n")
    files |= {"model": llama_folder, "data": str(tmp / "x.csv")}
    ended = command(*arguments(f"{TRAIN} --task causal_lm --epochs 1 {SETTINGS}", files))
    assert (ended.code, ended.err) == (0, "")
    line = f"predict {{out}} --input {{data}} --output {tmp}/out.jsonl --max-new-tokens 2"
    assert command(*arguments(line, files)).code == 0
    first = json.loads((tmp / "out.jsonl").read_text().splitlines()[1])
    assert (first["input"], first["output"]) == ("1", "7")


def test_the_number_of_each_record_is_ours_on_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_lora.tasks.tables.reachable", lambda: True)
    monkeypatch.setattr(
        "adaptive_lora.tasks.tables.load_dataset",
        lambda *_, **__: Dataset.from_list([{"(record)": 1}]),
    )
    with pytest.raises(InputError, match=r"some/set has a column '\(record\)'"):
        load_splits(DataConfig(train="some/set"))
