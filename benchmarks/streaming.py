"""How much memory a training takes whose records are streamed from a CSV of any size.

    python benchmarks/streaming.py [--megabytes 500] [--steps 200] [--whole] [--output FILE.json]

Makes the CSV on the spot (a text of about 200 characters, some with quotes and line ends, and a
label), and trains a tiny encoder on its stream in a process of its own; then a second process reads
the stream from its first record to its last. With --whole a third reads the same file at once, for
comparison. Peaks are those of whole processes, with Python, PyTorch and the model in them.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from model_folders import PIECES, _bert

from adaptive_lora.model.memory import peak_memory
from adaptive_lora.recipe.config import DataConfig, parse
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.data import load_splits
from adaptive_lora.tasks.streaming import training_pieces

HELD_OUT = 1000


def make(file: Path, size: int) -> int:
    """Write a CSV of about `size` bytes and return how many records it has."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(PIECES, k=50)) for _ in range(5000)]
    texts += [f'he said "{text[:90]}",\nand {text[90:]}' for text in texts[:500]]
    records = 0
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["n", "text", "label"])
        while stream.tell() < size:
            for _ in range(1000):
                writer.writerow([records, draw.choice(texts), records % 2])
                records += 1
    return records


def data_of(file: Path, **data: Any) -> dict[str, Any]:
    return {"train": str(file), "text": "text", "label": "label", "classes": ["0", "1"],
            "eval_size": HELD_OUT, "duplicate_ids": "keep", **data}  # fmt: skip


def train(file: Path, folder: Path, steps: int) -> dict[str, Any]:
    values = {
        "model": _bert(folder / "model", 16, 24),
        "task": "classification",
        "output": str(folder / "run"),
        "data": data_of(file, streaming=True),
        "training": {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no"},
    }
    result = run(parse(values))
    return {"steps": result["steps"], "status": result["status"]}


def read_stream(file: Path) -> dict[str, Any]:
    pieces = training_pieces(DataConfig(**data_of(file, streaming=True)))
    return {"records": sum(len(piece.records) for piece in pieces) + HELD_OUT}


def read_whole(file: Path) -> dict[str, Any]:
    splits = load_splits(DataConfig(**data_of(file)))
    return {"records": sum(len(split.records) for split in splits.all)}


def measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what `work` returns, with the seconds and the peak of a fresh process that does it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, *arguments))


def _timed(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    started = time.perf_counter()
    found = work(*arguments)
    seconds = round(time.perf_counter() - started, 1)
    return {**found, "seconds": seconds, "peak_bytes": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "large.csv"
        records = make(file, arguments.megabytes * 10**6)
        found: dict[str, Any] = {"file_bytes": file.stat().st_size, "records": records}
        found["train"] = measured(train, file, folder, arguments.steps)
        found["read_stream"] = measured(read_stream, file)
        if arguments.whole:
            found["read_whole"] = measured(read_whole, file)
    for key in ("train", "read_stream", "read_whole"):
        if key in found:
            print(f"{key:<12} {found[key]['peak_bytes'] / 1e6:,.0f} MB, {found[key]['seconds']} s")
    assert found["read_stream"]["records"] == records
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
