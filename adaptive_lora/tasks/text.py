"""Tasks that read one text or a pair of texts and give one answer: what classification and
regression share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig
from adaptive_lora.tasks.base import ROW, Task
from adaptive_lora.tasks.data import Split, columns_of

LABEL_COLUMNS = ("label", "labels")


class TextTask(Task):
    """Features of one or two text columns; subclasses say what a label is."""

    auto_class = AutoModelForSequenceClassification

    def learn(self, split: Split) -> None:
        if split.images:
            raise InputError(
                f"{split.source} is a folder of images; use --task image_classification, or give a "
                "file of texts"
            )
        label = self.data.label
        if isinstance(label, list):
            split.require(*label)
        else:
            label = label_column(split, label)
        text = self.data.text or _guess_text(split, label, self.data.id)
        columns = [text] if isinstance(text, str) else text
        if not 1 <= len(columns) <= 2:
            raise InputError(f"data.text names {len(columns)} columns; expected one, or a pair")
        self.learned(text=columns, label=label)

    @property
    def columns(self) -> list[str]:
        return [self.data.text] if isinstance(self.data.text, str) else self.data.text or []

    @property
    def label(self) -> str:
        return one_label(self.data) or LABEL_COLUMNS[0]

    @property
    def label_names(self) -> list[str]:
        """The columns that a label is read from: one, but for several that are a class each."""
        return [self.label]

    @abstractmethod
    def labels(self, split: Split) -> list[Any]:
        """Return a number for each label. Raises `InputError` at the first that is none."""

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        split.require(*self.columns, *(self.label_names if labelled else []))
        labels = {"labels": self.labels(split)} if labelled else {}
        texts = [split.texts(column) for column in self.columns]
        encoded = self.tokenizer(*texts, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        rows = self._fit(split, lengths, labelled)
        # Again only where needed: `_fit` had to see the lengths before any cut.
        if max(lengths) > self.longest:
            encoded = self.tokenizer(*texts, truncation=True, max_length=self.longest)
        features = Dataset.from_dict({**encoded, **labels, ROW: list(range(len(lengths)))})
        return self._checked(features.select(rows) if len(rows) < len(lengths) else features, split)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return DataCollatorWithPadding(self.tokenizer)


def label_column(split: Split, given: str | None, usual: Sequence[str] = LABEL_COLUMNS) -> str:
    """Return the recipe's label column, or the first of a usual name."""
    if given is not None:
        split.require(given)
        return given
    for column in usual:
        if column in split.records.column_names:
            return column
    names = ", ".join(columns_of(split.records))
    raise InputError(
        f"{split.source} has no column {usual[0]!r}; its columns: {names}. Give data.label"
    )


def one_label(data: DataConfig) -> str | None:
    """Return the recipe's label column. Raises `InputError` where it names several."""
    if isinstance(data.label, list):
        raise InputError(
            f"data.label names the columns {data.label}, each a class that a record has or has "
            "not; this is what multi_label_classification reads"
        )
    return data.label


def _guess_text(split: Split, label: str | list[str], key: str) -> list[str]:
    first, labels = split.records[0], [label] if isinstance(label, str) else label
    candidates = [
        name
        for name in columns_of(split.records)
        if name not in (*labels, key) and isinstance(first[name], str)
    ]
    if len(candidates) != 1:
        raise InputError(
            f"{split.source} has {len(candidates)} text columns besides "
            f"{', '.join(map(repr, labels))} "
            f"({', '.join(candidates)}); say which to read: data.text (one column, or a list of "
            "two)"
        )
    return candidates
