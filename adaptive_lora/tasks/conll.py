"""CoNLL's files of tagged words: a word a line, its tag in the last column, a blank line after each
sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adaptive_lora.errors import InputError

CONLL = (".conll", ".iob", ".iob2", ".bio")
DOCUMENT = "-DOCSTART-"  # CoNLL-2003's line before each document


def read_conll(text: str, path: Path) -> dict[str, list[list[str]]]:
    """Return the columns `tokens` and `ner_tags` of a file, a record for each sentence; without
    tags where its lines have one column only.

    Columns lie between tabs where the first line of words has one, else between blanks. Comments
    ("# id 1", before a sentence) and "-DOCSTART-" are no words.

    Raises `InputError` naming the line that has more columns or fewer than the first.
    """
    sentences = list(_sentences(text, path))
    table = {"tokens": [[row[0] for row in rows] for rows in sentences]}
    if sentences and len(sentences[0][0]) > 1:
        table["ner_tags"] = [[row[-1] for row in rows] for rows in sentences]
    return table


def _sentences(text: str, path: Path) -> Iterator[list[list[str]]]:
    lines = [line.rstrip("\r") for line in text.split("\n")]
    words = (line for line in lines if line.strip() and not line.startswith(("#", DOCUMENT)))
    first = next(words, "")
    separator = "\t" if "\t" in first else None
    width = len(first.split(separator))
    rows: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        row = line.split(separator)
        comment = line.startswith("#") and not rows and len(row) != width
        if not line.strip():
            if rows:
                yield rows
            rows = []
        elif comment or row[0] == DOCUMENT:
            continue
        elif len(row) != width:
            raise InputError(
                f"{path}, line {number}: {len(row)} columns where the first line of words has "
                f"{width}: {line.strip()!r:.60}; write a word, its tag, and between them as many "
                "columns as in the other lines"
            )
        else:
            rows.append(row)
    if rows:
        yield rows
