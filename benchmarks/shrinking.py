"""What shrinking saves: our `adalora` beside PEFT's AdaLoRA and plain LoRA of the final pattern;
the cost of `observe`.

    python benchmarks/shrinking.py --model FOLDER [--rank 8] [--pairs 25] [--output FILE.json]

Ours and PEFT's are trained through their whole schedule, from 1.5 x to the final rank, on random
tokens, 32 x 32. Bytes are counted on the tensors. Then, after the last decision and with their
controllers still called, ours, PEFT's and plain PEFT LoRA of our final pattern take turns in one
process, three steps a turn; a figure is the median of the ratios to plain. Targets are the four
attention projections, which all cost the same, so that PEFT's budget in components is ours in
parameters. `observe` is timed inside our steps and divided by the time of a plain step, averaged
over the 60 steps of the schedule (after the last decision it rests).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, set_seed

import adaptive_lora as al

TARGETS = r".*attention.*(query|key|value|output\.dense)"
# steps of the schedule's training, its last decision (70 %), steps of a timed turn
SCHEDULE, LAST, TURN = (60, 42, 3)
Step = Callable[[], None]


def base(folder: str) -> Any:
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 30000, (32, 32), generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens[:, 0] % 2,
    }


class Arm:
    """A model in training: its step, with or without a controller, and the bytes it holds for the
    adapters."""

    def __init__(self, model: PeftModel, method: al.Method | None, total: int) -> None:
        self.model, self.batch = model, make_batch()
        self.trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4
        )
        self.controller = (
            al.RankController(model, self.optimizer, method, total) if method else None
        )
        self.observe_seconds: list[float] = []

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        if self.controller is not None:
            started = time.perf_counter()
            self.controller.observe()
            self.observe_seconds.append(time.perf_counter() - started)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.controller is not None:
            self.controller.step()

    def bytes(self) -> dict[str, int]:
        state = [t for p in self.trained for t in self.optimizer.state[p].values()]
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        return {
            "parameters": sum(p.numel() for p in self.trained),
            "gradients": size(self.trained),
            "Adam": size(state),
        }


def turns(arms: dict[str, Step], pairs: int) -> dict[str, list[float]]:
    """Return the seconds of a step, by arm, one for each turn; the order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(pairs):
        names = list(arms)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            arms[name]()  # the first step after another arm finds cold caches
            started = time.perf_counter()
            for _ in range(TURN):
                arms[name]()
            seconds[name].append((time.perf_counter() - started) / TURN)
    return seconds


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def measure(folder: str, rank: int, pairs: int) -> dict[str, Any]:
    # the timed steps belong to the training, with all that a controller does there
    total = SCHEDULE + pairs * (TURN + 1)
    times: dict[str, Any] = {"initial": SCHEDULE // 10, "final": total - LAST}
    methods = {
        "adalora": al.methods.adalora(rank, **times),
        "PEFT AdaLoRA": al.methods.peft_adalora(rank, **times),
    }
    arms = {
        name: Arm(al.attach(base(folder), method, TARGETS), method, total)
        for name, method in methods.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        arm.step()
        before = arm.bytes()
        for _ in range(SCHEDULE - 1):
            arm.step()
        rows[name] = {"before": before, "after": arm.bytes()}
    with tempfile.TemporaryDirectory() as saved:
        al.save(arms["adalora"].model, saved)
        plain = Arm(PeftModel.from_pretrained(base(folder), saved, is_trainable=True), None, total)
    plain.step()
    rows["plain LoRA, same pattern"] = {"before": plain.bytes(), "after": plain.bytes()}

    steps: dict[str, Step] = {
        "adalora": arms["adalora"].step,
        "PEFT AdaLoRA": arms["PEFT AdaLoRA"].step,
        "plain LoRA, same pattern": plain.step,
    }
    seconds = turns(steps, pairs)
    reference = seconds["plain LoRA, same pattern"]
    for name, row in rows.items():
        row["ratio"] = quartiles(
            [one / two for one, two in zip(seconds[name], reference, strict=True)]
        )
    # The first observation makes the statistics; the rest of the schedule observes nothing, which
    # counts as well.
    share = (
        sum(arms["adalora"].observe_seconds[1:SCHEDULE]) / SCHEDULE / statistics.median(reference)
    )
    observing = statistics.median(arms["adalora"].observe_seconds[1:LAST])
    device = f"{torch.get_num_threads()} CPU threads"
    return {
        "rank": rank, "pairs": pairs, "device": device, "machine": platform.machine(),
        "torch": torch.__version__,
        "plain_step_ms": statistics.median(reference) * 1e3, "observe_ms": observing * 1e3,
        "observe_share": share,
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = measure(options.model, options.rank, options.pairs)
    print(
        f"{'':26}{'parameters':>19}{'gradients, kB':>16}{'Adam, kB':>16}   step / plain (quartiles)"
    )
    for name, row in result["rows"].items():
        before, after, (ratio, low, high) = row["before"], row["after"], row["ratio"]
        kilobytes = [
            f"{before[key] / 1e3:,.0f} → {after[key] / 1e3:,.0f}" for key in ("gradients", "Adam")
        ]
        parameters = f"{before['parameters']:,} → {after['parameters']:,}"
        print(
            f"{name:26}{parameters:>19}{kilobytes[0]:>16}{kilobytes[1]:>16}   {ratio:.3f} "
            f"({low:.3f} .. {high:.3f})"
        )
    print(
        f"observe: {result['observe_ms']:.2f} ms a step while it observes; averaged over all steps "
        f"{100 * result['observe_share']:.2f} % of a plain step of {result['plain_step_ms']:.1f} ms"
    )
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
