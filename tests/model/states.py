"""Every state in which PEFT, transformers, TRL and users leave a model or its configuration: one
small function each, its docstring says what it is.

`cells.py` puts each before every public function. Where a state is not in this list, and why:
`NOT_BUILT`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import accelerate
import peft
import torch
import transformers as hf
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import adaptive_lora as al
from adaptive_lora.model.quantization import keep_trainable, quantize_in_place

IDS = torch.arange(36).reshape(3, 12)
TARGETS = ["q_proj", "v_proj"]
TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**TOKENS, **WIDTH, "num_attention_heads": 4, "max_position_embeddings": 64}
BERT = {**WIDTH, "vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}

NOT_BUILT = {
    "QALoRA (`use_qalora`)": "PEFT implements it for GPTQ layers only, whose package needs a GPU",
    'LoftQ (`init_lora_weights="loftq"`)': "PEFT computes its start on CUDA or XPU only",
    "GPTQ, AWQ, AQLM, EETQ, HQQ, INC, torchao bases": "packages that are not installed here, most "
    "of them for GPUs only",
    "`megatron_config`": "needs Megatron-LM",
    "Transformer Engine layers, tensor parallel plans, DTensor": "need CUDA or several processes",
    "FSDP, DeepSpeed, DistributedDataParallel": "need several processes; their refusals are in "
    "`tests/training/test_controller.py`",
    "a `device_map` over several devices": "there is one device here; offloading to the "
    "CPU is among the states",
    "TRL's `AutoModelForCausalLMWithValueHead`": "trl 1.16 has no value-head model any more; "
    "a model inside another module stands for it",
    "`adapter_names=` of a forward pass, `disable_adapter()`, `rescale_adapter_scale()`": "last "
    "for one call or block and leave no state; what they leave inside it is `disabled` and "
    "`set_scale`",
    "`convert_to_lora`, `save_as_lora`, `reduce_intruder_dimension`": "what comes out is a plain "
    "LoRA adapter, as `by_peft`",
    "`runtime_config`": "is not saved, and changes how DoRA starts only",
}
"""States that cannot be built on this machine, or leave nothing behind, and why."""


def itself(model: Any) -> Any:
    return model


def own_rows() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(2, 60, (16, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in rows]


def class_rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": row["labels"][0] % 2} for row in own_rows()]


def decoder_rows() -> list[dict[str, torch.Tensor]]:
    return [{**row, "decoder_input_ids": row["input_ids"]} for row in own_rows()]


def signal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def signal_ids() -> torch.Tensor:
    """One record of 64 tokens, so that covariances of 32 features have full rank."""
    return torch.randint(2, 60, (1, 64), generator=torch.Generator().manual_seed(3))


def signal_rows(name: str, *shape: int) -> Callable[[], list[dict[str, torch.Tensor]]]:
    return lambda: [{name: x, "labels": torch.tensor(i % 2)} for i, x in enumerate(signal(*shape))]


@lru_cache
def _cached(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def _llama(**config: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, **config}))


def llama() -> Any:
    """The base of most states; equal at every call."""
    return copy.deepcopy(_cached(_llama))


def tied_llama() -> Any:
    torch.manual_seed(0)
    return _llama(tie_word_embeddings=True)


def bert_classifier() -> Any:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT))


def bert() -> Any:
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**BERT))


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_positions": 64, "n_layer": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, **sizes))


def albert() -> Any:
    torch.manual_seed(0)
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**BERT, embedding_size=16))


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
    )


def mixtral() -> Any:
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**LLAMA, **experts}))


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_attention_heads": 4}
    return hf.ViTForImageClassification(hf.ViTConfig(**WIDTH, **sizes))


class OwnNet(nn.Module):
    """A model that is none of transformers: `trunk`, mean over time, two classes."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.trunk(x)).mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attention(x, x, x, need_weights=False)[0])


class Twice(nn.Module):
    """One linear module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def own_net(trunk: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return OwnNet(trunk())

    return make


@contextmanager
def quiet() -> Iterator[None]:
    """What PEFT and transformers warn of while a state is made, which is the state's own matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fill(model: Any) -> Any:
    """Move every trainable parameter as a training would: B is N(0, 0.1), no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad or not p.is_floating_point() or p.is_meta:
                continue
            if "lora_A" in name and bool(p.count_nonzero()):
                continue
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def lora(base: Any, adapter_name: str = "default", **config: Any) -> Any:
    """Stock PEFT's LoRA of rank 4 and scale 2 on `base`, as if trained."""
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    return fill(get_peft_model(base, LoraConfig(**options), adapter_name))


def add(model: Any, name: str, seed: int = 7, **config: Any) -> Any:
    """Add a second adapter and fill it; the first stays active."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    model.add_adapter(name, LoraConfig(**options))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}." in key and "lora_B" in key:
                p.normal_(std=0.1)
    return model


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}]


# Attached plainly


def attached() -> Any:
    """`al.attach` with rank 4 on every query and value, as if trained."""
    torch.manual_seed(5)
    return fill(al.attach(llama(), al.methods.lora(4), TARGETS))


def attached_mixed_ranks() -> Any:
    """`al.attach` with ranks 4 and 2 by layer."""
    torch.manual_seed(5)
    return fill(al.attach(llama(), al.methods.custom(layer_ranks=[4, 2]), TARGETS))


def parked() -> Any:
    """`al.attach` with rank 0 in the second layer: its adapters are parked."""
    torch.manual_seed(5)
    return fill(al.attach(llama(), al.methods.custom(layer_ranks=[4, 0]), TARGETS))


def attached_adalora() -> Any:
    """`al.attach` with `methods.peft_adalora`: PEFT's AdaLoRA until the training ends."""
    torch.manual_seed(5)
    return fill(al.attach(llama(), al.methods.peft_adalora(2, initial_rank=4), TARGETS))


