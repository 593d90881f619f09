"""Several files and folders for one split: all are read, a fault is named by its file, and weights
mix them the same way every time."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from model_folders import (
    TRAIN,
    Command,
    arguments,
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
from adaptive_lora.tasks.data import RECORD, load_splits

pytest_plugins = ("model_folders",)


def write_csv(file: Path, rows: list[tuple[Any, ...]], header: str = "text,label") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def named(prefix: str, count: int) -> list[tuple[Any, ...]]:
    return [(f"{prefix}{i}", "xy"[i % 2]) for i in range(count)]


def texts(data: dict[str, Any]) -> list[str]:
    return list(load_splits(DataConfig(**data)).train.records["text"])


def test_files_and_folders_are_read_together_in_their_order(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one.csv", named("a", 3))
    write_csv(tmp_path / "more" / "2.csv", named("c", 2))
    write_csv(tmp_path / "more" / "1" / "x.csv", named("b", 2))
    write_csv(tmp_path / "more" / "_old" / "x.csv", named("no", 2))
    (tmp_path / "more" / "README.md").write_text("no data")
    (tmp_path / "more" / ".x.csv").write_text("no,data,at,all")
    pa.parquet.write_table(
        pa.table({"text": ["d0"], "label": ["x"], "more": [1]}), tmp_path / "more" / "3.parquet"
    )
    held_out = [one, write_csv(tmp_path / "e.csv", named("e", 2))]
    splits = load_splits(DataConfig(train=[one, str(tmp_path / "more")], eval=held_out))
    assert splits.train.records["text"][:] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1", "d0"]
    assert splits.train.records["more"][:] == [None] * 7 + [1]
    assert splits.eval.records["text"][:] == ["a0", "a1", "a2", "e0", "e1"]
    assert splits.train.at(5) == f"{tmp_path}/more/1/x.csv, record 2"
    assert splits.train.at(8) == f"{tmp_path}/more/3.parquet, record 1"
    assert splits.eval.at(4) == f"{tmp_path}/e.csv, record 1"


def test_a_folder_alone_and_a_list_of_one_are_what_they_hold(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "a.csv", named("a", 20))
    alone = load_splits(DataConfig(train=str(tmp_path / "d" / "a.csv")))
    for train in (str(tmp_path / "d"), [str(tmp_path / "d")]):
        splits = load_splits(DataConfig(train=train))
        assert splits.train.records.to_list() == alone.train.records.to_list()
        assert splits.eval.records.to_list() == alone.eval.records.to_list()


def test_numbers_of_two_kinds_are_of_the_wider_one(tmp_path: Path) -> None:
    files = [
        write_csv(tmp_path / "a.csv", [("a", 1), ("b", 2)]),
        write_csv(tmp_path / "b.csv", [("c", 2.5), ("d", 1)]),
    ]
    table = load_splits(DataConfig(train=files, eval=files)).train.records
    assert table["label"][:] == [1.0, 2.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("b.csv", b"text,label\na,b,c\n", "b.csv, record 1 (line 2): 3 values"),
        ("b.csv", b"", "b.csv has no records"),
        ("b.csv", b"\x89PNG\r\n\x1a\n\x00", "b.csv, line 1: not UTF-8"),
        ("b.csv", b"text,label\na,\x00\n", "b.csv, line 2: a NUL byte"),
        ("b.parquet", b"PAR1", "cannot read"),
        ("b.jsonl", b'{"text": "a", "label": 1}\n',
         "b.jsonl: column 'label' is int64, and string in the files before it"),
        ("b.jsonl", b'{"text": "a"}\n', "b.jsonl, record 1: column 'label' is None"),
        ("b.jsonl", b'{"text": "", "label": "x"}\n', "b.jsonl, record 1: column 'text' is ''"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_among_others_is_named(
    name: str, content: bytes, words: str, bert_folder: str, tmp_path: Path, command: Command
) -> None:
    write_csv(tmp_path / "d" / "a.csv", named("a", 12))
    (tmp_path / "d" / name).write_bytes(content)
    ended = command("data", "check", "--model", bert_folder, "--data", tmp_path / "d")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert words in ended.err


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "a.csv", named("a", 12))
    (tmp_path / "d" / "b.csv").symlink_to(tmp_path / "gone.csv")
    # a link to nothing is no file of the folder; by its name it is missing
    with pytest.raises(InputError, match=r"b.csv does not exist"):
        load_splits(
            DataConfig(train=[str(tmp_path / "d" / "a.csv"), str(tmp_path / "d" / "b.csv")])
        )


def test_ids_are_compared_within_a_file(tmp_path: Path) -> None:
    rows = [(i, f"a{i}") for i in range(5)]
    files = [write_csv(tmp_path / f"{n}.csv", rows, "id,text") for n in "ab"]
    assert len(texts({"train": files, "eval": files})) == 10
    files.append(write_csv(tmp_path / "c.csv", [*rows, rows[0]], "id,text"))
    with pytest.raises(InputError, match=r"c.csv: records 1 and 6 share the id 0"):
        load_splits(DataConfig(train=files))


def test_weights_repeat_and_sample_what_is_trained_on(tmp_path: Path) -> None:
    files = [write_csv(tmp_path / f"{n}.csv", named(n, 40)) for n in "abc"]
    data: dict[str, Any] = {
        "train": [
            files[0],
            {"path": files[1], "weight": 2.5},
            {"path": files[2], "weight": 0.25},
        ],
        "eval": files[0],
    }
    splits = load_splits(DataConfig(**data))
    counts = Counter(splits.train.records["text"])
    of_file = {
        name: Counter(number for text, number in counts.items() if text[0] == name)
        for name in "abc"
    }
    assert of_file == {"a": {1: 40}, "b": {2: 20, 3: 20}, "c": {1: 10}}
    assert "b.csv: weight 2.5, 100 records an epoch of 40 to train on" in splits.notes[-2]
    # a repeated record keeps its number
    assert set(splits.train.records[RECORD]) <= set(range(1, 121))
    assert texts(data) == texts(data)
    assert texts(data) != texts({**data, "seed": 1})


def test_a_record_held_out_is_never_trained_on_whatever_its_weight(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", named("a", 40))
    splits = load_splits(DataConfig(train=[{"path": file, "weight": 3}], eval_size=10))
    assert len(splits.train.records) == 90
    assert not set(splits.train.records["text"]) & set(splits.eval.records["text"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": []}, "data names no place of records; expected a path"),
        ({"train": 3}, "data has 3 for a place of records; expected a path"),
        ({"train": [{"path": "a.csv", "weight": 0}]}, "weight is 0: Input should be greater than"),
        ({"train": [{"path": "a.csv", "wieght": 2}]}, "key wieght. Did you mean 'weight'?"),
        ({"train": "a.csv", "eval": [{"path": "a.csv", "weight": 2}]},
         "data.eval gives a.csv the weight 2; only records to train on have weights"),
    ],
)  # fmt: skip
def test_a_list_or_a_weight_that_means_nothing_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        parse({"model": "m", "data": data, "output": "o"})
    assert words in str(error.value)
    assert len(str(error.value)) < 600


def test_a_weight_that_takes_nothing_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", named("a", 40))
    with pytest.raises(
        InputError, match=r"weight 0.01 of the 36 records to train on .* takes none"
    ):
        load_splits(DataConfig(train=[{"path": file, "weight": 0.01}]))


def test_a_weighted_run_resumes_exactly(bert_folder: str, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", reviews(20 + n)) for n in range(2)]
    train = [{"path": files[0], "weight": 1.5}, files[1]]
    values = recipe(bert_folder, files[0], tmp_path / "whole", data={"train": train})
    values["training"] |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    run(parse(values))
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    for path in (folder / "checkpoints").iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    (folder / "result.json").unlink()
    run(parse({**values, "output": str(folder)}), resume=True)
    assert weights_of(folder) == weights_of(tmp_path / "whole")
    assert [row for row in rows_of(folder) if "eval_loss" in row][-1] == [
        row for row in rows_of(tmp_path / "whole") if "eval_loss" in row
    ][-1]


def test_data_twice_on_the_command_line_trains_on_both(
    files: dict[str, str], command: Command
) -> None:
    tmp = Path(files["tmp"])
    first, second = (
        write_jsonl(tmp / f"{n}.jsonl", [r | {"label": n} for r in reviews(12)]) for n in "xy"
    )
    line = "--epochs 1 --set training.warmup_steps=0 --set training.dataloader_pin_memory=false"
    both = f"--data {second} --eval-data {first} --eval-data {second}"
    ended = command(*arguments(f"{TRAIN} {both} {line}", files | {"data": first}))
    assert (ended.code, ended.err) == (0, "")
    assert result_of(Path(files["out"]))["data"]["classes"] == ["x", "y"]
    assert "training: x 12, y 12" in ended.out
    assert "evaluation: x 12, y 12" in ended.out
    # and the run can be used
    found = command("evaluate", files["out"])
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --model a --model b", "--model is given 2 times; it takes one value"),
        ("train --label a --label b --label c", "--label is given 3 times"),
        ("data check --max-length 3 --max-length 3", "--max-length is given 2 times"),
        ("study x.yaml --output a --output b", "--output is given 2 times"),
        ("export x --to native --to merged --output y", "--to is given 2 times"),
        ("train --set data.label=a --set data.label=b",
         "--set 'data.label=a' and 'data.label=b' set one key; give one"),
    ],
)  # fmt: skip
def test_an_option_given_twice_is_refused_and_not_half_heard(
    line: str, words: str, command: Command
) -> None:
    ended = command(*line.split())
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1
