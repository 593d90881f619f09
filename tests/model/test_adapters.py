"""Adapters: what is attached is what was asked for, and what is saved is what stock PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_bert, make_gpt2, scale_of
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.model.adapters import adapters, weights
from adaptive_lora.model.attach import infer_task_type

IDS = torch.arange(24).reshape(3, 8)
MIXED = {
    "custom": methods.custom(layer_ranks=[5, 0, 2, 1]),
    "linear_decay": methods.linear_decay(base_rank=7, min_rank=2),
}
# Four layers: PEFT shortens the names of 20 targets and more to their endings.
BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: make_bert(4),
    "gpt2": lambda: make_gpt2(4),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def randomise(model: PeftModel) -> PeftModel:
    """Give every trainable parameter random values, as training would: B is no longer zero, the
    head has moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def trained(
    base: nn.Module, method: methods.Method = MIXED["custom"], **options: object
) -> PeftModel:
    return randomise(al.attach(base, method, **options))


def config_in(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_attaching_changes_no_output_and_leaves_only_adapters_and_head_trainable(
    tiny_bert: PreTrainedModel,
) -> None:
    before = logits(tiny_bert)
    model = al.attach(tiny_bert, methods.lora(4), ["query", "value"])
    assert torch.equal(logits(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {
        f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }
    assert len(trainable) == 2 * 2 * 3 + 2
    assert trainable - {name for name in trainable if "lora_" in name} == head


@pytest.mark.parametrize("method", MIXED)
@pytest.mark.parametrize("base", BASES)
def test_a_saved_adapter_gives_the_same_logits_here_and_in_stock_peft(
    base: str, method: str, tmp_path: Path
) -> None:
    model = trained(BASES[base](), MIXED[method], scale=1.5)
    expected = logits(model)
    assert not torch.allclose(expected, logits(BASES[base]()), atol=0.1)  # the adapters matter
    ours = al.load(BASES[base](), al.save(model, tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(BASES[base](), tmp_path / "adapter")
    present = {name: rank for name, rank in al.ranks(model).items() if rank}
    for reloaded in (ours, stock):  # the same tensors in the same operations: equal to the last bit
        assert torch.equal(logits(reloaded), expected)
        assert al.ranks(reloaded) == present


@pytest.mark.parametrize("scale", [2.0, 0.3, 1 / 3])
def test_every_adapter_is_saved_with_the_same_scale_whatever_its_rank(
    scale: float, tmp_path: Path
) -> None:
    model = trained(make_bert(4), scale=scale)
    config = config_in(al.save(model, tmp_path))
    present = {
        "^" + name.replace(".", r"\."): rank for name, rank in al.ranks(model).items() if rank
    }
    assert config["r"] == 5
    assert not config["use_rslora"]
    assert config["rank_pattern"] == present
    assert config["alpha_pattern"].keys() == present.keys()
    alphas = [(config["lora_alpha"], config["r"])]
    alphas += [(config["alpha_pattern"][key], rank) for key, rank in present.items()]
    # Two roundings of a double: scale * r, and the division by r.
    assert [alpha / rank for alpha, rank in alphas] == pytest.approx(
        [scale] * len(alphas), rel=1e-15
    )
    assert scale_of(PeftModel.from_pretrained(make_bert(4), tmp_path)) == pytest.approx(
        scale, rel=1e-15
    )


def test_a_uniform_adapter_is_saved_like_any_other_lora(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    config = config_in(al.save(al.attach(tiny_bert, methods.lora(8)), tmp_path))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        8,
        16,
        {},
        {},
    )


def test_stock_save_pretrained_writes_the_same_adapter(tmp_path: Path) -> None:
    model = trained(make_bert(4))
    al.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    ours, stock = (config_in(tmp_path / who) for who in ("ours", "stock"))
    assert {**ours, "target_modules": set(ours["target_modules"])} == {
        **stock,
        "target_modules": set(stock["target_modules"]),
    }
    ours, stock = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "stock")
    )
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


def test_a_target_of_rank_0_costs_nothing_and_is_not_saved(tmp_path: Path) -> None:
    model = trained(make_gpt2(4))
    parked = {name for name, rank in al.ranks(model).items() if rank == 0}
    assert parked == {
        f"transformer.h.1.{kind}"
        for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert not any(
        "h.1." in name for name, p in model.named_parameters() if p.requires_grad and p.numel()
    )
    names = set(config_in(al.save(model, tmp_path))["target_modules"])
    assert names == al.ranks(model).keys() - parked
    assert not any("h.1." in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_all_that_is_of_the_adapter_has_pefts_prefix_in_its_name() -> None:
    """By which TRL, for one, tells what is of the base, whatever its rank."""
    model = al.attach(make_bert(), methods.lora(2), targets=["query"])
    al.resize(model, {next(iter(al.ranks(model))): 0})
    base = {f"bert.{name}" for name, _ in make_bert().bert.named_parameters()}
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if model.prefix not in name and "classifier" not in name
    }
    assert names == base


def test_ranks_and_parameters_are_read_from_the_tensors(tiny_bert: PreTrainedModel) -> None:
    model = al.attach(tiny_bert, methods.lora(4), ["query"])
    name = "bert.encoder.layer.1.attention.self.query"
    layer = adapters(model)[name]
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(7, 16))
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(16, 7))
    assert al.ranks(model) == {**dict.fromkeys(adapters(model), 4), name: 7}
    assert al.lora_parameters(model) == (4 + 7 + 4) * (16 + 16)


def test_lora_parameters_is_the_sum_over_the_adapters() -> None:
    for make in BASES.values():
        model = al.attach(make(), MIXED["custom"])
        by_name = sum(
            p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad
        )
        by_shape = 0
        for layer in adapters(model).values():
            if pair := weights(layer):
                (rank, i), (o, same_rank) = pair[0].shape, pair[1].shape
                assert rank == same_rank
                by_shape += rank * (i + o)
        assert al.lora_parameters(model) == by_name == by_shape


def test_only_the_targets_of_the_active_adapter_are_looked_at_and_saved(tmp_path: Path) -> None:
    model = trained(make_bert(), methods.lora(2), targets=["query"])
    mine, answers = al.ranks(model), logits(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["key"]))
    assert al.ranks(model) == mine
    reloaded = al.load(make_bert(), al.save(model, tmp_path))
    assert al.ranks(reloaded) == mine
    assert torch.equal(logits(reloaded), answers)
    model.set_adapter("other")
    assert al.ranks(model) == {name.replace("query", "key"): 3 for name in mine}


def test_an_adapter_made_of_the_config_of_the_one_that_changes_is_saved_as_it_is(
    tmp_path: Path,
) -> None:
    """As TRL makes its reference adapter: PEFT keeps the object it is given."""
    model = trained(make_bert(), methods.lora(4), targets=["query"])
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    reference = logits(randomise(model))
    model.set_adapter("default")
    names = list(al.ranks(model))
    al.resize(model, {names[0]: 1, names[1]: 0})
    mine = logits(model)
    model.save_pretrained(str(tmp_path))
    for folder, expected in ((tmp_path, mine), (tmp_path / "ref", reference)):
        reloaded = PeftModel.from_pretrained(make_bert(), str(folder))
        assert torch.equal(logits(reloaded), expected)


def test_the_config_that_the_user_gave_is_left_as_it_was() -> None:
    """It may be given again: to the next of several trainings."""
    config = LoraConfig(r=8, target_modules=["query", "key"])
    models = [get_peft_model(make_bert(), config) for _ in range(2)]
    before = config.to_dict()
    al.resize(models[0], {name: 0 for name in al.ranks(models[0]) if "key" in name})
    assert config.to_dict() == before
    assert al.ranks(get_peft_model(make_bert(), config)) == al.ranks(models[1])


def test_a_checkpoint_loaded_into_targets_of_rank_0_brings_them_back(tmp_path: Path) -> None:
    """PEFT hands on the tensors of what it finds in the model; the rest it drops without a word."""
    method = methods.adalora(2)  # whose ranks change: the model follows
    model = trained(make_bert(), method, targets=["query", "key"])
    before, answers = al.ranks(model), logits(model)
    queries = [name for name in before if "query" in name]
    al.save(model, tmp_path / "early")
    model.add_adapter("ref", model.peft_config["default"])
    al.resize(model, dict.fromkeys(queries, 0))
    model.load_adapter(str(tmp_path / "early"), "ref")
    assert al.ranks(model) == before | dict.fromkeys(queries, 0)
    model.load_adapter(str(tmp_path / "early"), "default")
    assert al.ranks(model) == before
    assert torch.equal(logits(model), answers)


TEXT = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
}
GENERATORS: list[tuple[type[PreTrainedModel], PreTrainedConfig, TaskType | None]] = [
    (
        T5ForConditionalGeneration,
        T5Config(vocab_size=32, d_model=8, num_layers=1),
        TaskType.SEQ_2_SEQ_LM,
    ),
    (
        LlavaForConditionalGeneration,
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "patch_size": 4, **IMAGE},
            text_config={"model_type": "llama", **TEXT},
        ),
        TaskType.CAUSAL_LM,
    ),
    (
        WhisperForConditionalGeneration,
        WhisperConfig(d_model=12, encoder_layers=1, decoder_layers=1),
        None,
    ),
]


