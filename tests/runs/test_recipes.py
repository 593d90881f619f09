"""Recipes: each runs as it is, on a narrow model of its architecture; the budgets of the README are
those at full size."""

from __future__ import annotations

import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_folders import Command, recipe, result_of
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from adaptive_lora.allocation.target import Target
from adaptive_lora.files import read_recipe
from adaptive_lora.methods import Method, build
from adaptive_lora.model.targets import find_targets, head_modules
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)

ROOT = Path(__file__).parent.parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
RECIPES = BENCHMARK["RECIPES"]
each = pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
VOCABULARY, LAYERS, WIDTH, INNER, HEADS = 24, 2, 32, 48, 2
BERT_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
NARROW: dict[str, dict[str, Any]] = {
    "distilbert/distilbert-base-uncased": {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
                                           "hidden_dim": INNER},
    "google-bert/bert-base-uncased": BERT_SIZES,
    "google-bert/bert-base-cased": BERT_SIZES,
    "google/vit-base-patch16-224-in21k": BERT_SIZES | {"image_size": 32},
    "microsoft/DialoGPT-medium": {
        "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 0, "eos_token_id": 0,
    },
    "facebook/bart-large": {
        "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    },
    "microsoft/deberta-v3-base": BERT_SIZES,
}  # fmt: skip
HEAD = {
    "classification": AutoModelForSequenceClassification,
    "multi_label_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "causal_lm": AutoModelForCausalLM,
    "summarization": AutoModelForSeq2SeqLM,
    "question_answering": AutoModelForQuestionAnswering,
    "image_classification": AutoModelForImageClassification,
}


def test_the_recipes_name_hub_models_and_each_writes_to_a_folder_of_its_own_name() -> None:
    assert len(RECIPES) == 22
    for file in RECIPES:
        values = read_recipe(file)
        assert values["model"] in NARROW
        assert values["output"] == f"runs/{file.stem}"
        assert file.read_text().startswith("# ")


@each
def test_a_recipe_is_dry_run_on_a_narrow_model_and_stock_peft_loads_the_adapter(
    file: Path, tmp_path: Path
) -> None:
    name = read_recipe(file)["model"]
    vocabulary = {} if "vit" in name else {"vocab_size": VOCABULARY}
    narrow = BENCHMARK["model_config"](name, **NARROW[name], **vocabulary)
    config = BENCHMARK["stand_in"](
        file, tmp_path, narrow, per_device_train_batch_size=4, per_device_eval_batch_size=3
    )
    result = run(config, dry_run=True)
    assert (result["status"], result["steps"], result["task"]) == ("ok", 2, config.task)
    assert result_of(tmp_path / "run")["metrics"] == result["metrics"]
    assert result["metric"] in result["metrics"]
    budget = build(config.method.name, config.method.arguments).budget_parameters(
        find_targets(_narrow_base(config, 2), config.adapters.targets)
    )
    assert budget is None or budget - WIDTH - INNER < result["lora_parameters"] <= budget
    base = _narrow_base(config, len(result["data"]["classes"] or [0, 1]))
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def _narrow_base(config: RunConfig, num_labels: int) -> PreTrainedModel:
    return HEAD[config.task].from_config(
        AutoConfig.from_pretrained(config.model, num_labels=num_labels)
    )


@pytest.mark.parametrize(
    "method",
    [
        {"name": "adalora", "initial": 800, "final": 3500, "every": 100},
        {"name": "adalora", "initial": 0.3, "final": 0.3},
        {"name": "peft_adalora", "rank": 2},
        {"name": "grad_delta", "warmup_steps": 200},
        {"name": "plateau", "patience": 3},
    ],
    ids=str,
)
def test_a_dry_run_decides_whatever_the_times_of_the_whole_training_are(
    method: dict[str, Any], bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    values = recipe(bert_folder, reviews_file, tmp_path / "run")
    result = run(parse(values | {"method": method}), dry_run=True)
    assert (result["status"], result["steps"]) == ("ok", 2)
    assert (
        result["budget_parameters"] is None
        or result["lora_parameters"] <= result["budget_parameters"]
    )


@cache
def full_size(name: str, task: str) -> PreTrainedModel:
    with torch.device("meta"):
        return HEAD[task].from_config(BENCHMARK["model_config"](name))


def at_full_size(file: Path) -> tuple[RunConfig, Method, list[Target]]:
    config = parse(read_recipe(file))
    targets = find_targets(full_size(config.model, config.task), config.adapters.targets)
    return config, build(config.method.name, config.method.arguments), targets


def parameters(method: Method, targets: list[Target]) -> tuple[int, int]:
    """Return the LoRA parameters at the start and, at most, at the end."""
    pattern = method.initial_pattern(targets)
    start = sum(pattern[target.name] * target.cost for target in targets)
    if (budget := method.budget_parameters(targets)) is not None:
        return start, budget
    if method.adaptation is None:
        return start, start
    return start, sum(
        (method.adaptation.max_rank or target.full_rank) * target.cost for target in targets
    )


ROWS = {
    cells[0]: cells[1:]
    for cells in re.findall(
        r"^\| \[(.+?)\]\(\1\.yaml\) \| (.+?) \| `(.+?)` \| (.+?) \|$",
        (ROOT / "recipes" / "README.md").read_text(),
        re.M,
    )
}


def test_the_table_has_a_row_for_each_recipe() -> None:
    assert ROWS.keys() == {file.stem for file in RECIPES}


@each
def test_the_table_gives_method_and_parameters_of_the_full_size_model(file: Path) -> None:
    _, method, targets = at_full_size(file)
    start, end = parameters(method, targets)
    assert ROWS[file.stem][1:] == (
        method.name,
        f"{start:,}" if start == end else f"{start:,} → {end:,}",
    )


def test_the_parameters_are_those_of_the_published_tables() -> None:
    ends = {file.stem: parameters(*at_full_size(file)[1:])[1] for file in RECIPES}
    deberta = full_size("microsoft/deberta-v3-base", "classification")
    classifier = sum(p.numel() for p in deberta.classifier.parameters())  # of two classes
    assert classifier == 1_538
    for task in ("mnli", "sst2", "cola", "qnli"):
        assert ends[f"deberta-v3-base-{task}-small"] == 331_776 == 333_314 - classifier
        assert ends[f"deberta-v3-base-{task}-large"] == 4 * 331_776
    # MNLI has three classes
    assert ends["deberta-v3-base-mnli-small"] + classifier // 2 * 3 == 334_083
    assert head_modules(deberta) == ["pooler", "classifier"]
    assert sum(p.numel() for p in deberta.pooler.parameters()) == 590_592
    assert ends["dialogpt-medium-alpaca-baseline-r8"] == 3_145_728
    assert ends["dialogpt-medium-alpaca-baseline-r16"] == 6_291_456
    assert ends["distilbert-sst2-grad-delta"] == ends["distilbert-sst2-lora"]


def test_the_targets_of_deberta_are_six_kinds_in_each_layer_and_not_the_pooler() -> None:
    _, _, targets = at_full_size(ROOT / "recipes" / "deberta-v3-base-cola-small.yaml")
    kinds = {target.kind for target in targets}
    assert kinds == {
        "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj",
        "attention.output.dense",
        "intermediate.dense", "output.dense",
    }  # fmt: skip
    assert len(targets) == 6 * 12
    assert {target.stack for target in targets} == {"deberta.encoder.layer"}


@pytest.mark.parametrize(
    "file",
    [file for file in RECIPES if read_recipe(file)["method"]["name"] == "adalora"],
    ids=lambda path: path.stem,
)
def test_the_flag_in_the_recipe_gives_the_lora_column_at_the_same_budget(
    file: Path, command: Command
) -> None:
    flag = re.search(r"`(--\w+ [^`]+)` gives the LoRA column at the same budget", file.read_text())
    assert flag is not None
    outcome = command(
        "train", "--config", file, *shlex.split(flag[1]), "--output", "runs/other", "--print-config"
    )
    assert outcome.code == 0, outcome.err
    printed = parse(yaml.safe_load(outcome.out))
    assert printed.method.name == "lora"
    _, adaptive, targets = at_full_size(file)
    start, end = parameters(build(printed.method.name, printed.method.arguments), targets)
    assert start == end == adaptive.budget_parameters(targets)
