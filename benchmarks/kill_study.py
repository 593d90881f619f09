"""SIGKILL to a study and all its workers at 20 random moments; then its results.json beside a clean
run's, byte for byte.

    PYTHONPATH=.:tests python benchmarks/kill_study.py --output benchmarks/kill_study.json

A tiny BERT, dropout on, 36 runs that really train (a third of them diverges), two workers, a
checkpoint every second step. The study's process and its workers are one process group, forked from
a process that has torch loaded. The last start, which ends the study, is the command line with a
worker process of its own.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from model_folders import (
    FEED_FORWARD,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    _tokenizer,
    recipe,
    reviews,
    write_jsonl,
)
from study_data import in_a_group_of_its_own
from transformers import BertConfig, BertModel

from adaptive_lora.study.outcomes import is_over
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.study_file import parse_study

OFTEN = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def tiny_bert(folder: str) -> str:
    """Write a random encoder and its tokenizer, and return the folder."""
    _tokenizer(
        "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=HIDDEN, intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def finished(folder: Path) -> int:
    """Return how many runs of a study are over."""
    runs = folder / "runs"
    return sum(is_over(folder, path.name) for path in runs.iterdir()) if runs.is_dir() else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        data = write_jsonl(here / "reviews.jsonl", reviews(40))
        base = recipe(
            tiny_bert(str(here / "bert")), data, "", adapters={"dropout": 0.1},
            training=OFTEN | {"num_train_epochs": 4},
        )  # fmt: skip
        del base["output"]
        adalora = {"name": "adalora", "rank": 2, "initial": 2, "final": 2, "every": 2}
        values = {
            "name": "killed",
            "base": base,
            "grid": {
                "method": [{"name": "lora", "rank": 2}, adalora],
                "training.learning_rate": [1e-2, 3e-3, 1e30],
                "seed": [0, 1, 2, 3, 4, 5],
            },
            "baseline": "lora",
            "report": {"metric": "eval_accuracy"},
        }
        study = parse_study(values)
        began = time.monotonic()
        os.waitpid(in_a_group_of_its_own(study, here / "clean", workers=2), 0)
        whole = time.monotonic() - began
        plan, moments, done, ended_alone = make_plan(study), [], [], 0
        for _ in range(options.kills):
            # Kills spread over all of the work: after none or one more run, and some moment into
            # the next.
            begun, goal = time.monotonic(), finished(here / "killed") + draw.choice((0, 0, 1))
            pause = draw.uniform(0.05, 1) * 2 * whole / len(plan)
            child, over = in_a_group_of_its_own(study, here / "killed", workers=2), None
            while (over is None or time.monotonic() < over) and not ended_alone:
                if over is None and finished(here / "killed") >= goal:
                    over = time.monotonic() + pause
                if os.waitpid(child, os.WNOHANG)[0]:
                    ended_alone += 1
                time.sleep(0.005)
            if ended_alone:
                break
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            moments.append(round(time.monotonic() - begun, 2))
            done.append(finished(here / "killed"))
        (here / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "adaptive_lora.cli.main",
            "study",
            str(here / "study.yaml"),
            "--output",
            str(here / "killed"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = [(here / folder / "results.json").read_bytes() for folder in ("clean", "killed")]
        costs = json.loads((here / "killed" / "costs.json").read_text())
        rows = json.loads(results[0])["runs"]
        clean, killed = (text.decode().splitlines() for text in results)
        print(
            "\n".join(difflib.unified_diff(clean, killed, "clean", "killed", lineterm="")), end=""
        )
        figures = {
            "runs": len(rows),
            "of them failed (diverged)": sum(row["status"] == "failed" for row in rows),
            "kills": len(moments),
            "seconds after each start": moments,
            "runs that were over at each kill": done,
            "seconds of the clean study": round(whole, 1),
            "runs that were taken over": sum(cost["attempts"] > 1 for cost in costs.values()),
            "most attempts of one run": max(cost["attempts"] for cost in costs.values()),
            "results.json equals the clean one, byte for byte": results[0] == results[1],
        }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if results[0] == results[1] and len(moments) == options.kills else 1)


if __name__ == "__main__":
    main()
