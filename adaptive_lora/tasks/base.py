"""What a task is: records -> features, a collator, metrics, and the model class that fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from adaptive_lora.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a `Trainer` needs besides the model; `notes` are lines to print before training.

    `metrics` are the names of what `compute_metrics` returns.
    """

    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    compute_metrics: Callable[[Any], dict[str, float]]
    metrics: tuple[str, ...]
    preprocess_logits: Callable[..., Any] | None = None
    model_arguments: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Task(ABC):
    """A kind of task. Stateless: everything it needs comes in the config and the tokenizer."""

    @abstractmethod
    def prepare(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> Prepared:
        """Read the data and turn it into features of at most `longest` tokens. Raises `InputError` on data that
        cannot be trained on."""

    @abstractmethod
    def load_model(self, source: str, **arguments: Any) -> Any:
        """Return what `from_pretrained` returns for the class with the right head."""
