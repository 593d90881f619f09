"""Small random models of the architectures people fine-tune, and a training of each."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from dynamic import DYNAMIC
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import BitNetQuantConfig

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.methods import METHODS, Method
from adaptive_lora.model.attach import infer_task_type
from adaptive_lora.model.peft_adalora import MaskedByPeft
from adaptive_lora.model.targets import find_targets

STEPS = 6
WIDTH = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
TEXT = {**WIDTH, "vocab_size": 64, "max_position_embeddings": 32}
# two queries to a key
DECODER = {**TEXT, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
DISTILBERT = {
    "vocab_size": 64,
    "dim": 16,
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 32,
}
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 32,
    "bos_token_id": 0,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART_LAYERS = {
    f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    **BART_LAYERS,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
DEEPSEEK_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def bitnet(plain: tuple[str, ...] = ("lm_head",), **quantisation: Any) -> PreTrainedModel:
    """A BitNet whose linear modules, except `plain`, are replaced as `from_pretrained` does for
    this quantisation."""
    # it imports torch's compiler, which uses what torch has deprecated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformers.integrations.bitnet import replace_with_bitnet_linear
    model = hf.BitNetForCausalLM(hf.BitNetConfig(**DECODER))
    return replace_with_bitnet_linear(model, list(plain), BitNetQuantConfig(**quantisation))


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], PreTrainedModel]
    targets: int  # linear modules outside the head, counted by hand
    heads: tuple[str, ...] = ()  # language models have none: their output embeddings stay frozen


# 6 of a BERT layer and a pooler; 7 of a Llama layer (q, k, v, o, gate, up, down); T5 and BART: 6
# and 10.
ARCHITECTURES = {
    "bert": Architecture(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), 2 * 6 + 1, ("classifier",)
    ),
    "bert qa": Architecture(
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)), 2 * 6, ("qa_outputs",)
    ),
    "distilbert": Architecture(
        lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTILBERT)),
        2 * 6,
        ("pre_classifier", "classifier"),
    ),
    "distilbert qa": Architecture(
        lambda: hf.DistilBertForQuestionAnswering(hf.DistilBertConfig(**DISTILBERT)),
        2 * 6,
        ("qa_outputs",),
    ),
    "roberta": Architecture(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        2 * 6,
        ("classifier",),
    ),
    "albert": Architecture(  # one layer for both, a projection of the embeddings and a pooler
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=8)),
        6 + 2,
        ("classifier",),
    ),
    "electra": Architecture(  # a projection of the embeddings
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, embedding_size=8)),
        2 * 6 + 1,
        ("classifier",),
    ),
    "deberta-v2": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT)),
        2 * 6,
        ("pooler", "classifier"),
    ),
    "deberta-v3": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT, **DEBERTA_V3)),
        2 * 6,
        ("pooler", "classifier"),
    ),
    "deberta, own projections of positions": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**TEXT, **{**DEBERTA_V3, "share_att_key": False}, conv_kernel_size=3)
        ),
        2 * 8,
        ("pooler", "classifier"),
    ),
    "gpt2": Architecture(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, eos_token_id=1)), 2 * 4),
    "gpt2 classifier": Architecture(
        lambda: hf.GPT2ForSequenceClassification(
            hf.GPT2Config(**GPT2, eos_token_id=1, pad_token_id=1)
        ),
        2 * 4,
        ("score",),
    ),
    "llama": Architecture(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), 2 * 7),
    "llama classifier": Architecture(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, pad_token_id=1)),
        2 * 7,
        ("score",),
    ),
    "qwen2": Architecture(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)), 2 * 7),
    "qwen3": Architecture(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)), 2 * 7
    ),
    "mistral": Architecture(lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), 2 * 7),
    "gemma2": Architecture(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8)), 2 * 7
    ),
    "gemma3": Architecture(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8)), 2 * 7
    ),
    "bitnet": Architecture(lambda: hf.BitNetForCausalLM(hf.BitNetConfig(**DECODER)), 2 * 7),
    "bitnet, quantised online": Architecture(
        lambda: bitnet(linear_class="autobitlinear", quantization_mode="online"), 2 * 7
    ),
    "t5": Architecture(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
        2 * (6 + 10),
    ),
    "bart": Architecture(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), 2 * (6 + 10)
    ),
    "bart classifier": Architecture(
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART, num_labels=2)),
        2 * (6 + 10),
        ("classification_head",),
    ),
    "vit": Architecture(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**WIDTH, image_size=8, patch_size=4)),
        2 * 6,
        ("classifier",),
    ),
    # Mixtures of experts: attention, and of Qwen2 the shared expert (gate, up, down) too.
    "mixtral": Architecture(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)), 2 * 4
    ),
    "qwen2-moe": Architecture(
        lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **DECODER, **EXPERTS, decoder_sparse_step=1, shared_expert_intermediate_size=16
            )
        ),
        2 * (4 + 3),
    ),
    "deepseek-v3": Architecture(  # a dense layer, then one of experts
        lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **{**DECODER, "num_key_value_heads": 2},
                **DEEPSEEK,
                **DEEPSEEK_EXPERTS,
                moe_intermediate_size=8,
                first_k_dense_replace=1,
            )
        ),
        2 * 5,
    ),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ARCHITECTURES[name].make()


def batch_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Four random records of length 8, or four images, with the labels this model takes."""
    kind = type(model).__mro__[1].__name__ + type(model).__name__
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (4, 8), generator=generator)
    ids[:, -1] = 2  # BART classifies at its end of sequence
    if "Image" in kind:
        return {
            "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
            "labels": ids[:, 0] % 2,
        }
    if "QuestionAnswering" in kind:
        return {"input_ids": ids, "start_positions": ids[:, 0] % 8, "end_positions": ids[:, 1] % 8}
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if "SequenceClassification" in kind else ids}


def answers(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return (
        torch.cat([output.start_logits, output.end_logits])
        if "start_positions" in batch
        else output.logits
    )


def method_for(base: PreTrainedModel, name: str) -> Method:
    """The method of this name, with arguments with which ranks change within `STEPS` steps."""
    if name == "custom":
        absent, large = (f"^{re.escape(target.name)}$" for target in find_targets(base)[:2])
        return methods.custom(pattern={absent: 0, large: 3, ".*": 1})
    method = DYNAMIC[name]() if name in DYNAMIC else METHODS[name](rank=2)
    if isinstance(method.adaptation, MaskedByPeft) and infer_task_type(base) is None:
        return replace(method, adaptation=replace(method.adaptation, orthogonality=0.0))
    return method


def train(model: PeftModel, method: Method, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = al.RankController(model, optimizer, method, STEPS)
    for _ in range(STEPS):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        controller.evaluated(float(loss.detach()))
    controller.finish()
    assert math.isfinite(float(loss.detach()))
