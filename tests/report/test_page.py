"""The page of a study in a real browser: every control, no error, no request, hostile text, a
phone, a keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import CHROMIUM, browser
from page_study import HOSTILE, Shape, write_study

from adaptive_lora.report.html import render
from adaptive_lora.report.page_data import page_data
from adaptive_lora.report.study_read import StudyRecord, pareto_front, read_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install chromium (.ci/run does, as root)"
)
SHAPE = Shape(ranks=(4, 8), rates=(3e-4, 1e-3), seeds=2, layers=3, decisions=5, points=60)
TABLES = ("results-body", "wins-body", "failures-body", "runs-body")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    pytest.importorskip("playwright", reason="no playwright: pip install -e '.[dev]'")
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, SHAPE)
    return read_study(folder)


Open = Callable[..., "Page"]


@pytest.fixture
def opened(chromium: Browser, tmp_path: Path) -> Iterator[Open]:
    """Return a function that shows a study; at the end there was no message on the console, no
    error and no request."""
    pages, wrong = [], []

    def show(
        study: StudyRecord, width: int = 1280, height: int = 900, scheme: Any = "light"
    ) -> Page:
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(render(study.head.name, page_data(study)), encoding="utf-8")
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: request.url == file.as_uri() or wrong.append(f"request: {request.url}"),
        )
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.goto(file.as_uri())
        pages.append(context)
        return page

    yield show
    for context in pages:
        context.close()
    assert wrong == []


def column(page: Page, table: str, number: int) -> list[str]:
    return page.locator(f"#{table} tbody tr td:nth-child({number + 1})").all_inner_texts()


def amount(text: str, exact: bool) -> tuple[bool, Any]:
    """Return what a cell is sorted by: what is missing last; its number; text with the numbers in
    it as numbers."""
    first = text.split("\n")[0].replace("−", "-").replace(",", "").strip().lower()
    number = re.match(r"[+<]? ?(-?\d+(\.\d+)?)( |$)", first)
    words = (
        first
        if exact
        else [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", first)]
    )
    return (first == "–", float(number[1]) if number else words)


def test_every_column_sorts_both_ways(study: StudyRecord, opened: Open) -> None:
    page = opened(study)
    for table in TABLES:
        heads = page.locator(f"#{table} thead th")
        sortable = [
            number for number in range(heads.count()) if heads.nth(number).locator("button").count()
        ]
        assert len(sortable) >= 4
        for number in sortable:
            lengths = set()
            for direction in ("ascending", "descending"):
                heads.nth(number).locator("button").click()
                assert heads.nth(number).get_attribute("aria-sort") == direction
                assert page.locator(f"#{table} th[aria-sort]").count() == 1
                exact = heads.nth(number).inner_text().startswith("Run")
                shown = [amount(text, exact) for text in column(page, table, number)]
                known = [value for missing, value in shown if not missing]
                # the unknown last, either way
                assert not any(missing for missing, _ in shown[: len(known)])
                assert known == sorted(known, reverse=direction == "descending"), (
                    table,
                    number,
                    direction,
                )
                lengths.add(len(known))
            assert len(lengths) == 1


def test_the_table_shows_what_the_record_says(study: StudyRecord, opened: Open) -> None:
    page = opened(study)
    words = [
        " ".join(text.split()) for text in page.locator("#results-body tbody tr").all_inner_texts()
    ]
    assert len(words) == len(study.table)
    for text, row in zip(words, study.table, strict=True):
        assert text.startswith(row.method)
        assert f"{row.lora_parameters:,}" in text
        assert f"{row.mean:.3f}"[:5] in text
        assert ("≠" in text) == (row.parameters_equal is False)
        if row.comparison and row.comparison.verdict:
            assert row.comparison.verdict in text.split()
    assert "tie" in " ".join(words).split()
    for part in ("best_mean", "the best mean over seeds", "trials a row: 2"):
        assert part in page.locator("#rule").inner_text()
    assert "Noise floor" in page.locator("#notes").inner_text()


def test_filters_keep_what_passes_in_every_section(study: StudyRecord, opened: Open) -> None:
    page = opened(study)
    everything = {table: page.locator(f"#{table} tbody tr").count() for table in TABLES}
    page.get_by_role("button", name="adalora", exact=True).click()
    assert (
        page.get_by_role("button", name="adalora", exact=True).get_attribute("aria-pressed")
        == "false"
    )
    for table in ("results-body", "runs-body"):
        methods = {text.split("\n")[0].split()[0] for text in column(page, table, 0)}
        assert methods == {"lora", "linear_decay", "grad_delta"}
    assert page.locator("#run-choice optgroup[label=adalora]").count() == 0
    page.locator("select[name=task]").select_option("cola")
    page.locator("select[name=budget]").select_option("rank 8")
    wanted = [
        r for r in study.runs if (r.task, r.budget) == ("cola", "rank 8") and r.method != "adalora"
    ]
    assert page.locator("#runs-body tbody tr").count() == len(wanted)
    assert page.locator("#failures-body tbody tr").count() == sum(
        run.status == "failed" for run in wanted
    )
    assert page.locator("#count").inner_text() == f"{len(wanted)} of {len(study.runs)} runs"
    assert page.locator("#quality-body h4").all_inner_texts() == ["cola"]
    assert page.locator("#quality-body .point").count() == 3
    assert page.locator("#loss-body .curve").count() == len(
        [r for r in wanted if r.id in study.in_table]
    )
    for method in ("lora", "linear_decay", "grad_delta"):
        page.locator("#filters").get_by_role("button", name=method, exact=True).click()
    for section in ("results", "quality", "loss", "rank", "cost", "runs"):
        assert "filters" in page.locator(f"#{section}-body .empty").inner_text(), section
    page.get_by_role("button", name="Reset").click()
    assert {table: page.locator(f"#{table} tbody tr").count() for table in TABLES} == everything


def cells(page: Page, panel: int) -> dict[str, int]:
    """Return {target: rank} of a rank heatmap, as the tooltip says it of each cell under the
    pointer."""
    said = (
        page.locator("#rank-body svg.heatmap")
        .nth(panel)
        .evaluate(
            """map => [...map.querySelectorAll('[data-at]')].map(cell => {
            const at = {bubbles: true, clientX: 9, clientY: 9};
            cell.dispatchEvent(new PointerEvent('pointermove', at));
            return document.getElementById('tooltip').textContent;
        })"""
        )
    )
    return {name: int(rank) for name, rank in (text.split("\n") for text in said)}


def test_the_slider_goes_through_the_decisions_of_the_chosen_run(
    study: StudyRecord, opened: Open
) -> None:
    page = opened(study)
    run = study.representative("adalora")
    assert run is not None
    history = study.details[run.id].history
    page.locator("#run-choice").select_option(run.id)
    slider = page.locator("#decision")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", str(len(history)))
    assert slider.input_value() == str(len(history))
    assert cells(page, 0) == run.initial_ranks
    assert cells(page, 1) == run.ranks == history[-1].pattern
    slider.focus()
    for number in range(len(history) - 1, -1, -1):
        page.keyboard.press("ArrowLeft")
        assert slider.input_value() == str(number)
        said = page.locator("#rank-controls .status").inner_text()
        assert slider.get_attribute("aria-valuetext") == said
        if number:
            decision = history[number - 1]
            assert said.startswith(
                f"Decision {number} of {len(history)}, step {decision.step}: {decision.status}."
            )
            assert (
                f"{decision.parameters_after:,} parameters of a budget of {decision.budget:,}"
                in said
            )
            assert f"step {decision.step}" in page.locator("#saliency-body h4").first.inner_text()
        slider.focus()
    assert cells(page, 1) == run.initial_ranks
    assert "were not scored" not in page.locator("#saliency-body").inner_text()
    assert "No scores up to here" in page.locator("#saliency-body .empty").inner_text()
    page.locator("#decision").fill("2")
    assert cells(page, 1) == history[1].pattern


def test_every_run_can_be_chosen_and_parts_of_scores_have_a_panel_each(
    study: StudyRecord, opened: Open
) -> None:
    page = opened(study)
    options = page.locator("#run-choice option")
    assert options.count() == len([run for run in study.runs if run.ranks])
    by_id = {run.id: run for run in study.runs}
    for method in study.methods:
        group = page.locator(f"#run-choice optgroup[label={method}] option")
        identity = str(group.first.get_attribute("value"))
        page.locator("#run-choice").select_option(identity)
        decisions = study.details[identity].history
        assert page.locator("#decision").count() == (1 if decisions else 0)
        assert page.locator("#trajectory-body .panel").count() == (5 if decisions else 0)
        panels = page.locator("#saliency-body h4").all_inner_texts()
        assert [title.split()[0] for title in panels] == (
            ["Score", *decisions[-1].parts] if decisions else []
        )
    shown = page.get_by_role("button", name=re.compile("^Ranks of run "))
    shown.nth(shown.count() - 1).click()
    last = str(shown.nth(shown.count() - 1).get_attribute("aria-label")).removeprefix(
        "Ranks of run "
    )
    assert page.locator("#run-choice").input_value() == last in by_id
    assert page.evaluate("document.activeElement.id") == "run-choice"


def test_loss_curves_switch_and_answer_the_pointer(study: StudyRecord, opened: Open) -> None:
    page = opened(study)
    assert page.locator("#loss-body .curve").count() == len(study.in_table)
    page.get_by_label("only runs in the table").uncheck()
    assert page.locator("#loss-body .curve").count() == len(study.runs)
    page.get_by_role("button", name="Evaluation").click()
    assert page.get_by_role("button", name="Evaluation").get_attribute("aria-pressed") == "true"
    assert "evaluation loss" in page.locator("#loss-body").inner_text()
    path = page.locator("#loss-body path[fill=none]:not([class])").last
    path.dispatch_event("pointerenter")
    assert page.locator("#loss-body .curve.on").count() == 1
    path.dispatch_event("pointermove", {"clientX": 300, "clientY": 300})
    assert "seed" in page.locator("#tooltip").inner_text()
    path.dispatch_event("pointerleave")
    assert page.locator("#tooltip").is_hidden()
    path.dispatch_event("click")
    assert page.locator("#run-choice").input_value()
    page.get_by_role("button", name="Training").click()
    assert "training loss" in page.locator("#loss-body").inner_text()


def test_the_front_is_marked_and_points_speak(study: StudyRecord, opened: Open) -> None:
    page = opened(study)
    points = page.locator("#quality-body .point")
    assert points.count() == len(study.table)
    for number in range(points.count()):
        points.nth(number).focus()
        text = page.locator("#tooltip").inner_text()
        assert "parameters" in text
        on = "front-point" in str(points.nth(number).get_attribute("class"))
        assert ("Pareto front" in text) == on
    for task in SHAPE.tasks:
        front = pareto_front(
            [row for row in study.table if row.task == task], greater_is_better=True
        )
        panel = page.locator(
            "#quality-body .panel", has=page.get_by_role("heading", name=task, exact=True)
        )
        assert panel.locator(".front-point").count() == panel.locator(".ring").count() == len(front)
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_the_button_is_pressed(
    scheme: str, study: StudyRecord, opened: Open
) -> None:
    page = opened(study, scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(251, 250, 248)", "dark": "rgb(20, 23, 27)"}
    other = "dark" if scheme == "light" else "light"
    assert page.evaluate(ground) == colours[scheme]
    page.emulate_media(color_scheme=other)  # type: ignore[arg-type]
    assert page.evaluate(ground) == colours[other]
    button = page.locator("#theme")
    assert button.inner_text() == f"{scheme.capitalize()} colours"
    button.click()
    assert page.evaluate(ground) == colours[scheme]
    assert button.inner_text() == f"{other.capitalize()} colours"
    button.click()
    assert page.evaluate(ground) == colours[other]


def test_a_phone_scrolls_down_only_and_can_sort(study: StudyRecord, opened: Open) -> None:
    page = opened(study, width=360, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    outside = """[...document.querySelectorAll('body *')].filter(e =>
        !e.closest('.scroll, .skip') && e.getBoundingClientRect().right > 361)
        .map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(outside) == []
    assert (
        page.locator("#results-body tbody tr").first.evaluate("e => getComputedStyle(e).display")
        == "block"
    )
    button = page.locator("#results-body th button", has_text="Parameters")
    button.click()
    button.click()
    assert column(page, "results-body", 0)[0].startswith("adalora")
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_function(
        "document.querySelector('#quality-body svg').viewBox.baseVal.width > 350"
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 900


def test_the_keyboard_reaches_every_control_and_walks_the_heatmap(
    study: StudyRecord, opened: Open
) -> None:
    page = opened(study)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the theme
    assert page.locator("#theme").inner_text() == "Light colours"
    page.locator("#results-body th button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#results-body th").first.get_attribute("aria-sort") == "ascending"
    # sorting does not lose the focus
    assert page.evaluate("document.activeElement.textContent") == "Method"
    page.locator("#rank-body svg.heatmap").first.focus()
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(page.locator("#tooltip").inner_text().split("\n")[0])
    assert [name.removeprefix("encoder.layer.") for name in seen] == [
        "0.attention.self.query",
        "1.attention.self.query",
        "1.attention.self.key",
        "0.attention.self.key",
        "0.attention.self.query",
        "0.attention.self.query",
    ]
    nameless = """[...document.querySelectorAll('button, select, input, [tabindex="0"]')]
        .filter(e => !e.textContent.trim() && !e.getAttribute('aria-label'))
        .filter(e => !(e.labels && e.labels.length)).map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_text_from_run_files_stays_text(tmp_path: Path, opened: Open) -> None:
    """Every text of the study ends a script, starts an image, and is a formula; the page shows it
    and does none of it."""
    study_folder = tmp_path / "study"
    write_study(
        study_folder,
        Shape(methods=("lora", "adalora"), tasks=("sst2",), ranks=(4,), layers=2, points=20),
    )
    file = study_folder / "results.json"
    text = file.read_text()
    record = json.loads(text)
    for word in (
        "adalora",
        "sst2",
        "rank 4",
        "bert",
        "training stopped",
        "eval_test_accuracy",
        record["study"]["name"],
    ):
        text = text.replace(json.dumps(word)[1:-1], json.dumps(word + HOSTILE)[1:-1])
    file.write_text(text.replace("attention.self.query", "attention.<b>self</b>.query"))
    for history in study_folder.glob("runs/*/allocations.jsonl"):
        history.write_text(
            history.read_text().replace("attention.self.query", "attention.<b>self</b>.query")
        )
    hostile = read_study(study_folder)
    assert hostile.problems == []
    page = opened(hostile)
    assert page.title() == hostile.head.name == record["study"]["name"] + HOSTILE
    assert page.locator("img, b, iframe, object").count() == 0
    assert page.locator("script").count() == 2
    for place in (
        "h1",
        "#filters",
        "#results-body",
        "#failures-body",
        "#rank-controls",
        "#runs-body",
    ):
        assert HOSTILE in page.locator(place).inner_text() or HOSTILE in str(
            page.locator(place).text_content()
        ), place
    assert "<b>self</b>" in str(page.locator("#rank-body").text_content())
    page.set_viewport_size({"width": 360, "height": 700})
    page.wait_for_function(
        "document.querySelector('#quality-body svg').viewBox.baseVal.width < 350"
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("width", [360, 1280])
def test_long_names_of_methods_keep_their_end_and_cover_no_figure(
    width: int, tmp_path: Path, opened: Open
) -> None:
    long = [
        f"grad_delta monitor_alpha 0.5 monitor_beta 0.5 warmup_steps {share}"
        for share in (0.1, 0.3)
    ]
    write_study(
        tmp_path,
        Shape(
            methods=("lora", *long),
            tasks=("sst2",),
            ranks=(4,),
            rates=(1e-3,),
            layers=1,
            decisions=1,
        ),
    )
    page = opened(read_study(tmp_path), width=width)
    boxes = (
        page.locator("#cost-body svg")
        .first.locator("text")
        .evaluate_all(
            """texts => texts.map((text) => {
                const { left, right, top } = text.getBoundingClientRect();
                return [text.textContent, left, right, top];
            })"""
        )
    )
    names, figures = boxes[0::2], boxes[1::2]
    assert [text.split()[-1] for text, *_ in names] == ["lora", "0.1", "0.3"]
    for (_, _, right, top), (_, left, _, beside) in zip(names, figures, strict=True):
        assert abs(top - beside) < 6
        assert right < left


def test_an_empty_study_says_so_in_every_section(tmp_path: Path, opened: Open) -> None:
    record = write_study(
        tmp_path,
        Shape(methods=("lora",), tasks=("sst2",), ranks=(4,), rates=(1e-3,), seeds=1, layers=1),
    )
    record |= {"runs": [], "table": [], "noise_floor": [], "wins": {}, "notes": []}
    (tmp_path / "results.json").write_text(json.dumps(record))
    page = opened(read_study(tmp_path))
    for section in (
        "results",
        "quality",
        "loss",
        "rank",
        "trajectory",
        "saliency",
        "cost",
        "failures",
        "runs",
    ):
        assert len(page.locator(f"#{section}-body .empty").inner_text().split()) >= 4, section
    assert page.locator("table").count() == 0
