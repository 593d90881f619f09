"""Records for a run: what of which table is trained and evaluated on. What the records mean is the
task's business."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from adaptive_lora.errors import InputError, unknown
from adaptive_lora.recipe.config import DataConfig
from adaptive_lora.tasks.tables import read_table

# column of `load_splits`: the record's place in its source, from 1, whatever the split did to it
RECORD = "(record)"


@dataclass(frozen=True)
class Split:
    """Records, where they came from, and what they are for ("training", "evaluation", ...):
    messages name all three."""

    records: Dataset
    source: str
    part: str

    def texts(self, column: str, *, blank: bool = False) -> list[str]:
        """Return a column of texts. Raises `InputError` at the first that is none, or (unless
        `blank`) has no letter."""
        for record, value in zip(self.records[RECORD], self.records[column], strict=True):
            if not isinstance(value, str) or not (blank or value.strip()):
                raise InputError(
                    f"{self.at(record)}: column {column!r} is {value!r:.60}; expected text"
                )
        return list(self.records[column])

    def at(self, record: int) -> str:
        """Return the place of a record, for messages; `record` counts from 1, as the source."""
        return f"{self.source}, record {record}"

    def require(self, *columns: str) -> None:
        """Raise `InputError`, naming the columns there are, unless `columns` are among them."""
        present = columns_of(self.records)
        for column in columns:
            if column not in present:
                raise InputError(
                    unknown(
                        f"{self.source} has no column {column!r}", column, present, "Its columns"
                    )
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

    The cut and the choice of `rows` depend on `data.seed` and the number of records alone, so they
    are the same on every machine. With `rows` and no eval source, `rows` counts both parts: 200
    with `eval_size` 20 gives 180 / 20. A column `RECORD` is added, so that a message can name the
    record as the source counts it.
    """
    train = _sample(
        _read(data, data.train, data.train_split), data.rows, data.seed, "rows", data.train
    )
    eval_source = data.eval or data.train
    if data.eval is not None or data.eval_split is not None:
        held_out = _read(data, eval_source, data.eval_split or "train")
        held_out = _sample(held_out, data.eval_rows, data.seed, "eval_rows", eval_source)
    else:
        size = (
            data.eval_size
            if isinstance(data.eval_size, int)
            else round(data.eval_size * len(train))
        )
        if not 0 < size < len(train):
            raise InputError(
                f"eval_size {data.eval_size} of {len(train)} records in {data.train} leaves "
                f"{len(train) - size} to train on and {size} to evaluate on; both must be at least "
                "1"
            )
        order = np.random.default_rng(data.seed).permutation(len(train))
        train, held_out = train.select(order[size:]), train.select(order[:size])
    extra = {name: (source, "train") for name, source in data.extra_eval.items()}
    extra |= {name: (data.train, split) for name, split in data.extra_eval_split.items()}
    return Splits(
        Split(train, data.train, "training"),
        Split(held_out, eval_source, "evaluation"),
        {
            name: Split(_read(data, source, split), source, name)
            for name, (source, split) in extra.items()
        },
    )


def _read(data: DataConfig, source: str, split: str) -> Dataset:
    table = numbered(
        read_table(source, config=data.config, split=split, texts=text_columns(data)), source
    )
    if len(table) == 0:
        raise InputError(f"split {split!r} of {source} is empty")
    if data.duplicate_ids == "refuse" and data.id in table.column_names:
        seen: dict[Any, int] = {}
        for record, key in zip(table[RECORD], table[data.id], strict=True):
            if key in (None, ""):
                continue
            if (first := seen.setdefault(str(key), record)) != record:
                raise InputError(
                    f"{source}: records {first} and {record} share the {data.id} {key!r}; remove "
                    "one, name the column that tells records apart with data.id, or set "
                    "data.duplicate_ids: keep"
                )
    return table


def text_columns(data: DataConfig) -> set[str]:
    """Return the columns that a recipe reads as text, by whatever task; there need be none of them
    in its files."""
    text = [data.text] if isinstance(data.text, str) else data.text or []
    try:
        prompt = {name for _, name, _, _ in string.Formatter().parse(data.prompt or "") if name}
    except ValueError:  # a broken template, of which the task says more
        prompt = set()
    named = {
        data.instruction,
        data.input,
        data.output,
        data.summary,
        data.question,
        data.context,
        data.answers,
    }
    labels = data.label if isinstance(data.label, list) else [data.label]
    return {*text, *named, *prompt} - {*labels}


def numbered(table: Dataset, source: str) -> Dataset:
    """Return the table with the column `RECORD`. Raises `InputError` if the source has one."""
    if RECORD in table.column_names:
        raise InputError(
            f"{source} has a column {RECORD!r}, the name of our number of each record; rename it"
        )
    return table.add_column(RECORD, np.arange(1, len(table) + 1))


def columns_of(table: Dataset) -> list[str]:
    """Return the columns of the source."""
    return [name for name in table.column_names if name != RECORD]


def only_text(table: Dataset, *others: str | None) -> str | None:
    """Return the column "text", else the only column of texts besides `others`; None where there is
    neither."""
    texts = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string") and name not in others
    ]
    if "text" in texts:
        return "text"
    return texts[0] if len(texts) == 1 else None


def _sample(table: Dataset, rows: int | None, seed: int, field: str, source: str) -> Dataset:
    if rows is None:
        return table
    if rows > len(table):
        raise InputError(f"data.{field} asks for {rows} records; {source} has {len(table)}")
    return table.select(np.sort(np.random.default_rng(seed).permutation(len(table))[:rows]))
