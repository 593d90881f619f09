"""What tasks that learn to write share: prompts from columns, token losses, bits per byte, generated text."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq

from adaptive_lora.data import Split
from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED, ROW, Task, by_record
from adaptive_lora.tasks.generation import generate

BYTES, PROMPT = "bytes", "prompt_ids"  # columns: bytes of the text that bears loss; what generation starts from


class WritingTask(Task):
    """Loss, perplexity per token and bits per byte of what is to be written, averaged over tokens and not over batches."""

    needs_outputs = False
    shift = 1  # logits at t are for the label at t + shift

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        inner = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        return lambda items: inner([{k: v for k, v in item.items() if k in _READ} for item in items])

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce logits (B, T, V) to (B, 2): each record's summed negative log-likelihood and its number of tokens."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits, labels = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)], dim=1)

    def score(self, outputs: Any, labels: Any, features: Dataset, model: nn.Module) -> dict[str, float]:
        nll, tokens = np.asarray(outputs, dtype=np.float64).sum(axis=0)
        return metrics.language_model(float(nll), int(tokens), sum(features[BYTES]))

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        return [{"prediction": text} for text in by_record(features[ROW], self.write(features[PROMPT], model))]

    def write(self, prompts: Sequence[list[int]], model: nn.Module) -> list[str]:
        """Return what the model writes after each prompt (token ids)."""
        return generate(model, self.tokenizer, prompts, self.generation, self.positions)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a prompt for a text a person gives, as in training."""
        raise NotImplementedError

    def show(self, item: dict[str, Any]) -> str:
        learned = [label for label in item["labels"] if label != IGNORED]
        ids = item["input_ids"] if self.shift == 0 else item["input_ids"][: len(item["input_ids"]) - len(learned)]
        return f"{self.tokenizer.decode(ids)}[learned: {self.tokenizer.decode(learned)}]"

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text that goes on after others: no special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _start_ids(self, text: str) -> list[int]:
        """Return the ids of a text that opens a record, with the tokenizer's opening tokens and without a closing one."""
        ids = self.tokenizer(text, verbose=False)["input_ids"] if text else []
        if not text and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]  # some tokenizers close every text; this one goes on
        return ids

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []

    def _byte_count(self, text: str, ids: list[int], cut: bool) -> int:
        """Return the bytes of a text in UTF-8, of what is left of it when it was cut to `ids`."""
        return len(str(self.tokenizer.decode(ids, skip_special_tokens=True) if cut else text).encode())


_READ = ("input_ids", "attention_mask", "labels")


def template_columns(template: str) -> list[str]:
    """Return the columns a template names: "{a} or {b}" -> ["a", "b"]. Raises `InputError` on a broken one."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"data.prompt {template!r} is no template: {error}; write {{{{ and }}}} for braces") from None
    if not names or not all(re.fullmatch(r"[^.\[\]]+", name) for name in names):
        raise InputError(f"data.prompt {template!r} names no column; expected one in braces, such as {{question}}")
    return names


def fill(template: str, split: Split) -> list[str]:
    """Return the template with the columns of each record filled in."""
    columns = template_columns(template)
    split.require(*columns)
    values = [split.texts(column, blank=True) for column in columns]
    return [template.format(**dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True)]
