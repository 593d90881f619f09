"""The reports of a study: table on the terminal, `report.md`, `results.csv`, `report.html`,
figures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from adaptive_lora.errors import InputError
from adaptive_lora.files import move, write_text
from adaptive_lora.report.html import render
from adaptive_lora.report.page_data import page_data
from adaptive_lora.report.study_figures import draw_figures
from adaptive_lora.report.study_read import StudyFolder, read_study
from adaptive_lora.report.study_text import csv_text, markdown, print_study

FIGURES = "figures"


def report_study(folder: str | Path) -> list[Path]:
    """Print the table of the study in `folder`, write its reports beside its results, and return
    their paths.

    `report.md`, `results.csv`, `report.html` and `figures/` are written anew, each whole or not at
    all; the same study gives the same bytes.

    Raises `InputError` when there are no results or the folder cannot be written to,
    `IntegrityError` when `results.json` is damaged. Anything else that is damaged is left out and
    named in the reports.
    """
    study = read_study(folder)
    print_study(study)
    try:
        return _write(study)
    except OSError as error:
        raise InputError(f"cannot write the reports into {study.folder}: {error}") from error


def _write(study: StudyFolder) -> list[Path]:
    with TemporaryDirectory(prefix=".report-", dir=study.folder) as folder:
        staging = Path(folder)
        drawn = draw_figures(study, staging / FIGURES)
        texts = {
            "report.html": render(study.head["name"], page_data(study)),
            "report.md": markdown(study, [f"{FIGURES}/{figure.name}" for figure in drawn]),
            "results.csv": csv_text(study),
        }
        for name, text in texts.items():
            write_text(study.folder / name, text)
        for old in (study.folder / FIGURES).glob("ranks-[0-9]*-*.[ps][nv]g"):
            old.unlink()  # of a method that the study no longer has
        for figure in sorted((staging / FIGURES).glob("*")):
            (study.folder / FIGURES).mkdir(exist_ok=True)
            move(figure, study.folder / FIGURES / figure.name)
    return [
        *(study.folder / name for name in texts),
        *(study.folder / FIGURES / figure.name for figure in drawn),
    ]
