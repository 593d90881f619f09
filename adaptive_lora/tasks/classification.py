"""Sequence classification: one text or a pair of texts, one label."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from torch import nn

from adaptive_lora.data import RECORD, Split
from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import ROW, by_record
from adaptive_lora.tasks.text import TextTask

METRICS = ("accuracy", "f1", "f1_macro", "matthews")


class Classification(TextTask):
    """Accuracy, F1 and Matthews' correlation over the classes seen in training, or those the recipe names."""

    metrics: tuple[str, ...] = METRICS

    def learn(self, split: Split) -> None:
        super().learn(split)
        self.learned(classes=class_names(split, self.label, self.data.classes))
        self.metrics = metrics_of(self.names)
        self.notes.append(
            f"classification of {' + '.join(self.columns)} into {len(self.names)} classes ({', '.join(self.names):.60})"
        )

    def model_arguments(self) -> dict[str, Any]:
        return head_arguments(self.names)

    @property
    def names(self) -> list[str]:
        return self.data.classes or []

    def labels(self, split: Split) -> list[int]:
        ids = label_ids(split, self.label, self.names)
        self.notes.append(label_counts(split, ids, self.names))
        return ids

    def score(self, outputs: Any, labels: Any, features: Dataset, model: nn.Module) -> dict[str, float]:
        return metrics.classification(outputs, labels)

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        return by_record(features[ROW], class_rows(outputs, self.names))


def class_names(split: Split, label: str, given: list[str] | None) -> list[str]:
    """Return the recipe's classes, or those of the training records; integers sort as numbers. One alone is an error."""
    feature = split.records.features[label]
    values = list(split.records[label])
    if given is not None:
        if len(set(given)) < len(given):
            raise InputError(f"data.classes names a class twice: {given}")
        names = given
    elif isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        for record, value in zip(split.records[RECORD], values, strict=True):
            if value is None or isinstance(value, list | dict):
                raise InputError(f"{split.at(record)}: column {label!r} is {value!r}; expected a text or a number")
        names = [str(value) for value in sorted(set(values))]
    if len(names) < 2 or len(set(values)) < 2:
        present = names if len(names) < 2 else sorted({str(value) for value in values})
        raise InputError(f"{split.source}: column {label!r} holds one class only, {present}; nothing to classify")
    return names


def label_ids(split: Split, label: str, names: list[str]) -> list[int]:
    """Return the class number of each record. Raises `InputError` at the first label outside the classes."""
    by_name = {name: index for index, name in enumerate(names)}
    is_class_label = isinstance(split.records.features[label], ClassLabel)
    is_index = is_class_label or not any(name.lstrip("-").isdigit() for name in names)
    ids = []
    for record, value in zip(split.records[RECORD], split.records[label], strict=True):
        index = by_name.get(str(value))
        if index is None and is_index and isinstance(value, int) and 0 <= value < len(names):
            index = value  # a class number beside class names: GLUE's files with data.classes given
        if index is None:
            raise InputError(f"{split.at(record)}: label {value!r} in column {label!r} is outside the classes {names}")
        ids.append(index)
    return ids


def label_counts(split: Split, ids: list[int], names: list[str]) -> str:
    """Return a line that says how often each class occurs."""
    counts = Counter(ids)
    shown = ", ".join(f"{names[index]} {count:,}" for index, count in counts.most_common(8))
    more = f" and {len(counts) - 8} classes more" if len(counts) > 8 else ""
    return f"{split.part}: {shown}{more}; the largest class is {max(counts.values()) / len(ids):.1%}"


def metrics_of(names: list[str]) -> tuple[str, ...]:
    """Return the metrics for these classes: F1 of "the positive class" needs two."""
    return tuple(metric for metric in METRICS if metric != "f1" or len(names) == 2)


def head_arguments(names: list[str]) -> dict[str, Any]:
    """Return the arguments for `from_pretrained` of a model with these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def class_rows(logits: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return the class and its probability for each row of logits (N, C)."""
    shifted = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    best = probabilities.argmax(axis=-1)
    return [{"prediction": names[i], "probability": float(row[i])} for i, row in zip(best, probabilities, strict=True)]
