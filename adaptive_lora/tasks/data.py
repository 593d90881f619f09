"""Records for a run: what of which table is trained and evaluated on. What the records mean is the
task's business."""

from __future__ import annotations

import string
from bisect import bisect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, concatenate_datasets

from adaptive_lora.errors import InputError, unknown
from adaptive_lora.recipe.config import DataConfig, Sources, sources, spelled
from adaptive_lora.tasks.tables import files_of, read_table
from adaptive_lora.tasks.text_files import Form

# column of `load_splits`: the record's place in its source, from 1, whatever the split did to it
RECORD = "(record)"


@dataclass(frozen=True)
class Split:
    """Records, where they came from, and what they are for ("training", "evaluation", ...):
    messages name all three."""

    records: Dataset
    source: str
    part: str
    # of several files, (the number of its first record, its name) of each; else empty
    files: tuple[tuple[int, str], ...] = ()

    def texts(self, column: str, *, blank: bool = False) -> list[str]:
        """Return a column of texts, each given whole or as a list of sentences. Raises `InputError`
        at the first that is none, or (unless `blank`) has no letter."""
        values = [joined(value) for value in self.records[column]]
        for record, value in zip(self.records[RECORD], values, strict=True):
            if not isinstance(value, str) or not (blank or value.strip()):
                raise InputError(
                    f"{self.at(record)}: column {column!r} is {value!r:.60}; expected text"
                )
        return values

    def at(self, record: int) -> str:
        """Return the place of a record, for messages; `record` counts from 1, as the source, and
        over several files."""
        first, name = 1, self.source
        if self.files:
            first, name = self.files[bisect([first for first, _ in self.files], record) - 1]
        return f"{name}, record {record - first + 1}"

    @property
    def images(self) -> bool:
        """Whether the records are images in a folder."""
        return any(Path(name).is_dir() for _, name in self.files or [(1, self.source)])

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
    notes: list[str]  # lines to show on how their files were read

    @property
    def all(self) -> list[Split]:
        return [self.train, self.eval, *self.extra.values()]


@dataclass(frozen=True)
class Records:
    """All records of the places that a recipe names together, as one table."""

    table: Dataset
    source: str  # the places, as messages name them
    files: tuple[tuple[int, str], ...]  # as of a `Split`
    weights: tuple[tuple[int, str, float], ...]  # of each place, and the number of its first record

    def split(self, part: str, table: Dataset | None = None) -> Split:
        """Return what `part` takes of them, all unless said."""
        files = self.files if len(self.files) > 1 else ()
        return Split(self.table if table is None else table, self.source, part, files)


def load_splits(data: DataConfig) -> Splits:
    """Return the records of the named files or splits, or a seeded cut of the training records.

    The cut, the choice of `rows` and that of a weight depend on `data.seed` and the number of
    records alone, so they are the same on every machine. With `rows` and no eval source, `rows`
    counts both parts: 200 with `eval_size` 20 gives 180 / 20. Weights are of what is trained on,
    after the cut. A column `RECORD` is added, so that a message can name the record as the source
    counts it.
    """
    notes: list[str] = []
    given = read_records(data, data.train, data.train_split, notes)
    train = _sample(given, data.rows, data.seed, "rows")
    if data.eval is not None or data.eval_split is not None:
        others = read_records(
            data, data.train if data.eval is None else data.eval, data.eval_split or "train", notes
        )
        held_out = others.split(
            "evaluation", _sample(others, data.eval_rows, data.seed, "eval_rows")
        )
    else:
        cut = _cut_texts if data.unit == "file" and columns_of(train) == ["text"] else _cut
        train, rest = cut(train, data)
        held_out = given.split("evaluation", rest)
    train = _weighted(train, given, data.seed, notes)
    extra = {name: (source, "train") for name, source in data.extra_eval.items()}
    extra |= {name: (data.train, split) for name, split in data.extra_eval_split.items()}
    return Splits(
        given.split("training", train),
        held_out,
        {
            name: read_records(data, source, split, notes).split(name)
            for name, (source, split) in extra.items()
        },
        notes,
    )


