"""Resuming: a run that was stopped ends as if it had not been, or says why it cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_folders import Command, digests, recipe, result_of, rows_of, weights_of

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a run as if it had been killed in its second epoch, after step 6 was
    logged."""
    folder = tmp_path / "interrupted"
    shutil.copytree(finished, folder)
    for name in ("adapter", "checkpoints/checkpoint-8"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["step"] <= 6)
    )
    return folder


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text()) | {"output": str(folder)} | changes


def test_a_resumed_run_ends_as_if_it_had_never_stopped(interrupted: Path, finished: Path) -> None:
    run(parse(recipe_of(interrupted)), resume=True)
    assert weights_of(interrupted) == weights_of(finished)
    assert rows_of(interrupted) == rows_of(finished)
    changing = {"metrics", "train_seconds", "peak_memory_bytes", "process_memory_before_bytes"}
    before, after = result_of(finished), result_of(interrupted)
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }


@pytest.mark.parametrize("logged", ["steps", "epoch"])
@pytest.mark.parametrize("evaluated", ["steps", "epoch"])
@pytest.mark.parametrize("saved", ["steps", "epoch"])
def test_every_checkpoint_is_exact_whenever_it_is_made(
    saved: str, evaluated: str, logged: str, bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """Some lie in the last step of an epoch, whose end brings an evaluation, a decision on it, or a
    log row."""
    training = {"logging_strategy": logged, "save_steps": 2, "eval_steps": 2, "max_steps": 10}
    training |= {"save_strategy": saved, "eval_strategy": evaluated, "save_total_limit": 10}
    plateau = {"name": "plateau", "initial_rank": 1, "max_rank": 5, "threshold": 100.0}
    # The Trainer's checkpoints do not hold the losses since the last log row, of which the next is
    # the mean.
    lost = {"loss"} if (saved, logged) == ("steps", "epoch") else set()

    def shown(folder: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key not in lost} for row in rows_of(folder)
        ]

    values = recipe(
        bert_folder, reviews_file, tmp_path / "whole", adapters={"dropout": 0.1}, training=training
    )
    run(parse({**values, "method": plateau}))
    steps = [
        int(path.name.split("-")[1]) for path in (tmp_path / "whole" / "checkpoints").iterdir()
    ]
    assert sorted(steps) == ([2, 4, 6, 8, 10] if saved == "steps" else [4, 8, 10])
    for step in steps:
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(tmp_path / "whole", cut)
        (cut / "result.json").unlink()
        for later in (other for other in steps if other > step):
            shutil.rmtree(cut / "checkpoints" / f"checkpoint-{later}")
        run(parse({**values, "method": plateau, "output": str(cut)}), resume=True)
        assert weights_of(cut) == weights_of(tmp_path / "whole")
        assert shown(cut) == shown(tmp_path / "whole")
        ended, expected = result_of(cut), result_of(tmp_path / "whole")
        assert ended["ranks"] == expected["ranks"]
        # results.json of a study is equal byte for byte
        assert list(ended["metrics"]) == list(expected["metrics"])


def test_resuming_with_another_recipe_names_the_keys_that_differ(
    interrupted: Path, command: Command
) -> None:
    values, before = recipe_of(interrupted, seed=7), digests(interrupted)
    values["training"] = values["training"] | {"weight_decay": 0.5}
    with pytest.raises(IntegrityError, match=r"differing keys: seed, training\.weight_decay$"):
        run(parse(values), resume=True)
    other = command(
        "train",
        "--config",
        interrupted / "config.yaml",
        "--output",
        interrupted,
        "--seed",
        "7",
        "--resume",
    )
    assert (other.code, other.out) == (4, "")
    assert other.err.rstrip().endswith("differing keys: seed")
    assert digests(interrupted) == before


def test_there_must_be_a_run_to_resume(tmp_path: Path, bert_folder: str, reviews_file: str) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        run(parse(recipe(bert_folder, reviews_file, tmp_path / "none")), resume=True)
    assert not (tmp_path / "none").exists()


