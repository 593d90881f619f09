"""Classes of words: named entities, parts of speech. One tag for each word of a record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import architectures, class_names
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED, ROW, alike
from adaptive_lora.tasks.classification import ClassTask
from adaptive_lora.tasks.data import RECORD, Split

TAG_COLUMNS = ("ner_tags", "tags", "labels", "label")
TOKENS = "tokens"
# columns of the features: for each token the number of the word that it begins, IGNORED of one that
# begins none; how many words the record has
WORDS, COUNT = ("words", "count")


class TokenClassification(ClassTask):
    """F1 of whole entities where the tags name entities (IOB1, IOB2, IOBES, BILOU), else accuracy
    and macro F1 of the tags.

    Words are joined by spaces and read as one text. The first token of a word bears its tag; the
    others, and special tokens, bear no loss. A record that is too long is cut into several inputs,
    so that each of its words is read: training, evaluation and prediction leave none out.
    """

    auto_class = AutoModelForTokenClassification
    metrics = ("f1", "precision", "recall", "accuracy")
    label_columns: ClassVar[tuple[str, ...]] = TAG_COLUMNS

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
    ) -> None:
        super().__init__(config, tokenizer, model_config)
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {config.model!r} ({type(tokenizer).__name__}) does not say "
                "which letters a token stands for, which tags of words need; use a model with a "
                "tokenizer.json"
            )

    def learn(self, split: Split) -> None:
        split.require(self.column)
        super().learn(split)
        entities = "f1" in self.metrics
        self.notes.append(
            f"tags of the words in {self.column}: {self._listed()}"
            + ("" if entities else "; they name no entities (B-, I- before a type)")
        )

    @property
    def column(self) -> str:
        if self.data.text is not None and not isinstance(self.data.text, str):
            raise InputError(
                f"data.text is {self.data.text}; token_classification reads one column"
            )
        return self.data.text or TOKENS

    def _each(self, split: Split) -> Iterator[tuple[int, Any]]:
        words = self._words(split)
        columns = (split.records[RECORD], words, split.records[self.label])
        for record, some, tags in zip(*columns, strict=True):
            if not isinstance(tags, list) or len(tags) != len(some):
                raise InputError(
                    f"{split.at(record)}: column {self.label!r} is {tags!r:.60}; expected a list "
                    f"of {len(some)} tags, one for each word in {self.column!r}"
                )
            yield from ((record, tag) for tag in tags)

    def _names(self, split: Split) -> list[str]:
        names, own = super()._names(split), class_names(self.model_config)
        tagger = any("ForTokenClassification" in name for name in architectures(self.model_config))
        if own is None or not tagger or self._class_label(split) is not None:
            return names
        if not all(name.isdecimal() and int(name) < len(own) for name in names):
            return names
        self.learned(class_numbers=True)
        self.notes.append("tags are the numbers of the base's outputs, by whose names they go")
        return own

    def _metrics(self) -> tuple[str, ...]:
        return (
            type(self).metrics if metrics.names_entities(self.names) else ("accuracy", "f1_macro")
        )

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        split.require(self.column, *([self.label] if labelled else []))
        words = self._words(split)
        texts = [_joined(some)[0] for some in words]
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        kept = self._fit(split, lengths, labelled)
        rows = [
            {**window, WORDS: begins, COUNT: len(words[row]), ROW: row}
            for row in kept
            for window, begins in self._windows(words[row])
        ]
        if labelled:
            self._add_labels(rows, split, words)
        if len(rows) > len(kept):
            self.notes.append(
                f"{split.part}: {len(rows):,} inputs of {len(kept):,} records; where one is cut, "
                "the rest is read as another"
            )
        read = sum(word != IGNORED for one in rows for word in one[WORDS])
        if unread := sum(len(words[row]) for row in kept) - read:
            self.notes.append(f"{split.part}: {unread:,} words of which the tokenizer has no token")
        return self._checked(Dataset.from_list(rows), split)

    def _add_labels(self, rows: list[dict[str, Any]], split: Split, words: list[list[str]]) -> None:
        outputs = iter(self.labels(split))
        tags = [list(itertools.islice(outputs, len(some))) for some in words]
        for one in rows:
            own = tags[one[ROW]]
            one["labels"] = [IGNORED if word == IGNORED else own[word] for word in one[WORDS]]

    def _words(self, split: Split) -> list[list[str]]:
        for record, words in zip(split.records[RECORD], split.records[self.column], strict=True):
            listed = isinstance(words, list) and all(isinstance(word, str) for word in words)
            if not listed or not any(map(str.strip, words)):
                raise InputError(
                    f"{split.at(record)}: column {self.column!r} is {words!r:.60}; expected a list "
                    "of words"
                )
        return list(split.records[self.column])

    def _windows(self, words: Sequence[str]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield the inputs that a record is cut into, and which word each token begins."""
        text, owners = _joined(words)
        encoded = self.tokenizer(
            text, truncation=True, max_length=self.longest, return_overflowing_tokens=True,
            return_offsets_mapping=True, return_special_tokens_mask=True,
        )  # fmt: skip
        seen: set[int] = set()
        columns = [key for key in self.tokenizer.model_input_names if key in encoded]
        for number in range(len(encoded["input_ids"])):
            begins = []
            for (first, end), special in zip(
                encoded["offset_mapping"][number],
                encoded["special_tokens_mask"][number],
                strict=True,
            ):
                # Some tokens have the space before their word as their first letter.
                letters = [] if special else [at for at in range(first, end) if text[at].strip()]
                word = owners[letters[0]] if letters else IGNORED
                begins.append(IGNORED if word in seen else word)
                seen.add(word)
            yield {key: encoded[key][number] for key in columns}, begins

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        inner = DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORED)
        ours = (WORDS, COUNT, ROW)
        return lambda items: inner([{k: v for k, v in i.items() if k not in ours} for i in items])

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce logits (B, T, C) to the number of the best output (B, T), -1 where one is NaN."""
        scores = super().reduce(logits, labels)
        return torch.where(scores.isnan().any(-1), -1, scores.argmax(-1))

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        found, wanted = (self._by_record(values, features) for values in (outputs, labels))
        if any(tag is None for tags in found for tag in tags.values()):
            return dict.fromkeys(self.metrics, float("nan"))
        sides = ([[str(tag) for tag in tags.values()] for tags in side] for side in (found, wanted))
        return (metrics.entities if "f1" in self.metrics else metrics.tags)(*sides)

    def constant(self, outputs: Any, labels: Any) -> bool | None:
        tagged = np.asarray(labels) != IGNORED
        return alike(np.asarray(outputs)[tagged]) and not alike(np.asarray(labels)[tagged])

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        # A word without a token, such as one control character, is outside all entities.
        unread = "O" if "O" in self.names else None
        counts = dict(zip(features[ROW], features[COUNT], strict=True))
        found = self._by_record(outputs, features)
        return [
            {"prediction": [tags.get(word, unread) for word in range(counts[row])]}
            for row, tags in zip(sorted(counts), found, strict=True)
        ]

    def _by_record(self, values: Any, features: Dataset) -> list[dict[int, str | None]]:
        """Return {word: tag} for each record in order, of numbers of outputs (N, T)."""
        found: dict[int, dict[int, str | None]] = {row: {} for row in sorted(features[ROW])}
        rows = zip(features[ROW], features[WORDS], np.asarray(values), strict=True)
        for row, begins, numbers in rows:
            for word, number in zip(begins, numbers, strict=False):  # padded on the right
                if word != IGNORED:
                    found[row][word] = self.order[number] if number >= 0 else None
        return [dict(sorted(tags.items())) for tags in found.values()]

    def show(self, item: dict[str, Any]) -> str:
        """Return the text with each word's tag after it."""
        special = set(self.tokenizer.all_special_ids)
        runs: list[tuple[str, list[int]]] = []  # (what comes after, tokens)
        for place, (token, word) in enumerate(zip(item["input_ids"], item[WORDS], strict=True)):
            if word != IGNORED:
                tag = f" [{self.order[item['labels'][place]]}]" if "labels" in item else ""
                runs.append((tag, [token]))
            elif token in special or not runs:
                runs.append(("", [token]))
            else:
                runs[-1][1].append(token)
        return " ".join(f"{str(self.tokenizer.decode(ids)).strip()}{after}" for after, ids in runs)


def _joined(words: Sequence[str]) -> tuple[str, list[int]]:
    """Return the text that words make, and for each of its letters the word that it is of, IGNORED
    of a blank between two.

    >>> _joined(["so", "I"])
    ('so I', [0, 0, -100, 1])
    """
    owners = []
    for number, word in enumerate(words):
        owners += [*[number] * len(word), IGNORED]
    return " ".join(words), owners[:-1]
