"""Methods: published numbers without a budget, exact budgets with one, and precise refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_bert, make_gpt2
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import InputError
from adaptive_lora.methods import METHODS, Method
from adaptive_lora.model.adapter_file import tensor_ranks
from adaptive_lora.model.targets import find_targets

GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]


def dialogpt_medium() -> GPT2LMHeadModel:
    """DialoGPT-medium's shape, without memory: 24 layers, width 1024."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16))


@pytest.fixture(scope="module")
def medium() -> list[Target]:
    return find_targets(dialogpt_medium(), GPT2_TARGETS)


def per_layer(method: Method, targets: Sequence[Target]) -> list[int]:
    """Return the one rank that each layer has."""
    pattern = method.initial_pattern(targets)
    layers = [
        {pattern[t.name] for t in targets if t.layer == layer}
        for layer in range(targets[0].n_layers)
    ]
    assert all(len(ranks) == 1 for ranks in layers)
    return [rank for ranks in layers for rank in ranks]


@pytest.mark.parametrize(("rank", "parameters"), [(8, 3_145_728), (16, 6_291_456)])
def test_lora_on_dialogpt_medium_has_the_published_number_of_parameters(
    rank: int, parameters: int
) -> None:
    model = al.attach(dialogpt_medium(), methods.lora(rank), GPT2_TARGETS)
    assert al.lora_parameters(model) == parameters
    assert set(al.ranks(model).values()) == {rank}
    assert len(al.ranks(model)) == 4 * 24


DECAY = [16, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4]


def test_linear_decay_from_16_to_4_over_24_layers(medium: list[Target]) -> None:
    assert per_layer(methods.linear_decay(), medium) == DECAY
    assert round(sum(DECAY) / 24, 2) == 9.54


def test_linear_increase_is_linear_decay_turned_round(medium: list[Target]) -> None:
    assert per_layer(methods.linear_increase(), medium) == DECAY[::-1]


def test_empirical_is_low_then_high_then_middle(medium: list[Target]) -> None:
    assert per_layer(methods.empirical(), medium) == [9] * 7 + [19] * 10 + [16] * 7


def test_attention_heavy_gives_the_feed_forward_half(medium: list[Target]) -> None:
    pattern = methods.attention_heavy().initial_pattern(medium)
    by_kind = {t.kind: {pattern[u.name] for u in medium if u.kind == t.kind} for t in medium}
    assert by_kind == {"attn.c_attn": {16}, "attn.c_proj": {16}, "mlp.c_fc": {8}, "mlp.c_proj": {8}}


def test_a_single_layer_gets_a_defined_rank() -> None:
    targets = find_targets(make_bert(n_layers=1), ["query"])
    presets = (methods.linear_decay(), methods.linear_increase(), methods.empirical(base_rank=10))
    assert [per_layer(preset, targets) for preset in presets] == [[16], [16], [6]]


SHAPES: dict[str, Callable[..., Method]] = {
    "lora": methods.lora,
    "linear_decay": methods.linear_decay,
    "linear_increase": methods.linear_increase,
    "attention_heavy": methods.attention_heavy,
    "empirical": methods.empirical,
    "custom": lambda **budget: methods.custom(
        pattern={r".*\.1\..*query|.*c_fc": 0, ".*": 3}, **budget
    ),
}


def meets_exactly(
    pattern: dict[str, int], budget: int, targets: Sequence[Target], raw: dict[str, int]
) -> bool:
    """True when Σ R (I + O) <= budget and no component that may still be added would fit."""
    rest = budget - sum(pattern[t.name] * t.cost for t in targets)
    may_grow = [t for t in targets if raw[t.name] and pattern[t.name] < t.full_rank]
    return rest >= 0 and all(rest < t.cost for t in may_grow)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("model", [make_bert, make_gpt2, dialogpt_medium])
def test_a_method_with_a_budget_meets_it_exactly_and_keeps_its_order(
    name: str, model: Callable
) -> None:
    targets = find_targets(model())
    raw = SHAPES[name]().shape(targets)
    one_each = sum(t.cost for t in targets)
    for budget in (one_each, one_each + 1, 3 * one_each - 1, 1_000_003, 10**9):
        pattern = SHAPES[name](budget=budget).initial_pattern(targets)
        assert meets_exactly(pattern, budget, targets, raw)
        for a in targets:
            assert (pattern[a.name] == 0) == (raw[a.name] == 0)
            assert pattern[a.name] <= a.full_rank
            alike = [
                b
                for b in targets
                if (b.in_features, b.out_features) == (a.in_features, a.out_features)
            ]
            assert all(
                pattern[a.name] >= pattern[b.name] for b in alike if raw[a.name] > raw[b.name]
            )


