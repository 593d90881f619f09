"""An adapter on the output embeddings of a language model: saved, reloaded, resized, merged, with
weights of their own and with those of the input embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import recipe, rows_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.adapter_tools.export import export
from adaptive_lora.model.adapters import weights
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs import use
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)
# What PEFT says of such an adapter: it saves the frozen weight too, and merging unties it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TARGETS = ["q_proj", "lm_head"]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def attached(folder: Path) -> PeftModel:
    model = al.attach(fresh(folder), methods.lora(4), TARGETS)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model


def test_the_adapter_is_one_of_the_output_alone(base_folder: Path) -> None:
    """Where the weight is that of the input embeddings too, these stay as they were."""
    model, base = attached(base_folder), fresh(base_folder)
    assert al.ranks(model)["lm_head"] == 4
    inner: Any = model.get_base_model()
    pair = weights(inner.lm_head)
    assert pair is not None
    hidden = torch.randn(3, 16)
    added = inner.lm_head(hidden) - base.lm_head(hidden)
    assert torch.allclose(added, 2.0 * hidden @ pair[0].T @ pair[1].T, atol=1e-5)
    ids = torch.arange(64)
    assert torch.equal(inner.get_input_embeddings()(ids), base.get_input_embeddings()(ids))


@pytest.mark.parametrize("rank", [0, 2, 7])
def test_it_is_reloaded_by_stock_peft_at_any_rank(
    rank: int, base_folder: Path, tmp_path: Path
) -> None:
    model = attached(base_folder)
    pattern = dict.fromkeys(al.ranks(model), 4) | {"lm_head": rank}
    before = logits(model)
    al.resize(model, pattern)
    assert al.ranks(model) == pattern
    after = logits(model)
    assert torch.equal(before, after) == (rank > 4)  # growing changes nothing
    al.save(model, tmp_path / "adapter")
    reloaded: Any = PeftModel.from_pretrained(fresh(base_folder), str(tmp_path / "adapter"))
    assert torch.equal(logits(reloaded), after)
    assert torch.equal(logits(al.load(fresh(base_folder), tmp_path / "adapter")), after)


def test_every_form_of_it_answers_the_same(base_folder: Path, tmp_path: Path) -> None:
    model = attached(base_folder)
    al.save(model, tmp_path / "adapter")
    for form in ("native", "uniform", "merged"):  # each is read back and compared by `export`
        done = export(tmp_path / "adapter", form, tmp_path / form)
        assert done.difference is not None
        assert not any("trained whole" in note for note in done.notes)
    merged = fresh(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert not merged.config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)


def test_a_run_adapts_it_decides_its_rank_and_is_used(
    llama_folder: str, instructions_file: str, tmp_path: Path
) -> None:
    values = recipe(
        llama_folder, instructions_file, tmp_path / "run", task="causal_lm",
        adapters={"targets": TARGETS}, method={"name": "adalora", "rank": 2},
    )  # fmt: skip
    values["method"] = {"name": "adalora", "rank": 2}
    result = run(parse(values))
    assert "lm_head" in result["ranks"]
    (last,) = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row][-1:]
    again = use.evaluate(use.open_run(tmp_path / "run"))
    assert again["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)
