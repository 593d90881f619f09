"""How long an input may be where the recipe says nothing: by the task and by the model's window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import (
    Command,
    instructions,
    prepare,
    questions,
    recipe,
    result_of,
    weights_of,
    write_jsonl,
)

from adaptive_lora.errors import IntegrityError
from adaptive_lora.recipe.config import USUAL_LENGTH, TaskName, parse
from adaptive_lora.runs import use
from adaptive_lora.runs.memory_plan import plan
from adaptive_lora.runs.run import run
from adaptive_lora.study.plan import identity
from adaptive_lora.tasks import TASKS

pytest_plugins = ("model_folders",)
# The names that version 0.1 gave to runs: without a length, with its default, with another.
NAMES: dict[str, tuple[str, str, str]] = {
    "classification": ("f2cf82b7522a31dc", "f2cf82b7522a31dc", "111701e26fc706fe"),
    "regression": ("1c7a163b2cf734c8", "1c7a163b2cf734c8", "e61da61ce56c7152"),
    "image_classification": ("82ad842f3adfb060", "82ad842f3adfb060", "a68acb72f2456919"),
    "causal_lm": ("e5062cdc5ee6bd46", "e5062cdc5ee6bd46", "b38d7212445407c4"),
    "summarization": ("39404e8e47471254", "39404e8e47471254", "4b10aba18d8fcb56"),
    "question_answering": ("0de96b60ae61b27f", "0de96b60ae61b27f", "efc3ae9ea12e21ea"),
}


def name_of(task: str, **data: Any) -> str:
    values = {"model": "m", "task": task, "data": {"train": "x.csv", **data}, "output": "o"}
    return identity(parse(values).model_dump(mode="json"), threads=1)


def long(count: int, words: int) -> list[dict[str, str]]:
    """Return articles of so many words."""
    return [
        {"text": " ".join(["the", "day", "is", "good"] * (words // 4)), "summary": "a day"}
        for _ in range(count)
    ]


@pytest.fixture
def wide_window(llama_folder: str, tmp_path: Path) -> str:
    """Return a causal model that reads 4,096 tokens."""
    folder = shutil.copytree(llama_folder, tmp_path / "wide-window")
    for file, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, key: 4096}))
    return str(folder)


@pytest.mark.parametrize("task", NAMES)
def test_runs_that_say_a_length_keep_their_names(task: str) -> None:
    unsaid, default, other = NAMES[task]
    assert (name_of(task, max_length=128), name_of(task, max_length=64)) == (default, other)
    # Where the default is another one now, it is another run.
    as_before = task in ("classification", "regression", "image_classification")
    assert (name_of(task) == unsaid) == as_before


def test_every_task_has_a_usual_length() -> None:
    assert USUAL_LENGTH.keys() == TASKS.keys()


def test_what_is_written_is_not_cut_at_128(wide_window: str, tmp_path: Path) -> None:
    tasks: dict[TaskName, dict[str, Any]] = {"causal_lm": {"text": "text"}, "summarization": {}}
    for task, data in tasks.items():
        file = write_jsonl(tmp_path / "x.jsonl", long(20, 600))
        task_ = prepare(wide_window, file, task=task, longest=None, **data)
        assert task_.task.longest == task_.task.data.max_length == 1024
        assert min(map(len, task_.train["input_ids"])) > 600
        assert any("0 longer than" in note for note in task_.task.notes)
        assert (
            "inputs of up to 1,024 tokens, the default of the task; data.max_length says another "
            "number"
        ) in task_.task.notes


@pytest.mark.parametrize("task", ["causal_lm", "question_answering", "token_classification"])
def test_it_is_never_more_than_the_model_reads(
    task: str, bert_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    model, records = (
        (llama_folder, instructions(20)) if task == "causal_lm" else (bert_folder, questions(20))
    )
    if task == "token_classification":
        records = [{"tokens": ["a", "day"], "ner_tags": ["O", "B-X"]}] * 20
    file = write_jsonl(tmp_path / "x.jsonl", records)
    task_ = prepare(model, file, task=task, longest=None, **({"stride": 4}
                    if task == "question_answering" else {})).task  # fmt: skip
    assert task_.longest == task_.data.max_length == 48
    assert any("48 tokens, all that the model reads" in note for note in task_.notes)


def test_the_number_is_kept_with_the_run_and_in_its_use(
    llama_folder: str, instructions_file: str, tmp_path: Path
) -> None:
    values = recipe(llama_folder, instructions_file, tmp_path / "run", task="causal_lm")
    run(parse(values))
    assert result_of(tmp_path / "run")["data"]["max_length"] == 48
    assert use.finished_task(tmp_path / "run")[0].data.max_length == 48
    assert use.open_run(tmp_path / "run").task.longest == 48


def test_a_run_of_version_0_1_is_resumed_with_its_length(llama_folder: str, tmp_path: Path) -> None:
    """Its recipe says none, its folder 128; the default is another one now."""
    file = write_jsonl(tmp_path / "x.jsonl", instructions(40))
    folder = tmp_path / "run"
    written = recipe(llama_folder, file, folder, task="causal_lm", data={"max_length": 24})
    run(parse(written))
    weights = weights_of(folder)
    shutil.rmtree(folder / "adapter")
    (folder / "result.json").unlink()
    unsaid = recipe(llama_folder, file, folder, task="causal_lm")
    assert parse(unsaid).data.max_length is None
    run(parse(unsaid), resume=True)
    assert weights_of(folder) == weights
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["max_length"] == 24
    other = parse(recipe(llama_folder, file, folder, task="causal_lm", data={"max_length": 32}))
    with pytest.raises(IntegrityError, match=r"differing keys: data\.max_length"):
        run(other, resume=True)


def test_a_guessed_task_has_the_length_of_one_that_is_said(
    bert_folder: str, reviews_file: str, tmp_path: Path, command: Command
) -> None:
    written = []
    for name, flags in (("said", ["--task", "classification"]), ("guessed", [])):
        ended = command(
            "train", "--model", bert_folder, "--data", reviews_file, "--epochs", 1,
            "--output", tmp_path / name, "--set", "training.dataloader_pin_memory=false", *flags,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        written.append({key: value for key, value in config.items() if key != "output"})
    assert written[0] == written[1]
    assert written[0]["data"]["max_length"] == 128


def test_a_plan_is_for_the_length_that_is_used(llama_folder: str, wide_window: str) -> None:
    def peak(model: str, **data: Any) -> int:
        found = plan(parse(recipe(model, "none", "o", task="causal_lm", data=data)), device="cpu")
        said = any("data.max_length says another number" in note for note in found.notes)
        assert said == (not data)
        return found.peak

    assert peak(llama_folder) == peak(llama_folder, max_length=48)
    assert (
        peak(wide_window) == peak(wide_window, max_length=1024) > peak(wide_window, max_length=128)
    )
