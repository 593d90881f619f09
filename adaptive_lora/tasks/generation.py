"""Text from a model: greedy or beam search over prompts of token ids, in batches of similar
length."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from adaptive_lora.errors import InputError
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
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    seq2seq = base.config.is_encoder_decoder
    config = copy.deepcopy(base.generation_config)
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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    if rooms and min(rooms) < 1:
        raise InputError(
            f"a prompt of {len(prompts[order[0]]):,} tokens leaves no room in the model's {limit} "
            "positions"
        )
    # One room for a batch: what a prompt is answered does not depend on its neighbours.
    batches = [
        batch
        for _, group in itertools.groupby(order, key=rooms.__getitem__)
        for batch in _batches(list(group), settings.batch_size)
    ]
    training = model.training
    model.eval()
    try:
        for batch in tqdm(
            batches,
            desc="generating",
            disable=not sys.stderr.isatty() or len(batches) < 2,
            leave=False,
        ):
            width = len(prompts[batch[0]])
            config.max_new_tokens = rooms[batch[0]]
            # a causal model goes on from the right end
            padding = [width - len(prompts[i]) for i in batch]
            pad = tokenizer.pad_token_id
            ids = [
                [pad] * n + prompts[i] if not seq2seq else prompts[i] + [pad] * n
                for i, n in zip(batch, padding, strict=True)
            ]
            mask = [
                [0] * n + [1] * (width - n) if not seq2seq else [1] * (width - n) + [0] * n
                for n in padding
            ]
            written = base.generate(
                input_ids=torch.tensor(ids, device=base.device),
                attention_mask=torch.tensor(mask, device=base.device),
                generation_config=config,
            )
            written = written if seq2seq else written[:, width:]
            for i, text in zip(
                batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
            ):
                texts[i] = text.strip()
    finally:
        model.train(training)
    return texts


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
