"""How heavy the page of a large study is, and how fast it opens.

    python benchmarks/page_size.py [--runs 200] [--output FILE.json]

Makes up a study of 5 methods x 2 tasks x 2 budgets x 2 learning rates x 5 seeds = 200 runs of 24
layers x 5 module kinds, 1,000 steps and 40 decisions each, writes its page, and opens it from disk
five times in a fresh headless chromium. A time is from the start of the navigation until the page
has drawn itself and the browser a frame of it; the median is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from browser import browser
from page_study import Shape, write_study

from adaptive_lora.report.html import render
from adaptive_lora.report.page_data import page_data
from adaptive_lora.report.study_read import read_study

METHODS = ("lora", "linear_decay", "adalora", "grad_delta", "plateau")
OPENED = """() => new Promise(done => requestAnimationFrame(
    () => setTimeout(() => done(performance.now()), 0)))"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seeds = max(1, arguments.runs // (len(METHODS) * 8))
    shape = Shape(methods=METHODS, seeds=seeds, layers=24, decisions=40, points=1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_study(folder, shape)
        started = time.perf_counter()
        study = read_study(folder)
        file = folder / "report.html"
        file.write_text(render(study.head["name"], page_data(study)), encoding="utf-8")
        made = time.perf_counter() - started
        times = []
        for _ in range(5):
            with browser() as chromium:
                page = chromium.new_page(viewport={"width": 1280, "height": 900})
                page.goto(file.as_uri())
                times.append(page.evaluate(OPENED) / 1000)
                version = chromium.version
        figures = {
            "runs": len(study.runs),
            "targets": len(study.runs[0]["ranks"]),
            "bytes": file.stat().st_size,
            "seconds_to_make": round(made, 2),
            "seconds_to_open": [round(seconds, 3) for seconds in sorted(times)],
            "median_seconds_to_open": round(statistics.median(times), 3),
            "browser": f"chromium {version}",
            "machine": platform.machine(),
        }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
