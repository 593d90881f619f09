"""JSON and JSONL files: records that are objects, and the first that is none."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from adaptive_lora.errors import InputError
from adaptive_lora.tasks.text_files import ending, lines_of, read_text

# Half of a character beyond U+FFFF, as JSON escapes it; whole characters are two of these.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_type(field: pa.Field) -> None:
    """Raise `ValueError` or `RecursionError` unless a data set can hold the column."""
    Dataset(pa.schema([field]).empty_table())


def table_of(records: list[dict[str, Any]], path: Path, first: int = 1) -> pa.Table:
    """Return a column for every key of any record; a record without it has None there. The first is
    number `first` of its file."""
    columns = {}
    for name in dict.fromkeys(key for record in records for key in record):
        values = [record.get(name) for record in records]
        try:
            columns[name] = _array(values)
        except _UNFIT:
            raise _misfit(values, name, path, first) from None
    return pa.table(columns)


_UNFIT = (ValueError, TypeError, OverflowError, RecursionError)  # Arrow's errors are among these


def _array(values: list[Any]) -> pa.Array:
    array = pa.array(values)
    check_type(pa.field("", array.type))
    return array


def _misfit(values: list[Any], name: str, path: Path, start: int) -> InputError:
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
        f"{path}, record {start - 1 + unfit}: the values of {name!r} do not fit one type: "
        f"{reprlib.repr(values[fit])}{others} ({reason:.120}); make them all text, all numbers, or "
        "all lists or objects of one shape"
    )


def read_json(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON or JSONL file. Raises `InputError` with line or record."""
    text = read_text(path)
    if ending(path) == ".json":
        records = _lines(text, path) if _is_lines(text) else _records(_parse(text, path), path)
    else:
        records = _lines(text, path)
    surrogates = SURROGATE.search(text) is not None
    for number, record in enumerate(records, start=1):
        _check_record(record, path, f"record {number}", surrogates=surrogates)
    if records and all(isinstance(record.get("paragraphs"), list) for record in records):
        return _questions(records, path)
    return records


def stream_json(path: Path, size: int) -> Iterator[pa.Table]:
    """Yield the records of a JSONL file in tables of `size`, holding no more of it. Raises as
    `read_json`, once it gets there."""
    records: list[dict[str, Any]] = []
    names: dict[str, None] = {}  # a key that a record before had is a column
    first = 1
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        record = _parse(line, path, number)
        odd = SURROGATE.search(line) is not None
        _check_record(record, path, f"line {number}", surrogates=odd)
        names |= dict.fromkeys(record)
        records.append(names | record)
        if len(records) == size:
            yield table_of(records, path, first)
            first += size
            records = []
    if records:
        yield table_of(records, path, first)


def _check_record(record: Any, path: Path, place: str, *, surrogates: bool) -> None:
    """Raise `InputError` unless a record is an object of characters."""
    if not isinstance(record, dict):
        raise InputError(f"{path}, {place}: expected an object, got {reprlib.repr(record)}")
    if surrogates:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[max(error.start - 20, 0) : error.end]
            raise InputError(
                f"{path}, {place}: {half!r} ends in half of a surrogate pair, which is no "
                "character; remove it"
            ) from None


def _lines(text: str, path: Path) -> list[Any]:
    # splitlines() also splits at U+2028, inside a string
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, path, number) for number, line in lines if line.strip()]


def _is_lines(text: str) -> bool:
    """True for objects in lines of their own, which many call .json."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _records(value: Any, path: Path) -> list[Any]:
    """Return the records of a whole JSON file: a list of them, an object of them by name, an object
    with one such list in it, or an object of columns."""
    if isinstance(value, list):
        return value
    inner = list(value.values()) if isinstance(value, dict) else []
    lists = [name for name in value if _of_objects(value[name])] if inner else []
    if len(lists) == 1:
        return list(value[lists[0]])
    if lists:
        raise InputError(
            f"{path} holds {len(lists)} lists of records ({', '.join(lists)!s:.60}); make a file "
            "of each"
        )
    if records := _of_columns(value) or (inner if _of_objects(inner) else []):
        return records
    raise InputError(
        f"{path} holds a {type(value).__name__} without records in it; expected a list of records, "
        'an object of records ({"0": {...}}), one list in an object ({"data": [...]}), or an '
        "object of columns"
    )


def _of_columns(value: Any) -> list[Any]:
    """Return the records of an object of columns: lists of one length, or objects of rows numbered
    from 0, as pandas writes a table. None where it is no such object."""
    inner = list(value.values()) if isinstance(value, dict) else []
    if not inner or len({len(one) if isinstance(one, list | dict) else -1 for one in inner}) > 1:
        return []
    if all(isinstance(one, list) for one in inner):
        return [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    if list(value) == _numbers(inner) or not all(
        isinstance(one, dict) and list(one) == _numbers(one) for one in inner
    ):
        return []
    return [{name: value[name][row] for name in value} for row in inner[0]]


def _numbers(rows: Sized) -> list[str]:
    return [str(row) for row in range(len(rows))]


def _of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _questions(articles: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return a record for each question of SQuAD's own files: articles of paragraphs of
    questions."""
    records = []
    for number, article in enumerate(articles, start=1):
        try:
            records += [
                {"title": article.get("title"), "context": paragraph["context"], **question}
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        except (KeyError, TypeError):
            raise InputError(
                f"{path}, record {number}: paragraphs as SQuAD has them hold context and qas"
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
