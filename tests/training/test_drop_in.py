"""`AdaptiveLoRA`: what it returns and shows is true of the model that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import scale_of
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from adaptive_lora import AdaptiveLoRA, InputError, lora_parameters
from adaptive_lora.allocation import history
from adaptive_lora.allocation.importance import min_max
from adaptive_lora.model.adapters import targets_of
from adaptive_lora.testing import apart

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
         "pad_token_id": 0,
         "num_hidden_layers": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
         "num_labels": 2}  # fmt: skip
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
MODELS = {"distilbert": {"hidden_dim": 32}, "bert": {}, "roberta": {}, "deberta-v2": RELATIVE}
QUIET = {"use_cpu": True, "disable_tqdm": True}
ROWS = torch.randint(2, 64, (64, 8), generator=torch.Generator().manual_seed(3))
TRAIN = [{"input_ids": row, "label": row[0] % 2} for row in ROWS[:48]]
VAL = Dataset.from_dict({"input_ids": ROWS[48:].tolist(), "labels": (ROWS[48:, 0] % 2).tolist()})


def fresh(kind: str = "bert") -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    )


# twelve steps: 48 items, batch 8, two epochs
def tuner(kind: str = "bert", **options: Any) -> AdaptiveLoRA:
    given = {
        "warmup_steps": 5,
        "max_r": 8,
        "num_train_epochs": 2,
        "batch_size": 8,
        "learning_rate": 5e-3,
        **options,
    }
    return AdaptiveLoRA(fresh(kind), TRAIN, VAL, **given, training_arguments=QUIET)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ROWS[48:]).logits


@pytest.mark.parametrize("kind", MODELS)
def test_accuracy_ranks_scores_and_the_saved_adapter_are_those_of_the_model(
    kind: str, tmp_path: Path
) -> None:
    tuned = tuner(kind, r=3, alpha=12, output_dir=tmp_path / "run")
    assert tuned.train() == float(
        (logits(tuned.model).argmax(-1) == ROWS[48:, 0] % 2).float().mean()
    )
    scores = tuned.scores
    assert (
        tuned.ranks == scores.r == {n: int(2 + min(s, 1.0) * (8 - 2)) for n, s in scores.s.items()}
    )
    assert len(set(tuned.ranks.values())) > 1
    normal = [min_max(x).values() for x in (scores.G, scores.W)]
    assert list(scores.s.values()) == pytest.approx(
        [0.5 * g + 0.5 * w for g, w in zip(*normal, strict=True)]
    )
    assert scores.correlation == pytest.approx(
        np.corrcoef(list(scores.G.values()), list(scores.W.values()))[0, 1]
    )
    assert scale_of(tuned.model) == 4
    assert [
        history.from_json(json.loads((tmp_path / "run/allocations.jsonl").read_text()))
    ] == tuned.history
    again = PeftModel.from_pretrained(fresh(kind), str(tuned.save(tmp_path / "adapter")))
    assert torch.equal(logits(again), logits(tuned.model))


@pytest.mark.parametrize("allowed", [{"rank": 3}, {"budget": 2000}])
def test_a_budget_is_met_to_less_than_one_component(allowed: dict[str, int]) -> None:
    tuned = tuner(**allowed)
    tuned.train()
    costs = [t.cost for t in targets_of(tuned.model)]
    assert 0 <= allowed.get("budget", 3 * sum(costs)) - lora_parameters(tuned.model) < min(costs)


def test_growing_throws_nothing_away() -> None:
    """A decision after the last step that only grows leaves the function that training without it
    gives."""
    same, grown = (tuner(r=2, min_r=2, max_r=top, warmup_steps=12) for top in (2, 8))
    assert same.train() == grown.train()
    assert sum(grown.ranks.values()) > sum(same.ranks.values()) == 2 * len(same.ranks)
    before = dict(same.model.named_parameters())
    for name, parameter in grown.model.named_parameters():
        if "lora_" in name:
            dim = 0 if "lora_A" in name else 1
            kept, new = parameter.tensor_split([before[name].shape[dim]], dim)
            assert torch.equal(kept, before[name])
            assert dim == 0 or not new.any()
    # A product with more columns of zeros is summed in another order: some ten roundings of float32
    # with AVX2, fewer with AVX512.
    assert apart(logits(same.model), logits(grown.model)) <= 5e-6


def test_what_cannot_work_is_said_before_the_first_step() -> None:
    short = tuner(warmup_steps=13)
    for attribute in ("ranks", "scores", "history", "model"):
        with pytest.raises(InputError, match=r"call train\(\) first"):
            getattr(short, attribute)
    with pytest.raises(InputError, match=r"steps 13\.\.13 do not fit a training of 12 steps"):
        short.train()
    good, usual = (
        list(VAL)[:7],
        {"warmup_steps": 1, "val_dataset": VAL, "training_arguments": QUIET},
    )
    for bad, message in (
        ({"train_dataset": VAL, "training_arguments": {"seed": 2}}, "'seed' of AdaptiveLoRA"),
        ({"train_dataset": [{"input_ids": ROWS[0]}]}, "'labels' or 'label'"),
        ({"train_dataset": [*good, good[0] | {"labels": 2}]}, "label 2 is outside the 2 classes"),
        ({"train_dataset": [*good, good[0] | {"input_ids": [5]}]}, "pad"),
    ):
        with pytest.raises(InputError, match=message):
            AdaptiveLoRA(fresh(), **usual | bad).train()
