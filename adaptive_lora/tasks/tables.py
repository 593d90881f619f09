"""Tables from files and the hub: CSV, TSV, JSON, JSONL, parquet, plain text, folders of images.
Every fault is named with its place."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, load_dataset

from adaptive_lora.errors import InputError
from adaptive_lora.hub import explain_missing, is_local, reachable
from adaptive_lora.tasks.conll import CONLL, read_conll
from adaptive_lora.tasks.csv_files import read_csv
from adaptive_lora.tasks.json_files import check_type, read_json, table_of
from adaptive_lora.tasks.text_files import PACKED, Form, ending, read_text, units

READERS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def read_table(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    form: Form | None = None,
    notes: list[str] | None = None,
) -> Dataset:
    """Return the records of a local CSV / TSV / JSON / JSONL / parquet / text file, or of a data
    set on the hub.

    Args:
        source: a file, or a data set name on the hub such as "nyu-mll/glue".
        config: the hub data set's configuration, such as "sst2". Files have none.
        split: the hub data set's split. Files have none.
        form: what a recipe says of the form of files.
        notes: where lines on how the file was read are added.

    Raises `InputError` naming the file, and the line where there is one.
    """
    path = Path(source)
    if is_local(source) or ending(path) in (*READERS, *CONLL):
        return _read_file(path, form or Form(), [] if notes is None else notes)
    if not reachable():
        raise InputError(
            explain_missing("data set", source, tried=[f"local file {path.resolve()}"])
        )
    try:
        return load_dataset(source, config, split=split)
    except Exception as error:  # the hub client has dozens of kinds; the message is what helps
        raise InputError(
            f"cannot load data set {source!r} (config {config!r}, split {split!r}): {error}"
        ) from error


def files_of(source: str) -> list[str]:
    """Return the data files of a folder that holds some and no images, sorted; else `source`.
    Names that begin with a dot or an underscore are no data."""
    folder = Path(source)
    if not folder.is_dir() or any(_within(folder, IMAGES)):
        return [source]
    return [str(path) for path in _within(folder, (*READERS, PACKED))] or [source]


def _within(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    # Sorted, for the order of a folder differs between file systems.
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )


def _read_file(path: Path, form: Form, notes: list[str]) -> Dataset:
    if path.is_dir():
        return _read_images(path)
    if not path.is_file():
        raise InputError(
            f"data file {path} does not exist; give a {', '.join(READERS)} file or a hub data set "
            "name"
        )
    try:
        table = _table(path, form, notes)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (pa.ArrowCapacityError, MemoryError) as error:
        raise InputError(
            f"{path} does not fit into memory ({error!s:.120}); data.streaming: true reads it in "
            "pieces"
        ) from None
    return checked(table, path)


def checked(table: pa.Table, path: Path) -> Dataset:
    """Return a table as a data set. Raises `InputError` for one without records, with two columns
    of one name, or with a column that a data set cannot hold."""
    if table.num_rows == 0:
        raise InputError(f"{path} has no records")
    if len(set(table.column_names)) < table.num_columns:
        raise InputError(
            f"{path} has two columns of one name; its columns: {', '.join(table.column_names)}"
        )
    for field in table.schema:
        try:
            check_type(field)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: column {field.name!r} is of the type {field.type!s:.60}, which is not "
                f"read ({error}); leave the column out, or make it text, numbers, or lists of these"
            ) from None
    return Dataset(table)


def _table(path: Path, form: Form, notes: list[str]) -> pa.Table:
    suffix = ending(path)
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    if suffix in (".csv", ".tsv") or (suffix == ".txt" and form.delimiter is not None):
        table, lines = read_csv(path, read_text(path), form, tabs=suffix == ".tsv")
        notes += lines
        return table
    if suffix in CONLL:
        return pa.table(read_conll(read_text(path), path))
    if suffix in (".json", ".jsonl"):
        return table_of(read_json(path), path)
    if suffix == ".txt":
        text = read_text(path)
        records = units(text, form.unit)
        notes.append(
            f"{path}: {len(records):,} records, each a {form.unit}, of {_lines(text):,} lines"
        )
        return pa.table({"text": pa.array(records, pa.string())})
    raise InputError(
        f"data file {path} has the ending {suffix!r}; expected one of {', '.join(READERS)}"
    )


def _lines(text: str) -> int:
    return text.count("\n") + (not text.endswith("\n"))


def _read_images(folder: Path) -> Dataset:
    """Return the column "image" (paths) of a folder, and "label" when the images lie in one folder
    for each class."""
    files = _within(folder, IMAGES)
    if not files:
        raise InputError(
            f"data file {folder} is a folder without images ({', '.join(IMAGES)}) and without "
            f"files of records; give a {', '.join(READERS)} file, a folder of these, a folder that "
            "holds one folder of images for each class, or a hub data set name"
        )
    columns = {"image": [str(path) for path in files]}
    if all(path.parent != folder for path in files):
        columns["label"] = [path.relative_to(folder).parts[0] for path in files]
    return Dataset.from_dict(columns)
