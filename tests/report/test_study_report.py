"""Reports of studies as files: what they say, that they say it twice alike, and what they make of
damage."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from model_folders import Command
from page_study import HOSTILE, Shape, write_study
from study_data import finished, plan_in
from study_data import study as instant

from adaptive_lora.report import html, report, study_figures
from adaptive_lora.report.page_data import CURVE_POINTS, digits, evenly, page_data
from adaptive_lora.report.study_read import pareto_front, read_study
from adaptive_lora.report.study_text import csv_text, markdown
from adaptive_lora.study.records import TableRow

pytest_plugins = ("model_folders",)
SMALL = Shape(
    methods=("lora", "adalora", "grad_delta"),
    tasks=("sst2",),
    ranks=(4,),
    seeds=3,
    layers=2,
    points=150,
)
RECORDED = sorted((Path(__file__).parents[2] / "studies" / "results").glob("*/results.json"))
REPORTS = ["report.html", "report.md", "results.csv"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "study"
    folder.mkdir()
    write_study(folder, SMALL)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    file = folder / "results.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))


def embedded(page: str) -> Any:
    return json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0]
    )


def test_the_command_writes_every_report_and_the_same_again(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (folder / "mine.txt").write_text("stays")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    ended = command("report", folder)
    assert (ended.code, ended.err) == (0, "")
    lines = [line for line in ended.out.splitlines() if not line.startswith(("file: ", "figure: "))]
    assert max(map(len, lines)) <= 100
    study = read_study(folder)
    table = ended.out[ended.out.index("method") :]
    for row in study.table:
        line = next(line for line in table.splitlines() if line.split()[:1] == [row["method"]])
        assert f"{row['mean']:.{digits(study)['sst2']}f} ± " in line
        assert (row["comparison"]["verdict"] if row["comparison"] else "baseline") in line.split()
    for words in ("best_mean", "trials a row: 2", "Noise floor", "failed: ", "the loss is nan"):
        assert words in " ".join(ended.out.split())
    named = [
        Path(line.split(": ", 1)[1])
        for line in ended.out.splitlines()
        if line.startswith(("file: ", "figure: "))
    ]
    figures = [
        "quality",
        "pareto",
        "loss",
        "cost",
        "ranks-0-lora",
        "ranks-1-adalora",
        "ranks-2-grad-delta",
    ]
    assert named == [
        *(folder / name for name in REPORTS),
        *(folder / "figures" / f"{name}.png" for name in figures),
    ]
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    new = after.keys() - before.keys()
    assert new == {*named, *(folder / "figures" / f"{name}.svg" for name in figures)}
    assert {file: after[file] for file in before} == before
    for name in figures:
        image = matplotlib.image.imread(folder / "figures" / f"{name}.png")[..., :3]
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
        assert 0.01 < (image.min(axis=2) < 0.9).mean() < 0.9  # neither blank nor covered
    again = command("report", folder)
    assert again.out == ended.out
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == after


def test_the_csv_has_every_run_and_nothing_a_spreadsheet_would_run(folder: Path) -> None:
    change(
        folder,
        lambda record: record["runs"][0].update(
            status="failed", reason='=HYPERLINK("http://x";"y")\nline, two'
        ),
    )
    study = read_study(folder)
    text = csv_text(study)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["id"] for row in rows] == [run["id"] for run in study.runs]
    assert rows[0]["reason"] == '\'=HYPERLINK("http://x";"y")\nline, two'
    for row, run in zip(rows[1:], study.runs[1:], strict=True):
        assert (row["status"], row["method"], row["seed"]) == (
            run["status"],
            run["method"],
            str(run["seed"]),
        )
        assert float(row["learning_rate"]) == run["learning_rate"]
        value = row["metric:eval_test_accuracy"]
        assert value == ("" if run["status"] != "ok" else str(run["metrics"]["eval_test_accuracy"]))
        assert row["in_table"] == str(run["id"] in study.in_table)
        assert row["train_seconds"] == (
            "" if run["status"] != "ok" else str(study.costs[run["id"]]["train_seconds"])
        )


def test_the_markdown_has_table_rule_noise_failures_and_figures(made: Path) -> None:
    study = read_study(made)
    text = markdown(study, ["figures/quality.png"])
    places = digits(study)["sst2"]
    for row in study.table:
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {row['method'].replace('_', chr(92) + '_')} |")
        )
        assert row["ci95"] is not None
        assert f"| {row['mean']:.{places}f} |" in line
        assert f"| {row['ci95'][0]:.{places}f} … {row['ci95'][1]:.{places}f} |" in line
        assert f"| {row['comparison']['verdict'] if row['comparison'] else 'baseline'} |" in line
        assert f"| {row['lora_parameters']:,}{'' if row['parameters_equal'] else ' ≠'} |" in line
    assert "![quality](figures/quality.png)" in text
    assert "not an equal budget (sst2 rank 4)" in text
    for run in study.runs:
        assert (f"| {run['id']} | failed |" in text) == (run["status"] == "failed")
    table = text[text.index("| method") : text.index("\n\n", text.index("| method"))].splitlines()
    assert [line.count(" | ") for line in table] == [14] * (2 + len(study.table))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_hostile_text_is_text_everywhere(folder: Path) -> None:
    bad = f"{HOSTILE} | `a` [x](javascript:1) $\\frac$ ]]> \u2028 &amp; 😀"
    file = folder / "results.json"
    text = file.read_text()
    tame = html.render("tame", page_data(read_study(folder)))
    for word in (
        "adalora",
        "sst2",
        "rank 4",
        "the loss is nan",
        "Four ways to spend a budget",
        "eval_accuracy",
    ):
        text = text.replace(word, json.dumps(bad)[1:-1])
    file.write_text(text)
    study = read_study(folder)
    page = html.render(study.head["name"], page_data(study))
    parser, expected = Tags(), Tags()
    parser.feed(page)
    expected.feed(tame)
    assert parser.tags == expected.tags
    assert embedded(page)["methods"][1]["name"] == bad
    assert page.split('id="data">')[1].split("</script>")[0].isascii()
    shown = markdown(study, [])
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[`\[$]", shown.replace("[report.html](report.html)", ""))
    header = next(line for line in shown.splitlines() if line.startswith("| method"))
    rows = [
        line
        for line in shown.splitlines()
        if line.startswith("|") and "0.0" in line and "trials" not in line
    ]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} <= {
        len(re.findall(r"(?<!\\)\|", header)),
        9,
    }
    drawn = study_figures.draw_figures(study, folder / "figures")  # neither a formula nor a path
    assert all(
        re.fullmatch(r"[a-z0-9-]+\.png", figure.name) and figure.parent == folder / "figures"
        for figure in drawn
    )


def test_the_page_runs_only_its_own_script(made: Path) -> None:
    page = html.render("x", page_data(read_study(made)))
    assert page == html.render("x", page_data(read_study(made)))
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    policy = " ".join(policy.split())
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "{{" not in page.split("<script>")[0]
    assert not re.search(r"(?:src|href)=\"(?!#|data:,)", page.split("<script>")[0])
    own = page.rsplit("<script>", 1)[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|"
        r"https?://(?!www\.w3\.org)",
        own,
    )
    with pytest.raises(ValueError, match="JSON"):
        html.render("x", {"value": float("nan")})


def test_what_is_not_finite_is_null_and_long_series_are_thinned(folder: Path) -> None:
    run = next(
        run for run in read_study(folder).runs if run["status"] == "ok" and run["method"] == "lora"
    )
    lines = [{"step": step, "loss": None if step == 3 else 1e-9 * step} for step in range(1, 5001)]
    (folder / "runs" / run["id"] / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    data = page_data(read_study(folder))
    steps, values = next(one for one in data["runs"] if one["id"] == run["id"])["curves"]["loss"]
    assert len(steps) == len(values) == CURVE_POINTS
    assert (steps[0], steps[-1]) == (1, 5000)
    assert np.ptp(np.diff(steps)) <= 1
    assert "120 points" in data["footer"][-1]
    short = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.25},
        {"step": 4},
    ]
    (folder / "runs" / run["id"] / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in short)
    )
    data = page_data(read_study(folder))
    assert next(one for one in data["runs"] if one["id"] == run["id"])["curves"]["loss"] == [
        [1, 2, 3],
        [0.5, None, 0.25],
    ]


def test_decisions_are_thinned_when_all_together_are_too_many(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_lora.report.page_data.CELLS", 1)
    data = page_data(read_study(made))
    for run in data["runs"]:
        numbers = [decision["number"] for decision in run.get("decisions", [])]
        assert numbers == [1, run["decided"]][: run.get("decided", 0)]
    assert "of more than 2 decisions in a run, 2 are kept" in data["footer"][-1]
    assert [number for number, _ in evenly(range(9), 4)] == [1, 4, 6, 9]


def test_the_front_is_what_nobody_beats() -> None:
    """Against the definition, on every small set of points on a grid, ties included."""
    random = np.random.default_rng(0)
    for greater in (True, False):
        for _ in range(200):
            points = random.integers(0, 4, (5, 2))
            rows = [_row(int(100 + x), float(y)) for x, y in points]
            sign = 1 if greater else -1
            beaten = [
                any(
                    x2 <= x and sign * y2 >= sign * y and (x2, sign * y2) != (x, sign * y)
                    for x2, y2 in points
                )
                for x, y in points
            ]
            expected = {
                (100 + x, y) for (x, y), lost in zip(points, beaten, strict=True) if not lost
            }
            front = pareto_front(rows, greater_is_better=greater)
            assert {(row["lora_parameters"], row["mean"]) for row in front} == expected
            assert len(front) == len(expected)


def _row(parameters: int, mean: float) -> TableRow:
    return TableRow(
        method="m", task="t", model="", budget="", settings={}, chosen={}, learning_rate=None,
        trials=1, runs=[], seeds=1,
        failed=0, mean=mean, sd=None, ci95=None, lora_parameters=parameters, parameters_equal=None,
        note=None, comparison=None,
    )  # fmt: skip


def test_colours_are_those_of_the_page_and_can_be_read() -> None:
    """Text has a contrast of 4.5 to its ground in both themes, marks of methods have 2.7 (WCAG asks
    4.5 and 3)."""
    style = (Path(html.__file__).parent / "page" / "page.css").read_text()
    pairs = {
        name: (a, b)
        for name, a, b in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    }
    assert tuple(pairs[f"m{i}"][0] for i in range(9)) == study_figures.COLOURS

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (0, 1):
        for text in ("ink", "soft", "accent", "good", "bad"):
            for ground in ("ground", "panel", "tint"):
                assert contrast(pairs[text][theme], pairs[ground][theme]) >= 4.5, (
                    text,
                    ground,
                    theme,
                )
        for i in range(9):
            assert contrast(pairs[f"m{i}"][theme], pairs["panel"][theme]) >= 2.7, (i, theme)


@pytest.mark.parametrize(
    ("edit", "words", "lost"),
    [
        (lambda r: r["runs"][3].update(seed="x"), "run 4 (0003", 1),
        (lambda r: r["runs"][3].update(lora_parameters=1.5), "lora_parameters", 1),
        (lambda r: r["runs"][3].pop("method"), "method: Field required", 1),
        (lambda r: r["runs"].insert(0, "x"), "run 1 is left out", 0),
        (lambda r: r["runs"].append(r["runs"][0]), "occurs twice; the first is used", 0),
        (lambda r: r["runs"][3].update(id="../../etc"), "is not the name of a directory", 1),
        (lambda r: r["table"][1].update(mean="high"), "table row 2 is left out: mean", 0),
        (
            lambda r: r["table"][1]["comparison"].update(verdict="best"),
            "table row 2 is left out: comparison.verdict",
            0,
        ),
        (lambda r: r.update(wins=[]), "wins is not a mapping", 0),
        (lambda r: r.update(table=None), "no list of table rows", 0),
        (lambda r: r.update(noise_floor=[{}]), "noise floor 1 is left out", 0),
    ],
)
def test_a_row_edited_by_hand_is_named_and_the_rest_unharmed(
    edit: Callable[[Any], object], words: str, lost: int, folder: Path
) -> None:
    whole = read_study(folder)
    change(folder, edit)
    study = read_study(folder)
    assert any(words in problem and "results.json" in problem for problem in study.problems), (
        study.problems
    )
    assert len(study.problems) == 1
    assert len(study.runs) == len(whole.runs) - lost
    assert [run for run in whole.runs if run in study.runs] == study.runs
    page = embedded(html.render("x", page_data(study)))
    assert page["problems"] == study.problems
    assert all(problem.split(":")[0] in markdown(study, []) for problem in study.problems)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl is damaged: line 2"),
        ("allocations.jsonl", '{"step": 1}\n', "allocations.jsonl is damaged: row 1"),
        ("result.json", "{", "result.json is damaged"),
        ("adapter/adapter_model.safetensors", "x", "missing or damaged"),
    ],
)
def test_a_damaged_run_is_named_and_its_other_files_are_used(
    name: str, content: str, words: str, folder: Path
) -> None:
    run = read_study(folder).representative("adalora")
    assert run is not None
    file = folder / "runs" / run["id"] / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    study = read_study(folder)
    assert [words in problem and run["id"] in problem for problem in study.problems] == [True]
    details = study.details[run["id"]]
    assert bool(details.metrics) == (name != "metrics.jsonl")
    assert bool(details.history) == (name != "allocations.jsonl")
    assert bool(details.memory) == (name != "result.json")


@pytest.mark.parametrize("costs", ["{", "[]", '{"a": {"train_seconds": "x"}}', None])
def test_without_costs_there_is_a_report_without_costs(costs: str | None, folder: Path) -> None:
    (folder / "costs.json").unlink()
    if costs is not None:
        (folder / "costs.json").write_text(costs)
    study = read_study(folder)
    assert ["costs.json is not used" in problem for problem in study.problems] == [True] * (
        costs is not None
    )
    assert study_figures.cost(study) is None
    assert ",," in csv_text(study)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "holds no finished run"),
        ("", 4, "results.json is damaged"),
        ('{"version": 1, "study": {"na', 4, "results.json is damaged"),
        ('{"version": 1, "x": NaN}', 4, "NaN is not JSON"),
        ("[]", 4, "has version None"),
        ('{"version": 2}', 4, "has version 2, this release reads version 1"),
        ('{"version": 1, "study": {"name": 3}}', 4, "study: name"),
        ("[" * 100_000, 4, "results.json is damaged"),
    ],
)
def test_without_readable_results_there_is_one_message_and_nothing_written(
    content: str | None, code: int, words: str, tmp_path: Path, command: Command
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    ended = command("report", tmp_path)
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"] * (content is not None)


def test_an_empty_study_has_reports_that_say_so(folder: Path) -> None:
    change(folder, lambda r: r.update(runs=[], table=[], noise_floor=[], wins={}, notes=[]))
    shutil.rmtree(folder / "runs")
    assert report(folder) == [folder / name for name in REPORTS]
    text = (folder / "report.md").read_text()
    assert "The table is empty: no run of this study has finished." in text
    assert "There are no runs." in text
    assert len((folder / "results.csv").read_text().splitlines()) == 1


def test_figures_of_a_study_that_had_more_are_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ours: a figure that somebody put beside them stays."""
    monkeypatch.setattr("adaptive_lora.report.study_write.draw_figures", lambda study, target: [])
    figures = folder / "figures"
    figures.mkdir()
    for name in ("ranks-7-old.png", "ranks-7-old.svg", "mine.png"):
        (figures / name).write_text("x")
    report(folder)
    assert [file.name for file in figures.iterdir()] == ["mine.png"]


