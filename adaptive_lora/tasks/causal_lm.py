"""Causal language modelling: instruction records with the prompt masked from the loss, or plain text."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from adaptive_lora.config import DataConfig, RunConfig
from adaptive_lora.data import RECORD, load_splits, require_columns
from adaptive_lora.errors import InputError
from adaptive_lora.tasks.base import Prepared, Task

IGNORED = -100  # the label PyTorch's cross-entropy leaves out


def prompt_of(instruction: str, context: str) -> str:
    """Return the prompt of an Alpaca-style record: headings, so that any tokenizer can mark the parts.

    >>> prompt_of("Name a colour.", "")
    '### Instruction:\\nName a colour.\\n\\n### Response:\\n'
    """
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


class CausalLanguageModelling(Task):
    """Loss and perplexity per loss-bearing token, averaged over tokens and not over batches."""

    def load_model(self, source: str, **arguments: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(source, **arguments)

    def prepare(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> Prepared:
        data = config.data
        train, held_out = load_splits(data)
        notes: list[str] = []

        def features(table: Dataset, source: str, part: str) -> Dataset:
            pairs = _pairs(table, data, source)
            encoded = [_encode(tokenizer, prompt, completion, longest) for prompt, completion in pairs]
            kept = [item for item in encoded if any(label != IGNORED for label in item["labels"][1:])]
            if not kept:
                raise InputError(
                    f"{source}: no {part} record has a token to learn from within {longest} tokens; "
                    "raise data.max_length, or check the output column"
                )
            cut = sum(item.pop("cut") for item in encoded)
            learned = sum(label != IGNORED for item in kept for label in item["labels"])
            notes.append(
                f"{part}: {len(kept):,} records, {learned:,} tokens bear loss; {cut:,} records cut at {longest} tokens, "
                f"{len(encoded) - len(kept):,} dropped (nothing to learn from)"
            )
            return Dataset.from_list(kept)

        return Prepared(
            train=features(train, data.train, "training"),
            eval=features(held_out, data.eval or data.train, "evaluation"),
            collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            compute_metrics=_metrics,
            metrics=("token_loss", "perplexity"),
            preprocess_logits=_token_losses,
            notes=notes,
        )


def _pairs(table: Dataset, data: DataConfig, source: str) -> list[tuple[str, str]]:
    """Return (prompt, completion) of each record; plain text is a completion without a prompt."""
    if data.text is not None:
        if not isinstance(data.text, str):
            raise InputError(f"data.text is {data.text}; causal_lm reads one column")
        columns = [data.text]
    else:
        columns = [data.instruction, data.output]
    require_columns(table, columns, source)
    for column in columns:
        for record, value in zip(table[RECORD], table[column], strict=True):
            if not isinstance(value, str):
                raise InputError(f"{source}, record {record}: column {column!r} is {value!r}; expected text")
    if data.text is not None:
        return [("", text) for text in table[data.text]]
    contexts = table[data.input] if data.input in table.column_names else [""] * len(table)
    return [
        (prompt_of(instruction, context or ""), output)
        for instruction, context, output in zip(table[data.instruction], contexts, table[data.output], strict=True)
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, longest: int) -> dict[str, Any]:
    """Return input ids with labels; the prompt's labels are IGNORED. Cut at the end to `longest` tokens."""
    start = (
        tokenizer(prompt)["input_ids"]
        if prompt
        else ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [])
    )
    if prompt and start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]  # some tokenizers close every text; the prompt goes on
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [*start, *tokenizer(completion, add_special_tokens=False)["input_ids"], *end]
    labels = [IGNORED] * len(start) + ids[len(start) :]
    if not completion.strip():
        labels = [IGNORED] * len(ids)  # an empty answer teaches nothing but to stop
    return {
        "input_ids": ids[:longest],
        "attention_mask": [1] * min(len(ids), longest),
        "labels": labels[:longest],
        "cut": len(ids) > longest,
    }


def _token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits (B, T, V) to (B, 2): each record's summed negative log-likelihood and its number of tokens."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(1), (labels[:, 1:] != IGNORED).sum(1).to(losses.dtype)], dim=1)


def _metrics(prediction: Any) -> dict[str, float]:
    total, tokens = prediction.predictions.sum(axis=0)
    loss = float(total / tokens)
    return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
