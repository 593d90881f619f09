"""Files of text: what a recipe says of their form, and their text, decoded or refused by line."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaptive_lora.errors import InputError

Quoting = Literal["quotes", "escapes", "text"]
Unit = Literal["line", "paragraph", "file"]
PACKED = ".gz"


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a recipe says of the form of its files; None leaves it to the file.

    Args:
        texts: columns of a CSV or TSV file that are text even where they look like numbers or
            dates.
        delimiter: what stands between the values of a CSV or TSV file.
        quoting: what a double quote in it is: around a value and doubled inside (quotes), around a
            value with a backslash before one inside (escapes), or a character like any (text).
        columns: the names of the columns of a CSV or TSV file without a header; "header" where its
            first line is one, however it looks.
        unit: what of a .txt file is a record.
    """

    texts: Collection[str] = ()
    delimiter: str | None = None
    quoting: Quoting | None = None
    columns: Sequence[str] | Literal["header"] | None = None
    unit: Unit = "line"


def ending(path: Path) -> str:
    """Return what a file's name says of its form, in lower case: ".csv" of "a.CSV.gz"."""
    packed = path.suffix.lower() == PACKED
    return (Path(path.stem) if packed else path).suffix.lower()


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark. Raises `InputError` with the line where
    it is none."""
    content = _content(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise InputError(f"{path}, line {line}: a NUL byte; the file is binary, not text")
    return text


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their ends, without holding more of it. Raises as
    `read_text`."""
    packed = path.suffix.lower() == PACKED
    number = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in line:
                    raise InputError(
                        f"{path}, line {number}: a NUL byte; the file is binary, not text"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file: {error}") from None


def _content(path: Path) -> bytes:
    if path.suffix.lower() != PACKED:
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file: {error}") from None


def units(text: str, unit: Unit) -> list[str]:
    """Return the records of plain text: its lines, its paragraphs (between blank lines), or all of
    it. Of lines and paragraphs, what is blank is none."""
    if unit == "file":
        return [text] if text.strip() else []
    # Only a line feed ends a line: U+2028 and the like may stand in one.
    parts = text.split("\n") if unit == "line" else re.split(r"\n\s*\n", text)
    return [part.strip("\r\n") for part in parts if part.strip()]
