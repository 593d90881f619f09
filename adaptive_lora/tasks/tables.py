"""Tables from files and the hub: CSV, TSV, JSON, JSONL, parquet, folders of images. Every fault is
named with its place."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, load_dataset

from adaptive_lora.errors import InputError
from adaptive_lora.hub import explain_missing, is_local, reachable
from adaptive_lora.tasks.conll import CONLL, read_conll

READERS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Half of a character beyond U+FFFF, as JSON escapes it; whole characters are two of these.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_table(
    source: str, *, config: str | None = None, split: str = "train", texts: Collection[str] = ()
) -> Dataset:
    """Return the records of a local CSV / TSV / JSON / JSONL / parquet file, or of a hub data set.

    Args:
        source: a file, or a data set name on the hub such as "nyu-mll/glue".
        config: the hub data set's configuration, such as "sst2". Files have none.
        split: the hub data set's split. Files have none.
        texts: columns of a CSV or TSV file that are text even where they look like numbers or
            dates.

    Raises `InputError` naming the file, and the line where there is one.
    """
    path = Path(source)
    if is_local(source) or path.suffix.lower() in (*READERS, *CONLL):
        return _read_file(path, texts)
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


def _read_file(path: Path, texts: Collection[str]) -> Dataset:
    if path.is_dir():
        return _read_images(path)
    if not path.is_file():
        raise InputError(
            f"data file {path} does not exist; give a {', '.join(READERS)} file or a hub data set "
            "name"
        )
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        elif suffix in (".csv", ".tsv"):
            table = _read_csv(path, "\t" if suffix == ".tsv" else ",", texts)
        elif suffix in CONLL:
            table = pa.table(read_conll(_read_text(path), path))
        elif suffix in (".json", ".jsonl"):
            table = _table(_read_json(path), path)
        else:
            raise InputError(
                f"data file {path} has the ending {suffix!r}; expected one of {', '.join(READERS)}"
            )
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if table.num_rows == 0:
        raise InputError(f"{path} has no records")
    if len(set(table.column_names)) < table.num_columns:
        raise InputError(
            f"{path} has two columns of one name; its columns: {', '.join(table.column_names)}"
        )
    for field in table.schema:
        try:
            _check_type(field)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: column {field.name!r} is of the type {field.type!s:.60}, which is not "
                f"read ({error}); leave the column out, or make it text, numbers, or lists of these"
            ) from None
    return Dataset(table)


def _check_type(field: pa.Field) -> None:
    """Raise `ValueError` or `RecursionError` unless a data set can hold the column."""
    Dataset(pa.schema([field]).empty_table())


def _read_csv(path: Path, delimiter: str, texts: Collection[str]) -> pa.Table:
    # Decoded here: of a byte that is not UTF-8 we name the line.
    text = _read_text(path)
    header = text.lstrip("\r\n").partition("\n")[0]
    for other, name in DELIMITERS.items():
        if delimiter == "," and delimiter not in header and other in header:
            remedy = f"save it with {DELIMITERS[delimiter]}" + (
                ", or name it .tsv" if other == "\t" else ""
            )
            raise InputError(
                f"{path} seems to have {name} between its columns ({header.strip()!r:.60}); "
                f"{remedy}"
            )
    ragged: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row)
        return "error"

    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(text.encode()),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            # One block, as a record longer than it would be an error; threads do not count rows.
            read_options=pyarrow.csv.ReadOptions(
                block_size=min(max(path.stat().st_size, 1 << 20), 2**31 - 1), use_threads=False
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(texts, pa.string())
            ),
        )
    except pa.ArrowInvalid:
        if not ragged:
            raise
        row = ragged[0]
        found = re.search(rf"^{re.escape(row.text)}\r?$", text, re.MULTILINE)
        line = f" (line {text.count(chr(10), 0, found.start()) + 1})" if found else ""
        raise InputError(
            f"{path}, record {row.number - 1}{line}: {row.actual_columns} values where the header "
            f"names {row.expected_columns} columns: {row.text!r:.60}; put quotes around a value "
            "that holds a separator"
        ) from None


def _read_images(folder: Path) -> Dataset:
    """Return the column "image" (paths) of a folder, and "label" when the images lie in one folder
    for each class."""
    # Sorted, for the order of a folder differs between file systems.
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file()
    )
    if not files:
        raise InputError(
            f"data file {folder} is a folder without images ({', '.join(IMAGES)}); give a "
            f"{', '.join(READERS)} file, a folder that holds one folder of images for each class, "
            "or a hub data set name"
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
        raise InputError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None


def _table(records: list[dict[str, Any]], path: Path) -> pa.Table:
    """Return a column for every key of any record; a record without it has None there."""
    columns = {}
    for name in dict.fromkeys(key for record in records for key in record):
        values = [record.get(name) for record in records]
        try:
            columns[name] = _array(values)
        except _UNFIT:
            raise _misfit(values, name, path) from None
    return pa.table(columns)


_UNFIT = (ValueError, TypeError, OverflowError, RecursionError)  # Arrow's errors are among these


def _array(values: list[Any]) -> pa.Array:
    array = pa.array(values)
    _check_type(pa.field("", array.type))
    return array


def _misfit(values: list[Any], name: str, path: Path) -> InputError:
    """Return what to say of values that make no column: the first record with which they make none,
    and why."""
    # of so many records from the first a column can be made, or none
    fit, unfit, reason = (0, len(values) + 1, "")
    while unfit - fit > 1:
        middle = (fit + unfit) // 2
        try:
            _array(values[:middle])
            fit = middle
        except _UNFIT as error:
            unfit, reason = middle, str(error)
    before = next((value for value in values[:fit] if value is not None), None)
    others = "" if before is None else f", and a record before it has {reprlib.repr(before)}"
    return InputError(
        f"{path}, record {unfit}: the values of {name!r} do not fit one type: "
        f"{reprlib.repr(values[fit])}{others} ({reason:.120}); make them all text, all numbers, or "
        "all lists or objects of one shape"
    )


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        records = _parse(text, path)
        if not isinstance(records, list):
            raise InputError(f"{path} holds a {type(records).__name__}; expected a list of records")
    else:  # splitlines() also splits at U+2028, inside a string
        lines = enumerate(text.split("\n"), start=1)
        records = [_parse(line, path, number) for number, line in lines if line.strip()]
    surrogates = SURROGATE.search(text) is not None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, record {number}: expected an object, got {reprlib.repr(record)}"
            )
        if surrogates:
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[max(error.start - 20, 0) : error.end]
                raise InputError(
                    f"{path}, record {number}: {half!r} ends in half of a surrogate pair, which is "
                    "no character; remove it"
                ) from None
    return records


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """Return what the JSON text holds: a whole file, or one of its lines."""
    place = str(path) if line is None else f"{path}, line {line}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise InputError(
            f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except RecursionError:
        raise InputError(
            f"{place}: lists or objects too deep in each other to be read; write flat records"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{place}: {error}") from None
