"""Recipes: every mistake is named with its key, and what is resolved can be written down and read
back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from adaptive_lora.errors import InputError
from adaptive_lora.files import read_recipe, set_key
from adaptive_lora.recipe.config import TRAINING_RESERVED, RunConfig, parse

LEAST = {"model": "m", "task": "classification", "data": {"train": "x.csv"}, "output": "o"}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def with_keys(*assignments: str) -> dict[str, Any]:
    values = copy.deepcopy(LEAST)
    for assignment in assignments:
        set_key(values, assignment)
    return values


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainin", "training"),
        ("data.tex", "text"),
        ("adapters.target", "targets"),
        ("training.learning_rat", "learning_rate"),
        ("training.gradient_accumulation_step", "gradient_accumulation_steps"),
        ("method.base_rnk", "base_rank"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_spelling(key: str, nearest: str) -> None:
    with pytest.raises(InputError) as error:
        parse(with_keys("method.name=linear_decay", f"{key}=1"), origin="here.yaml")
    assert str(error.value).startswith("here.yaml: ")
    assert key.removeprefix("method.") in str(error.value)
    assert f"Did you mean {nearest!r}?" in str(error.value)


@pytest.mark.parametrize(
    "key", ["a[0]", "str", "data.str", "data.list[str]", "adapters.function-after"]
)
def test_a_key_spelled_like_one_of_pydantics_own_words_is_an_unknown_key(key: str) -> None:
    with pytest.raises(InputError, match="unknown key") as error:
        parse(with_keys(f"{key}=1"))
    assert f"unknown key {key}." in str(error.value)


@pytest.mark.parametrize("where", [(), ("data",), ("method",), ("adapters",), ("training",)])
def test_a_key_that_is_no_string_is_refused(where: tuple[str, ...]) -> None:
    values = with_keys("method.name=lora", "adapters.scale=1", "training.optim=adamw_torch")
    node = values
    for key in where:
        node = node[key]
    node[3] = "x"
    with pytest.raises(InputError, match="3"):
        parse(values)


def test_yaml_exponents_are_numbers_in_every_float_field_of_training(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-4 as a string."""
    hints = typing.get_type_hints(TrainingArguments)
    names = [name for name in FIELDS if hints[name] is float]
    assert {"learning_rate", "weight_decay", "num_train_epochs"} <= set(names)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(LEAST) + "training:\n" + "".join(f"  {name}: 3e-1\n" for name in names)
    )
    assert isinstance(read_recipe(file)["training"]["learning_rate"], str)
    training = parse(read_recipe(file)).training
    assert {name: training[name] for name in names} == dict.fromkeys(names, 0.3)


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("training.learning_rate=fast", "training.learning_rate is 'fast'"),
        ("training.learning_rate=null", "training.learning_rate is None"),
        ("training.learning_rate=-1", "training.learning_rate is -1.0"),
        ("training.learning_rate=.nan", "training.learning_rate is nan"),
        ("training.max_grad_norm=.inf", "training.max_grad_norm is inf"),
        ("training.num_train_epochs=0", "training.num_train_epochs is 0"),
        ("training.per_device_eval_batch_size=0", "training.per_device_eval_batch_size is 0"),
        ("training.fp16=perhaps", "training.fp16 is 'perhaps'"),
        ("training=3", "training is 3"),
        ("data=x.csv", "data is 'x.csv'"),
        ("data.text=3", "data.text is 3"),
        ("data.classes=[yes, no]", "data.classes holds True"),
        ("data.eval_size=0", "data.eval_size is 0"),
        ("data.eval_size=2.5", "data.eval_size is 2.5"),
        ("data.max_length=-1", "data.max_length is -1"),
        ("data.seed=-1", "data.seed is -1"),
        ("seed=-1", "seed is -1"),
        ("on_non_finite=ignore", "on_non_finite is 'ignore'"),
        ("max_skipped=0", "max_skipped is 0"),
        ("max_skipped=1.5", "max_skipped is 1.5"),
        ("seed=4294967296", "seed is 4294967296"),
        ("task=translation", "task is 'translation'"),
        ("output=null", "output is None"),
        ("adapters.scale=0", "adapters.scale is 0"),
        ("adapters.dropout=1", "adapters.dropout is 1"),
        ("method=lora", "method is 'lora'"),
        ("method.rank=2.5", "rank is 2.5"),
        ("method={name: custom, layer_ranks: 3}", "layer_ranks is 3"),
        ("method={name: custom, pattern: 3}", "rank pattern is 3"),
        ("method={name: custom, pattern: {1: 2}}", "rank pattern is {1: 2}"),
        ("method={name: custom, file: 3}", "file is 3"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_key(
    assignment: str, key: str
) -> None:
    with pytest.raises(InputError) as error:
        parse(with_keys(assignment))
    assert key in str(error.value)


def test_every_missing_key_is_named_at_once() -> None:
    with pytest.raises(
        InputError, match=r"model is missing; .*data\.train is missing; output is missing"
    ):
        parse({"task": "causal_lm", "data": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: m\ndata: [1,\nseed: }\n", "line 3, column 7"),
        (b"model: m\n\ttask: x\n", "line 2, column 1"),
        (b"seed: 2001-99-99\n", "month must be in 1..12"),
        ("model: é".encode("latin-1"), "utf-8"),
        (b"", "NoneType; expected a mapping"),
        (b"- model\n", "list; expected a mapping"),
    ],
)
def test_a_recipe_that_is_no_yaml_mapping_is_named_with_the_place(
    tmp_path: Path, text: bytes, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with pytest.raises(InputError) as error:
        read_recipe(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_every_field_of_training_arguments_can_be_set() -> None:
    defaults = {
        name: default(field) for name, field in FIELDS.items() if name not in TRAINING_RESERVED
    }
    training = parse({**LEAST, "training": defaults}).training
    assert training == defaults
    plain = (bool, int, float, str, list, dict, type(None))
    assert [name for name, value in training.items() if type(value) not in plain] == []


@pytest.mark.parametrize(("field", "instead"), TRAINING_RESERVED.items())
def test_a_training_field_the_run_decides_is_refused_with_the_key_to_use(
    field: str, instead: str
) -> None:
    with pytest.raises(InputError, match=rf"training\.{field} cannot be set; use {instead}$"):
        parse({**LEAST, "training": {field: default(FIELDS[field])}})


def test_a_bare_no_is_the_strategy_no() -> None:
    """YAML 1.1 reads a bare `no` as false."""
    assert parse(with_keys("training.save_strategy=no")).training["save_strategy"] == "no"


VALUES = {
    "seed": st.integers(0, 2**32 - 1),
    "on_non_finite": st.sampled_from(["stop", "skip"]),
    "max_skipped": st.integers(1, 10**9),
    "data.rows": st.none() | st.integers(1, 10**9),
    "data.eval_size": st.integers(1, 10**6) | st.floats(1e-9, 0.999),
    "data.text": st.none() | st.text() | st.lists(st.text(), max_size=2),
    "data.classes": st.none() | st.lists(st.text(), max_size=3),
    "adapters.scale": st.floats(1e-9, 1e9),
    "adapters.targets": st.text() | st.lists(st.text(), max_size=3),
    "method": st.sampled_from(
        [
            {"name": "lora"},
            {"name": "empirical", "rank": 3},
            {"name": "custom", "pattern": {".*": 2}},
        ]
    ),
    "training.learning_rate": st.floats(1e-300, 1e300),
    "training.report_to": st.lists(st.text()) | st.text(),
    "training.lr_scheduler_kwargs": st.dictionaries(st.text(), st.integers() | st.text()),
}


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_writing_a_resolved_recipe_and_parsing_it_is_the_identity(chosen: dict[str, Any]) -> None:
    values = copy.deepcopy(LEAST)
    for key, value in chosen.items():
        *parents, last = key.split(".")
        (values.setdefault(parents[0], {}) if parents else values)[last] = value
    config = parse(values)
    again = parse(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_the_home_folder_may_be_written_as_a_tilde() -> None:
    config = parse(
        {
            **LEAST,
            "model": "~/m",
            "data": {"train": "~/x.csv", "eval": "~/y.csv"},
            "output": "~/out",
        }
    )
    home = str(Path.home())
    assert [config.model, config.data.train, config.data.eval, config.output] == [
        f"{home}/{name}" for name in ("m", "x.csv", "y.csv", "out")
    ]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("training.weight_decay=0.01", {"training": {"weight_decay": 0.01, "max_steps": 3}}),
        (" training.max_steps =5", {"training": {"max_steps": 5}}),
        ("data.text=[a, b]", {"data": {"text": ["a", "b"]}}),
        ("data.label=a=b", {"data": {"label": "a=b"}}),
        ("method={name: lora, rank: 2}", {"method": {"name": "lora", "rank": 2}}),
        ("data.label=", {"data": {"label": None}}),
    ],
)
def test_set_puts_a_yaml_value_at_its_key_and_touches_nothing_else(
    assignment: str, expected: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"training": {"max_steps": 3}}
    set_key(values, assignment)
    assert values == {"training": {"max_steps": 3}} | expected


@pytest.mark.parametrize(
    "assignment",
    ["seed", "=3", "a..b=1", ".=1", "training.max_steps.x=1", "seed={", "seed=!!int x"],
)
def test_a_malformed_set_is_refused_with_its_text(assignment: str) -> None:
    with pytest.raises(InputError) as error:
        set_key({"training": {"max_steps": 3}}, assignment)
    assert repr(assignment) in str(error.value)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(
        [
            "",
            "seed",
            "data",
            "data.text",
            "data.rows",
            "method",
            "training.optim",
            "adapters.scale",
            "output",
        ]
    )
    | st.text(max_size=8),
    st.sampled_from(["=", "=!!int ", "=!!timestamp ", "=[", "={a: ", "=&a [*a, ", ""]),
    st.text(max_size=12),
)
def test_no_text_after_set_gives_anything_but_a_config_or_an_input_error(
    key: str, middle: str, value: str
) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse(with_keys(f"{key}{middle}{value}")), RunConfig)
