"""What makes a run a dry run: two steps, a decision in them, and a few records scored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from adaptive_lora.allocation.method import Method
from adaptive_lora.recipe.config import RunConfig

STEPS = 2


def two_steps(config: RunConfig) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` to override."""
    overrides = {"max_steps": STEPS, "save_strategy": "no", "load_best_model_at_end": False}
    # a method that waits for evaluations needs one before the end
    if config.training["eval_strategy"] != "no":
        overrides |= {"eval_strategy": "steps", "eval_steps": 1}
    return overrides


def few(features: Dataset, arguments: TrainingArguments) -> Dataset:
    """Return as many features as two batches hold."""
    return features.take(min(STEPS * arguments.eval_batch_size, len(features)))


def soon(method: Method) -> Method:
    """Return the method with its decisions in a dry run. Times given in steps, such as 200 of
    warm-up, would not fit."""
    adaptation = method.adaptation
    if adaptation is None:
        return method
    when, schedule = adaptation.when.soon(), adaptation.schedule.soon()
    return replace(method, adaptation=replace(adaptation, when=when, schedule=schedule))
