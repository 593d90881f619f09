"""One batch of 8 is two of 4 is four of 2, for every kind of model: tokens count the same wherever
they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import adaptive_lora as al
from adaptive_lora.training.trainer import AdaptiveTrainer, use_progress


def make_t5() -> T5ForConditionalGeneration:
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
    }
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def make_bart() -> BartForConditionalGeneration:
    sizes = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sides = {
        f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sizes.items()
    }
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=16,
            **sides,
            max_position_embeddings=32,
            dropout=0.0,
            init_std=0.2,
        )
    )


def make_llama() -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def make_vit() -> ViTForImageClassification:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def without_dropout() -> Any:
    return make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


MODELS = {
    "T5": make_t5,
    "BART": make_bart,
    "GPT-2": without_dropout,
    "Llama": make_llama,
    "ViT": make_vit,
}


def records(name: str) -> Dataset:
    """16 records; the number of labels that count differs from one to the next."""
    draw = torch.Generator().manual_seed(1)
    if name == "ViT":
        return Dataset.from_list(
            [
                {"pixel_values": torch.rand(3, 8, 8, generator=draw).tolist(), "labels": i % 3}
                for i in range(16)
            ]
        )
    rows = []
    for masked in [0, 1, 6, 2, 5, 0, 7, 3] * 2:
        ids, labels = (torch.randint(3, 64, (8,), generator=draw).tolist() for _ in range(2))
        rows.append({"input_ids": ids, "labels": [-100] * masked + labels[masked:]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_micro_batches_train_like_one_batch(name: str, tmp_path: Path) -> None:
    trained = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(0)
        model = al.attach(MODELS[name](), al.methods.lora(4))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # at B = 0 the gradient of A is 0
                torch.nn.init.normal_(parameter, std=0.1)
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=2,
            learning_rate=0.1, optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to="none",
            dataloader_pin_memory=False, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = AdaptiveTrainer(model, arguments, train_dataset=records(name))
        use_progress(trainer, quiet=True)
        trainer.train()
        end = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        trained.append(end - start)
    assert trained[0].norm() > 1e-2
    for accumulated in trained[1:]:
        # The same sums in another order: a few float32 roundings of a gradient, relative to its
        # size.
        assert (accumulated - trained[0]).norm() < 1e-4 * trained[0].norm()