def resized() -> Any:
    """`al.attach`, then `al.resize` to ranks 4, 0, 6 and 1."""
    model = attached()
    al.resize(model, dict(zip(al.ranks(model), (4, 0, 6, 1), strict=True)))
    return model


def by_peft() -> Any:
    """PEFT's `get_peft_model` with rank 4."""
    return lora(llama())


def no_update_yet() -> Any:
    """Fresh adapters: every B is zero."""
    torch.manual_seed(5)
    return get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


def other_name() -> Any:
    """The adapter is called "mine", not "default"."""
    return lora(llama(), "mine")


def loaded() -> Any:
    """`PeftModel.from_pretrained`: frozen, in evaluation mode."""
    return _loaded(lora(llama()), llama())


def loaded_under_a_name() -> Any:
    """`PeftModel.from_pretrained(..., adapter_name="mine", is_trainable=True)`."""
    return _loaded(lora(llama()), llama(), adapter_name="mine", is_trainable=True)


def loaded_low_memory() -> Any:
    """`PeftModel.from_pretrained(..., low_cpu_mem_usage=True)`."""
    return _loaded(lora(llama()), llama(), low_cpu_mem_usage=True)


def _loaded(model: Any, base: Any, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(base, folder, **options)


def rank_pattern() -> Any:
    """`rank_pattern` without `alpha_pattern`: several scales."""
    return lora(llama(), rank_pattern={"v_proj": 2})


def alpha_pattern() -> Any:
    """`alpha_pattern` without `rank_pattern`: several scales."""
    return lora(llama(), alpha_pattern={"v_proj": 2})


def both_patterns() -> Any:
    """`rank_pattern` and `alpha_pattern` of one scale."""
    return lora(llama(), rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})


def rslora() -> Any:
    """`use_rslora`: alpha / √r."""
    return lora(llama(), use_rslora=True)


def rslora_rank_pattern() -> Any:
    """`use_rslora` with `rank_pattern`: several scales."""
    return lora(llama(), use_rslora=True, rank_pattern={"v_proj": 2})


def negative_scale() -> Any:
    """`lora_alpha` below zero, to subtract an adapter."""
    return lora(llama(), lora_alpha=-8)


def zero_scale() -> Any:
    """`lora_alpha` 0."""
    return lora(llama(), lora_alpha=0)


def all_linear() -> Any:
    """`target_modules="all-linear"`."""
    return lora(llama(), target_modules="all-linear")


def regular_expression() -> Any:
    """`target_modules` is a regular expression."""
    return lora(llama(), target_modules=r".*\.1\.self_attn\.(q|v)_proj")


def default_targets() -> Any:
    """`target_modules` None: PEFT's own list for the architecture."""
    return lora(llama(), target_modules=None)


def exclude_modules() -> Any:
    """`exclude_modules` takes one module out of `target_modules`."""
    return lora(llama(), exclude_modules=["model.layers.0.self_attn.v_proj"])


def layers_to_transform() -> Any:
    """`layers_to_transform` and `layers_pattern` choose the second layer."""
    return lora(llama(), layers_to_transform=[1], layers_pattern="layers")


def dropout() -> Any:
    """`lora_dropout` 0.1, in training mode."""
    return lora(llama(), lora_dropout=0.1).train()


def evaluation_mode() -> Any:
    """In evaluation mode."""
    return lora(llama()).eval()


def frozen() -> Any:
    """`inference_mode=True`: the adapter is frozen."""
    model = lora(llama())
    model.set_requires_grad("default", requires_grad=False)
    model.peft_config["default"].inference_mode = True
    return model


def frozen_a() -> Any:
    """A is frozen by hand, B trained (LoRA-FA)."""
    model = lora(llama())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    return model


def base_trained_too() -> Any:
    """A norm and a projection of the base are trained beside the adapter, by `requires_grad`."""
    model = lora(llama())
    for name in ("model.norm", "model.layers.0.mlp.up_proj"):
        model.get_base_model().get_submodule(name).requires_grad_(True)
    return fill(model)


def unused_loss() -> Any:
    """A loss that waits for backward() is alive."""
    model = lora(llama())
    model.kept_loss = [model(input_ids=IDS, labels=IDS).loss]
    return model


def nan() -> Any:
    """A NaN in a B."""
    model = lora(llama())
    layers(model)[0].lora_B["default"].weight.data[0, 0] = float("nan")
    return model


def nan_times_zero() -> Any:
    """An infinity in an A whose B is zero."""
    model = no_update_yet()
    layers(model)[0].lora_A["default"].weight.data[0, 0] = float("inf")
    return model


def nan_in_the_base() -> Any:
    """A NaN in a frozen weight of the base."""
    return lora(poisoned_llama())


def poisoned_llama() -> Any:
    base = llama()
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    return base


def copied() -> Any:
    """`copy.deepcopy` of an attached model."""
    return copy.deepcopy(attached())


