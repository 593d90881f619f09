"""What a study costs beside its training: 1,000 runs that take no time, from the plan to
results.json.

    PYTHONPATH=.:tests python benchmarks/study_overhead.py --output benchmarks/study_overhead.json

Two figures: wall seconds of everything after torch is imported (a worker in this process), and of
the whole command with a worker process of its own, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import study_data

from adaptive_lora.recipe.config import parse
from adaptive_lora.study.plan import make_plan, write_plan
from adaptive_lora.study.study import run_study, write_results
from adaptive_lora.study.worker import work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    grid = {**study_data.study().grid, "seed": list(range(options.runs // 4))}
    made = study_data.study(grid=grid)
    figures: dict[str, float | int | str] = {"runs": options.runs}
    stamps = [(time.perf_counter(), time.process_time())]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "in-process"
        for name, step in (
            ("plan", lambda: write_plan(here, made, make_plan(made))),
            ("stand-in and bookkeeping", lambda: work(here, study_data.train)),
            ("results", lambda: write_results(here)),
        ):
            step()
            stamps.append((time.perf_counter(), time.process_time()))
            figures[f"{name}, wall s"] = round(stamps[-1][0] - stamps[-2][0], 2)
            figures[f"{name}, CPU s"] = round(stamps[-1][1] - stamps[-2][1], 2)
        began = time.process_time()
        for one in make_plan(made):
            study_data.train(parse({**one["config"], "output": f"{folder}/alone/{one['id']}"}))
        figures["plan and stand-in without a study, CPU s"] = round(time.process_time() - began, 2)
        began = time.perf_counter()
        run_study(made, Path(folder) / "command", train=study_data.INSTANT)
        figures["whole, with a worker process, wall s"] = round(time.perf_counter() - began, 2)
    figures["load average"] = round(os.getloadavg()[0], 1)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
