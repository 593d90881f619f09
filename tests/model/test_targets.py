"""Targets are found by introspection: which modules are linear, how deep they sit, and which belong
to attention."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from conftest import make_bert, make_gpt2
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptive_lora.errors import InputError
from adaptive_lora.model.targets import coverage, find_targets, head_modules

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BART_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART_SIZES = {
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
T5_SIZES = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 3,
}


def make(name: str) -> PreTrainedModel:
    """A random model with 3 layers (encoder-decoders: 2 and 3), width 16, feed-forward 32 (GPT-2:
    64)."""
    vocabulary = {"vocab_size": 64}
    match name:
        case "bert":
            return make_bert()
        case "gpt2":
            return make_gpt2()
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**vocabulary, **LLAMA, num_hidden_layers=3))
        case "distilbert":
            config = DistilBertConfig(**vocabulary, dim=16, hidden_dim=32, n_layers=3, n_heads=2)
            return DistilBertForSequenceClassification(config)
        case "t5":
            return T5ForConditionalGeneration(T5Config(**vocabulary, **T5_SIZES))
        case "bart":
            return BartForConditionalGeneration(
                BartConfig(**vocabulary, **BART_SIZES, **BART_HEADS)
            )
    raise AssertionError(name)


# For every model: its layers by stack, and for every kind of target (in every layer of that stack,
# in module order): attention or not, I, O. Written by hand from the architectures.
A, F = True, False
SELF = dict.fromkeys(("k_proj", "v_proj", "q_proj", "out_proj"), (A, 16, 16))
CROSS = {f"encoder_attn.{kind}": shape for kind, shape in SELF.items()}
FC = {"fc1": (F, 16, 32), "fc2": (F, 32, 16)}
T5_ATTENTION = dict.fromkeys("qkvo", (A, 16, 16))


def t5_layer(*attention: str) -> dict[str, tuple[bool, int, int]]:
    blocks = {
        f"layer.{i}.{name}.{k}": v
        for i, name in enumerate(attention)
        for k, v in T5_ATTENTION.items()
    }
    dense = f"layer.{len(attention)}.DenseReluDense"
    return {**blocks, f"{dense}.wi": (F, 16, 32), f"{dense}.wo": (F, 32, 16)}


EXPECTED = {
    "bert": {
        ("bert.encoder.layer", 3): {
            **{f"attention.self.{kind}": (A, 16, 16) for kind in ("query", "key", "value")},
            "attention.output.dense": (A, 16, 16),
            "intermediate.dense": (F, 16, 32),
            "output.dense": (F, 32, 16),
        }
    },
    "gpt2": {
        ("transformer.h", 3): {
            "attn.c_attn": (A, 16, 48),
            "attn.c_proj": (A, 16, 16),
            "mlp.c_fc": (F, 16, 64),
            "mlp.c_proj": (F, 64, 16),
        }
    },
    "llama": {
        ("model.layers", 3): {
            **{
                f"self_attn.{kind}_proj": (A, 16, out)
                for kind, out in (("q", 16), ("k", 8), ("v", 8), ("o", 16))
            },
            **{f"mlp.{kind}_proj": (F, 16, 32) for kind in ("gate", "up")},
            "mlp.down_proj": (F, 32, 16),
        }
    },
    "distilbert": {
        ("distilbert.transformer.layer", 3): {
            **{f"attention.{kind}_lin": (A, 16, 16) for kind in ("q", "k", "v", "out")},
            "ffn.lin1": (F, 16, 32),
            "ffn.lin2": (F, 32, 16),
        }
    },
    "t5": {
        ("encoder.block", 2): t5_layer("SelfAttention"),
        ("decoder.block", 3): t5_layer("SelfAttention", "EncDecAttention"),
    },
    "bart": {
        ("model.encoder.layers", 2): {
            **{f"self_attn.{kind}": shape for kind, shape in SELF.items()},
            **FC,
        },
        ("model.decoder.layers", 3): {
            **{f"self_attn.{kind}": shape for kind, shape in SELF.items()},
            **CROSS,
            **FC,
        },
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_linear_finds_every_linear_of_every_layer_with_its_depth_shape_and_block(
    name: str,
) -> None:
    found = [
        (t.name, t.kind, t.stack, t.layer, t.n_layers, t.attention, t.in_features, t.out_features)
        for t in find_targets(make(name))
        if t.name != "bert.pooler.dense"  # has a test of its own
    ]
    assert found == [
        (f"{stack}.{layer}.{kind}", kind, stack, layer, n_layers, *rest)
        for (stack, n_layers), kinds in EXPECTED[name].items()
        for layer in range(n_layers)
        for kind, rest in kinds.items()
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_features_of_a_target_are_those_its_module_maps_between(name: str) -> None:
    """Also for GPT-2's `Conv1D`, which stores its weight transposed."""
    model = make(name)
    for target in find_targets(model):
        output = model.get_submodule(target.name)(torch.zeros(1, target.in_features))
        assert output.shape == (1, target.out_features)
        assert target.cost == target.in_features + target.out_features
        assert target.full_rank == min(target.in_features, target.out_features)


