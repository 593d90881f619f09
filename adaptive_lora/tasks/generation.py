"""Text from a model: greedy or beam search over prompts of token ids, in batches of similar
length."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from adaptive_lora.errors import InputError
from adaptive_lora.model.adapters import base_of
from adaptive_lora.recipe.config import GenerationConfig


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: GenerationConfig,
    limit: int | None = None,
) -> list[str]:
    """Return the text the model writes after each prompt; no sampling, so the same every time.

    Args:
        model: causal or encoder-decoder, with or without adapters; its training mode is restored.
        prompts: token ids, special tokens included, none empty.
        limit: positions of the model, for prompt and text (causal) or for the text
            (encoder-decoder); what is written stops there.

    Raises `InputError` when a prompt leaves no position to write to.
    """
    base: Any = base_of(model)
    seq2seq = base.config.is_encoder_decoder
    # A copy: these settings are ours, and not the model's from now on.
    config = copy.deepcopy(base.generation_config)
    # None: transformers warns of settings of sampling, which a model may bring, when none is done.
    config.update(
        do_sample=False, num_beams=settings.num_beams, temperature=None, top_p=None, top_k=None,
        max_length=None,
        early_stopping=settings.num_beams > 1, min_new_tokens=settings.min_new_tokens or None,
        length_penalty=settings.length_penalty if settings.num_beams > 1 else None,
        no_repeat_ngram_size=settings.no_repeat_ngram_size or None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    texts = [""] * len(prompts)
    end = sys.maxsize if limit is None else limit
    # A decoder of an encoder-decoder starts from one token, whatever the prompt.
    rooms = [min(settings.max_new_tokens, end - (1 if seq2seq else len(ids))) for ids in prompts]
    if rooms and min(rooms) < 1:
        raise InputError(
            f"a prompt of {max(map(len, prompts)):,} tokens leaves no room in the model's {limit} "
            "positions"
        )
    batches = _batches(prompts, rooms, settings.batch_size)
    training = model.training
    model.eval()
    silent = not sys.stderr.isatty() or len(batches) < 2
    try:
        for batch in tqdm(batches, desc="generating", disable=silent, leave=False):
            config.max_new_tokens = rooms[batch[0]]
            some = [prompts[i] for i in batch]
            ids, mask = _padded(some, tokenizer.pad_token_id, left=not seq2seq)
            written = base.generate(
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=config,
            )
            written = written if seq2seq else written[:, ids.shape[1] :]
            answers = tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(batch, answers, strict=True):
                texts[i] = text.strip()
    finally:
        model.train(training)
    return texts


def _padded(
    prompts: Sequence[list[int]], pad: Any, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token ids, mask) of a batch, both (B, T); padded on the left for a causal model,
    which goes on from the right end."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        fill = width - len(prompt)
        own, ones, zeros = list(prompt), [1] * len(prompt), [0] * fill
        ids.append([pad] * fill + own if left else own + [pad] * fill)
        mask.append(zeros + ones if left else ones + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def _batches(prompts: Sequence[list[int]], rooms: list[int], size: int) -> list[list[int]]:
    """Return the numbers of the prompts of each batch, long ones first, so that little is padded.

    One room for a batch: what a prompt is answered does not depend on its neighbours.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    groups = [list(group) for _, group in itertools.groupby(order, key=rooms.__getitem__)]
    return [g[start : start + size] for g in groups for start in range(0, len(g), size)]