@pytest.mark.parametrize(("kind", "config", "task_type"), GENERATORS)
def test_what_generates_conditionally_is_told_apart(
    kind: type[PreTrainedModel], config: PreTrainedConfig, task_type: TaskType | None
) -> None:
    """On an encoder's output, on an image before the prompt, and on speech, without `input_ids`."""
    with torch.device("meta"):
        assert infer_task_type(kind(config)) == task_type


class Classifier(BertForSequenceClassification):
    """A model whose class name tells PEFT's task type to nobody."""


def bert_like() -> PreTrainedModel:
    base = make_bert()
    base.__class__ = Classifier
    return base


def distilbert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "task_type", "heads"),
    [
        (make_bert, None, {"classifier"}),
        (make_bert, "SEQ_CLS", {"classifier"}),
        (make_bert, "FEATURE_EXTRACTION", {"classifier"}),
        (bert_like, None, {"classifier"}),
        (distilbert, None, {"pre_classifier", "classifier"}),
        (distilbert, "SEQ_CLS", {"pre_classifier", "classifier"}),
    ],
)
def test_the_head_is_trained_and_saved_whatever_the_task_type(
    make: Callable[[], PreTrainedModel], task_type: str | None, heads: set[str], tmp_path: Path
) -> None:
    model = al.attach(make(), methods.lora(2), task_type=task_type)
    others = [
        name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name
    ]
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in others} == heads
    randomise(model)
    saved = load_file(al.save(model, tmp_path) / "adapter_model.safetensors")
    for head in heads:
        assert torch.equal(
            saved[f"base_model.model.{head}.weight"],
            model.get_parameter(f"base_model.model.{head}.modules_to_save.default.weight"),
        )
    for load in (al.load, PeftModel.from_pretrained):
        assert torch.equal(logits(load(make(), tmp_path)), logits(model))


