"""The reports of a study: table on the terminal, `report.md`, `results.csv`, `report.html`, figures."""

from __future__ import annotations

import os
from pathlib import Path

from adaptive_lora.errors import InputError
from adaptive_lora.report.html import render
from adaptive_lora.report.page_data import page_data
from adaptive_lora.report.study_read import read_study

PAGE_FILE = "report.html"


def report_study(folder: str | Path) -> list[Path]:
    """Print the table of the study in `folder`, write its reports into it, and return their paths."""
    study = read_study(folder)
    return [_write(study.folder / PAGE_FILE, render(study.head.name, page_data(study)))]


def _write(file: Path, text: str) -> Path:
    """Replace `file` by `text`, whole or not at all."""
    staged = file.with_name(f".{file.name}")
    try:
        staged.write_text(text, encoding="utf-8", newline="\n")
        os.replace(staged, file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error}") from error
    return file
