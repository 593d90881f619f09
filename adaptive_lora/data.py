"""Tables of records: from a local file or the hub, with a seeded split. What the records mean is the task's business."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
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
    if path.is_dir():
        return _read_images(path)
    if not path.is_file():
        raise InputError(f"data file {path} does not exist; give a {', '.join(READERS)} file or a hub data set name")
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
                # A record longer than a block would be an error: let the file be one block.
                read_options=pyarrow.csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), 2**31 - 1)),
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


def _read_images(folder: Path) -> Dataset:
    """Return the column "image" (paths) of a folder, and "label" when the images lie in one folder for each class."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not files:
        raise InputError(
            f"data file {folder} is a folder without images ({', '.join(IMAGES)}); give a {', '.join(READERS)} file, a "
            "folder that holds one folder of images for each class, or a hub data set name"
        )
    columns = {"image": [str(path) for path in files]}
    if all(path.parent != folder for path in files):
        columns["label"] = [path.relative_to(folder).parts[0] for path in files]
    return Dataset.from_dict(columns)


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


@dataclass(frozen=True)
class Split:
    """Records, where they came from, and what they are for ("training", "evaluation", ...): messages name all three."""

    records: Dataset
    source: str
    part: str

    def texts(self, column: str, *, blank: bool = False) -> list[str]:
        """Return a column of texts. Raises `InputError` at the first that is none, or (unless `blank`) has no letter."""
        for record, value in zip(self.records[RECORD], self.records[column], strict=True):
            if not isinstance(value, str) or not (blank or value.strip()):
                raise InputError(f"{self.at(record)}: column {column!r} is {value!r:.60}; expected text")
        return list(self.records[column])

    def at(self, record: int) -> str:
        """Return the place of a record, for messages; `record` counts from 1, as the source does."""
        return f"{self.source}, record {record}"

    def require(self, *columns: str) -> None:
        """Raise `InputError` naming the columns there are unless all of `columns` are among them."""
        present = columns_of(self.records)
        for column in columns:
            if column not in present:
                raise InputError(
                    f"{self.source} has no column {column!r}.{nearest(column, present)} Its columns: {', '.join(present)}"
                )


@dataclass(frozen=True)
class Splits:
    """What a run reads: to train on, to evaluate on while training, and once more after it."""

    train: Split
    eval: Split
    extra: dict[str, Split]

    @property
    def all(self) -> list[Split]:
        return [self.train, self.eval, *self.extra.values()]


def load_splits(data: DataConfig) -> Splits:
    """Return the records of the named files or splits, or a seeded cut of the training records.

    The cut and the choice of `rows` depend on `data.seed` and the number of records alone, so they are the same on
    every machine. With `rows` and no eval source, `rows` counts both parts: 200 with `eval_size` 20 gives 180 / 20.
    A column `RECORD` is added, so that a message can name the record as the source counts it.
    """
    train = _sample(_read(data, data.train, data.train_split), data.rows, data.seed, "rows", data.train)
    eval_source = data.eval or data.train
    if data.eval is not None or data.eval_split is not None:
        held_out = _read(data, eval_source, data.eval_split or "train")
        held_out = _sample(held_out, data.eval_rows, data.seed, "eval_rows", eval_source)
    else:
        size = data.eval_size if isinstance(data.eval_size, int) else round(data.eval_size * len(train))
        if not 0 < size < len(train):
            raise InputError(
                f"eval_size {data.eval_size} of {len(train)} records in {data.train} leaves {len(train) - size} to train on "
                f"and {size} to evaluate on; both must be at least 1"
            )
        order = np.random.default_rng(data.seed).permutation(len(train))
        train, held_out = train.select(order[size:]), train.select(order[:size])
    extra = {name: (source, "train") for name, source in data.extra_eval.items()}
    extra |= {name: (data.train, split) for name, split in data.extra_eval_split.items()}
    return Splits(
        Split(train, data.train, "training"),
        Split(held_out, eval_source, "evaluation"),
        {name: Split(_read(data, source, split), source, name) for name, (source, split) in extra.items()},
    )


def _read(data: DataConfig, source: str, split: str) -> Dataset:
    table = numbered(read_table(source, config=data.config, split=split))
    if len(table) == 0:
        raise InputError(f"split {split!r} of {source} is empty")
    if data.duplicate_ids == "refuse" and data.id in table.column_names:
        seen: dict[Any, int] = {}
        for record, key in zip(table[RECORD], table[data.id], strict=True):
            if key in (None, ""):
                continue
            if (first := seen.setdefault(str(key), record)) != record:
                raise InputError(
                    f"{source}: records {first} and {record} share the {data.id} {key!r}; remove one, name the column that "
                    "tells records apart with data.id, or set data.duplicate_ids: keep"
                )
    return table


def numbered(table: Dataset) -> Dataset:
    """Return the table with the column `RECORD`."""
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
