"""Causal language modelling: instruction records with the prompt masked from the loss, or plain text."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForCausalLM

from adaptive_lora.data import Split
from adaptive_lora.errors import InputError
from adaptive_lora.tasks.base import IGNORED, ROW
from adaptive_lora.tasks.language_model import BYTES, PROMPT, WritingTask, fill


def prompt_of(instruction: str, context: str) -> str:
    """Return the prompt of an Alpaca-style record: headings, so that any tokenizer can mark the parts.

    >>> prompt_of("Name a colour.", "")
    '### Instruction:\\nName a colour.\\n\\n### Response:\\n'
    """
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


class CausalLanguageModelling(WritingTask):
    """Loss, perplexity per loss-bearing token, and bits per byte of the text they stand for."""

    auto_class = AutoModelForCausalLM
    metrics = ("token_loss", "perplexity", "bits_per_byte")

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        prompts = self._prompts(split, labelled)
        starts = [self._start_ids(prompt) for prompt in prompts]
        completions = self._completions(split) if labelled else [""] * len(prompts)
        # An empty answer teaches nothing but to stop.
        ends = [self._text_ids(text) + self._end_ids() if text.strip() else [] for text in completions]
        lengths = [len(start) + len(end) for start, end in zip(starts, ends, strict=True)]
        rows = []
        kept = self._fit(split, lengths, labelled)
        for row in kept:
            start, ids = starts[row], (starts[row] + ends[row])[: self.longest]
            learned = len(ids) - max(len(start), 1)  # nothing predicts a first token
            if labelled and learned < 1:
                continue
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": [IGNORED] * len(start) + ids[len(start) :],
                    PROMPT: start[: self.longest],
                    BYTES: self._byte_count(completions[row], ids[len(start) :], lengths[row] > len(ids)),
                    ROW: row,
                }
            )
        if not rows:
            raise InputError(
                f"{split.source}: no {split.part} record has a token to learn from within {self.longest} tokens; "
                "raise data.max_length, or check the output column"
            )
        if len(rows) < len(kept):
            self.notes.append(f"{split.part}: {len(kept) - len(rows):,} records dropped (no token to learn from)")
        features = Dataset.from_list(rows)
        if labelled:
            self.notes.append(f"{split.part}: {self.bears_loss(features):,} tokens bear loss")
        return self._checked(features, split)

    def _prompts(self, split: Split, labelled: bool) -> list[str]:
        data = self.data
        if data.text is not None:
            if not isinstance(data.text, str):
                raise InputError(f"data.text is {data.text}; causal_lm reads one column")
            split.require(data.text)
            # Plain text is a completion without a prompt; a text to go on with is all prompt.
            return [""] * len(split.records) if labelled else split.texts(data.text)
        if data.prompt is not None:
            return fill(data.prompt, split)
        split.require(data.instruction)
        has_input = data.input in split.records.column_names
        contexts = split.records[data.input] if has_input else [""] * len(split.records)
        instructions = split.texts(data.instruction, blank=True)
        return [prompt_of(text, context or "") for text, context in zip(instructions, contexts, strict=True)]

    def _completions(self, split: Split) -> list[str]:
        column = self.data.text if isinstance(self.data.text, str) else self.data.output
        split.require(column)
        return split.texts(column, blank=True)

    def prompt_ids(self, text: str) -> list[int]:
        if self.data.text is None:
            text = prompt_of(text, "") if self.data.prompt is None else text
        return self._start_ids(text)
