"""What tasks that learn to write share: prompts from columns, token losses, bits per byte,
generated text."""

from __future__ import annotations

import string
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED, ROW, Task, by_record
from adaptive_lora.tasks.data import Split
from adaptive_lora.tasks.generation import generate

# columns: bytes of the text that bears loss; what generation starts from
BYTES, PROMPT = ("bytes", "prompt_ids")


class WritingTask(Task):
    """Loss, perplexity per token and bits per byte of what is to be written, averaged over tokens
    and not over batches."""

    needs_outputs = False
    shift = 1  # logits at t are for the label at t + shift

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
    ) -> None:
        _check_direction(config, model_config)
        super().__init__(config, tokenizer, model_config)
        self.smoothing = config.training.get("label_smoothing_factor") or 0.0
        self.remote_code = config.trust_remote_code

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        shifter = self._shifter() if self.shift == 0 and self.smoothing else None
        # It would make tensors of every column, and ours hold texts and lists of their own length.
        inner = DataCollatorForSeq2Seq(self.tokenizer, shifter, label_pad_token_id=IGNORED)
        return lambda items: inner(
            [{k: v for k, v in item.items() if k in _READ} for item in items]
        )

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce logits (B, T, V) to (B, 2): each record's summed negative log-likelihood and its
        number of tokens."""
        if isinstance(logits, tuple):  # a mixture of experts may have put its auxiliary loss first
            logits = next(
                part for part in logits if isinstance(part, torch.Tensor) and part.dim() == 3
            )
        logits, labels = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        losses = F.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        # Two numbers a record: the logits of a whole evaluation would not fit into memory.
        return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)], dim=1)

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        nll, tokens = np.asarray(outputs, dtype=np.float64).sum(axis=0)
        return metrics.language_model(float(nll), int(tokens), sum(features[BYTES]))

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"prediction": text}
            for text in by_record(features[ROW], self.write(features[PROMPT], model))
        ]

    def write(self, prompts: Sequence[list[int]], model: nn.Module) -> list[str]:
        """Return what the model writes after each prompt (token ids)."""
        return generate(model, self.tokenizer, prompts, self.generation, self.positions)

    @abstractmethod
    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a prompt for a text a person gives, as in training."""

    def show(self, item: dict[str, Any]) -> str:
        learned = [label for label in item["labels"] if label != IGNORED]
        ids = (
            item["input_ids"]
            if self.shift == 0
            else item["input_ids"][: len(item["input_ids"]) - len(learned)]
        )
        return f"{self.tokenizer.decode(ids)}[learned: {self.tokenizer.decode(learned)}]"

    def _shifter(self) -> nn.Module:
        """Return a model without storage that makes decoder inputs of labels: with label smoothing
        the Trainer keeps the labels from the model, which then cannot."""
        with torch.device("meta"):
            model: nn.Module = self.auto_class.from_config(
                self.model_config, trust_remote_code=self.remote_code
            )
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise InputError(
                f"training.label_smoothing_factor is {self.smoothing}: {type(model).__name__} does "
                "not say how decoder inputs are made from labels, which label smoothing needs; set "
                "it to 0"
            )
        return model

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text that goes on after others: no special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _start_ids(self, text: str) -> list[int]:
        """Return the ids of a text that opens a record, with the tokenizer's opening tokens and
        without a closing one."""
        ids = self.tokenizer(text, verbose=False)["input_ids"] if text else []
        if not text and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]  # some tokenizers close every text; this one goes on
        return ids

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []

    def _sized_ids(self, text: str, *, target: bool = False) -> tuple[list[int], list[int]]:
        """Return the ids of a text as `_text_ids`, and how many of its bytes in UTF-8 each stands
        for: together all of them. As a `target`, with what the tokenizer puts around one."""
        given = {"text_target": text} if target else {"text": text, "add_special_tokens": False}
        fast = self.tokenizer.is_fast
        found = self.tokenizer(**given, verbose=False, return_offsets_mapping=fast)
        ids = list(found["input_ids"])
        if not fast:
            spelled = self.tokenizer.batch_decode(
                [[one] for one in ids], skip_special_tokens=target
            )
            return ids, _sizes_by_spelling(text, spelled)
        own = [place for place, part in enumerate(found.sequence_ids(0)) if part is not None]
        sizes = [0] * len(ids)
        counted = byte_sizes(text, [found["offset_mapping"][place][1] for place in own])
        for place, size in zip(own, counted, strict=True):
            sizes[place] = size
        return ids, sizes


