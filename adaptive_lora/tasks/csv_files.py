"""CSV and TSV files: what separates their values, and what quotes mean, is read off the whole file.

A reader that takes a quote in a text for the start of a value runs on to the next quote, over the
ends of lines, and gives fewer records than there are, without a word. So every line is accounted
for: it is a record, a part of one whose quotes are whole, or blank. A file that can be read in two
ways is refused until the recipe says which.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from adaptive_lora.errors import InputError
from adaptive_lora.tasks.text_files import Form, Quoting, lines_of

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LOOKED_AT = 1000  # records from which the delimiter is told
MEANINGS: dict[Quoting, str] = {
    "quotes": "quotes enclose values",
    "escapes": "quotes enclose values, and a backslash stands before one inside",
    "text": "quotes are text",
}
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 20, 2**31 - 1
_LARGEST_VALUE = 1 << 27  # characters; a quote that is never closed makes a longer one
_HEAD = 1 << 22  # characters from which the dialect of a stream is told
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_FEW = 20  # values that a column of classes has at most


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How the lines of a file are records."""

    delimiter: str
    quoting: Quoting
    names: tuple[str, ...] = ()
    header: int = 0  # lines that it takes, with blank ones before it

    def rows(self, lines: Iterable[str]) -> Iterator[tuple[int, int, list[str]]]:
        """Yield (first line, lines from 1 to its last, values) of each record; blank lines have no
        values. Raises `csv.Error` where the quotes are not whole."""
        if self.quoting == "text":
            for number, line in enumerate(lines, start=1):
                text = line.rstrip("\r\n")
                if "\r" in text:
                    raise csv.Error("a carriage return inside a line")
                yield number, number, text.split(self.delimiter) if text else []
            return
        csv.field_size_limit(_LARGEST_VALUE)
        escapes = self.quoting == "escapes"
        reader = csv.reader(
            lines, delimiter=self.delimiter, doublequote=not escapes,
            escapechar="\\" if escapes else None, strict=True,
        )  # fmt: skip
        first = 1
        for values in reader:
            yield first, reader.line_num, values
            first = reader.line_num + 1

    def __str__(self) -> str:
        between = DELIMITERS.get(self.delimiter, repr(self.delimiter))
        return f"{between} between values, {MEANINGS[self.quoting]}"


@dataclass
class Count:
    """What the lines of a file are."""

    records: int = 0
    lines: int = 0
    blank: int = 0


def read_csv(path: Path, text: str, form: Form, *, tabs: bool) -> tuple[pa.Table, list[str]]:
    """Return the table that `text`, the content of `path`, holds, and lines to show on how it was
    read. `tabs`: by its name it is separated by tabs.

    Raises `InputError` with the line where one does not fit, or where the file fits two readings.
    """
    if "\n" not in text:
        text = text.replace("\r", "\n")  # the line ends of old Macs
    dialect = find_dialect(path, text, form, tabs=tabs)
    count = check(path, text, dialect)
    table = parse(text, dialect, form)
    if table.num_rows != count.records:
        raise InputError(
            f"{path}: {count.records:,} records in its lines and {table.num_rows:,} as read with "
            f"{dialect}; say data.delimiter and data.quoting"
        )
    return table, [_shown(path, dialect, count), *_quoted_text(path, dialect, table)]


def find_dialect(path: Path, text: str, form: Form, *, tabs: bool) -> Dialect:
    """Return how the records of a file are written, with the names of its columns."""
    usual: Quoting = "text" if tabs and form.delimiter in (None, "\t") else "quotes"
    quoting = form.quoting or usual
    delimiter = form.delimiter or _delimiter(text, quoting, "\t" if tabs else ",")
    if form.quoting is None:
        quoting = "text" if delimiter == "\t" else "quotes"
    dialect = Dialect(delimiter=delimiter, quoting=quoting)
    if form.quoting is None and quoting == "quotes" and '"' in text:
        dialect = _quotes_of(path, text, dialect)
    return _named(path, text, dialect, form)


def _delimiter(text: str, quoting: Quoting, usual: str) -> str:
    """Return the delimiter that gives every record as many values as the header, and the header
    several; the usual one where none does."""
    found = {}
    for delimiter in sorted(DELIMITERS, key=lambda one: one != usual):
        # A file of commas that is called .tsv has quotes as files of commas have.
        meaning = quoting if delimiter == usual else "text" if delimiter == "\t" else "quotes"
        dialect = Dialect(delimiter=delimiter, quoting=meaning)
        sizes = _sizes(dialect, text)
        if sizes and sizes[0] > 1:
            found[delimiter] = sum(size == sizes[0] for size in sizes) / len(sizes)
    whole = [delimiter for delimiter, share in found.items() if share == 1]
    if usual in found and (usual in whole or not whole):
        return usual
    # A header alone, or one column with a mark in its name: of others, all lines must agree.
    return whole[0] if whole else usual


