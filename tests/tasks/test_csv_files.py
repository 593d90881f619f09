"""CSV and TSV as people have them: the dialect is read off the file and said, every line is
accounted for, and what fits two readings is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from model_folders import Command

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig, parse
from adaptive_lora.tasks.data import form_of, load_splits
from adaptive_lora.tasks.tables import read_table
from adaptive_lora.tasks.text_files import Form

pytest_plugins = ("model_folders",)

# As GLUE publishes them: tabs, quotes that are text, a byte order mark, no header in CoLA.
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t702876\t702977\tAmrozi accused him , whom he called " the witness "\t"Referring to\r\n'
    "0\t2108705\t2108831\t\"Yucaipa owned Dominick 's\" before\tYucaipa bought Dominick 's\r\n"
    '1\t1330381\t1330521\tThey had published an advertisement\t"On June 10 , the owners "\r\n'
)
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    '0\tmain-news\theadlines\t2013\t0003\tnone\tnone\t"A plane\tA plane is taking off."\t5.000\n'
    '1\tmain-news\theadlines\t2013\t0007\tnone\tnone\tA man\tA man sings "\t3.800\n'
    '2\tmain-news\theadlines\t2013\t0010\tnone\tnone\tA "cat\tA cat\t0\n'
)
COLA = (
    "gj04\t1\t\tOur friends won't buy this analysis, let alone the next one.\n"
    'gj04\t0\t*\tThe car honked "its way down the road.\n'
    'cj99\t1\t\t"Fred watered the plants flat.\n'
)


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8", newline="")
    return file


def read(file: Path, **form: Any) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    return read_table(str(file), form=Form(**form), notes=notes).to_list(), notes


@pytest.mark.parametrize(
    ("name", "text", "form"),
    [
        ("mrpc.tsv", MRPC, {}),
        ("stsb.tsv", STSB, {}),
        ("cola.tsv", COLA, {"columns": ["source", "label", "mark", "sentence"]}),
    ],
)
def test_glues_own_files_have_as_many_records_as_lines(
    name: str, text: str, form: dict[str, Any], tmp_path: Path
) -> None:
    """Read with quotes, as other files are, the first two lose a record each without a word."""
    records, notes = read(written(tmp_path, name, text), **form)
    lines = [line.split("\t") for line in text.lstrip("\ufeff").replace("\r", "").splitlines()]
    lines = lines[0 if form else 1 :]
    assert [list(record.values()) for record in records] == [
        [_as_read(value) for value in line] for line in lines
    ]
    header = "no header" if form else "a header"
    assert notes[0].startswith(f"{tmp_path / name}: tabs between values, quotes are text, {header}")
    assert notes[0].endswith(f"; {len(lines)} records in {len(lines) + (not form)} lines")


def _as_read(value: str) -> Any:
    if re.fullmatch(r"[1-9]\d*|0", value):
        return int(value)
    return float(value) if re.fullmatch(r"\d\.\d+", value) else value


def test_a_hundred_thousand_lines_of_quotes_are_as_many_records(tmp_path: Path) -> None:
    marks = ['"a day', 'a "day" ', 'a day"', '"', '"a ""b"" c"', 'a "" day', '"a" day"']
    rows = [f"{marks[i % len(marks)]}\t{marks[i % 5]}\t{i % 3}" for i in range(100_000)]
    file = written(tmp_path, "x.tsv", "\n".join(["a\tb\tlabel", *rows]) + "\n")
    records, notes = read(file)
    assert len(records) == file.read_bytes().count(b"\n") - 1
    assert [f"{r['a']}\t{r['b']}\t{r['label']}" for r in records] == rows
    assert "14,286 values of 'a' are kept with the quotes around them" in "\n".join(notes)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_delimiter_and_the_line_ends_are_the_files(
    mark: str, name: str, end: str, tmp_path: Path
) -> None:
    lines = [f"text, raw{mark}score", f"a day, really{mark}1,5", f"a night{mark}2,5"]
    file = written(tmp_path, "x.csv", "\ufeff" + end.join(lines) + end)
    records, notes = read(file)
    assert records == [
        {"text, raw": "a day, really", "score": "1,5"},
        {"text, raw": "a night", "score": "2,5"},
    ]
    assert f"{name} between values" in notes[0]
    assert "2 records in 3 lines" in notes[0]


def test_mixed_line_ends_and_blank_lines_are_counted(tmp_path: Path) -> None:
    file = written(tmp_path, "x.csv", "\r\n\ntext,label\r\na,b\n\nc,d\r\n\n")
    records, notes = read(file)
    assert records == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    assert notes == [
        f"{file}: commas between values, quotes enclose values, a header (2 blank above); "
        "2 records in 7 lines, 4 of them blank"
    ]


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        ('text,label\n"a ""b"", c\nd",x\n', ['a "b", c\nd', "x"], "quotes enclose values"),
        ('text,label\n"The" is a word,x\n', ['"The" is a word', "x"], "quotes are text"),
        ('text,label\nthe "end,x\n', ['the "end', "x"], "quotes enclose values"),
        ('text,label\n"a \\"b\\", c",x\n', ['a "b", c', "x"], "a backslash stands before"),
        ('text\n"a\nb"\n', ["a\nb"], "quotes enclose values"),
    ],
)
def test_what_a_quote_is_in_a_csv_is_what_makes_its_records_fit(
    text: str, expected: list[str], said: str, tmp_path: Path
) -> None:
    records, notes = read(written(tmp_path, "x.csv", text))
    assert [list(record.values()) for record in records] == [expected]
    assert said in notes[0]


def test_quotes_of_a_tsv_are_read_when_said(tmp_path: Path) -> None:
    file = written(tmp_path, "x.tsv", 'text\tlabel\n"a\tday\tx\nand ""on"""\tx\nb\ty\n')
    with pytest.raises(InputError, match=r"line 2\): 3 values .*data.quoting: quotes makes all"):
        read(file)
    records, _ = read(file, quoting="quotes")
    assert records[0] == {"text": 'a\tday\tx\nand "on"', "label": "x"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.csv", 'a,b\nx,y\n"p,q\nr",s\nz,z\n',
         "lines 3 to 4: one record where quotes enclose values, and 2 records of 2 values"),
        ("x.csv", 'a,b\nx,y\n"p,q,r\nz,z\n', "line 3: a quote that is never closed"),
        ("x.csv", 'a,b\nx,"y\ny"\n"p" q,r,s\n',
         "line 4: a closing quote with more of the value after it, where commas between values"),
        ("x.csv", "a,b\nx,y\rz,z\n", "line 2: a carriage return inside a line"),
        ("x.tsv", "a\tb\nx\ty\nx\ry\tz\n", "line 3: a carriage return inside a line"),
        ("x.tsv", 'a\tb\nx\ty\n"z\n', "record 2 (line 3): 1 values where the header names 2"),
        ("x.csv", "a,b\nx,y\0\n", "line 2: a NUL byte; the file is binary"),
        ("x.tsv", COLA, "line 1: 'gj04', '1', '', \"Our friends won't buy this analysis"),
        ("x.tsv", COLA, "name the 4 columns with data.columns, or say data.columns: header"),
        ("x.csv", "good,a day\nbad,a night\ngood,b\nbad,c\ngood,d\n",
         "line 1: 'good', 'a day' looks like a record"),
    ],
)  # fmt: skip
def test_what_fits_no_reading_or_two_is_refused_with_its_line(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    file = written(tmp_path, name, text)
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}, ")
    assert words in str(error.value)