def test_a_pooler_takes_the_depth_of_the_last_layer(tiny_bert: PreTrainedModel) -> None:
    *_, last, pooler = find_targets(tiny_bert)
    assert (pooler.name, pooler.kind, pooler.attention) == (
        "bert.pooler.dense",
        "bert.pooler.dense",
        False,
    )
    assert (
        (pooler.stack, pooler.layer, pooler.n_layers)
        == (last.stack, last.layer, last.n_layers)
        == (last.stack, 2, 3)
    )


def test_a_target_before_every_layer_takes_the_depth_of_the_first() -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model = nn.ModuleDict({"embed_in": nn.Linear(3, 4), "layers": layers})
    assert [(t.name, t.layer, t.n_layers) for t in find_targets(model)] == [
        ("embed_in", 0, 2),
        ("layers.0", 0, 2),
        ("layers.1", 1, 2),
    ]


def test_depth_counts_layers_that_carry_targets(tiny_bert: PreTrainedModel) -> None:
    found = find_targets(tiny_bert, r".*layer\.[12]\.attention\.self\.query")
    assert [(t.layer, t.n_layers) for t in found] == [(0, 2), (1, 2)]


def test_only_what_lies_inside_a_layer_makes_a_target_attention() -> None:
    """A model may call the stack around its layers attention; its feed-forward stays
    feed-forward."""
    layer = nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({"q": nn.Linear(4, 4)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(4, 4)}),
        }
    )
    model = nn.ModuleDict({"attention_stack": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    assert {t.kind: t.attention for t in find_targets(model)} == {
        "self_attn.q": True,
        "mlp.up": False,
    }


def test_heads_and_output_embeddings_carry_no_adapter() -> None:
    llama = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, **LLAMA, num_hidden_layers=1))
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    masked = BertForMaskedLM(BertConfig(vocab_size=64, **sizes))
    heads = {
        make("bert"): ["classifier"],
        make("distilbert"): ["pre_classifier", "classifier"],
        llama: ["score"],
        make("gpt2"): [],
        make("llama"): [],
        make("t5"): [],
        make("bart"): [],
        masked: [],  # its `cls` holds the output embeddings, which are tied to the input embeddings
        make("bert").bert: [],
    }
    for model, expected in heads.items():
        assert head_modules(model) == expected
        names = [target.name for target in find_targets(model)]
        assert not {name.split(".")[0] for name in names} & {*expected, "lm_head"}
        assert "cls.predictions.decoder" not in names


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["query", "value"], {"attention.self.query": 3, "attention.self.value": 3}),
        (["attention.output.dense"], {"attention.output.dense": 3}),
        (
            ["output.dense"],
            {"attention.output.dense": 3, "output.dense": 3},
        ),  # PEFT's meaning: the last parts
        (["bert.encoder.layer.1.intermediate.dense"], {"intermediate.dense": 1}),
        (["value", "query", "query"], {"attention.self.query": 3, "attention.self.value": 3}),
        (r"bert\.encoder\.layer\.\d\.output\.dense", {"output.dense": 3}),
        (r".*\.(query|key)", {"attention.self.query": 3, "attention.self.key": 3}),
        ("bert.pooler.dense", {"bert.pooler.dense": 1}),
        (
            "All-Linear",
            {**dict.fromkeys(EXPECTED["bert"]["bert.encoder.layer", 3], 3), "bert.pooler.dense": 1},
        ),
    ],
)
def test_targets_by_name_ending_or_regular_expression(
    tiny_bert: PreTrainedModel, targets: str | list[str], kinds: dict[str, int]
) -> None:
    found = find_targets(tiny_bert, targets)
    assert Counter(t.kind for t in found) == kinds
    in_module_order = [
        name for name, _ in tiny_bert.named_modules() if name in {t.name for t in found}
    ]
    assert [t.name for t in found] == in_module_order


