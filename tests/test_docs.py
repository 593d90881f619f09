"""The pages in docs/: their code runs and conforms, their defaults are the defaults, their links
lead somewhere."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from model_folders import instructions
from peft import PeftModel
from test_readme import python_blocks
from transformers import AutoModelForCausalLM

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.methods import METHODS
from adaptive_lora.model.adapters import adapters, targets_of
from adaptive_lora.model.attach import attach
from adaptive_lora.testing import CHECKS, Check

pytest_plugins = ("model_folders",)
disable_progress_bars()

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
METHOD, WHEN, PROOF = python_blocks("docs/add-a-method.md")
NAMES: dict[str, Any] = {"__name__": __name__}
exec(METHOD, NAMES)
exec(WHEN, NAMES)
exec(PROOF, NAMES)


@pytest.mark.parametrize("check", CHECKS)
def test_the_method_of_the_page_conforms(check: Check, tmp_path: Path) -> None:
    NAMES["test_fisher"](check, tmp_path)


@pytest.mark.parametrize("check", CHECKS)
def test_the_when_of_the_page_decides_in_a_method_that_conforms(
    check: Check, tmp_path: Path
) -> None:
    check(growth_at_every_second_evaluation, tmp_path)


def growth_at_every_second_evaluation() -> methods.Method:
    plain = methods.plateau(initial_rank=1, max_rank=5)
    assert plain.adaptation is not None
    return replace(plain, adaptation=replace(plain.adaptation, when=NAMES["Every"](nth=2)))


def test_the_method_of_the_page_is_at_most_thirty_lines() -> None:
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 30


def test_every_default_in_the_table_of_knobs_is_the_default() -> None:
    text = (ROOT / "docs" / "how-to-choose.md").read_text(encoding="utf-8")
    rows = [
        line.strip("|").split("|")
        for line in text.split("## The knobs")[1].splitlines()
        if line.startswith("|")
    ]
    checked, owner = set(), ""
    for who, knobs, defaults, _ in rows:
        owner = who.strip(" `") or owner
        if owner in METHODS:
            accepted = inspect.signature(METHODS[owner]).parameters
            for name, default in zip(
                re.findall(r"`(\w+)`", knobs), defaults.strip().split(", "), strict=True
            ):
                # rank None stands for 8 in the methods whose table row says so.
                assert default == ("8" if name == "rank" else str(accepted[name].default)), (
                    owner,
                    name,
                )
                checked.add((owner, name))
    assert {name for owner, name in checked if owner == "adalora"} == set(
        inspect.signature(METHODS["adalora"]).parameters
    ) - {"budget"}
    assert len(checked) >= 19
    assert inspect.signature(attach).parameters["scale"].default == 2.0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_method_has_its_place_in_the_page_on_choosing() -> None:
    text = (ROOT / "docs" / "how-to-choose.md").read_text(encoding="utf-8").split("## The knobs")[0]
    assert [name for name in METHODS if f"`{name}" not in text] == []


# TRL 1.16 checkpoints activations by the names that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_trainings_of_the_page_on_trl(
    llama_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = instructions(32)
    names: dict[str, Any] = {
        "model_folder": llama_folder,
        "texts": Dataset.from_list([{"text": " ".join(row.values())} for row in rows]),
        "pairs": Dataset.from_list(
            [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "bad"} for r in rows]
        ),
    }
    tuning, preferring = python_blocks("docs/trl.md")
    for code, steps in ((tuning, 200), (preferring, 100)):
        exec(code.replace(f"max_steps={steps}", "max_steps=20, use_cpu=True"), names)
        model, method = names["trainer"].model, names["method"]
        budget = method.budget_parameters(targets_of(model))
        assert budget is not None
        assert al.lora_parameters(model) <= budget
        assert len(set(al.ranks(model).values())) > 1
        assert {layer.scaling["default"] for layer in adapters(model).values()} == {2.0}
    reread = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama_folder), "sft/adapter"
    )
    assert len(set(al.ranks(reread).values())) > 1