def test_a_header_that_looks_like_a_record_can_be_said_to_be_one(tmp_path: Path) -> None:
    file = written(tmp_path, "x.csv", "2023,2024\na,b\n")
    assert read(file, columns="header")[0] == [{"2023": "a", "2024": "b"}]
    assert len(read(file, columns=["x", "y"])[0]) == 2
    with pytest.raises(InputError, match=r"line 1: 2 values, and data.columns names 1 columns"):
        read(file, columns=["x"])
    # pandas' own names of columns without names, and of a column of row numbers
    assert read(written(tmp_path, "p.csv", "0,1\na,b\n"))[0] == [{"0": "a", "1": "b"}]
    assert read(written(tmp_path, "p.csv", ",text\n0,a\n1,b\n"))[0][0] == {"": 0, "text": "a"}
    # the names, and a file that has them
    assert len(read(file, columns=["2023", "2024"])[0]) == 1


def test_numbers_that_are_not_written_as_numbers_stay_text_and_truth_values_too(
    tmp_path: Path,
) -> None:
    rows = ["zip,n,b,f", "01234,7,true,1.50", "99999,,FALSE,2"]
    records, _ = read(written(tmp_path, "x.csv", "\n".join(rows)))
    assert records == [
        {"zip": "01234", "n": 7, "b": "true", "f": 1.5},
        {"zip": "99999", "n": None, "b": "FALSE", "f": 2.0},
    ]


def test_the_recipe_says_delimiter_quoting_and_columns(tmp_path: Path) -> None:
    data = DataConfig(train="x", delimiter="tab", quoting="text", columns=["a"])
    form = form_of(data)
    assert (form.delimiter, form.quoting, form.columns) == ("\t", "text", ["a"])
    assert DataConfig(train="x", delimiter="~").delimiter == "~"
    # a recipe that does not say these keys has the same name as under 0.1
    dumped = DataConfig(train="x").model_dump()
    assert not {"delimiter", "quoting", "columns"} & dumped.keys()
    with pytest.raises(InputError, match=r"data.delimiter is 'commas'; expected comma, semicolon"):
        parse({"model": "m", "data": {"train": "x", "delimiter": "commas"}, "output": "o"})


def test_data_check_says_how_the_file_was_read(
    bert_folder: str, tmp_path: Path, command: Command
) -> None:
    rows = [f'"a {"good" if i % 2 else "bad"} day\t{i % 2}' for i in range(12)]
    file = written(tmp_path, "x.tsv", "\n".join(["text\tlabel", *rows, ""]))
    ended = command("data", "check", "--model", bert_folder, "--data", file)
    assert (ended.code, ended.err) == (0, "")
    assert "tabs between values, quotes are text, a header; 12 records in 13 lines" in (
        ended.out.replace("\n    ", " ")
    )


def test_a_quoted_file_of_many_records_is_read_as_parquet_has_it(tmp_path: Path) -> None:
    """The records of a table written by another writer, with all that quotes are for."""
    import csv

    odd = ["a", 'b "c"', "d, e", "f\ng", "", '"', "h\r\ni", "j;k|l\tm"]
    rows = [{"text": odd[i % 8], "other": odd[(i * 3) % 8], "n": i} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for delimiter in ",;|":
        with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        splits = load_splits(
            DataConfig(train=str(tmp_path / "x.csv"), eval=f"{tmp_path}/x.parquet")
        )
        assert splits.train.records.to_list() == splits.eval.records.to_list()