TRAINER_FILES = [
    "optimizer.pt",
    "scheduler.pt",
    "adapter_model.safetensors",
    "trainer_state.json",
    "rng_state.pth",
]
RANK_FILES = ["rank_state.json", "rank_state.safetensors"]


def do_damage(damage: str, file: Path) -> str:
    """Make `file` of a checkpoint missing or cut it short; return a pattern of the complaint."""
    if damage == "missing":
        file.unlink()
        return rf"{file.parent.name} has no {file.stem}\*?\."
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file.parent.name} is damaged"


@pytest.mark.parametrize("damage", ["missing", "cut short"])
@pytest.mark.parametrize("name", TRAINER_FILES)
@pytest.mark.parametrize("finished", ["classification_run"], indirect=True)
def test_a_damaged_checkpoint_with_none_before_it_is_refused_and_named(
    name: str, damage: str, interrupted: Path, finished: Path
) -> None:
    """The Trainer would go on without an optimizer state, silently."""
    complaint = do_damage(damage, interrupted / "checkpoints" / "checkpoint-4" / name)
    before = digests(interrupted)
    with pytest.raises(
        IntegrityError, match=rf"{complaint}.*; remove \S+checkpoints to train from the start"
    ) as refused:
        run(parse(recipe_of(interrupted)), resume=True)
    assert refused.value.exit_code == 4
    assert digests(interrupted) == before


@pytest.fixture(scope="module")
def dynamic_run(
    tmp_path_factory: pytest.TempPathFactory, bert_folder: str, reviews_file: str
) -> Path:
    """Return a finished run whose ranks changed after step 2, with checkpoints after steps 4 and 8.
    Read only."""
    output = tmp_path_factory.mktemp("dynamic") / "run"
    method = {
        "name": "grad_delta",
        "warmup_steps": 2,
        "initial_rank": 3,
        "min_rank": 1,
        "max_rank": 6,
    }
    run(parse(recipe(bert_folder, reviews_file, output) | {"method": method}))
    return output


@pytest.mark.parametrize("damage", ["missing", "cut short"])
@pytest.mark.parametrize(
    ("origin", "name"),
    [
        *(("classification_run", name) for name in TRAINER_FILES),
        *(("dynamic_run", name) for name in RANK_FILES),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_it_is_used(
    origin: str,
    name: str,
    damage: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished, folder = request.getfixturevalue(origin), tmp_path / "run"
    shutil.copytree(finished, folder)
    # by number: 10, 8
    shutil.copytree(
        folder / "checkpoints" / "checkpoint-8", folder / "checkpoints" / "checkpoint-10"
    )
    shutil.copytree(
        folder / "checkpoints" / "checkpoint-8", folder / "checkpoints" / "checkpoint-old"
    )
    complaints = [
        do_damage(damage, folder / "checkpoints" / f"checkpoint-{step}" / name) for step in (10, 8)
    ]
    capsys.readouterr()
    run(parse(recipe_of(folder)), resume=True)
    lines = capsys.readouterr().out.splitlines()
    for line, complaint in zip(lines, complaints, strict=False):
        assert re.search(rf"{complaint}.*; resuming from checkpoint-4$", line)
    assert [line for line in lines[2:] if "checkpoint" in line] == []
    assert rows_of(folder) == rows_of(finished)
    assert weights_of(folder) == weights_of(finished)


@pytest.mark.parametrize("name", RANK_FILES)
def test_a_dynamic_run_whose_only_checkpoint_lacks_its_rank_state_is_refused(
    name: str, dynamic_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(dynamic_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "checkpoints" / "checkpoint-8" / name).unlink()
    with pytest.raises(IntegrityError, match=f"checkpoint-8 has no {name}"):
        run(parse(recipe_of(tmp_path / "run")), resume=True)


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
def test_a_damaged_recipe_in_the_run_directory_is_refused(
    interrupted: Path, finished: Path
) -> None:
    values = recipe_of(interrupted)
    (interrupted / "config.yaml").write_text("seed: [")
    with pytest.raises(
        IntegrityError, match=r"cannot be resumed: .*config\.yaml is not valid YAML"
    ):
        run(parse(values), resume=True)
