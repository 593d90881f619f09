"""Records that are streamed: the same records as read whole, over and over, one piece in memory,
and exactly resumed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from model_folders import (
    Command,
    instructions,
    recipe,
    result_of,
    reviews,
    rows_of,
    weights_of,
    write_jsonl,
)

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig, parse
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.data import RECORD, Split, load_splits
from adaptive_lora.tasks.streaming import Stream, splits_of, training_pieces
from adaptive_lora.tasks.tables import read_table
from adaptive_lora.tasks.text_files import Form

pytest_plugins = ("model_folders",)

ODD = ["a day", 'a "night"', "a, meal", "one\ntwo", "naïve \u2028 film", "", '"']


def records(count: int) -> list[dict[str, Any]]:
    return [{"text": ODD[i % len(ODD)], "n": i, "f": i / 4} for i in range(count)]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    suffix = file.name.partition(".")[2]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    elif suffix == "jsonl":
        write_jsonl(file, rows)
    elif suffix == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
        file.write_bytes(gzip.compress(content) if suffix == "csv.gz" else content)
    return str(file)


def streamed(file: str | list[str], **data: Any) -> list[dict[str, Any]]:
    values = {"train": file, "eval": "unused.csv", "streaming": True, **data}
    return [row for piece in training_pieces(DataConfig(**values)) for row in piece.records]


@pytest.mark.parametrize("piece", [1, 5, 1000])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "parquet", "tsv"])
def test_a_stream_has_the_records_of_the_file(suffix: str, piece: int, tmp_path: Path) -> None:
    rows = [row | {"text": row["text"].replace("\n", " ")} if suffix == "tsv" else row
            for row in records(33)]  # fmt: skip
    file = write(tmp_path / f"x.{suffix}", rows)
    whole = read_table(file, form=Form(texts=["text"])).to_list()
    assert len(whole) == 33
    found = streamed(file, piece=piece, text="text")
    assert [row.pop(RECORD) for row in found] == list(range(1, 34))
    assert found == whole


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_a_stream_of_text_has_the_records_of_the_file(
    piece: int, unit: str, tmp_path: Path
) -> None:
    text = "".join(f"line {i}\n" + ("\n \n" if i % 3 == 0 else "") for i in range(20)) + "end"
    (tmp_path / "x.txt").write_text(text)
    data: dict[str, Any] = {"train": str(tmp_path / "x.txt"), "unit": unit}
    whole = load_splits(DataConfig(**data, eval=data["train"])).train.records.to_list()
    assert streamed(data["train"], unit=unit, piece=piece) == whole


def test_a_stream_goes_over_its_files_in_turn_and_again(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(9)]) for n in "ab"]
    data = DataConfig(train=files, eval="unused.csv", streaming=True, piece=4)

    def features(split: Split) -> Dataset:
        return split.records.select_columns(["text"])

    def first(seed: int, number: int) -> list[str]:
        return [row["text"] for row in islice(Stream(data, features, seed), number)]

    seen = first(0, 54)
    expected = Counter(f"{n}{i}" for n in "ab" for i in range(9))
    assert Counter(seen[:18]) == Counter(seen[18:36]) == Counter(seen[36:]) == expected
    assert {text[0] for text in seen[:9]} == {"a"}
    assert seen[:18] != seen[18:36]
    assert first(0, 30) == seen[:30]
    assert first(1, 30) != seen[:30]


def test_only_the_piece_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """What lies behind `rows` cannot be read here, and is not."""
    good = "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(20))
    (tmp_path / "x.jsonl").write_text(good + "no JSON\n")
    file = str(tmp_path / "x.jsonl")
    assert len(streamed(file, piece=5, rows=20)) == 20
    assert len(streamed(file, piece=5, rows=13)) == 13
    with pytest.raises(InputError, match=r"x.jsonl, line 21, column 1: not valid JSON"):
        streamed(file, piece=5)
    data = DataConfig(train=file, eval=file, eval_rows=7, streaming=True, piece=3, rows=10)
    splits = splits_of(data)
    assert splits.eval.records["text"][:] == [f"t{i}" for i in range(7)]
    assert len(splits.train.records) == 3


def test_a_number_of_records_at_the_head_is_held_out(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"text": f"t{i}"} for i in range(20)])
    data: dict[str, Any] = {"train": file, "streaming": True, "piece": 6, "eval_size": 8}
    splits = splits_of(DataConfig(**data))
    assert splits.eval.records["text"][:] == [f"t{i}" for i in range(8)]
    assert splits.train.records["text"][:] == [f"t{i}" for i in range(8, 12)]
    found = streamed(file, piece=6, eval=None, eval_size=8)
    assert [row["text"] for row in found] == [f"t{i}" for i in range(8, 20)]
    assert found[0][RECORD] == 9
    assert len(streamed(file, piece=6, eval=None, eval_size=8, rows=15)) == 7
    with pytest.raises(InputError, match=r"no records are left to train on after the 20"):
        splits_of(DataConfig(**{**data, "eval_size": 20}))
    with pytest.raises(InputError, match=r"21 records are asked of .* it has fewer"):
        splits_of(DataConfig(**{**data, "eval_size": 21}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"text,label\n" + b"a,b\n" * 9 + b"a,b,c\n", "record 10 (line 11): 3 values"),
        ("x.csv", b'text,label\n' + b'"a,b",c\n' * 9 + b'"a" x,"b\n', "line 11: a closing quote"),
        ("x.csv", b"text,label\n" + b"a,b\n" * 9 + b"\xe4,b\n", "line 11: not UTF-8"),
        ("x.csv", b"text,label\n" + b"a,b\n" * 9 + b"a,\x00\n", "line 11: a NUL byte"),
        ("x.csv", b"", "x.csv has no records"),
        ("x.jsonl", b'{"text": "a"}\n' * 9 + b"[1]\n", "line 10: expected an object"),
        ("x.jsonl", b'{"text": "a"}\n' * 9 + b'{"text": 1}\n', "record 10: the values of 'text'"),
        ("x.jsonl", b"\n", "x.jsonl has no records"),
        ("x.parquet", b"PAR1", "cannot read"),
        ("x.json", b"[]", "x.json cannot be streamed; expected a file of .csv"),
        ("x.txt", b"a", "data.unit is file"),
    ],
)  # fmt: skip
def test_a_fault_in_a_stream_is_named_with_its_place(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        streamed(str(tmp_path / name), piece=4, unit="file")
    assert words in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_key_of_earlier_records_is_a_column_of_later_pieces(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"a": "1", "b": "2"}, {"a": "3"}])
    assert [row["b"] for row in streamed(file, piece=1)] == ["2", None]


def test_a_data_set_on_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_dict({"text": list("abcdefg"), "label": [0, 1] * 3 + [0]}, features=kinds)

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("some/set", "sst2", "train", True)
        return table.to_iterable_dataset()

    monkeypatch.setattr("adaptive_lora.tasks.streaming.load_dataset", load)
    data = DataConfig(train="some/set", config="sst2", eval="unused.csv", streaming=True, piece=3)
    found = list(training_pieces(data))
    assert [len(piece.records) for piece in found] == [3, 3, 1]
    assert found[1].records["text"][:] == list("def")
    assert found[0].records.features["label"] == kinds["label"]


def streaming_recipe(model: str, file: str, folder: Path, **data: Any) -> dict[str, Any]:
    values = recipe(model, file, folder)
    values["data"] |= {"streaming": True, "piece": 7, "eval_size": 6, **data}
    values["training"] |= {
        "max_steps": 12, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps",
        "save_steps": 4, "save_total_limit": 9,
    }  # fmt: skip
    return values


def test_a_streamed_run_resumes_exactly_in_mid_stream(bert_folder: str, tmp_path: Path) -> None:
    """Twelve steps are more than one pass over the file; the stop lies in the middle of a piece."""
    file = write_jsonl(tmp_path / "x.jsonl", reviews(50))
    values = streaming_recipe(
        bert_folder, file, tmp_path / "whole", classes=["negative", "positive"]
    )
    values["adapters"] = {"dropout": 0.1}
    values["training"]["gradient_accumulation_steps"] = 2
    result = run(parse(values))
    assert (result["status"], result["steps"]) == ("ok", 12)
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(folder / "checkpoints" / name)
    (folder / "result.json").unlink()
    run(parse({**values, "output": str(folder)}), resume=True)
    assert weights_of(folder) == weights_of(tmp_path / "whole")
    assert [row for row in rows_of(folder) if row["step"] == 12] == [
        row for row in rows_of(tmp_path / "whole") if row["step"] == 12
    ]


def test_streamed_instructions_train_with_what_is_read_whole(
    llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", instructions(40))
    values = streaming_recipe(llama_folder, file, tmp_path / "run")
    del values["task"]
    result = run(parse(values))
    assert (result["task"], result["steps"]) == ("causal_lm", 12)
    assert result["metrics"]["eval_token_loss"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--set training.max_steps=-1", "data.streaming goes with training.max_steps"),
        ("--set training.dataloader_num_workers=1", "expected 0 with data.streaming"),
        ("--set data.eval_size=0.1", "a fraction of records that are not counted"),
        ("--set data.classes=null", "name them all with data.classes"),
        ("--set data.train=[{path:x.csv,weight:2}]", "data.train has weights"),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused(
    change: str, words: str, bert_folder: str, tmp_path: Path, command: Command
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", reviews(50))
    settings = {
        "data.streaming": "true", "data.eval_size": "6", "training.max_steps": "2",
        "data.classes": "[negative,positive]", "training.dataloader_num_workers": "0",
    }  # fmt: skip
    key, _, value = change.removeprefix("--set ").partition("=")
    settings[key] = value.replace(":", ": ").replace("x.csv", file)
    line = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
    ended = command(
        "train", "--model", bert_folder, "--data", file, "--output", tmp_path / "out",
        "--task", "classification", *line,
    )  # fmt: skip
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert words in ended.err
    assert not (tmp_path / "out").exists()


def test_data_check_and_evaluate_read_no_more_than_the_head(
    bert_folder: str, tmp_path: Path, command: Command
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", reviews(50))
    values = streaming_recipe(bert_folder, file, tmp_path / "run", classes=["negative", "positive"])
    run(parse(values))
    with Path(file).open("a") as stream:
        stream.write("no JSON\n")
    found = command("evaluate", tmp_path / "run")
    assert (found.code, found.err) == (0, "")
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    ended = command("data", "check", "--config", tmp_path / "recipe.yaml")
    assert (ended.code, ended.err) == (0, "")
    assert "is streamed, 7 records at a time" in ended.out.replace("\n    ", " ")
    assert result_of(tmp_path / "run")["metrics"]["eval_accuracy"] >= 0


@pytest.mark.parametrize("error", [MemoryError("no room"), pa.ArrowCapacityError("2 GB")])
def test_a_file_that_does_not_fit_into_memory_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.parquet", records(3))

    def full(path: Path) -> None:
        raise error

    monkeypatch.setattr("adaptive_lora.tasks.tables.pyarrow.parquet.read_table", full)
    with pytest.raises(InputError, match=r"x.parquet does not fit into memory .*data.streaming"):
        read_table(file)