def test_a_study_that_was_run_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    record = finished(tmp_path)
    study = read_study(tmp_path)
    assert study.problems == []
    for kind, rows in (
        ("runs", study.runs),
        ("table", study.table),
        ("noise_floor", study.noise_floor),
    ):
        recorded: Any = record
        assert json.loads(json.dumps(rows)) == json.loads(json.dumps(recorded[kind]))
    assert study.costs == record["costs"]
    assert study.methods[0] == "lora"
    assert all(study.details[run["id"]].metrics for run in study.runs)


@pytest.mark.parametrize("name", [path.parent.name for path in RECORDED])
def test_the_studies_recorded_here_are_read_whole(name: str) -> None:
    """They are of earlier versions; their run directories are not beside them."""
    study = read_study(RECORDED[0].parent.parent / name)
    assert study.problems == []
    assert study.table
    assert study.costs.keys() == {run["id"] for run in study.runs}
    assert all(costs["train_seconds"] for costs in study.costs.values())


def test_a_number_beyond_all_bounds_is_left_out(folder: Path) -> None:
    file = folder / "results.json"
    mean = json.loads(file.read_text())["table"][0]["mean"]
    file.write_text(file.read_text().replace(f'"mean": {mean}', '"mean": 1e999', 1))
    study = read_study(folder)
    assert ["table row 1 is left out: Out of range" in problem for problem in study.problems] == [
        True
    ]


def test_a_study_under_way_is_reported_as_far_as_it_is(tmp_path: Path, command: Command) -> None:
    plan_in(tmp_path, instant())
    ended = command("report", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    out = " ".join(ended.out.split())
    assert "12 runs: 12 missing" in out
    assert "missing: 12 runs: not run yet" in out
    assert "The noise floor is unknown: it takes two seeds of lora." in out
    assert "not run yet" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "results.json").exists()