def inference_tensors() -> Any:
    """Made under `torch.inference_mode()`."""
    with torch.inference_mode():
        return lora(_llama_seeded())


def _llama_seeded() -> Any:
    torch.manual_seed(0)
    return _llama()


def config_with_another_rank() -> Any:
    """`peft_config` says rank 16, the tensors have 4."""
    model = lora(llama())
    model.peft_config["default"].r = 16
    return model


# Merged, off, several


def merged() -> Any:
    """`merge_adapter()`."""
    model = lora(llama())
    model.merge_adapter()
    return model


def merged_in_one_layer() -> Any:
    """One layer is merged, the others are not."""
    model = lora(llama())
    layers(model)[0].merge()
    return model


def merged_and_unmerged() -> Any:
    """`merge_adapter()`, then `unmerge_adapter()`: the base has been rounded."""
    model = lora(llama())
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def merged_other() -> Any:
    """Of two adapters the inactive one is merged."""
    model = add(lora(llama()), "other")
    model.merge_adapter(adapter_names=["other"])
    return model


def merged_two() -> Any:
    """Two adapters are merged, one is active."""
    model = add(lora(llama()), "other")
    model.merge_adapter(adapter_names=["default", "other"])
    return model


def disabled() -> Any:
    """`disable_adapter_layers()`."""
    model = lora(llama())
    model.base_model.disable_adapter_layers()
    return model


def disabled_in_one_layer() -> Any:
    """The adapters of one layer are disabled."""
    model = lora(llama())
    layers(model)[0].enable_adapters(False)
    return model


def two_one_active() -> Any:
    """Two adapters, the first is active."""
    return add(lora(llama()), "other")


def two_second_active() -> Any:
    """Two adapters, the second is active."""
    model = add(lora(llama()), "other")
    model.set_adapter("other")
    return model


def two_active() -> Any:
    """Two adapters active together."""
    model = add(lora(llama()), "other")
    model.base_model.set_adapter(["default", "other"])
    return model


def two_of_other_targets_active() -> Any:
    """Two adapters of different targets active together."""
    model = add(lora(llama()), "other", target_modules=["o_proj"])
    model.base_model.set_adapter(["default", "other"])
    return model


def two_of_other_targets() -> Any:
    """Two adapters of different targets, the first active."""
    return add(lora(llama()), "other", target_modules=["o_proj"])


def two_of_other_ranks() -> Any:
    """Two adapters, the inactive one of rank 2."""
    return add(lora(llama()), "other", r=2)


def two_trained() -> Any:
    """Two adapters, one active, both with `requires_grad`."""
    model = add(lora(llama()), "other")
    model.set_requires_grad(["default", "other"])
    return model


def reference_adapter() -> Any:
    """A frozen copy "ref" beside the trained adapter, as TRL's DPO and GRPO make it."""
    model = lora(llama())
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def active_in_one_layer() -> Any:
    """One layer has another active adapter than the model."""
    model = add(lora(llama()), "other")
    layers(model)[0].set_adapter("other")
    return model


def first_deleted() -> Any:
    """The first of two adapters is deleted."""
    model = add(lora(llama()), "other")
    model.delete_adapter("default")
    return model


def last_deleted() -> Any:
    """The only adapter is deleted; the layers stay."""
    model = lora(llama())
    model.delete_adapter("default")
    return model


def none_active() -> Any:
    """No adapter is active: `set_adapter([])`."""
    model = lora(llama())
    model.base_model.set_adapter([])
    return model


def weighted() -> Any:
    """`add_weighted_adapter`, linear, of two adapters."""
    return _weighted("linear")


def weighted_cat() -> Any:
    """`add_weighted_adapter`, "cat": the ranks add up."""
    return _weighted("cat")


def weighted_svd() -> Any:
    """`add_weighted_adapter`, "svd"."""
    return _weighted("svd")