def read_records(
    data: DataConfig, given: Sources, split: str, notes: list[str] | None = None
) -> Records:
    """Return the records of all files that `given` names, numbered as `RECORD` over all of them.
    Lines on how they were read are added to `notes`."""
    tables: list[Dataset] = []
    files: list[tuple[int, str]] = []
    weights: list[tuple[int, str, float]] = []
    first = 1
    for place in sources(given):
        weights.append((first, place.path, place.weight))
        for file in files_of(place.path):
            table = _read(data, file, split, [] if notes is None else notes)
            tables.append(table)
            files.append((first, file))
            first += len(table)
    source = spelled(given)
    table = together(tables, [file for _, file in files])
    return Records(numbered(table, source), source, tuple(files), tuple(weights))


def together(tables: list[Dataset], names: list[str]) -> Dataset:
    """Return tables as one. A column that one lacks is None there; numbers of two kinds are of the
    wider one. Raises `InputError` for a column of two types."""
    if all(table.features == tables[0].features for table in tables):
        return concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    for table, name in zip(tables, names, strict=True):
        special = [key for key, kind in table.features.items() if isinstance(kind, _OWN_KINDS)]
        if special:
            raise InputError(
                f"{name} has a column {special[0]!r} of images or of classes, and the other "
                "sources have other columns; train on one of them, or save the records as files"
            )
    columns = [table.with_format("arrow")[:] for table in tables]
    whole = columns[0]
    for column, name in zip(columns[1:], names[1:], strict=True):
        try:
            whole = pa.concat_tables([whole, column], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise _of_two_types(whole.schema, column.schema, name) from None
    return Dataset(whole)


_OWN_KINDS = (ClassLabel, Image)


def _of_two_types(before: pa.Schema, now: pa.Schema, name: str) -> InputError:
    for field in now:
        place = before.get_field_index(field.name)
        try:
            if place >= 0:
                pa.unify_schemas(
                    [pa.schema([before.field(place)]), pa.schema([field])],
                    promote_options="permissive",
                )
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            return InputError(
                f"{name}: column {field.name!r} is {field.type!s:.60}, and "
                f"{before.field(place).type!s:.60} in the files before it; make it one type in all"
            )
    return InputError(f"{name}: its columns do not fit those of the files before it")


def _weighted(table: Dataset, given: Records, seed: int, notes: list[str]) -> Dataset:
    """Return the records to train on, each place's as often as its weight says."""
    if all(weight == 1 for *_, weight in given.weights):
        return table
    numbers = np.asarray(table[RECORD])
    firsts = [first for first, *_ in given.weights]
    chosen: list[np.ndarray] = []
    for place, (first, name, weight) in enumerate(given.weights):
        end = firsts[place + 1] if place + 1 < len(firsts) else len(given.table) + 1
        rows = np.flatnonzero((numbers >= first) & (numbers < end))
        part = round((weight - int(weight)) * len(rows))
        some = np.sort(np.random.default_rng([seed, place]).permutation(len(rows))[:part])
        taken = np.concatenate([*[rows] * int(weight), rows[some]])
        if not len(taken):
            raise InputError(
                f"weight {weight:g} of the {len(rows)} records to train on in {name} takes none of "
                "them; raise it, or leave the place out"
            )
        notes.append(
            f"{name}: weight {weight:g}, {len(taken):,} records an epoch of {len(rows):,} to train "
            "on"
        )
        chosen.append(taken)
    return table.select(np.concatenate(chosen))


def _read(data: DataConfig, source: str, split: str, notes: list[str]) -> Dataset:
    table = read_table(source, config=data.config, split=split, form=form_of(data), notes=notes)
    if len(table) == 0:
        raise InputError(f"split {split!r} of {source} is empty")
    if data.duplicate_ids == "refuse" and data.id in table.column_names:
        seen: dict[Any, int] = {}
        for record, key in enumerate(table[data.id], start=1):
            if key in (None, ""):
                continue
            if (first := seen.setdefault(str(key), record)) != record:
                raise InputError(
                    f"{source}: records {first} and {record} share the {data.id} {key!r}; remove "
                    "one, name the column that tells records apart with data.id, or set "
                    "data.duplicate_ids: keep"
                )
    return table


def form_of(data: DataConfig) -> Form:
    """Return what a recipe says of the form of its files."""
    return Form(
        texts=text_columns(data),
        delimiter=data.delimiter,
        quoting=data.quoting,
        columns=data.columns,
        unit=data.unit,
    )


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
        *([data.summary] if isinstance(data.summary, str) else data.summary),
        data.question,
        data.context,
        data.answers,
    }
    labels = data.label if isinstance(data.label, list) else [data.label]
    return {*text, *named, *prompt} - {*labels}


