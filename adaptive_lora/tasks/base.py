"""What a task is: records -> features, a collator, metrics, predictions, and the model class that
fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks.data import RECORD, Split

IGNORED = -100  # the label PyTorch's cross-entropy leaves out
# columns of every features table: the record's row in its split from 0; tokens
ROW, LENGTH = ("row", "length")


class Task(ABC):
    """One kind of task, bound to a recipe, to a tokenizer (or image processor) and to the model's
    configuration.

    `learn` looks at the training records once; `features` then turns the records of any split into
    what the model reads, plus columns of our own, which the Trainer leaves out because the model
    has no argument of their names. Everything that cannot be trained on is found in these two, and
    named by file and record. `notes` are lines to print.
    """

    auto_class: Any  # transformers' Auto class with the right head
    # what `score` returns, once learned; the first is reported first unless a recipe says
    metrics: tuple[str, ...]
    needs_outputs: ClassVar[bool] = True  # whether `predict` reads the outputs of a forward pass
    windows: ClassVar[bool] = False  # whether a text of any length is read in windows
    training: ClassVar[dict[str, Any]] = {}  # fields of TrainingArguments that this task needs

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
    ) -> None:
        self.data, self.generation = config.data, config.generation
        if self.data.unit == "file" and not self.windows:
            raise InputError(
                f"data.unit is file, and {config.task} reads no text in windows; expected line or "
                "paragraph"
            )
        self.tokenizer, self.model_config = tokenizer, model_config
        self.notes: list[str] = []
        self.positions = positions(model_config)
        self.longest = self._longest(config.usual_length)

    def learn(self, split: Split) -> None:
        """Take from the training records what the recipe leaves open (text columns, classes), by
        `learned`."""

    def learned(self, **data: Any) -> None:
        """Complete `self.data`, with which a task made anew reads further records as this one."""
        self.data = self.data.model_copy(update=data)

    @classmethod
    def model_class(cls, model_config: PretrainedConfig) -> Any:
        """Return the Auto class that gives a model of this configuration the right head."""
        return cls.auto_class

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments for `from_pretrained` that shape the head."""
        return {}

    def start_head(self, model: nn.Module, drawn: Collection[str]) -> list[str]:
        """Set what of a new head is better not left to chance, and return what to say of it.

        Args:
            drawn: names of the parameters that were drawn just now.
        """
        return []

    @abstractmethod
    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        """Return what the model reads, with labels unless the records have none. Raises
        `InputError` on bad records."""

    def features_alone(self, split: Split) -> Dataset:
        """Return the features of one of many pieces, of which nothing is noted."""
        noted = len(self.notes)
        features = self.features(split)
        del self.notes[noted:]
        return features

    @abstractmethod
    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the function that makes a batch of features."""

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return what is kept of a batch's outputs until `score` (the Trainer's
        preprocess_logits_for_metrics)."""
        return logits[0] if isinstance(logits, tuple) else logits

    @abstractmethod
    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        """Return the metrics of the outputs for `features`, row for row."""

    def constant(self, outputs: Any, labels: Any) -> bool | None:
        """Return whether every record is answered alike, though labels differ; None where a task
        gives no answers that could be compared."""
        return None

    @abstractmethod
    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        """Return a row of predictions for each record of the split that `features` came from, in
        its order."""

    def show(self, item: dict[str, Any]) -> str:
        """Return one row of features as a person reads it."""
        return str(self.tokenizer.decode(item["input_ids"]))

    def bears_loss(self, features: Dataset) -> int:
        """Return how many labels count in the loss."""
        return sum(
            label != IGNORED for labels in features["labels"] for label in np.atleast_1d(labels)
        )

    def _longest(self, usual: int) -> int:
        """Return the longest input in tokens that recipe, tokenizer and model allow; `usual` where
        the recipe says nothing."""
        limit = min(
            self.positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length
        )
        asked = self.data.max_length
        if asked is None:
            whose = "the default of the task" if usual <= limit else "all that the model reads"
            self.notes.append(
                f"inputs of up to {min(usual, limit):,} tokens, {whose}; data.max_length says "
                "another number"
            )
            self.learned(max_length=min(usual, limit))
        elif asked > limit:
            self.notes.append(
                f"data.max_length {asked:,} is more than the model reads: {limit:,} is used"
            )
        return min(asked or usual, limit)

    def _fit(
        self, split: Split, lengths: Sequence[int], labelled: bool, limit: int | None = None
    ) -> list[int]:
        """Return the rows to keep, whose inputs have `lengths` tokens before any cut; say what
        becomes of longer ones. Records without labels are there for an answer each, and none is
        dropped."""
        limit = limit or self.longest
        long = [row for row, length in enumerate(lengths) if length > limit]
        drop = self.data.too_long == "drop" and labelled
        if long and self.data.too_long == "refuse":
            raise InputError(
                f"{split.at(split.records[RECORD][long[0]])}: {lengths[long[0]]:,} tokens are more "
                f"than {limit:,} ({len(long):,} such records); raise data.max_length if the model "
                "reads more, or set data.too_long to cut or drop"
            )
        # Nearest: lengths that occur, and none between two of them.
        low, median, high = (int(np.percentile(lengths, q, method="nearest")) for q in (0, 50, 95))
        self.notes.append(
            f"{split.part}: {len(lengths):,} records of {low:,} to {max(lengths):,} tokens (median "
            f"{median:,}, 95 % up to {high:,}); {len(long):,} longer than {limit:,} and "
            f"{'dropped' if drop else 'cut'}"
        )
        if not drop:
            return list(range(len(lengths)))
        if len(long) == len(lengths):
            raise InputError(
                f"{split.source}: every {split.part} record is longer than {limit:,} tokens and "
                "dropped"
            )
        dropped = set(long)
        return [row for row in range(len(lengths)) if row not in dropped]

    def _checked(self, features: Dataset, split: Split) -> Dataset:
        """Return `features` with `LENGTH`, unless a token id is outside the model's vocabulary."""
        size = self.model_config.get_text_config().vocab_size
        for row, ids in zip(features[ROW], features["input_ids"], strict=True):
            if ids and max(ids) >= size:
                raise InputError(
                    f"{split.at(split.records[RECORD][row])}: token id {max(ids)} "
                    f"({self.tokenizer.decode(max(ids))!r}) is outside the model's vocabulary of "
                    f"{size}; the tokenizer belongs to another model"
                )
        return features.add_column(LENGTH, [len(ids) for ids in features["input_ids"]])


def positions(model_config: PretrainedConfig) -> int | None:
    """Return how many tokens the model reads at most; None when it has no such limit (T5).

    RoBERTa and its kin number positions from padding_idx + 1, so a table of 514 holds 512: seen
    from the position embeddings of a model without storage, as configurations do not say it.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(model_config)
    except (ValueError, KeyError, ImportError, NotImplementedError):
        # Code of its own, or a base that has no AutoModel.
        return int(limit)
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return int(limit) - module.padding_idx - 1
    return int(limit)


def alike(values: Any) -> bool:
    """Return whether the entries along the first dimension are all the same."""
    array = np.asarray(values)
    return bool((array == array[:1]).all())


def by_record(rows: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return `values` in the order of `rows`, the records they belong to."""
    return [value for _, value in sorted(zip(rows, values, strict=True), key=lambda pair: pair[0])]