def test_a_loaded_adapter_is_frozen_unless_asked_for(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    al.save(al.attach(tiny_bert, methods.lora(2)), tmp_path)
    for trainable in (False, True):
        loaded = al.load(make_bert(), tmp_path, trainable=trainable)
        assert all(
            p.requires_grad == trainable for n, p in loaded.named_parameters() if "lora_" in n
        )


# --- suffixes: PEFT takes a name for every module whose name ends like it ---


class Nested(nn.Module):
    """The full name of a module is the end of another's: proj, inner.proj, outer.inner.proj."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer["inner"]["proj"](self.inner["proj"](self.proj(x)).tanh())


NESTED = ("proj", "inner.proj", "outer.inner.proj")


@pytest.mark.parametrize(
    "ranks", [(1, 2, 3), (3, 1, 2), (0, 1, 2), (2, 0, 1), (1, 1, 0), (0, 2, 0), (2, 2, 2)]
)
def test_names_that_end_like_others_keep_their_own_ranks_when_saved(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    pattern = dict(zip(NESTED, ranks, strict=True))
    model = trained(Nested(), methods.custom(pattern=pattern))
    assert al.ranks(model) == pattern
    al.save(model, tmp_path)
    x = torch.eye(4)
    for load in (al.load, PeftModel.from_pretrained):
        reloaded = load(Nested(), tmp_path)
        assert torch.equal(reloaded(x), model(x))
        assert al.ranks(reloaded) == {name: rank for name, rank in pattern.items() if rank}


@pytest.mark.parametrize("targets", ["proj", r"inner\.proj"])
def test_targets_that_end_like_a_module_not_chosen_are_attached_alone(
    targets: str, tmp_path: Path
) -> None:
    model = trained(Nested(), methods.lora(2), targets=targets)
    assert al.ranks(model) == {targets.replace("\\", ""): 2}
    assert al.ranks(al.load(Nested(), al.save(model, tmp_path))) == al.ranks(model)
