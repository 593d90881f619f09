"""Step time of a method on a 4-bit base over that on float32.

    python benchmarks/nf4_step_time.py --model MINILM [--pairs 20] [--steps 4]

Paired: the two bases take turns in one process, `steps` steps each turn; the figure is the median
of the ratios with its quartiles. Expected 1.05 to 1.2 on a CPU. The model is any encoder folder,
the targets its attention; the data are random tokens, 32 x 32. Ranks stay as they start, so that
both arms do the same work. Accuracy and bytes on either base: studies/quantised.yaml; plans against
peaks: benchmarks/memory.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import set_seed

import adaptive_lora as al
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.loading import load_model, load_task

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "grad_delta": {"rank": 8, "min_rank": 2, "max_rank": 16},
    "adalora": {"rank": 8},
    "plateau": {"rank": 8, "initial_rank": 2, "max_rank": 8},
}
TARGETS = r".*\.attention\.(self\.(query|key|value)|output\.dense)"
Arm = tuple[torch.nn.Module, torch.optim.Optimizer, al.RankController | None]


def arm(folder: str, quantization: str, name: str) -> Arm:
    """Return a model with adapters, its optimizer, and what moves its ranks if anything does."""
    data = {"train": "none", "text": "text", "label": "label", "classes": ["0", "1"]}
    config = parse(
        {"model": folder, "task": "classification", "data": data, "output": "none",
         "quantization": quantization}
    )  # fmt: skip
    set_seed(0)
    base, head, _ = load_model(config, load_task(config))
    method = al.METHODS[name](**METHODS[name])
    model = al.attach(base, method, TARGETS, modules_to_save=head).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if method.adaptation is None:
        return model, optimizer, None
    return model, optimizer, al.RankController(model, optimizer, method, total_steps=10**6)


def seconds(arm: Arm, batch: dict[str, torch.Tensor], steps: int) -> float:
    """Return the wall-clock seconds of `steps` steps."""
    model, optimizer, controller = arm
    started = time.perf_counter()
    for _ in range(steps):
        model(**batch).loss.backward()
        if controller is not None:
            controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    quiet()
    batch = {
        "input_ids": torch.randint(1000, 20000, (32, 32)),
        "labels": torch.randint(0, 2, (32,)),
    }
    for name in METHODS:
        arms = {kind: arm(options.model, kind, name) for kind in ("none", "nf4")}
        for one in arms.values():
            seconds(one, batch, options.steps)
        ratios = []
        for pair in range(options.pairs):
            order = list(arms)[:: 1 if pair % 2 else -1]
            times = {kind: seconds(arms[kind], batch, options.steps) for kind in order}
            ratios.append(times["nf4"] / times["none"])
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {median:.3f} ({low:.3f} … {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