def test_a_name_that_occurs_in_attention_and_in_feed_forward_means_both(
    tiny_gpt2: PreTrainedModel,
) -> None:
    found = find_targets(tiny_gpt2, ["c_proj"])
    assert Counter((t.kind, t.attention) for t in found) == {
        ("attn.c_proj", True): 3,
        ("mlp.c_proj", False): 3,
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["quary"], "target 'quary' matches no linear module. Did you mean 'query'?"),
        (
            ["query", "self.vlaue"],
            "'self.vlaue' matches no linear module. Did you mean 'self.value'?",
        ),
        ("all-liner", "Did you mean 'all-linear'?"),
        (
            ["uery"],
            "'uery' matches no linear module",
        ),  # the end of a word is not the last part of a name
        (["classifier"], "target 'classifier' is the head: it is trained whole, and carries no"),
        (["query", "classifier"], "target 'classifier' is the head"),
        (
            "classif.*",
            "match 1 module and no target: 'classifier' is the head: it is trained whole",
        ),
        (["LayerNorm"], "target 'LayerNorm' is of the class LayerNorm: only linear modules"),
        (["word_embeddings"], "'word_embeddings' is of the class Embedding: only linear"),
        (".*(word|position)_embeddings", "match 2 modules and no target: 'bert.embeddings.word_e"),
        (
            ["self"],
            "'self' is of the class BertSelfAttention, which is no linear module but holds some",
        ),
        ("query", "a string is a regular expression over full names; give a list"),
        (r".*query\.", r"targets '.*query\\.' match no linear module"),
        ("(", "'(' is not a valid regular expression: missing )"),
        ([], "targets is an empty list"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_what_there_is(
    tiny_bert: PreTrainedModel, targets: str | list[str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        find_targets(tiny_bert, targets)
    if targets != "(":
        for kind in (
            "attention.self.query",
            "attention.output.dense",
            "intermediate.dense",
            "bert.pooler.dense",
        ):
            assert kind in str(error.value)
        assert "'all-linear'" in str(error.value)


def test_a_model_without_linear_modules_is_refused() -> None:
    with pytest.raises(InputError, match="Embedding has no linear module"):
        find_targets(nn.Embedding(2, 2))


def test_the_output_projection_of_torchs_attention_is_no_target() -> None:
    """`MultiheadAttention` takes its weight without calling it, so that an adapter on it would
    never run."""
    model = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
    assert [target.name for target in find_targets(model)] == ["linear1", "linear2"]
    with pytest.raises(InputError, match=r"'out_proj' is .* never called: no adapter on it would"):
        find_targets(model, ["out_proj"])


def test_a_convolution_and_a_part_of_a_head_are_refused_for_what_they_are() -> None:
    layers = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "up": nn.Linear(4, 8)})
    with pytest.raises(
        InputError, match="'conv' is of the class Conv1d: only linear modules carry adapters"
    ):
        find_targets(layers, ["conv"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    )
    with pytest.raises(
        InputError, match=r"'out_proj' is part of the head \(classifier\): it is tr"
    ):
        find_targets(model, ["out_proj"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_output_embeddings_are_a_target_where_they_are_meant(name: str) -> None:
    """A list or an expression means them; "all-linear" does not, nor do names of other modules."""
    model = make(name)
    output = model.get_output_embeddings()
    for targets in (["lm_head"], r"lm_head", r".*lm_head"):
        (found,) = find_targets(model, targets)
        assert model.get_submodule(found.name) is output
        assert (found.in_features, found.out_features) == (output.in_features, output.out_features)
    everything = [target.name for target in find_targets(model)]
    assert "lm_head" not in everything
    others = [target.name for target in find_targets(model, everything)]
    assert others == everything
    both = [target.name for target in find_targets(model, [everything[0], "lm_head"])]
    assert both == [everything[0], "lm_head"]


def test_all_linear_leaves_out_a_single_input_or_output_which_can_be_named() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(4, 1), "up": nn.Linear(4, 8), "time": nn.Linear(1, 4)})
    assert [target.name for target in find_targets(model)] == ["up"]
    assert [target.name for target in find_targets(model, ["gate", "time"])] == ["gate", "time"]
    with pytest.raises(
        InputError, match=r"Sequential has no linear module that could carry an adapter$"
    ):
        find_targets(nn.Sequential(nn.Linear(4, 1)))


class Experts(nn.Module):
    """Two experts in one parameter, beside a token and positions, which have three dimensions
    too."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(2, 3, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 9, 4))


def test_coverage_tells_weights_no_adapter_reaches_but_not_convolutions_and_positions() -> None:
    layer = nn.ModuleDict(
        {"attn": nn.Linear(4, 4, bias=False), "mlp": Experts(), "conv": nn.Conv1d(4, 4, 3)}
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    nn.utils.parametrizations.weight_norm(layer["conv"])
    (line,) = coverage(model, find_targets(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert line == (
        f"mlp.up_proj hold 24 parameters, {24 / total:.0%} of the base, in 3-D parameters (as "
        "fused experts do), which LoRA on linear modules does not reach; adapted are attn"
    )
    del layer["mlp"]
    assert coverage(model, find_targets(model)) == []