@pytest.mark.parametrize("name", SHAPES)
def test_rank_is_short_for_the_parameters_of_that_uniform_rank(
    name: str, medium: list[Target]
) -> None:
    budget = sum(8 * target.cost for target in medium)
    by_rank, by_budget = SHAPES[name](rank=8), SHAPES[name](budget=budget)
    assert by_rank.initial_pattern(medium) == by_budget.initial_pattern(medium)
    assert by_budget.budget_parameters(medium) == budget
    # uniform 8 is no constraint
    assert by_rank.budget_parameters(medium) == (None if name == "lora" else budget)


def test_a_rank_above_the_smaller_side_of_a_target_is_refused() -> None:
    targets = find_targets(make_bert(), ["intermediate.dense"])  # 16 -> 32
    assert per_layer(methods.lora(16), targets) == [16] * 3
    with pytest.raises(
        InputError, match=r"rank 17 for '.*intermediate.dense' exceeds .* = min\(16, 32\) = 16"
    ):
        methods.lora(17).initial_pattern(targets)
    with pytest.raises(InputError, match=r"rank 17 exceeds .* at most 16"):
        methods.linear_decay(rank=17).initial_pattern(targets)


def test_a_budget_below_one_component_per_target_is_refused(medium: list[Target]) -> None:
    with pytest.raises(InputError, match=r"budget of 1,000 parameters .* cost 393,216"):
        methods.linear_decay(budget=1000).initial_pattern(medium)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[
            (
                lambda name=name: SHAPES[name](rank=8, budget=9),
                r"rank \(8\) or budget \(9\), not both",
            )
            for name in SHAPES
        ],
        (lambda: methods.lora(0), "rank is 0; expected a whole number >= 1"),
        (lambda: methods.lora(8.0), "rank is 8.0; expected a whole number"),
        (lambda: methods.lora(True), "rank is True; expected a whole number"),
        (lambda: methods.empirical(budget=-5), "budget is -5; expected a whole number >= 1"),
        (lambda: methods.empirical(base_rank="8"), "base_rank is '8'; expected a whole number"),
        (lambda: methods.linear_decay(base_rank=4, min_rank=8), "min_rank 8 exceeds base_rank 4"),
        (
            lambda: methods.attention_heavy(min_rank=0),
            "min_rank is 0; expected a whole number >= 1",
        ),
        (lambda: methods.custom(), "exactly one of file, pattern, layer_ranks; got none"),
        (
            lambda: methods.custom(pattern={}, layer_ranks=[]),
            "exactly one of .* got .*'pattern', 'layer_ranks'",
        ),
        (
            lambda: methods.build("linear_dekay", {}),
            "unknown method 'linear_dekay'. Did you mean 'linear_decay'?",
        ),
        (lambda: methods.build("lora", {"rnak": 8}), "no argument 'rnak'. Did you mean 'rank'?"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself_in_one_line_and_names_its_source(name: str) -> None:
    description, source = methods.describe(name)
    assert len(description) > 20
    assert description.endswith(".")
    assert re.search(r"20\d\d", source)
    arguments = {"layer_ranks": [4]} if name == "custom" else {}
    assert methods.build(name, arguments).name == name


# --- custom ranks ---


@pytest.fixture
def query() -> list[Target]:
    """Three targets, one in each layer of a tiny BERT."""
    return find_targets(make_bert(), ["query"])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ranks.json", '{"layer_ranks": [5, 0, 2]}'),
        ("ranks.yaml", "layer_ranks: [5, 0, 2]\nstrategy_name: mine"),
        (
            "ranks.json",
            r'{"rank_pattern": {".*\\.0\\..*": 5, "bert.encoder.layer.1.attention.self.query": 0, '
            r'".*": 2}}',
        ),
        ("ranks.yml", "rank_pattern: {'.*[.]0[.].*': 5, '.*[.]1[.].*': 0, '.*': 2}"),
    ],
)
def test_custom_ranks_come_from_a_json_or_yaml_file(
    tmp_path: Path, query: list, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    assert per_layer(methods.custom(file=tmp_path / file), query) == [5, 0, 2]


def test_custom_ranks_come_directly_and_the_first_match_wins(query: list[Target]) -> None:
    assert per_layer(methods.custom(layer_ranks=[5, 0, 2]), query) == [5, 0, 2]
    assert per_layer(methods.custom(pattern={".*layer.1.*": 3, r".*": 1}), query) == [1, 3, 1]


def test_layer_ranks_run_through_the_encoder_before_the_decoder() -> None:
    sizes = {
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 3,
    }
    targets = find_targets(T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)))
    pattern = methods.custom(layer_ranks=[1, 2, 3, 4, 5]).initial_pattern(targets)
    first = {"encoder.block": 1, "decoder.block": 3}
    assert pattern == {t.name: first[t.stack] + t.layer for t in targets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer_ranks": [4, 4]}, "layer_ranks has 2 ranks, expected 3"),
        ({"layer_ranks": [4, -1, 4]}, r"layer_ranks\[1\] is -1; expected a whole number >= 0"),
        ({"layer_ranks": [4, 4, 2.5]}, r"layer_ranks\[2\] is 2.5; expected a whole number"),
        ({"layer_ranks": ["8", 4, 4]}, r"layer_ranks\[0\] is '8'; expected a whole number"),
        ({"layer_ranks": [4, True, 4]}, r"layer_ranks\[1\] is True; expected a whole number"),
        ({"layer_ranks": [4, None, 4]}, r"layer_ranks\[1\] is None; expected a whole number"),
        ({"layer_ranks": [4, 17, 4]}, r"rank 17 for '.*layer.1.*query' exceeds .* = 16"),
        ({"layer_ranks": 4}, "layer_ranks is 4; expected a list"),
        ({"rank_pattern": [4, 4, 4]}, r"rank_pattern is \[4, 4, 4\]; expected an object"),
        ({"rank_pattern": {".*": -2}}, r"rank of '\.\*' is -2; expected a whole number >= 0"),
        ({"rank_pattern": {".*layer.0.*": 4}}, "no entry .* matches target '.*layer.1.*query'"),
        ({"rank_pattern": {".*query": 4, ".*qury": 4}}, "'.*qury' matches no target"),
        ({"rank_pattern": {"(": 4}}, r"'\(' is not a valid regular expression"),
        ({"layer_rank": [4, 4, 4]}, "unknown key 'layer_rank'. Did you mean 'layer_ranks'?"),
        (
            {"layer_ranks": [4], "rank_pattern": {}},
            "exactly one of layer_ranks and rank_pattern, got .*'rank_pattern'",
        ),
        ({}, r"exactly one of layer_ranks and rank_pattern, got \[\]"),
        ([4, 4, 4], "holds a list; expected an object"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_custom_file_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, query: list[Target], content: object, message: str, suffix: str
) -> None:
    file = tmp_path / f"ranks.{suffix}"
    file.write_text(json.dumps(content))  # JSON is YAML
    with pytest.raises(InputError, match=message) as error:
        methods.custom(file=file).initial_pattern(query)
    if "exceeds" not in message:  # the rank of a target, wherever it came from
        assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ranks.json", b'{\n  "layer_ranks": [4,, 4]}', "not valid JSON: line 2, column 21"),
        ("ranks.yaml", b"layer_ranks: [4\nb: [", "not valid YAML: line 2, column"),
        ("ranks.json", b"\xff\xfe", "cannot read the rank file"),
        ("absent.json", None, "cannot read the rank file .*absent.json"),
    ],
)
def test_an_unreadable_custom_file_is_refused_with_the_place(
    tmp_path: Path, file: str, text: bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / file).write_bytes(text)
    with pytest.raises(InputError, match=message):
        methods.custom(file=tmp_path / file)


def test_the_saved_tensors_of_linear_decay_have_its_ranks(tmp_path: Path) -> None:
    """24 layers, narrow here: the ranks are those of DialoGPT-medium, read from the file."""
    model = al.attach(
        make_gpt2(24, n_embd=32), methods.linear_decay(), ["c_attn", "c_proj", "c_fc"]
    )
    saved = tensor_ranks(al.save(model, tmp_path) / "adapter_model.safetensors")
    assert len(saved) == 96
    assert all(rank == DECAY[int(name.split(".")[2])] for name, rank in saved.items())
