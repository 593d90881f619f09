"""Summarization with an encoder-decoder or a causal model: loss on the summary, ROUGE of what the
model writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED, ROW
from adaptive_lora.tasks.data import RECORD, Split, only_text, summary_columns
from adaptive_lora.tasks.language_model import (
    BYTES,
    PROMPT,
    WritingTask,
    template_columns,
    template_parts,
)

REFERENCES = "references"


class Summarization(WritingTask):
    """An encoder reads the text and a decoder writes the summary, or one causal model does both.

    A text that is too long loses its end, never the words of the template around it or the summary:
    a causal model reads template + text + summary in `max_length` tokens, of which
    `max_target_length` are the summary's.
    """

    metrics = (
        "rougeLsum", "rouge1", "rouge2", "rougeL", "token_loss", "perplexity", "bits_per_byte",
    )  # fmt: skip

    @classmethod
    def model_class(cls, model_config: Any) -> Any:
        return AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM

    def __init__(self, config: Any, tokenizer: Any, model_config: Any) -> None:
        super().__init__(config, tokenizer, model_config)
        self.seq2seq = bool(model_config.is_encoder_decoder)
        self.auto_class = self.model_class(model_config)
        self.shift = 0 if self.seq2seq else 1
        column = self.data.text or "text"
        if not isinstance(column, str):
            raise InputError(f"data.text is {column}; summarization reads one column")
        self.column = column
        usual = ("", "" if self.seq2seq else "\n\nSummary:\n")
        before, after = _around(self.data.prompt, column) if self.data.prompt else usual
        self._longest_target = self.data.max_target_length
        if self.seq2seq and self.positions is not None:
            self._longest_target = min(self._longest_target, self.positions)
        opening, closing = self._special_ids()
        self._before = [*opening, *(self._text_ids(before) if before else [])]
        self._after = [*(self._text_ids(after) if after else []), *closing]

    def learn(self, split: Split) -> None:
        data, columns = self.data, split.records.column_names
        if data.text is None and data.prompt is None and self.column not in columns:
            summaries = summary_columns(data, columns)
            found = only_text(split.records, *summaries, data.id, lists=True)
            if found is not None:
                self.column = found
                self.learned(text=found)
                self.notes.append(f"summaries of the column {found!r}")

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        split.require(self.column)
        texts = [self._text_ids(text) for text in split.texts(self.column)]
        references = self._references(split) if labelled else [[""]] * len(texts)
        room = self._room()
        kept = self._fit(split, [len(ids) for ids in texts], labelled, room)
        rows = []
        shortened = 0
        for row in kept:
            prompt = self._prompt(texts[row])
            target, sizes = self._target(references[row][0]) if labelled else ([], [])
            shortened += len(target) > self._longest_target
            target = target[: self._longest_target]
            ids = prompt if self.seq2seq else prompt + target
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": target if self.seq2seq else [IGNORED] * len(prompt) + target,
                    PROMPT: prompt,
                    REFERENCES: references[row],
                    BYTES: sum(sizes[: len(target)]),
                    ROW: row,
                }
            )
        features = Dataset.from_list(rows)
        if labelled:
            self.notes.append(
                f"{split.part}: {self.bears_loss(features):,} tokens bear loss; {shortened:,} "
                f"summaries longer than {self._longest_target:,} tokens and cut"
            )
        else:
            features = features.remove_columns("labels")
        return self._checked(features, split)

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        # not the longest, which come first in evaluation
        first = np.argsort(features[ROW])[: self.generation.rows]
        some = features.select(first)
        written = self.write(some[PROMPT], model)
        return {
            **metrics.rouge(written, list(some[REFERENCES])),
            **super().score(outputs, labels, features, model),
        }

    def _references(self, split: Split) -> list[list[str]]:
        """Return the summaries of each record, of which the first is learned. Raises `InputError`
        at the first record that has none."""
        columns = summary_columns(self.data, split.records.column_names)
        if not columns:
            named = self.data.summary
            split.require(*([named] if isinstance(named, str) else named))
        values = [split.records[column] for column in columns]
        found = [
            _texts(given, f"{split.at(record)}: column {' + '.join(columns)!r}")
            for record, *given in zip(split.records[RECORD], *values, strict=True)
        ]
        most = max(map(len, found))
        if most > 1:
            self.notes.append(
                f"{split.part}: up to {most} references of a text; the first is learned, and ROUGE "
                "takes the best"
            )
        return found

    def prompt_ids(self, text: str) -> list[int]:
        ids, room = self._text_ids(text), self._room()
        if len(ids) > room:
            raise InputError(
                f"a text of {len(ids):,} tokens is more than the {room:,} there is room for; "
                "shorten it, or use predict with a file, which cuts it"
            )
        return self._prompt(ids)

    def _room(self) -> int:
        """Return the tokens of a text that fit."""
        around = len(self._before) + len(self._after)
        fixed = around + (0 if self.seq2seq else self.data.max_target_length)
        if self.longest - fixed < 1:
            raise InputError(
                f"inputs of {self.longest} tokens leave no room for a text: {fixed} are taken by "
                f"the template{'' if self.seq2seq else ' and data.max_target_length'}; raise "
                "data.max_length"
            )
        return self.longest - fixed

    def _prompt(self, text: list[int]) -> list[int]:
        return [*self._before, *text[: self._room()], *self._after]

    def _target(self, summary: str) -> tuple[list[int], list[int]]:
        """Return the ids to write, with those that end them, and the bytes that each stands for."""
        if self.seq2seq:
            return self._sized_ids(summary, target=True)
        (ids, sizes), closing = self._sized_ids(summary), self._end_ids()
        return ids + closing, sizes + [0] * len(closing)

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Return what the tokenizer puts before and after a text; a causal model goes on where the
        text ends."""
        bare = self._text_ids("a")
        whole = self.tokenizer("a")["input_ids"]
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :] if self.seq2seq else []


def _around(template: str, column: str) -> tuple[str, str]:
    """Return what a template has before and after its only column."""
    if template_columns(template) != [column]:
        raise InputError(
            f"data.prompt {template!r}: expected the column {{{column}}} once, and no other"
        )
    parts = template_parts(template)
    at = [name for _, name in parts].index(column) + 1
    return "".join(text for text, _ in parts[:at]), "".join(text for text, _ in parts[at:])


def _texts(given: list[Any], place: str) -> list[str]:
    """Return the references among the values of a record, each a text, a list of texts, or none."""
    texts = [text for one in given for text in (one if isinstance(one, list) else [one])]
    texts = [text for text in texts if text is not None and text != ""]
    bad = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if bad or not texts:
        raise InputError(f"{place} is {bad[0] if bad else given[0]!r:.60}; expected text")
    return texts
