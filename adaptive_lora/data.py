"""Tables of records: from a local file or the hub, with a seeded split. What the records mean is the task's business."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, load_dataset

from adaptive_lora.config import DataConfig
from adaptive_lora.errors import InputError, nearest
from adaptive_lora.hub import explain_missing, is_local, reachable

READERS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
RECORD = "(record)"  # column of `load_splits`: the record's place in its source, from 1, whatever the split did to it


def read_table(source: str, *, config: str | None = None, split: str = "train") -> Dataset:
    """Return the records of a local CSV / TSV / JSON / JSONL / parquet file, or of a hub data set.

    Args:
        source: a file, or a data set name on the hub such as "nyu-mll/glue".
        config: the hub data set's configuration, such as "sst2". Files have none.
        split: the hub data set's split. Files have none.

    Raises `InputError` naming the file, and the line where there is one.
    """
    path = Path(source)
    if is_local(source) or path.suffix.lower() in READERS:
        return _read_file(path)
    if not reachable():
        raise InputError(explain_missing("data set", source, tried=[f"local file {path.resolve()}"]))
    try:
        return load_dataset(source, config, split=split)
    except Exception as error:  # the hub client has dozens of kinds; the message is what helps
        raise InputError(f"cannot load data set {source!r} (config {config!r}, split {split!r}): {error}") from error


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"data file {path} {what}; give a {', '.join(READERS)} file or a hub data set name")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        elif suffix in (".csv", ".tsv"):
            table = pyarrow.csv.read_csv(
                pa.BufferReader(_read_text(path).encode()),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True
                ),
            )
        elif suffix in (".json", ".jsonl"):
            table = _table(_read_json(path), path)
        else:
            raise InputError(f"data file {path} has the ending {suffix!r}; expected one of {', '.join(READERS)}")
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if table.num_rows == 0:
        raise InputError(f"{path} has no records")
    if len(set(table.column_names)) < table.num_columns:
        raise InputError(f"{path} has two columns of one name; its columns: {', '.join(table.column_names)}")
    return Dataset(table)


def _read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _table(records: list[dict[str, Any]], path: Path) -> pa.Table:
    """Return a column for every key of any record; a record without it has None there."""
    columns = {}
    for name in dict.fromkeys(key for record in records for key in record):
        try:
            columns[name] = pa.array([record.get(name) for record in records])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise InputError(f"{path}: the values of {name!r} do not fit one type: {error}") from None
    return pa.table(columns)


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            ) from None
        if not isinstance(records, list):
            raise InputError(f"{path} holds a {type(records).__name__}; expected a list of records")
        lines = list(enumerate(records, start=1))
    else:
        lines = []
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028, inside a string
            if line.strip():
                try:
                    lines.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}"
                    ) from None
    for number, record in lines:
        if not isinstance(record, dict):
            raise InputError(f"{path}, record {number}: expected an object, got {record!r:.60}")
    return [record for _, record in lines]


def load_splits(data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return (train, eval): the named files or splits, or a seeded cut of the training records.

    The cut and the choice of `rows` depend on `data.seed` and the number of records alone, so they are the same on
    every machine. With `rows` and no eval source, `rows` counts both parts: 200 with `eval_size` 20 gives 180 / 20.
    A column `RECORD` is added, so that a message can name the record as the source counts it.
    """
    train = _numbered(read_table(data.train, config=data.config, split=data.train_split))
    train = _sample(train, data.rows, data.seed, "rows", data.train)
    if data.eval is not None or data.eval_split is not None:
        held_out = _numbered(read_table(data.eval or data.train, config=data.config, split=data.eval_split or "train"))
        held_out = _sample(held_out, data.eval_rows, data.seed, "eval_rows", data.eval or data.train)
    else:
        size = data.eval_size if isinstance(data.eval_size, int) else round(data.eval_size * len(train))
        if not 0 < size < len(train):
            raise InputError(
                f"eval_size {data.eval_size} of {len(train)} records in {data.train} leaves {len(train) - size} to train on "
                f"and {size} to evaluate on; both must be at least 1"
            )
        order = np.random.default_rng(data.seed).permutation(len(train))
        train, held_out = train.select(order[size:]), train.select(order[:size])
    for name, part in (("training", train), ("evaluation", held_out)):
        if len(part) == 0:
            raise InputError(f"the {name} split is empty")
    return train, held_out


def _numbered(table: Dataset) -> Dataset:
    return table.add_column(RECORD, np.arange(1, len(table) + 1))


def columns_of(table: Dataset) -> list[str]:
    """Return the columns of the source."""
    return [name for name in table.column_names if name != RECORD]


def _sample(table: Dataset, rows: int | None, seed: int, field: str, source: str) -> Dataset:
    if rows is None:
        return table
    if rows > len(table):
        raise InputError(f"data.{field} asks for {rows} records; {source} has {len(table)}")
    return table.select(np.sort(np.random.default_rng(seed).permutation(len(table))[:rows]))


def require_columns(table: Dataset, columns: Sequence[str], source: str) -> None:
    """Raise `InputError` naming the columns there are unless `table` has all of `columns`."""
    present = columns_of(table)
    for column in columns:
        if column not in present:
            raise InputError(
                f"{source} has no column {column!r}.{nearest(column, present)} Its columns: {', '.join(present)}"
            )