def _sizes(dialect: Dialect, text: str) -> list[int]:
    """Return how many values each of the first records has."""
    sizes = []
    try:
        for *_, values in islice(dialect.rows(_lines(text)), LOOKED_AT):
            if values:
                sizes.append(len(values))
    except csv.Error:
        pass  # `check` names the line
    return sizes


def _quotes_of(path: Path, text: str, dialect: Dialect) -> Dialect:
    """Return the dialect with what quotes mean in this file: what makes all its lines records of
    one length. Raises `InputError` where two meanings do, and the records differ."""
    as_text = replace(dialect, quoting="text")
    plain = _fits(as_text, text)
    for quoting in ("quotes", "escapes") if '\\"' in text else ("quotes",):
        read = replace(dialect, quoting=quoting)
        spread = _fits(read, text)
        if spread is None:
            continue
        first, last, size = spread
        if plain is not None and last > first and size > 1:
            raise InputError(
                f"{path}, lines {first} to {last}: one record where quotes enclose values, and "
                f"{last - first + 1} records of {size} values where they are text; say which: "
                "data.quoting: quotes or text"
            )
        return read
    return as_text if plain is not None else dialect


def _fits(dialect: Dialect, text: str) -> tuple[int, int, int] | None:
    """Return None unless all records have as many values as the first; else (first line, last line,
    values) of the first that takes several lines for no reason seen in it, of any if none does."""
    found, size = (1, 1, 0), 0
    try:
        for first, last, values in dialect.rows(_lines(text)):
            size = size or len(values)
            if values and len(values) != size:
                return None
            # A quote inside was written twice, as no text has it.
            if last > first and found[0] == found[1] and '"' not in "".join(values):
                found = (first, last, 0)
    except csv.Error:
        return None
    return found[0], found[1], size


def _named(path: Path, text: str, dialect: Dialect, form: Form) -> Dialect:
    """Return the dialect with the names of the columns, from the recipe or from the header."""
    rows = ((last, values) for _, last, values in dialect.rows(_lines(text)) if values)
    try:
        last, names = next(rows, (0, []))
        some = [values for _, values in islice(rows, LOOKED_AT)]
    except csv.Error:  # `check` names the line
        last, names, some = 1, next(_lines(text), "").strip().split(dialect.delimiter), []
    given = form.columns
    if given is None:
        _check_header(path, last, names, some)
    elif given != "header" and not set(names) <= set(given):
        if len(given) != len(names):
            raise InputError(
                f"{path}, line {last}: {len(names)} values, and data.columns names {len(given)} "
                f"columns: {dialect.delimiter.join(names)!r:.60}"
            )
        last, names = 0, list(given)
    return replace(dialect, names=tuple(names), header=last)


