"""Shared fixtures: tiny random models, built from a config with a fixed seed. Nothing here touches
a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from peft import PeftModel
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from adaptive_lora.model.adapters import adapters
from adaptive_lora.testing import make_bert as make_bert

torch.set_num_threads(1)
# The same examples at every run and no time limit per example: a busy machine fails no test.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


def make_gpt2(n_layers: int = 3, **config: object) -> GPT2LMHeadModel:
    """A GPT-2 language model (`Conv1D`: weights stored transposed); the same weights at every
    call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_positions": 32, "n_layer": n_layers}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config}))


@pytest.fixture
def tiny_bert() -> BertForSequenceClassification:
    return make_bert()


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


def scale_of(model: PeftModel) -> float:
    """Return the one scale of the model's adapters, up to its last bits."""
    scales = {float(layer.scaling[layer.active_adapters[0]]) for layer in adapters(model).values()}
    assert max(scales) - min(scales) <= 1e-6 * max(scales)
    return max(scales)
