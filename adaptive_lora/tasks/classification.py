"""Sequence classification: one text or a pair of texts, one label."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from adaptive_lora.config import RunConfig
from adaptive_lora.data import RECORD, columns_of, load_splits, require_columns
from adaptive_lora.errors import InputError
from adaptive_lora.tasks.base import Prepared, Task

LABEL_COLUMNS = ("label", "labels")


class Classification(Task):
    """Accuracy and macro F1 over the classes seen in training, or those the recipe names."""

    def load_model(self, source: str, **arguments: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(source, **arguments)

    def prepare(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> Prepared:
        data = config.data
        train, held_out = load_splits(data)
        label = data.label or _guess_label(train, data.train)
        require_columns(train, [label], data.train)
        texts = [data.text] if isinstance(data.text, str) else data.text or _guess_text(train, label, data.train)
        if not 1 <= len(texts) <= 2:
            raise InputError(f"data.text names {len(texts)} columns; expected one, or a pair")
        for table, source in ((train, data.train), (held_out, data.eval or data.train)):
            require_columns(table, [*texts, label], source)
        classes = _class_names(train, label, data.classes, data.train)
        if len(classes) < 2:
            raise InputError(f"{data.train}: column {label!r} holds one class only, {classes}; nothing to classify")
        cut = Counter[str]()

        def features(table: Dataset, source: str, part: str) -> Dataset:
            ids = _label_ids(table, label, classes, source)
            for column in texts:
                for record, value in zip(table[RECORD], table[column], strict=True):
                    if not isinstance(value, str) or not value.strip():
                        raise InputError(f"{source}, record {record}: column {column!r} is {value!r}; expected text")
            encoded = tokenizer(*(list(table[column]) for column in texts), truncation=True, max_length=longest)
            at_limit = table.select([row for row, ids in enumerate(encoded["input_ids"]) if len(ids) == longest])
            if len(at_limit):
                full = tokenizer(*(list(at_limit[column]) for column in texts), verbose=False)
                cut[part] += sum(len(tokens) > longest for tokens in full["input_ids"])
            return Dataset.from_dict({**encoded, "labels": ids})

        prepared = Prepared(
            train=features(train, data.train, "training"),
            eval=features(held_out, data.eval or data.train, "evaluation"),
            collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_metrics,
            metrics=("accuracy", "f1_macro"),
            model_arguments={
                "num_labels": len(classes),
                "id2label": dict(enumerate(classes)),
                "label2id": {name: index for index, name in enumerate(classes)},
            },
        )
        prepared.notes.append(
            f"classification of {' + '.join(texts)} into {len(classes)} classes ({', '.join(classes):.60}): "
            f"{len(train):,} training, {len(held_out):,} evaluation records"
        )
        for part, count in cut.items():
            if count:
                prepared.notes.append(f"{count:,} {part} records are longer than {longest} tokens and are cut")
        return prepared


def _guess_label(table: Dataset, source: str) -> str:
    for column in LABEL_COLUMNS:
        if column in table.column_names:
            return column
    names = ", ".join(columns_of(table))
    raise InputError(f"{source} has no column {LABEL_COLUMNS[0]!r}; its columns: {names}. Give data.label")


def _guess_text(table: Dataset, label: str, source: str) -> list[str]:
    candidates = [c for c in columns_of(table) if c != label and isinstance(table[0][c], str)]
    if len(candidates) != 1:
        raise InputError(
            f"{source} has {len(candidates)} text columns besides {label!r} ({', '.join(candidates)}); "
            "say which to read: data.text (one column, or a list of two)"
        )
    return candidates


def _class_names(table: Dataset, label: str, given: list[str] | None, source: str) -> list[str]:
    feature = table.features[label]
    if given is not None:
        if len(set(given)) < len(given):
            raise InputError(f"data.classes names a class twice: {given}")
        return given
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = list(table[label])
    for record, value in zip(table[RECORD], values, strict=True):
        if value is None or isinstance(value, list | dict):
            raise InputError(f"{source}, record {record}: column {label!r} is {value!r}; expected a text or a number")
    # Integers sort as numbers, so that class 10 comes after class 9.
    return [str(value) for value in sorted(set(values))]


def _label_ids(table: Dataset, label: str, classes: list[str], source: str) -> list[int]:
    by_name = {name: index for index, name in enumerate(classes)}
    is_index = isinstance(table.features[label], ClassLabel) or not any(name.lstrip("-").isdigit() for name in classes)
    ids = []
    for record, value in zip(table[RECORD], table[label], strict=True):
        index = by_name.get(str(value))
        if index is None and is_index and isinstance(value, int) and 0 <= value < len(classes):
            index = value  # a class number beside class names: GLUE's files with data.classes given
        if index is None:
            raise InputError(
                f"{source}, record {record}: label {value!r} in column {label!r} is outside the classes {classes}"
            )
        ids.append(index)
    return ids


def _metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted = np.argmax(logits, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1_macro": float(f1_score(prediction.label_ids, predicted, average="macro", zero_division=0)),
    }
