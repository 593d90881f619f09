"""Resuming: a run that was stopped ends as if it had not been, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_folders import Command, digests, recipe, result_of, rows_of, weights_of

from adaptive_lora.config import parse
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.run import run

pytest_plugins = ("model_folders",)


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a run as if it had been killed in its second epoch, after step 6 was logged."""
    folder = tmp_path / "interrupted"
    shutil.copytree(finished, folder)
    for name in ("adapter", "checkpoints/checkpoint-8"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 6))
    return folder


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text()) | {"output": str(folder)} | changes


def test_a_resumed_run_ends_as_if_it_had_never_stopped(interrupted: Path, finished: Path) -> None:
    run(parse(recipe_of(interrupted)), resume=True)
    assert weights_of(interrupted) == weights_of(finished)
    assert rows_of(interrupted) == rows_of(finished)
    changing = {"metrics", "train_seconds", "peak_memory_bytes"}
    before, after = result_of(finished), result_of(interrupted)
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }


def test_resuming_with_another_recipe_names_the_keys_that_differ(interrupted: Path, command: Command) -> None:
    values, before = recipe_of(interrupted, seed=7), digests(interrupted)
    values["training"] = values["training"] | {"weight_decay": 0.5}
    with pytest.raises(IntegrityError, match=r"differing keys: seed, training\.weight_decay$"):
        run(parse(values), resume=True)
    other = command(
        "train", "--config", interrupted / "config.yaml", "--output", interrupted, "--seed", "7", "--resume"
    )
    assert (other.code, other.out) == (4, "")
    assert other.err.rstrip().endswith("differing keys: seed")
    assert digests(interrupted) == before


def test_there_must_be_a_run_to_resume(tmp_path: Path, bert_folder: str, reviews_file: str) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        run(parse(recipe(bert_folder, reviews_file, tmp_path / "none")), resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["missing", "cut short"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("finished", ["classification_run"], indirect=True)
def test_a_damaged_checkpoint_is_refused_and_named(name: str, damage: str, interrupted: Path, finished: Path) -> None:
    """The Trainer would go on without an optimizer state, silently."""
    file = interrupted / "checkpoints" / "checkpoint-4" / name
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-200])
    before = digests(interrupted)
    with pytest.raises(IntegrityError, match={"missing": f"4 has no {name}", "cut short": "4 is damaged"}[damage]):
        run(parse(recipe_of(interrupted)), resume=True)
    assert digests(interrupted) == before


@pytest.mark.parametrize("finished", ["classification_run"], indirect=True)
def test_one_wrong_bit_in_the_optimizer_state_is_found(interrupted: Path, finished: Path) -> None:
    file = interrupted / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    moment = torch.load(file, weights_only=True)["state"][0]["exp_avg"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(moment)] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="checkpoint-4 is damaged"):
        run(parse(recipe_of(interrupted)), resume=True)


@pytest.mark.parametrize("finished", ["classification_run"], indirect=True)
def test_a_damaged_recipe_in_the_run_directory_is_refused(interrupted: Path, finished: Path) -> None:
    values = recipe_of(interrupted)
    (interrupted / "config.yaml").write_text("seed: [")
    with pytest.raises(IntegrityError, match=r"cannot be resumed: .*config\.yaml is not valid YAML"):
        run(parse(values), resume=True)