def _weighted(kind: str) -> Any:
    model = add(lora(llama()), "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type=kind)
    model.set_adapter("both")
    return model


def set_scale() -> Any:
    """`set_scale` in every layer."""
    model = lora(llama())
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    return model


def scaled_in_one_layer() -> Any:
    """`scale_layer` in one layer."""
    model = lora(llama())
    layers(model)[0].scale_layer(0.5)
    return model


# Layer kinds and targets


def embeddings() -> Any:
    """LoRA on the embeddings only."""
    return lora(llama(), target_modules=["embed_tokens"])


def embeddings_and_linear() -> Any:
    """LoRA on the embeddings and on linear modules."""
    return lora(llama(), target_modules=["embed_tokens", *TARGETS])


def output_embeddings() -> Any:
    """LoRA on `lm_head`, not tied."""
    return lora(llama(), target_modules=["lm_head", *TARGETS])


def tied_output() -> Any:
    """LoRA on `lm_head`, whose weight is that of the embeddings."""
    return lora(tied_llama(), target_modules=["lm_head", *TARGETS])


def tied_embeddings() -> Any:
    """LoRA on the embeddings, whose weight is that of `lm_head`."""
    return lora(tied_llama(), target_modules=["embed_tokens", *TARGETS])


def tied_targets() -> Any:
    """LoRA on tied embeddings with `ensure_weight_tying`: the adapters are tied too."""
    return lora(tied_llama(), target_modules=["embed_tokens", *TARGETS], ensure_weight_tying=True)


def tied_base() -> Any:
    """LoRA on linear modules of a base with tied embeddings."""
    return lora(tied_llama())


def gpt2_modules() -> Any:
    """GPT-2's `Conv1D`, weights stored transposed."""
    return lora(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)


def conv1d() -> Any:
    """LoRA on a `Conv1d` and a linear module of a model that is none of transformers."""
    return lora(own_net(Convolution)(), target_modules=["conv", "proj"])


def conv2d() -> Any:
    """LoRA on ViT's `Conv2d` and on linear modules."""
    return lora(vit(), target_modules=["projection", "q_proj"])


def multihead_attention() -> Any:
    """LoRA on `nn.MultiheadAttention` and a linear module."""
    return lora(own_net(Attention)(), target_modules=["attention", "proj"])


def one_module_two_names() -> Any:
    """LoRA on a linear module that has two names."""
    return lora(own_net(Twice)(), target_modules=["first", "second"])


def own_network() -> Any:
    """LoRA on a model that is none of transformers."""
    return lora(own_net(Convolution)(), target_modules=["proj"])


def experts() -> Any:
    """LoRA on fused experts (`target_parameters`) only."""
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return lora(mixtral(), target_modules=[], target_parameters=both)


def experts_and_linear() -> Any:
    """LoRA on fused experts (`target_parameters`) and on linear modules."""
    return lora(mixtral(), target_parameters=["mlp.experts.gate_up_proj"])


def beside_experts() -> Any:
    """LoRA on the attention of a model with fused experts."""
    return lora(mixtral())


def shared_layers() -> Any:
    """ALBERT: one module serves every layer."""
    return lora(albert(), target_modules=["query", "value"], task_type="SEQ_CLS")


def encoder_decoder() -> Any:
    """T5, encoder-decoder with tied embeddings."""
    return lora(t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")


def classifier() -> Any:
    """BERT with a trained head (`task_type="SEQ_CLS"`)."""
    return lora(bert_classifier(), target_modules=["query", "value"], task_type="SEQ_CLS")


def two_classifiers() -> Any:
    """BERT with two adapters and a trained head for each, the first active."""
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return add(lora(bert_classifier(), **options), "other", **options)


def wide_names() -> Any:
    """`target_modules=["dense"]`, an ending of many modules, pooler included."""
    return lora(bert_classifier(), target_modules=["dense"], task_type="SEQ_CLS")


# Variants of LoRA


def dora() -> Any:
    """DoRA."""
    return lora(llama(), use_dora=True)


def lora_bias() -> Any:
    """`lora_bias`: a bias on B."""
    return lora(bert_classifier(), target_modules=["query"], lora_bias=True, task_type="SEQ_CLS")


def bias_all() -> Any:
    """`bias="all"`."""
    return lora(bert_classifier(), target_modules=["query"], bias="all", task_type="SEQ_CLS")


def bias_lora_only() -> Any:
    """`bias="lora_only"`."""
    return lora(bert_classifier(), target_modules=["query"], bias="lora_only", task_type="SEQ_CLS")


def alora() -> Any:
    """aLoRA: the adapter acts from an invocation sequence on."""
    return lora(llama(), alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")


def bdlora() -> Any:
    """BD-LoRA: block-diagonal factors."""
    blocks = BdLoraConfig(target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)
    return lora(llama(), use_bdlora=blocks)


def kasa() -> Any:
    """KaSA: truncates the base weights, and has singular values of its own."""
    return lora(llama(), kasa_config=KasaConfig())


def monteclora() -> Any:
    """MonteCLoRA: updates are sampled in training."""
    return lora(llama(), monteclora_config=MontecloraConfig(num_samples=2, buffer_size=2)).eval()


def velora() -> Any:
    """VeLoRA: activations are compressed for the backward pass."""
    return lora(llama(), velora_config=VeloraConfig(num_groups=4))


def arrow() -> Any:
    """Arrow: a router over two adapters."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in ("one", "two"):
            add(lora(llama()), "x", seed=len(paths)).save_pretrained(f"{folder}/{name}")
            paths.append(f"{folder}/{name}/x")
        options = ArrowConfig(top_k=1, rng_seed=0)
        return peft.tuners.lora.create_arrow_model(
            base_model=llama(), task_specific_adapter_paths=paths, arrow_config=options
        )


def layer_replication() -> Any:
    """`layer_replication`: a layer used twice, with adapters of its own."""
    return lora(llama(), layer_replication=[[0, 2], [1, 2]])


def trainable_tokens() -> Any:
    """`trainable_token_indices`: two rows of the embeddings are trained too."""
    return lora(llama(), trainable_token_indices=[3, 4])


def head_trained() -> Any:
    """`modules_to_save=["lm_head"]`."""
    return lora(llama(), modules_to_save=["lm_head"])


def norm_trained() -> Any:
    """`modules_to_save=["norm"]`."""
    return lora(llama(), modules_to_save=["norm"])


def embeddings_trained() -> Any:
    """`modules_to_save=["embed_tokens", "lm_head"]`, not tied."""
    return lora(llama(), modules_to_save=["embed_tokens", "lm_head"])


def tied_and_trained() -> Any:
    """`modules_to_save=["embed_tokens"]` of a tied model: the two come apart."""
    return lora(tied_llama(), modules_to_save=["embed_tokens"])


def tied_and_trained_together() -> Any:
    """`modules_to_save=["embed_tokens"]` of a tied model with `ensure_weight_tying`."""
    return lora(tied_llama(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)


def gaussian() -> Any:
    """`init_lora_weights="gaussian"`."""
    return lora(llama(), init_lora_weights="gaussian")


def random_start() -> Any:
    """`init_lora_weights=False`: B starts at random."""
    return lora(llama(), init_lora_weights=False)


def orthogonal() -> Any:
    """`init_lora_weights="orthogonal"`."""
    return lora(llama(), init_lora_weights="orthogonal")


def pissa() -> Any:
    """PiSSA: the base weights are changed at the start."""
    return lora(llama(), init_lora_weights="pissa")


def pissa_niter() -> Any:
    """PiSSA by a randomised SVD."""
    return lora(llama(), init_lora_weights="pissa_niter_4")


def olora() -> Any:
    """OLoRA: the base weights are changed at the start."""
    return lora(llama(), init_lora_weights="olora")


def mica() -> Any:
    """MiCA: B is frozen at the smallest singular vectors, only A is trained."""
    return lora(llama(), init_lora_weights="mica")


def corda() -> Any:
    """CorDA: the base weights are changed at the start, by activations."""
    # It asks for the package attrs, of which it needs what is in the standard library.
    with mock.patch.dict(sys.modules, {"attr": dataclasses}):
        from peft.tuners.lora.corda import preprocess_corda
    base = llama()
    config = _config(init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(base, config, run_model=lambda: base(signal_ids()))
    return fill(get_peft_model(base, config))


def eva() -> Any:
    """EVA: A from activations, ranks redistributed, scales adjusted."""
    model = get_peft_model(llama(), _config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)))
    peft.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    return fill(model)


def lora_ga() -> Any:
    """LoRA-GA: A and B from gradients, the base weights changed."""
    base = llama()
    config = _config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    return fill(get_peft_model(base, config))


def _config(**config: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config})


# The base


def bare() -> Any:
    """A base model without adapters."""
    return llama()


def bare_tied() -> Any:
    """A base model with tied embeddings, without adapters."""
    return tied_llama()


def bare_gpt2() -> Any:
    """GPT-2 without adapters."""
    return gpt2()


def bare_albert() -> Any:
    """ALBERT without adapters."""
    return albert()


def bare_t5() -> Any:
    """T5 without adapters."""
    return t5()


def bare_experts() -> Any:
    """A model with fused experts, without adapters."""
    return mixtral()


def bare_frozen() -> Any:
    """A base model frozen by `requires_grad_(False)`, in evaluation mode."""
    return llama().requires_grad_(False).eval()


def bare_on_meta() -> Any:
    """A base model on the device "meta", without weights."""
    with torch.device("meta"):
        return _llama()


def merged_and_unloaded() -> Any:
    """`merge_and_unload()`: the base with the update in it."""
    return lora(llama()).merge_and_unload()


def unloaded() -> Any:
    """`unload()`: the base without the adapter."""
    return lora(llama()).unload()


def merged_then_attached() -> Any:
    """`merge_and_unload()`, then LoRA anew."""
    return lora(merged_and_unloaded())


def bare_grown() -> Any:
    """`resize_token_embeddings` to 68 tokens, without adapters."""
    return grown_llama()


def grown_llama() -> Any:
    torch.manual_seed(0)
    base = _llama()
    base.resize_token_embeddings(68, mean_resizing=False)
    return base


def grown() -> Any:
    """`resize_token_embeddings` before the adapter; read back on a base that is grown too."""
    return lora(grown_llama())


def grown_read_on_published() -> Any:
    """`resize_token_embeddings` before the adapter; read back on the published base."""
    return lora(grown_llama())


def grown_and_saved() -> Any:
    """Grown, the new rows trained (`modules_to_save`); read back on the published base."""
    return lora(grown_llama(), modules_to_save=["embed_tokens", "lm_head"])


def grown_afterwards() -> Any:
    """`resize_token_embeddings` after the adapter; read back on a base that is grown too."""
    torch.manual_seed(0)
    base = _llama()
    torch_state = torch.get_rng_state()
    model = lora(base)
    torch.set_rng_state(torch_state)
    model.get_base_model().resize_token_embeddings(68, mean_resizing=False)
    return model


def bf16_llama() -> Any:
    return llama().to(torch.bfloat16)


def bf16() -> Any:
    """Base in bfloat16, adapters in float32 (PEFT's default)."""
    return lora(bf16_llama())


def bf16_all() -> Any:
    """Base and adapters in bfloat16 (`autocast_adapter_dtype=False`)."""
    model = get_peft_model(bf16_llama(), _config(), autocast_adapter_dtype=False)
    return fill(model)


def bf16_adapters() -> Any:
    """Base in float32, adapters in bfloat16."""
    model = lora(llama())
    for layer in layers(model):
        layer.lora_A.to(torch.bfloat16)
        layer.lora_B.to(torch.bfloat16)
    return model


def float64_llama() -> Any:
    return llama().double()


def float64() -> Any:
    """Base and adapters in float64."""
    return lora(float64_llama()).double()


def fp16_llama() -> Any:
    return llama().to(torch.float16)


def fp16() -> Any:
    """Base in float16, adapters in float32."""
    return lora(fp16_llama())


def _wide(kind: Any) -> Any:
    # 64: narrower modules stay as they are where the processor's 4-bit kernel is wrong for them
    torch.manual_seed(0)
    base = _llama(hidden_size=64)
    if kind:
        quantize_in_place(base, kind, torch.float32)
        keep_trainable(base)
    return base


def wide_llama() -> Any:
    return _wide(None)


def nf4_llama() -> Any:
    return _wide("nf4")


def int8_llama() -> Any:
    return _wide("int8")


def nf4() -> Any:
    """Base in NF4."""
    return lora(nf4_llama())


def int8() -> Any:
    """Base in int8."""
    return lora(int8_llama())


def nf4_prepared() -> Any:
    """Base in NF4, through `prepare_model_for_kbit_training`."""
    return lora(peft.prepare_model_for_kbit_training(nf4_llama()))


def bare_nf4() -> Any:
    """A base in NF4, without adapters."""
    return nf4_llama()


def on_meta() -> Any:
    """Base and adapters on the device "meta", without weights."""
    with torch.device("meta"):
        return get_peft_model(_llama(), _config())


def adapters_on_meta() -> Any:
    """`get_peft_model(..., low_cpu_mem_usage=True)`: adapters on "meta", to be loaded yet."""
    return get_peft_model(llama(), _config(), low_cpu_mem_usage=True)


def offloaded_to_cpu() -> Any:
    """`accelerate.cpu_offload`: hooks bring the weights, which stand on "meta"."""
    model = lora(llama())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def dispatched() -> Any:
    """`accelerate.dispatch_model` with a device map of one device."""
    base = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    return lora(base)


def offloaded_base() -> Any:
    """Base offloaded (`accelerate.cpu_offload`) before the adapter."""
    base = llama()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    return lora(base)


def checkpointing() -> Any:
    """`gradient_checkpointing_enable()` and `enable_input_require_grads()`."""
    model = lora(llama())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


def hotswap() -> Any:
    """`prepare_model_for_compiled_hotswap`: the scales are tensors."""
    model = lora(llama())
    prepare_model_for_compiled_hotswap(model)
    return model


def hotswap_padded() -> Any:
    """`prepare_model_for_compiled_hotswap(target_rank=8)`: padded, the config still says 4."""
    model = lora(llama())
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def hotswapped() -> Any:
    """`hotswap_adapter` put in another adapter of the same rank and another alpha."""
    model = lora(llama())
    with tempfile.TemporaryDirectory() as folder:
        lora(llama(), lora_alpha=4).save_pretrained(folder)
        hotswap_adapter(model, folder, adapter_name="default")
    return model


def compiled_in_place() -> Any:
    """`model.compile()`."""
    model = lora(llama())
    model.compile(backend="eager")
    return model


# Wrapped, and of other kinds


class Wrapper(nn.Module):
    """A model of one's own around another, such as a value head."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.encoder, self.value = inner, nn.Linear(64, 1)

    def forward(self, **inputs: Any) -> Any:
        output = self.encoder(**inputs)
        return {"loss": output.loss, "logits": output.logits, "value": self.value(output.logits)}


def compiled() -> Any:
    """`torch.compile(model)`."""
    return torch.compile(lora(llama()), backend="eager")


def data_parallel() -> Any:
    """`nn.DataParallel(model)`."""
    return nn.DataParallel(lora(llama()))


def inside_a_module() -> Any:
    """A `PeftModel` inside another `nn.Module`, such as a value head."""
    torch.manual_seed(9)
    return Wrapper(lora(llama()))


def two_inside_a_module() -> Any:
    """Two `PeftModel`s inside another `nn.Module`, as in a bi-encoder."""
    return nn.ModuleDict({"one": lora(llama()), "two": lora(llama())})


def nested() -> Any:
    """`get_peft_model` on a `PeftModel`."""
    return get_peft_model(lora(llama()), _config(r=2))


def mixed() -> Any:
    """`PeftMixedModel` with LoRA and LoHa."""
    torch.manual_seed(5)
    model = get_peft_model(llama(), _config(), mixed=True)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=TARGETS))
    model.set_adapter(["default", "other"])
    return fill(model)


def by_transformers() -> Any:
    """transformers' own `model.add_adapter(LoraConfig)`."""
    torch.manual_seed(5)
    model = llama()
    model.add_adapter(_config())
    return fill(model)


def two_by_transformers() -> Any:
    """transformers' own `model.add_adapter`, twice; both active."""
    torch.manual_seed(5)
    model = llama()
    model.add_adapter(_config(), "one")
    model.add_adapter(_config(), "two")
    model.set_adapter(["one", "two"])
    return fill(model)


def injected() -> Any:
    """PEFT's `inject_adapter_in_model`."""
    torch.manual_seed(5)
    return fill(peft.inject_adapter_in_model(_config(), llama()))


def sentence_transformer() -> Any:
    """A `SentenceTransformer` whose model is a `PeftModel`."""
    model = _sentence_transformer()
    model[0].model = lora(model[0].model, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    return model


def sentence_transformer_added() -> Any:
    """`SentenceTransformer.add_adapter`."""
    model = _sentence_transformer()
    model.add_adapter(_config(target_modules=["query"]))
    return fill(model)


@lru_cache
def _bert_folder() -> tempfile.TemporaryDirectory[str]:
    from tokenizers import Tokenizer, models

    folder = tempfile.TemporaryDirectory()
    bert().save_pretrained(folder.name)
    words = {f"w{i}": i for i in range(63)} | {"[UNK]": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="w0"
    ).save_pretrained(folder.name)
    return folder


def _sentence_transformer() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(_bert_folder().name)
    return SentenceTransformer(modules=[body, Pooling(32)], device="cpu")


def adalora_of_peft() -> Any:
    """PEFT's AdaLoRA."""
    return _other(AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, total_step=10))


def ia3() -> Any:
    """IA3."""
    return _other(
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    )


def loha() -> Any:
    """LoHa."""
    return _other(LoHaConfig(r=4, target_modules=TARGETS))


def lokr() -> Any:
    """LoKr."""
    return _other(LoKrConfig(r=4, target_modules=TARGETS))


def oft() -> Any:
    """OFT."""
    return _other(OFTConfig(oft_block_size=8, target_modules=TARGETS))


def vera() -> Any:
    """VeRA: A and B are shared and frozen."""
    return _other(VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def ln_tuning() -> Any:
    """LN tuning: the norms."""
    return _other(LNTuningConfig(target_modules=["input_layernorm"]))


def trainable_tokens_alone() -> Any:
    """`TrainableTokensConfig`, without LoRA."""
    return _other(TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]))


def prompt_tuning() -> Any:
    """Prompt tuning."""
    return _other(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def prefix_tuning() -> Any:
    """Prefix tuning."""
    return _other(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def xlora() -> Any:
    """X-LoRA: a classifier mixes two adapters."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            lora(llama()).save_pretrained(f"{folder}/{name}")
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=32,
            xlora_depth=1,
            adapters={name: f"{folder}/{name}" for name in ("one", "two")},
        )
        base = llama()
        base.config.use_cache = False
        return get_peft_model(base, config)


def _other(config: Any) -> Any:
    torch.manual_seed(5)
    return fill(get_peft_model(llama(), config))


# The list


def enable(model: Any) -> Any:
    model.base_model.enable_adapter_layers()
    return model


def unmerge(model: Any) -> Any:
    model.base_model.unmerge_adapter()
    return model


def use_other(model: Any) -> Any:
    model.base_model.set_adapter("other")
    return model


@dataclass(frozen=True)
class State:
    """A state, and what is needed to look at it.

    Args:
        build: makes the model, equal at every call; its docstring is the state in a sentence.
        base: makes the base on which a saved adapter is read back.
        stored: makes the base that is saved in a folder for `export`; None where there is none.
        inside: the model with the adapter in what `build` returns.
        as_saved: brings a model into the state whose answers a saved adapter has.
        undone: takes the state back; the answers after it must be the same with and without a
            change of ranks in between.
        inputs, rows: of a forward pass, of a training.
        runs: whether it can answer at all; what weights on "meta" give is chance.
        reads: whether an adapter of it can be read on `base` at all; where not, `al.load` refuses.
        tolerance: of answers, relative to the largest logit.
        needs: a package without which the state is passed over.
        resized: makes the base as its reader must resize it first.
        late: whether nothing can tell before ranks change for the first time.
    """

    build: Callable[[], Any]
    base: Callable[[], Any] = llama
    stored: Callable[[], Any] | None = field(default=llama)
    inside: Callable[[Any], Any] = itself
    as_saved: Callable[[Any], Any] = itself
    undone: Callable[[Any], Any] = itself
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": IDS}
    rows: Callable[[], list[dict[str, torch.Tensor]]] = own_rows
    reads: bool = True
    runs: bool = True
    tolerance: float = 1e-5
    needs: str | None = None
    resized: Callable[[], Any] | None = None
    late: bool = False

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def sentence(self) -> str:
        return " ".join((self.build.__doc__ or "").split())

    @property
    def available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def on(base: Callable[[], Any], *builders: Callable[[], Any], **options: Any) -> list[State]:
    """States of one base, whose stored form is itself."""
    return [State(build, **{"base": base, "stored": base, **options}) for build in builders]


def bare_states(*builders: Callable[[], Any], **options: Any) -> list[State]:
    return [State(build, base=build, **{"stored": build, **options}) for build in builders]


SEQUENCES = {"inputs": lambda: {"x": signal(3, 6, 16)}, "rows": signal_rows("x", 16, 6, 16)}
IMAGES = {
    "inputs": lambda: {"pixel_values": signal(3, 3, 8, 8)},
    "rows": signal_rows("pixel_values", 16, 3, 8, 8),
}
CLASSES = {"rows": class_rows}
DECODING = {
    "inputs": lambda: {"input_ids": IDS, "decoder_input_ids": IDS},
    "rows": decoder_rows,
}
# One rounding to 16 bits is 2^-8 (bfloat16) or 2^-11 (float16) of a number: what another order of
# the same sums, or a merge, can move the largest logit by is a few of them.
BF16, FP16 = 3e-2, 4e-3
NF4 = {"base": nf4_llama, "stored": wide_llama}

STATES: dict[str, list[State]] = {
    "Attached plainly": [
        State(attached),
        State(attached_mixed_ranks),
        State(parked),
        State(attached_adalora),
        State(resized),
        State(by_peft),
        State(no_update_yet),
        State(other_name),
        State(loaded),
        State(loaded_under_a_name),
        State(loaded_low_memory),
        State(copied),
        State(rank_pattern),
        State(alpha_pattern),
        State(both_patterns),
        State(rslora),
        State(rslora_rank_pattern),
        State(negative_scale),
        State(zero_scale),
        State(all_linear),
        State(regular_expression),
        State(default_targets),
        State(exclude_modules),
        State(layers_to_transform),
        State(dropout),
        State(evaluation_mode),
        State(frozen),
        State(frozen_a),
        State(base_trained_too),
        State(unused_loss, late=True),
        State(nan),
        State(nan_times_zero),
        *on(poisoned_llama, nan_in_the_base),
        State(inference_tensors),
        State(config_with_another_rank),
    ],
    "Merged, off, several": [
        State(merged, undone=unmerge),
        State(merged_in_one_layer, undone=unmerge),
        State(merged_and_unmerged),
        State(merged_other, undone=unmerge),
        State(merged_two, undone=unmerge),
        State(disabled, as_saved=enable, undone=enable),
        State(disabled_in_one_layer, as_saved=enable, undone=enable),
        State(two_one_active, undone=use_other),
        State(two_second_active),
        State(two_active),
        State(two_of_other_targets_active),
        State(two_of_other_targets, undone=use_other),
        State(two_of_other_ranks, undone=use_other),
        State(two_trained, undone=use_other),
        State(reference_adapter),
        State(active_in_one_layer, undone=use_other),
        State(first_deleted),
        State(last_deleted),
        State(none_active),
        State(weighted),
        State(weighted_cat),
        State(weighted_svd),
        State(set_scale),
        State(scaled_in_one_layer),
    ],
    "Layer kinds and targets": [
        State(embeddings),
        State(embeddings_and_linear),
        State(output_embeddings),
        *on(tied_llama, tied_output, tied_embeddings, tied_targets, tied_base),
        *on(gpt2, gpt2_modules),
        *on(own_net(Convolution), conv1d, own_network, stored=None, **SEQUENCES),
        *on(own_net(Attention), multihead_attention, stored=None, **SEQUENCES),
        *on(own_net(Twice), one_module_two_names, stored=None, **SEQUENCES),
        *on(vit, conv2d, **IMAGES),
        *on(mixtral, experts, experts_and_linear, beside_experts),
        *on(albert, shared_layers, **CLASSES),
        *on(t5, encoder_decoder, **DECODING),
        *on(bert_classifier, classifier, wide_names, **CLASSES),
        *on(bert_classifier, two_classifiers, undone=use_other, **CLASSES),
    ],
    "Variants of LoRA and its start": [
        State(dora),
        *on(bert_classifier, lora_bias, bias_all, bias_lora_only, **CLASSES),
        State(alora),
        State(bdlora),
        State(kasa),
        State(monteclora),
        State(velora),
        State(arrow),
        State(layer_replication),
        State(trainable_tokens),
        State(head_trained),
        State(norm_trained),
        State(embeddings_trained),
        *on(tied_llama, tied_and_trained, tied_and_trained_together),
        State(gaussian),
        State(random_start),
        State(orthogonal),
        State(pissa),
        State(pissa_niter),
        State(olora),
        State(mica),
        State(corda),
        State(eva),
        State(lora_ga),
    ],
    "The base": [
        *bare_states(
            bare, bare_tied, bare_gpt2, bare_experts, bare_frozen, merged_and_unloaded, unloaded
        ),
        *bare_states(bare_albert, **CLASSES),
        *bare_states(bare_t5, **DECODING),
        State(bare_on_meta),
        *bare_states(bare_grown),
        State(bare_nf4, **NF4),
        *on(merged_and_unloaded, merged_then_attached),
        *on(grown_llama, grown),
        State(grown_read_on_published, reads=False),
        State(grown_and_saved, reads=False, resized=grown_llama),
        *on(grown_llama, grown_afterwards),
        *on(bf16_llama, bf16, bf16_all, tolerance=BF16),
        State(bf16_adapters, tolerance=BF16),
        *on(fp16_llama, fp16, tolerance=FP16),
        *on(float64_llama, float64),
        State(nf4, **NF4),
        State(nf4_prepared, **NF4),
        State(int8, base=int8_llama, stored=wide_llama),
        State(on_meta),
        State(adapters_on_meta, runs=False),
        State(offloaded_to_cpu),
        State(offloaded_base, runs=False),
        State(dispatched),
        State(checkpointing),
        State(hotswap),
        State(hotswap_padded),
        State(hotswapped),
        State(compiled_in_place),
    ],
    "Wrapped, and of other kinds": [
        State(compiled, inside=lambda model: model._orig_mod),
        State(data_parallel, inside=lambda model: model.module),
        State(inside_a_module, inside=lambda model: model.encoder),
        State(two_inside_a_module, inside=lambda model: model["one"]),
        State(nested),
        State(mixed),
        State(by_transformers),
        State(two_by_transformers),
        State(injected),
        *on(
            bert,
            sentence_transformer,
            sentence_transformer_added,
            inside=lambda model: model[0].model,
            needs="sentence_transformers",
        ),
        State(adalora_of_peft),
        State(ia3),
        State(loha),
        State(lokr),
        State(oft),
        State(vera),
        State(ln_tuning),
        State(trainable_tokens_alone),
        State(prompt_tuning),
        State(prefix_tuning),
        State(xlora),
    ],
}
BY_NAME = {state.name: state for group in STATES.values() for state in group}
