"""Several classes of one text, or none: each is a question of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import ROW, alike, by_record
from adaptive_lora.tasks.classification import ClassTask
from adaptive_lora.tasks.data import RECORD, Split
from adaptive_lora.tasks.text import LABEL_COLUMNS, TextTask

SHOWN = 20  # classes whose counts are printed


class MultiLabelClassification(ClassTask, TextTask):
    """Micro and macro F1 over the classes of texts, and how often the whole set is right.

    A label is a list of classes, which may be empty; or several columns say with 0 and 1 what a
    record is, and the columns are the classes. The loss is transformers' binary cross-entropy; a
    class is predicted where its probability is above a half.
    """

    metrics = ("f1_micro", "f1_macro", "exact_match")

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
    ) -> None:
        super().__init__(config, tokenizer, model_config)
        if config.training.get("label_smoothing_factor"):
            raise InputError(
                "training.label_smoothing_factor is for one class a record; set it to 0 for "
                "multi_label_classification"
            )

    def learn(self, split: Split) -> None:
        TextTask.learn(self, split)
        columns = self.data.label
        if isinstance(columns, list):
            if self.data.classes not in (None, columns):
                raise InputError(
                    f"data.label names the columns {columns} and data.classes says "
                    f"{self.data.classes}: where columns are the classes, leave data.classes out"
                )
            self.learned(classes=columns)
        ClassTask.learn(self, split)
        self.notes.append(f"any of the classes of {' + '.join(self.columns)}: {self._listed()}")

    @property
    def label(self) -> str:
        """The label column, or all of them, for messages."""
        return " + ".join(self.label_names)

    @property
    def label_names(self) -> list[str]:
        given = self.data.label
        return given if isinstance(given, list) else [given or LABEL_COLUMNS[0]]

    def _lists(self, split: Split) -> Iterator[tuple[int, list[Any]]]:
        """Yield (record, its classes)."""
        if isinstance(self.data.label, list):
            yield from self._of_columns(split, self.data.label)
            return
        for record, value in zip(split.records[RECORD], split.records[self.label], strict=True):
            if not isinstance(value, list):
                raise InputError(
                    f"{split.at(record)}: column {self.label!r} is {value!r:.60}; expected a list "
                    "of classes, [] where there is none"
                )
            yield record, value

    def _of_columns(self, split: Split, columns: list[str]) -> Iterator[tuple[int, list[str]]]:
        rows = zip(*(split.records[name] for name in columns), strict=True)
        for record, values in zip(split.records[RECORD], rows, strict=True):
            for name, value in zip(columns, values, strict=True):
                if value not in (0, 1, "0", "1"):
                    raise InputError(
                        f"{split.at(record)}: column {name!r} is {value!r:.60}; expected 0 or 1"
                    )
            yield record, [name for name, value in zip(columns, values, strict=True) if int(value)]

    def _each(self, split: Split) -> Iterator[tuple[int, Any]]:
        return ((record, label) for record, labels in self._lists(split) for label in labels)

    def _sets(self, split: Split) -> list[frozenset[int]]:
        """Return the places of each record's classes among the data's."""
        ids = iter(self._ids(split))
        return [frozenset(next(ids) for _ in labels) for _, labels in self._lists(split)]

    def _check_present(self, split: Split) -> None:
        sets = set(self._sets(split))
        if len(sets) < 2:
            same = sorted(self.names[index] for index in next(iter(sets)))
            raise InputError(
                f"{split.source}: every record has the classes {same}; nothing to classify"
            )

    def _metrics(self) -> tuple[str, ...]:
        return type(self).metrics

    def model_arguments(self) -> dict[str, Any]:
        return {**super().model_arguments(), "problem_type": "multi_label_classification"}

    def labels(self, split: Split) -> list[list[float]]:
        """Return 0.0 or 1.0 for each output and record. Raises `InputError` at the first label
        outside the classes."""
        sets = self._sets(split)
        counts = Counter(index for places in sets for index in places)
        shown = ", ".join(f"{name:.30} {counts[i]:,}" for i, name in enumerate(self.names[:SHOWN]))
        more = len(self.names) - SHOWN
        self.notes.append(
            f"{split.part}: {shown}{f' and {more} classes more' if more > 0 else ''}; "
            f"{sum(not places for places in sets):,} of {len(sets):,} records have none"
        )
        outputs = np.argsort(self._outputs())
        return [[float(index in places) for index in outputs] for places in sets]

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        return metrics.multi_label(outputs, labels)

    def constant(self, outputs: Any, labels: Any) -> bool | None:
        return alike(np.asarray(outputs) > 0) and not alike(labels)

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        logits = np.asarray(outputs, dtype=np.float64)[:, self._outputs()]  # in the data's order
        probabilities = np.exp(-np.logaddexp(0.0, -logits))
        rows = [
            {
                "prediction": [name for name, p in zip(self.names, row, strict=True) if p > 0.5],
                "probability": dict(zip(self.names, map(float, row), strict=True)),
            }
            for row in probabilities
        ]
        return by_record(features[ROW], rows)
