"""Records that are read while they are trained on: files, and data sets on the hub, of any size.

A stream is read in pieces of `data.piece` records. Each is made features, and shuffled, by itself:
what is in memory is one piece. Over and over: where the last file ends the first begins again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch.utils.data
from datasets import Dataset, concatenate_datasets, load_dataset

from adaptive_lora.errors import InputError
from adaptive_lora.hub import is_local
from adaptive_lora.recipe.config import DataConfig, Sources, sources, spelled
from adaptive_lora.tasks.csv_files import stream_csv
from adaptive_lora.tasks.data import Split, Splits, form_of, load_splits, numbered, read_records
from adaptive_lora.tasks.json_files import stream_json
from adaptive_lora.tasks.tables import READERS, checked, files_of
from adaptive_lora.tasks.text_files import Form, ending, lines_of

STREAMED = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Features of the training records, without end, in an order that depends on the seed alone: a
    run that is resumed passes over what it has seen.

    Args:
        data: a recipe's `data`, with `streaming`.
        features: from a split to what the model reads.
        seed: of the order within each piece.
    """

    def __init__(self, data: DataConfig, features: Callable[[Split], Dataset], seed: int) -> None:
        self.data, self.features, self.seed = data, features, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            draw = np.random.default_rng([self.seed, epoch])
            for split in training_pieces(self.data):
                features = self.features(split)
                for row in draw.permutation(len(features)):
                    yield features[int(row)]


def splits_of(data: DataConfig) -> Splits:
    """Return what a run reads, streamed or not."""
    return stream_splits(data) if data.streaming else load_splits(data)


def stream_splits(data: DataConfig) -> Splits:
    """Return the splits of a recipe that streams: of the training records the first piece, to learn
    columns from; of evaluation records the first `eval_rows`, or those at the head of the stream
    that training leaves out."""
    if any(one.weight != 1 for one in sources(data.train)):
        raise InputError(
            "data.train has weights, for which all records must be counted; leave them out, or set "
            "data.streaming: false"
        )
    notes: list[str] = []
    if data.eval is not None or data.eval_split is not None:
        given = data.train if data.eval is None else data.eval
        split = data.eval_split or "train"
        if data.eval_rows is None:
            held_out = read_records(data, given, split, notes).split("evaluation")
        else:
            held_out = _head(data, given, split, data.eval_rows, "evaluation")
    else:
        held_out = _head(data, data.train, data.train_split, _held_out(data), "evaluation")
    train = next(training_pieces(data), None)
    if train is None:
        raise InputError(
            f"{spelled(data.train)}: no records are left to train on after the {_held_out(data):,} "
            "to evaluate on"
        )
    notes.append(
        f"{train.source} is streamed, {data.piece:,} records at a time; of the training records "
        f"these lines are about the first {len(train.records):,}"
    )
    extra = {
        name: read_records(data, source, "train", notes).split(name)
        for name, source in data.extra_eval.items()
    }
    extra |= {
        name: read_records(data, data.train, split, notes).split(name)
        for name, split in data.extra_eval_split.items()
    }
    return Splits(train, held_out, extra, notes)


def training_pieces(data: DataConfig) -> Iterator[Split]:
    """Yield the training records, piece by piece: of the first `data.rows`, if that is set, those
    that are not held out."""
    passed, left = _held_out(data), data.rows
    for split in pieces(data, data.train, data.train_split, "training"):
        size = len(split.records)
        taken = size if left is None else min(size, left)
        if passed < taken:
            records = split.records.select(range(passed, taken))
            yield Split(records, split.source, split.part)
        passed = max(passed - taken, 0)
        if left is not None:
            left -= taken
            if left == 0:
                return


def pieces(data: DataConfig, given: Sources, split: str, part: str) -> Iterator[Split]:
    """Yield the records of all files that `given` names in splits of `data.piece`."""
    for place in sources(given):
        for file in files_of(place.path):
            first = 1
            try:
                for table in _tables(data, file, split):
                    yield Split(numbered(table, file, first), file, part)
                    first += len(table)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
                raise InputError(f"cannot read {file}: {error}") from None
            if first == 1:
                raise InputError(f"{file} has no records")


def _held_out(data: DataConfig) -> int:
    """Return how many records at the head of the stream are evaluated on instead."""
    if data.eval is not None or data.eval_split is not None:
        return 0
    if not isinstance(data.eval_size, int):
        raise InputError(
            f"data.eval_size is {data.eval_size}, a fraction of records that are not counted when "
            "streaming; give evaluation records (--eval-data), or a number of records to hold out"
        )
    return data.eval_size


def _head(data: DataConfig, given: Sources, split: str, rows: int, part: str) -> Split:
    """Return the first `rows` records, all from one file."""
    tables: list[Dataset] = []
    for piece in pieces(data, given, split, part):
        tables.append(piece.records)
        if sum(map(len, tables)) >= rows:
            break
    if sum(map(len, tables)) < rows:
        raise InputError(f"{rows:,} records are asked of {spelled(given)} for {part}; it has fewer")
    return Split(concatenate_datasets(tables).select(range(rows)), spelled(given), part)


def _tables(data: DataConfig, source: str, split: str) -> Iterator[Dataset]:
    path = Path(source)
    if not (is_local(source) or ending(path) in READERS):
        records = load_dataset(source, data.config, split=split, streaming=True)
        for batch in records.iter(batch_size=data.piece):
            yield Dataset.from_dict(batch, features=records.features)
        return
    suffix = ending(path)
    if not path.is_file() or suffix not in STREAMED:
        raise InputError(
            f"{path} cannot be streamed; expected a file of {', '.join(STREAMED)}, or a data set "
            "on the hub" + (" (save the records as JSONL)" if suffix == ".json" else "")
        )
    for table in _file_tables(path, suffix, form_of(data), data.piece):
        yield checked(table, path)


def _file_tables(path: Path, suffix: str, form: Form, size: int) -> Iterator[pa.Table]:
    if suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=size):
                yield pa.Table.from_batches([batch])
    elif suffix == ".jsonl":
        yield from stream_json(path, size)
    elif suffix == ".txt" and form.delimiter is None:
        yield from _stream_text(path, form, size)
    else:
        yield from stream_csv(path, form, size, tabs=suffix == ".tsv")


def _stream_text(path: Path, form: Form, size: int) -> Iterator[pa.Table]:
    if form.unit == "file":
        raise InputError(f"data.unit is file, and {path} is streamed; expected line or paragraph")
    texts: list[str] = []
    open_text = ""
    for line in lines_of(path):
        if form.unit == "paragraph" and line.strip():
            open_text += line
            continue
        texts += [text.strip("\r\n") for text in (open_text, line) if text.strip()]
        open_text = ""
        if len(texts) >= size:
            yield pa.table({"text": texts})
            texts = []
    if open_text.strip():
        texts.append(open_text.strip("\r\n"))
    if texts:
        yield pa.table({"text": texts})
