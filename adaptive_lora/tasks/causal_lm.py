"""Causal language modelling: instruction records with the prompt masked from the loss, or plain
text."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from adaptive_lora.errors import InputError
from adaptive_lora.tasks.base import IGNORED, ROW
from adaptive_lora.tasks.data import RECORD, Split, joined, only_text
from adaptive_lora.tasks.language_model import (
    BYTES,
    PROMPT,
    WritingTask,
    fill,
    fill_each,
    template_columns,
)


def prompt_of(instruction: str, context: str) -> str:
    """Return the prompt of an Alpaca-style record: headings, so that any tokenizer can mark the
    parts.

    >>> prompt_of("Name a colour.", "")
    '### Instruction:\\nName a colour.\\n\\n### Response:\\n'
    """
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


class CausalLanguageModelling(WritingTask):
    """Loss, perplexity per loss-bearing token, and bits per byte of the text they stand for."""

    auto_class = AutoModelForCausalLM
    metrics = ("token_loss", "perplexity", "bits_per_byte")
    windows = True

    def learn(self, split: Split) -> None:
        data, columns = self.data, split.records.column_names
        if data.text is None and data.prompt is None and data.instruction not in columns:
            found = only_text(split.records, data.id)
            if found is not None:
                self.learned(text=found)
                self.notes.append(f"plain text of the column {found!r}, without prompts")

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        prompts = self._prompts(split, labelled)
        starts = [self._start_ids(prompt) for prompt in prompts]
        if not labelled:
            return self._checked(Dataset.from_list(self._to_answer(split, starts)), split)
        learned = [self._learned_ids(text) for text in self._completions(split)]
        ends, sizes = [ids for ids, _ in learned], [counts for _, counts in learned]
        lengths = [len(start) + len(end) for start, end in zip(starts, ends, strict=True)]
        whole = self.data.unit == "file" and self.data.text is not None
        kept = list(range(len(lengths))) if whole else self._fit(split, lengths, labelled)
        rows = []
        for row in kept:
            start, end = starts[row], ends[row]
            room = self.longest - len(start)
            for at in self._windows(start, end) if whole else [0]:
                ids = start + end[at : at + max(room, 0)]
                # Nothing predicts a first token: its bytes bear no loss and count for none.
                first = max(len(start), 1)
                if len(ids) <= first:
                    continue
                rows.append(
                    {
                        "input_ids": ids,
                        "attention_mask": [1] * len(ids),
                        "labels": [IGNORED] * first + ids[first:],
                        PROMPT: start,
                        BYTES: sum(sizes[row][at : at + room][first - len(start) :]),
                        ROW: row,
                    }
                )
        self._say(split, len(kept), len(rows), sum(lengths) if whole else None)
        if not rows:
            raise InputError(
                f"{split.source}: no {split.part} record has a token to learn from within "
                f"{self.longest} tokens; raise data.max_length, or check the output column"
            )
        features = Dataset.from_list(rows)
        self.notes.append(f"{split.part}: {self.bears_loss(features):,} tokens bear loss")
        return self._checked(features, split)

    def _say(self, split: Split, kept: int, rows: int, tokens: int | None) -> None:
        """Note the windows of texts of so many tokens that are read whole; else what is dropped."""
        if tokens is not None:
            self.notes.append(
                f"{split.part}: {kept:,} texts of {tokens:,} tokens in {rows:,} windows of at most "
                f"{self.longest:,}; nothing is cut"
            )
        elif 0 < rows < kept:
            self.notes.append(
                f"{split.part}: {kept - rows:,} records dropped (no token to learn from)"
            )

    def _learned_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids to write and the bytes each stands for; none of an empty text, which would
        teach nothing but to stop."""
        ids, sizes = self._sized_ids(text) if text.strip() else ([], [])
        closing = self._end_ids() if ids else []
        return ids + closing, sizes + [0] * len(closing)

    def _windows(self, start: list[int], end: list[int]) -> range:
        """Return where in the tokens `end` of a text its windows begin, each after the opening
        tokens `start`. Every token bears loss once; without an opening token a window begins with
        the last token of the one before, and only the first token of all bears none."""
        room = max(self.longest - len(start), 1)
        if start:
            return range(0, len(end), room)
        return range(0, max(len(end) - 1, 0), max(room - 1, 1))

    def _to_answer(self, split: Split, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Return the rows of records to be answered. A prompt too long loses its middle: its end
        says what to write."""
        allowed = self.longest
        if self.positions is not None:
            allowed = min(
                allowed, self.positions - min(self.generation.max_new_tokens, self.positions // 2)
            )
        for record, ids in zip(split.records[RECORD], prompts, strict=True):
            if not ids:
                raise InputError(
                    f"{split.at(record)}: the prompt is empty, and the tokenizer has no opening "
                    "token to go on from; expected text; fill it in or remove the record"
                )
        self._fit(split, [len(ids) for ids in prompts], False, allowed)
        long = sum(len(ids) > allowed for ids in prompts)
        if long:
            self.notes.append(
                f"{split.part}: {long:,} prompts are cut in their middle, to {allowed:,} tokens"
            )
        end = allowed // 2
        cut = [
            ids if len(ids) <= allowed else ids[: allowed - end] + ids[len(ids) - end :]
            for ids in prompts
        ]
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), PROMPT: ids, ROW: row}
            for row, ids in enumerate(cut)
        ]

    def _prompts(self, split: Split, labelled: bool) -> list[str]:
        data = self.data
        if data.text is not None:
            if not isinstance(data.text, str):
                raise InputError(f"data.text is {data.text}; causal_lm reads one column")
            split.require(data.text)
            # Plain text is a completion without a prompt; a text to go on with is all prompt.
            return [""] * len(split.records) if labelled else split.texts(data.text)
        if data.prompt is not None:
            return fill_each(data.prompt, split)
        split.require(data.instruction)
        has_input = data.input in split.records.column_names
        contexts = split.records[data.input] if has_input else [""] * len(split.records)
        contexts = [joined(context) for context in contexts]
        instructions = split.texts(data.instruction, blank=True)
        return [
            prompt_of(text, context or "")
            for text, context in zip(instructions, contexts, strict=True)
        ]

    def _completions(self, split: Split) -> list[str]:
        column = self.data.text if isinstance(self.data.text, str) else self.data.output
        split.require(column)
        return split.texts(column, blank=True)

    def prompt_ids(self, text: str) -> list[int]:
        template = self.data.prompt
        if self.data.text is not None:
            return self._start_ids(text)
        if template is None:
            return self._start_ids(prompt_of(text, ""))
        columns = dict.fromkeys(template_columns(template))
        if len(columns) > 1:
            raise InputError(
                f"data.prompt {template!r} has the columns {', '.join(columns)}; one prompt fills "
                "only one: use predict with a file that has these columns"
            )
        return self._start_ids(fill(template, dict.fromkeys(columns, text)))