_READ = ("input_ids", "attention_mask", "labels")


def byte_sizes(text: str, ends: Sequence[int]) -> list[int]:
    """Return how many bytes of a text each token stands for, which ends before the character
    `ends[i]`. What lies between two tokens is of the later, and what follows the last of that.

    Tokens with one end share their bytes: a character may be several tokens, and then a byte each.

    >>> byte_sizes("a b", [1, 3]), byte_sizes("€!", [1, 1, 1, 2])
    ([1, 2], [1, 1, 1, 1])
    """
    sizes: list[int] = []
    start = place = 0
    while place < len(ends):
        end, after = max(ends[place], start), place + 1
        while after < len(ends) and ends[after] <= end:
            after += 1
        size = len(text[start : len(text) if after == len(ends) else end].encode())
        shares = after - place
        sizes += [size // shares + (share < size % shares) for share in range(shares)]
        start, place = end, after
    return sizes


def _sizes_by_spelling(text: str, spellings: Sequence[str]) -> list[int]:
    """Return how many bytes of a text each token stands for, by what the tokens are alone."""
    rest, sizes = len(text.encode()), list[int]()
    for spelling in spellings:
        sizes.append(min(len(spelling.encode()), rest))
        rest -= sizes[-1]
    if sizes:
        sizes[-1] += rest  # white space that no token spells
    return sizes


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of literal text and the column that follows it, or None: "a {b}!" -> [("a ",
    "b"), ("!", None)].

    Names are taken as they are, so that a column may be called "article.body". Raises `InputError`
    where str.format would do more than to put a column in.
    """
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"data.prompt {template!r} is no template: {error}; write {{{{ and }}}} for braces"
        ) from None
    for _, name, spec, conversion in fields:
        if spec or conversion:
            got = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            raise InputError(
                f"data.prompt {template!r}: expected the name of a column in braces, got "
                f"{{{got}}}; leave out what follows {name!r} (a column is put in as it is)"
            )
        if name is not None and name.isdigit():
            raise InputError(
                f"data.prompt {template!r}: expected the name of a column in braces, got the "
                f"number {{{name}}}; write the name, such as {{question}}"
            )
    return [(literal, name) for literal, name, _, _ in fields]


def template_columns(template: str) -> list[str]:
    """Return the columns a template names: "{a} or {b}" -> ["a", "b"]. Raises `InputError` on a
    broken one."""
    names = [name for _, name in template_parts(template) if name is not None]
    if not names or not all(names):
        raise InputError(
            f"data.prompt {template!r} names no column; expected one in braces, such as "
            f"{{question}}"
        )
    return names


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with a value for each column put in."""
    return "".join(
        literal + (values[name] if name is not None else "")
        for literal, name in template_parts(template)
    )


def fill_each(template: str, split: Split) -> list[str]:
    """Return the template with the columns of each record filled in."""
    columns = template_columns(template)
    split.require(*columns)
    values = [split.texts(column, blank=True) for column in columns]
    return [
        fill(template, dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True)
    ]


def _check_direction(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise `InputError` for an encoder: it reads the token it is to predict, and its perplexity
    means nothing."""
    if model_config.is_encoder_decoder or type(model_config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return
    # XLM: "causal"
    if not getattr(model_config, "is_decoder", False) and not getattr(
        model_config, "causal", False
    ):
        raise InputError(
            f"{config.model!r} is an encoder ({model_config.model_type}), which reads a text in "
            f"both directions and cannot write; {config.task} expects a causal model (such as "
            "GPT-2 or Llama)"
            + (" or an encoder-decoder (such as T5)" if config.task == "summarization" else "")
            + "; give one, or use this model for classification, regression or question_answering"
        )
