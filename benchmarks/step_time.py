"""Step time of `AdaptiveTrainer` on our adapters over the stock `Trainer` on plain PEFT LoRA of the
same ranks.

    python benchmarks/step_time.py --model FOLDER [--pairs 15] [--steps 8]

Paired: the two arms take turns in one process, each turn times `steps` steps of one trainer; the
figure is the median of the ratios. Expected at most 1.02. The model is any encoder folder; the data
are random tokens, 32 x 32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import adaptive_lora as al


class Clock(TrainerCallback):
    """Wall-clock seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def batches(n: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, vocabulary, (32,), generator=generator),
            "attention_mask": torch.ones(32, dtype=torch.long),
            "labels": torch.randint(0, 2, (), generator=generator),
        }
        for _ in range(n)
    ]


def timed(trainer_class: type[Trainer], model: torch.nn.Module, steps: int, folder: str) -> float:
    """Return the median step time in seconds, the first step left out."""
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=32, max_steps=steps + 1, save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True, report_to="none", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    clock = Clock()
    data: Any = batches(32 * (steps + 1), 30000)
    trainer_class(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    return statistics.median(clock.seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()

    def base() -> Any:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)

    ours = al.attach(base(), al.methods.linear_decay(rank=8))
    config = ours.peft_config["default"]
    plain = get_peft_model(
        base(),
        LoraConfig(
            task_type="SEQ_CLS", r=config.r, lora_alpha=config.lora_alpha,
            target_modules=list(al.ranks(ours)),
            rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern,
        ),
    )  # fmt: skip
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            arms = [("ours", al.AdaptiveTrainer, ours), ("plain", Trainer, plain)]
            seconds = {
                name: timed(trainer, model, options.steps, folder)
                for name, trainer, model in arms[:: 1 if pair % 2 else -1]
            }
            ratios.append(seconds["ours"] / seconds["plain"])
            print(
                f"pair {pair:>2}: ours {seconds['ours'] * 1e3:.1f} ms, plain "
                f"{seconds['plain'] * 1e3:.1f} ms, ratio {ratios[-1]:.3f}"
            )
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"median ratio {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} .. "
        f"{quartiles[2]:.3f})"
    )


if __name__ == "__main__":
    main()
