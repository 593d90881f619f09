"""Why CoLA is hard for a sentence encoder: pooling, learning rate, or what is left frozen?

    python studies/cola.py --model FOLDER --train FILE --dev FILE

Frozen: logistic regression on the encoder's vectors, its regularisation chosen on the dev records,
in its favour. Trained: a linear head on the pooler or on mean-pooled tokens, with LoRA of rank 8 or
with every weight, on the same records. Writes `cola.json` and `cola.png` to the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import nn
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

import adaptive_lora as al
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.tasks.data import read_table

BATCH = 16


class Arm(NamedTuple):
    """One way to train. `rank` None trains every weight."""

    pooling: str
    rank: int | None
    rate: float

    @property
    def name(self) -> str:
        what = "all weights" if self.rank is None else f"LoRA rank {self.rank}"
        return f"{self.pooling}, {what}, lr {self.rate:g}"


ARMS = [
    Arm("pooler", 8, 1e-3),
    Arm("pooler", 8, 3e-4),
    Arm("mean", 8, 3e-4),
    Arm("pooler", None, 5e-5),
]


class Classifier(nn.Module):
    """A linear head on the vectors of an encoder."""

    def __init__(self, encoder: nn.Module, pooling: str, width: int) -> None:
        super().__init__()
        self.encoder, self.pooling, self.head = encoder, pooling, nn.Linear(width, 2)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.head(vectors(self.encoder(**batch), batch["attention_mask"])[self.pooling])


def vectors(outputs: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the ways to make one vector of a text."""
    mask = mask.unsqueeze(-1)
    return {
        "pooler": outputs.pooler_output,
        "[CLS]": outputs.last_hidden_state[:, 0],
        "mean": (outputs.last_hidden_state * mask).sum(1) / mask.sum(1),
    }


class Records:
    """Texts and labels, tokenized batch by batch."""

    def __init__(self, file: str, tokenizer: Any, rows: int | None) -> None:
        table = read_table(file)
        chosen = range(min(rows or len(table), len(table)))
        self.texts, self.labels = (
            list(table.select(chosen)[name]) for name in ("sentence", "label")
        )
        self.tokenizer = tokenizer
        self.lengths = [len(ids) for ids in tokenizer(self.texts)["input_ids"]]

    def batches(self, order: list[int]) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = self.tokenizer(
                [self.texts[i] for i in chosen], padding=True, return_tensors="pt"
            )
            yield dict(batch), [self.labels[i] for i in chosen]

    @property
    def by_length(self) -> list[int]:
        return sorted(range(len(self.texts)), key=self.lengths.__getitem__)


def frozen(model: str, train: Records, dev: Records) -> list[dict[str, Any]]:
    """Return the scores of logistic regression on each kind of vector."""
    encoder = AutoModel.from_pretrained(model).eval()

    def encode(records: Records) -> tuple[dict[str, np.ndarray], list[int]]:
        found: dict[str, list[torch.Tensor]] = {}
        labels: list[int] = []
        with torch.no_grad():
            for batch, part in records.batches(records.by_length):
                for name, value in vectors(encoder(**batch), batch["attention_mask"]).items():
                    found.setdefault(name, []).append(value)
                labels += part
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}, labels

    (x, y), (x_dev, y_dev) = encode(train), encode(dev)
    rows = []
    for name in x:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged at one strength: another one wins
            guesses = [
                LogisticRegression(C=c, max_iter=500).fit(x[name], y).predict(x_dev[name])
                for c in (0.1, 1, 10)
            ]
        best = max(guesses, key=lambda guess: matthews_corrcoef(y_dev, guess))
        rows.append({"arm": f"frozen, {name}", "epoch": 0, **scores(y_dev, best)})
    return rows


def trained(
    arm: Arm, model: str, train: Records, dev: Records, epochs: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the scores of an arm after each epoch."""
    set_seed(seed)
    encoder = AutoModel.from_pretrained(model)
    width = encoder.config.hidden_size
    if arm.rank is not None:
        encoder = al.attach(encoder, al.methods.lora(arm.rank))
    classifier = Classifier(encoder, arm.pooling, width)
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arm.rate)
    steps = epochs * -(-len(train.texts) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        classifier.train()
        total = 0.0
        generator = torch.Generator().manual_seed(seed + epoch)
        for batch, labels in train.batches(
            get_length_grouped_indices(train.lengths, BATCH, generator=generator)
        ):
            loss = nn.functional.cross_entropy(classifier(**batch), torch.tensor(labels))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(labels)
        classifier.eval()
        guess: list[int] = []
        truth: list[int] = []
        with torch.no_grad():
            for batch, labels in dev.batches(dev.by_length):
                guess += classifier(**batch).argmax(-1).tolist()
                truth += labels
        row = {
            "arm": arm.name,
            "epoch": epoch + 1,
            "train_loss": total / len(train.texts),
            **scores(truth, guess),
        }
        print({**row, "seconds": round(time.perf_counter() - started)}, flush=True)
        yield row


def scores(truth: list[int], guess: Any) -> dict[str, float]:
    return {
        "matthews": float(matthews_corrcoef(truth, guess)),
        "accuracy": float(accuracy_score(truth, guess)),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    arms = dict.fromkeys(row["arm"] for row in rows)
    for number, arm in enumerate(arms):
        found = [row for row in rows if row["arm"] == arm]
        if found[0]["epoch"] == 0:
            axis.axhline(
                found[0]["matthews"],
                color="#999999",
                linestyle=("-", "--", ":")[number % 3],
                linewidth=1,
                label=arm,
            )
        else:
            axis.plot(
                [row["epoch"] for row in found],
                [row["matthews"] for row in found],
                marker="o",
                label=arm,
            )
    axis.set_xticks(sorted({row["epoch"] for row in rows if row["epoch"]}))
    axis.set_xlabel("epoch")
    axis.set_ylabel("Matthews correlation, dev")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="encoder, folder or hub name")
    parser.add_argument("--train", required=True, help="file with sentence and label")
    parser.add_argument("--dev", required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/cola"))
    options = parser.parse_args()
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, dev = (
        Records(options.train, tokenizer, options.rows),
        Records(options.dev, tokenizer, None),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    rows = frozen(options.model, train, dev)
    print(*rows, sep="\n", flush=True)
    for arm in ARMS:
        rows += trained(arm, options.model, train, dev, options.epochs, options.seed)
        (options.output / "cola.json").write_text(
            json.dumps(rows, indent=2) + "\n", encoding="utf-8"
        )
        draw(rows, options.output / "cola.png")


if __name__ == "__main__":
    main()