def _check_header(path: Path, line: int, names: list[str], records: list[list[str]]) -> None:
    """Raise `InputError` where the first line is a record like the others."""
    # What pandas calls columns without names, and a column of row numbers.
    if names == [str(number) for number in range(len(names))]:
        return
    odd = [name for name in names[1:] if not name.strip()]
    odd += [name for name in names if _NUMBER.fullmatch(name.strip())]
    for place, name in enumerate(names):
        counts = Counter(record[place] for record in records if place < len(record))
        if counts[name] > 1 and len(counts) <= min(_FEW, counts.total() // 2):
            odd.append(name)  # a class, which others have too
    if odd:
        raise InputError(
            f"{path}, line {line}: {', '.join(map(repr, names))!s:.120} looks like a record and "
            f"not like a header ({odd[0]!r:.40}); name the {len(names)} columns with data.columns, "
            "or say data.columns: header"
        )


def check(path: Path, text: str, dialect: Dialect) -> Count:
    """Return the count of lines and records. Raises `InputError` at the first record that is not as
    the dialect has it."""
    count = Count()
    for _ in _checked(path, _lines(text), dialect, count, text):
        pass
    return count


def stream_csv(path: Path, form: Form, size: int, *, tabs: bool) -> Iterator[pa.Table]:
    """Yield the records of a file in tables of `size`, holding no more of it. Delimiter, quotes and
    header are told from its beginning. Raises as `read_csv`, once it gets there."""
    head: list[str] = []
    length = 0
    for line in lines_of(path):
        head.append(line)
        length += len(line)
        if length > _HEAD:
            break
    dialect = find_dialect(path, "".join(head), form, tabs=tabs)
    dialect_of_pieces = replace(dialect, header=0)
    records = _checked(path, lines_of(path), dialect, Count())
    while piece := "".join(islice(records, size)):
        table = parse(piece, dialect_of_pieces, form)
        # What is text in one piece is in the next, though all of it there may look like numbers.
        texts = {field.name for field in table.schema if pa.types.is_string(field.type)}
        form = replace(form, texts={*form.texts, *texts})
        yield table


def _checked(
    path: Path, lines: Iterable[str], dialect: Dialect, count: Count, text: str = ""
) -> Iterator[str]:
    """Yield the lines of each record, and count. Raises `InputError` at the first record that is
    not as the dialect has it; `text` is the whole file, where that is here."""
    pending: list[str] = []

    def watched() -> Iterator[str]:
        for line in lines:
            pending.append(line)
            yield line

    try:
        for first, last, values in dialect.rows(watched()):
            count.lines = last
            if not values:
                count.blank += 1
            elif last > dialect.header:
                count.records += 1
                if len(values) != len(dialect.names):
                    _refuse_ragged(path, text, dialect, count.records, first, values)
                yield "".join(pending)
            pending.clear()
    except csv.Error as error:
        raise InputError(
            f"{path}, line {count.lines + 1}: {_why(error)}, where {dialect}: "
            f"{pending[0].rstrip()!r:.60}; mend it, or say data.quoting: "
            f"{'quotes' if dialect.quoting == 'text' else 'text'}"
        ) from None


def _why(error: csv.Error) -> str:
    said = str(error)
    if "end of data" in said or "limit" in said:
        return "a quote that is never closed"
    if "new-line" in said or "carriage return" in said:
        return "a carriage return inside a line"
    return "a closing quote with more of the value after it"


def _refuse_ragged(
    path: Path, text: str, dialect: Dialect, record: int, line: int, values: list[str]
) -> NoReturn:
    remedy = "put quotes around a value that holds a separator"
    if dialect.quoting == "text":
        quoted = replace(dialect, quoting="quotes")
        remedy = (
            "data.quoting: quotes makes all records fit"
            if '"' in text and _fits(quoted, text) is not None
            else "a value cannot hold a separator or the end of a line unless data.quoting is "
            "quotes"
        )
    raise InputError(
        f"{path}, record {record} (line {line}): {len(values)} values where the header names "
        f"{len(dialect.names)} columns: {dialect.delimiter.join(values)!r:.60}; {remedy}"
    )


def parse(text: str, dialect: Dialect, form: Form) -> pa.Table:
    """Return the records of a text as columns of numbers, dates or text. A column of numbers that
    are not written as numbers are ("007", "+1") is text."""
    start = sum(len(line) for line in islice(_lines(text), dialect.header))
    content = text[start:].encode()
    numbers: list[str] = []
    if content.strip():
        table = _parse(content, dialect, dict.fromkeys(form.texts, pa.string()))
        numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    else:
        table = pa.table({name: pa.array([], pa.string()) for name in set(dialect.names)})
    if not numbers or len(set(dialect.names)) < len(dialect.names):
        return table
    written = _parse(content, dialect, dict.fromkeys(numbers, pa.string()), numbers)
    for name in numbers:
        again = pc.cast(table[name], pa.string())
        if pc.all(pc.equal(again, written[name])).as_py() is False:
            table = table.set_column(table.column_names.index(name), name, written[name])
    return table


def _parse(
    content: bytes,
    dialect: Dialect,
    types: dict[str, pa.DataType],
    columns: list[str] | None = None,
) -> pa.Table:
    quotes = dialect.quoting == "quotes"
    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=dialect.delimiter,
            quote_char=False if dialect.quoting == "text" else '"',
            double_quote=quotes,
            escape_char="\\" if dialect.quoting == "escapes" else False,
            newlines_in_values=dialect.quoting != "text",
        ),
        # One block, as a record longer than it would be an error.
        read_options=pyarrow.csv.ReadOptions(
            block_size=min(max(len(content), _SMALLEST_BLOCK), _LARGEST_BLOCK),
            use_threads=False,
            column_names=list(dialect.names),
        ),
        # A truth value is text: it keeps the spelling it has.
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=types, include_columns=columns, true_values=[], false_values=[]
        ),
    )


def _shown(path: Path, dialect: Dialect, count: Count) -> str:
    header = f"{dialect.header - 1 or 'no'} blank above" if dialect.header > 1 else ""
    header = ("a header" if dialect.header else "no header") + (f" ({header})" if header else "")
    blank = f", {count.blank:,} of them blank" if count.blank else ""
    return f"{path}: {dialect}, {header}; {count.records:,} records in {count.lines:,} lines{blank}"


def _quoted_text(path: Path, dialect: Dialect, table: pa.Table) -> Iterator[str]:
    """Yield a line on values with doubled quotes between quotes, where quotes are text."""
    if dialect.quoting != "text":
        return
    for field in table.schema:
        if pa.types.is_string(field.type):
            looks = pc.match_substring_regex(table[field.name], r'^"([^"]|"")*""([^"]|"")+"$')
            if number := pc.sum(looks).as_py():
                yield (
                    f"{path}: {number:,} values of {field.name!r} are kept with the quotes around "
                    "them; data.quoting: quotes takes these off"
                )


def _lines(text: str) -> Iterator[str]:
    """Yield the lines, with their ends. Only a line feed is one: others may stand in a text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start : end + 1]
        start = end + 1
    if start < len(text):
        yield text[start:]