def joined(value: Any) -> Any:
    """Return a list of texts, such as sentences, as one; anything else as it is.

    >>> joined(["One.", "Two."])
    'One. Two.'
    """
    texts = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
    return " ".join(value) if texts else value


def summary_columns(data: DataConfig, columns: Collection[str]) -> list[str]:
    """Return the columns of references: those the recipe names, or summary1, summary2, ... in place
    of a "summary" that is not there. Empty where there is none."""
    names = [data.summary] if isinstance(data.summary, str) else data.summary
    if all(name in columns for name in names):
        return names
    several = [f"{names[0]}{number}" for number in range(1, len(columns) + 1)]
    found = [name for name in several if name in columns]
    return found if isinstance(data.summary, str) else []


def numbered(table: Dataset, source: str, first: int = 1) -> Dataset:
    """Return the table with the column `RECORD`, from `first`. Raises `InputError` if the source
    has one."""
    if RECORD in table.column_names:
        raise InputError(
            f"{source} has a column {RECORD!r}, the name of our number of each record; rename it"
        )
    return table.add_column(RECORD, np.arange(first, first + len(table)))


def columns_of(table: Dataset) -> list[str]:
    """Return the columns of the source."""
    return [name for name in table.column_names if name != RECORD]


def only_text(table: Dataset, *others: str | None, lists: bool = False) -> str | None:
    """Return the column "text", else the only column of texts (or `lists` of them) besides
    `others`; None where there is neither."""
    texts = [
        name
        for name, feature in table.features.items()
        if name not in others
        and getattr(getattr(feature, "feature", feature) if lists else feature, "dtype", None)
        in ("string", "large_string")
    ]
    if "text" in texts:
        return "text"
    return texts[0] if len(texts) == 1 else None


def _cut(table: Dataset, data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the records to train on, and a seeded cut of them to evaluate on."""
    whole = isinstance(data.eval_size, int)
    size = int(data.eval_size) if whole else round(data.eval_size * len(table))
    if not 0 < size < len(table):
        raise InputError(
            f"eval_size {data.eval_size} of {len(table)} records in {spelled(data.train)} leaves "
            f"{len(table) - size} to train on and {size} to evaluate on; both must be at least 1"
        )
    order = np.random.default_rng(data.seed).permutation(len(table))
    return table.select(order[size:]), table.select(order[:size])


def _cut_texts(table: Dataset, data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return each text without its end, and its end, from the first line that starts in it."""
    if isinstance(data.eval_size, int):
        raise InputError(
            f"data.eval_size is {data.eval_size}; expected a fraction of each text, as data.unit "
            "is file"
        )
    starts, ends = [], []
    for record, text in zip(table[RECORD], table["text"], strict=True):
        at = round(len(text) * (1 - data.eval_size))
        at = text.find("\n", at) + 1 or text.rfind("\n", 0, at) + 1 or at
        if not (text[:at].strip() and text[at:].strip()):
            raise InputError(
                f"record {record} in {spelled(data.train)} is too short to hold out its "
                "end; give data.eval"
            )
        starts.append(text[:at])
        ends.append(text[at:])
    train, held_out = (
        Dataset.from_dict({"text": texts, RECORD: table[RECORD]}) for texts in (starts, ends)
    )
    return train, held_out


def _sample(given: Records, rows: int | None, seed: int, field: str) -> Dataset:
    table = given.table
    if rows is None:
        return table
    if rows > len(table):
        raise InputError(f"data.{field} asks for {rows} records; {given.source} has {len(table)}")
    return table.select(np.sort(np.random.default_rng(seed).permutation(len(table))[:rows]))
