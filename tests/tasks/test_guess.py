"""A recipe that names no task: model and columns decide where they leave no choice, and a guess is
said, kept, and never a default."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import (
    Command,
    articles,
    instructions,
    pictures,
    questions,
    ratings,
    recipe,
    result_of,
    reviews,
    tagged,
    topics,
    write_jsonl,
)

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.base_model import read_config
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.runs import use
from adaptive_lora.runs.memory_plan import plan
from adaptive_lora.runs.run import run
from adaptive_lora.study.plan import make_plan
from adaptive_lora.study.study_file import Study
from adaptive_lora.tasks.guess import ANSWERS, KINDS, kind_of, with_task

pytest_plugins = ("model_folders",)
Rows = Callable[[int], list[dict[str, Any]]]


def renamed(rows: Rows, **names: str) -> Rows:
    return lambda count: [{names.get(k, k): v for k, v in row.items()} for row in rows(count)]


def plain(count: int) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in reviews(count)]


def chats(count: int) -> list[dict[str, Any]]:
    turn = {"role": "user", "content": "the sum is"}
    return [{"messages": [turn, {"role": "assistant", "content": "one"}]}] * count


def labelled(rows: Rows) -> Rows:
    return lambda count: [row | {"label": i % 2} for i, row in enumerate(rows(count))]


def numbered(*labels: Any) -> Rows:
    return lambda n: [r | {"label": labels[i % len(labels)]} for i, r in enumerate(reviews(n))]


DATA: dict[str, Rows] = {
    "reviews": reviews,
    "ratings": ratings,
    "whole": numbered(0.0, 1.0, 2.0),
    "counts": numbered(1, 2, 3),
    "gaps": numbered(0.5, None, 2.0),
    "instructions": instructions,
    "labelled instructions": labelled(instructions),
    "prompts": renamed(instructions, instruction="prompt"),
    "chats": chats,
    "plain": plain,
    "story": renamed(plain, text="story"),
    "articles": renamed(articles, text="document"),
    "labelled articles": labelled(articles),
    "questions": questions,
    "tagged": tagged,
    "topics": topics,
    "words": renamed(tagged, tokens="words", ner_tags="labels"),
}


@pytest.fixture
def models(
    bert_folder: str, llama_folder: str, t5_folder: str, vit_folder: str, tmp_path: Path
) -> dict[str, str]:
    """Folders of what is told apart; of the last five only the configuration is there."""
    folders = {
        "encoder": bert_folder, "causal": llama_folder, "encoder-decoder": t5_folder,
        "images": vit_folder,
    }  # fmt: skip
    for name, source, fields in (
        ("classes", llama_folder, {"architectures": ["LlamaForSequenceClassification"]}),
        ("questions", bert_folder, {"architectures": ["BertForQuestionAnswering"]}),
        (
            "number", bert_folder,
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        ),
        ("tags", bert_folder, {"architectures": ["BertForTokenClassification"]}),
        ("nameless", llama_folder, {"architectures": None}),
    ):  # fmt: skip
        config = json.loads((Path(source) / "config.json").read_text())
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **fields}))
        folders[name] = str(tmp_path / name)
    return folders


def asked(model: str, data: str, **keys: Any) -> RunConfig:
    """Return a recipe without a task."""
    values = recipe(model, data, "never-made", data={"max_length": 40, **keys})
    del values["task"]
    return parse(values)


@pytest.mark.parametrize(
    ("model", "data", "keys", "task"),
    [
        ("encoder", "reviews", {}, "classification"),
        ("encoder", "ratings", {}, "regression"),
        ("encoder", "gaps", {}, "regression"),
        ("encoder", "whole", {}, "classification"),  # 1.0 is class 1, as elsewhere
        ("encoder", "counts", {}, "classification"),
        ("encoder", "questions", {}, "question_answering"),
        ("encoder", "labelled articles", {}, "classification"),  # an encoder writes no summaries
        ("number", "counts", {}, "regression"),
        ("number", "reviews", {}, "classification"),
        ("classes", "reviews", {}, "classification"),
        ("classes", "ratings", {}, "regression"),
        ("questions", "questions", {}, "question_answering"),
        ("encoder", "tagged", {}, "token_classification"),
        ("encoder", "topics", {}, "multi_label_classification"),
        ("causal", "topics", {"label": "label"}, "multi_label_classification"),
        ("encoder", "counts", {"label": ["label"]}, "multi_label_classification"),
        ("classes", "words", {"text": "words"}, "token_classification"),
        ("tags", "tagged", {}, "token_classification"),
        ("tags", "reviews", {}, "classification"),
        ("causal", "tagged", {"label": "ner_tags"}, "token_classification"),
        ("causal", "instructions", {}, "causal_lm"),
        ("causal", "labelled instructions", {}, "causal_lm"),
        ("causal", "prompts", {"prompt": "{prompt}"}, "causal_lm"),
        ("causal", "chats", {}, "causal_lm"),
        ("causal", "plain", {}, "causal_lm"),
        ("causal", "story", {}, "causal_lm"),
        ("causal", "articles", {}, "summarization"),
        ("causal", "questions", {}, "question_answering"),
        ("causal", "reviews", {"label": "label"}, "classification"),  # said: it is to be read
        ("causal", "ratings", {"label": "label"}, "regression"),
        ("nameless", "instructions", {}, "causal_lm"),
        ("encoder-decoder", "articles", {}, "summarization"),
        ("encoder-decoder", "reviews", {"classes": ["negative", "positive"]}, "classification"),
    ],
)
def test_model_and_columns_say_the_task(
    model: str, data: str, keys: dict[str, Any], task: str, models: dict[str, str], tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", DATA[data](20))
    config, (line,) = with_task(asked(models[model], file, **keys))
    assert config.task == task
    assert line.startswith(f"task {task}, a guess: ")
    assert "--task" in line
    assert config.model_copy(update={"task": None}) == asked(models[model], file, **keys)


@pytest.mark.parametrize(
    ("model", "data", "choices"),
    [
        ("causal", "reviews", "causal_lm, classification"),
        ("causal", "ratings", "causal_lm, regression"),
        ("causal", "prompts", "causal_lm, summarization, question_answering"),
        ("encoder", "plain", ", ".join(ANSWERS)),
        ("encoder", "instructions", ", ".join(ANSWERS)),
        ("encoder", "articles", ", ".join(ANSWERS)),
        ("causal", "tagged", "causal_lm, token_classification"),
        ("encoder-decoder", "reviews", "summarization, classification"),
        ("encoder-decoder", "instructions", "summarization, question_answering"),
    ],
)
def test_what_leaves_a_choice_is_refused_with_the_choices(
    model: str, data: str, choices: str, models: dict[str, str], tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", DATA[data](20))
    with pytest.raises(InputError, match=f"x.jsonl .*choose with --task .* one of {choices}$"):
        run(asked(models[model], file))
    assert not Path("never-made").exists()


def test_images_are_classified(models: dict[str, str], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 8)
    assert with_task(asked(models["images"], folder))[0].task == "image_classification"
    with pytest.raises(InputError, match="holds images, and the model is an encoder: use --task"):
        with_task(asked(models["encoder"], folder))
    file = write_jsonl(tmp_path / "x.jsonl", [{"image": "a.png", "label": "a"}] * 3)
    assert with_task(asked(models["images"], file))[0].task == "image_classification"


def test_every_kind_of_model_is_told(models: dict[str, str]) -> None:
    found = {name: kind_of(read_config(folder)) for name, folder in models.items()}
    assert set(found.values()) == set(KINDS)
    assert all(found[kind] == kind for kind in KINDS)
    assert (found["number"], found["nameless"]) == ("classes", "causal")


def test_a_task_that_is_said_is_never_guessed(models: dict[str, str], tmp_path: Path) -> None:
    config = parse(recipe(models["causal"], str(tmp_path / "none.jsonl"), "never-made"))
    assert with_task(config) == (config, [])


def test_a_run_says_its_guess_keeps_it_and_is_used(
    llama_folder: str, instructions_file: str, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "run"
    line = ["train", "--model", llama_folder, "--data", instructions_file, "--output", out]
    line += ["--set", "training.max_steps=2", "--set", "training.save_strategy=steps"]
    line += ["--set", "training.save_steps=1", "--set", "training.dataloader_pin_memory=false"]
    ended = command(*line)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("task causal_lm, a guess: ")
    assert yaml.safe_load((out / "config.yaml").read_text())["task"] == "causal_lm"
    assert result_of(out)["task"] == use.open_run(out).config.task == "causal_lm"
    shown = command(*line, "--print-config")
    assert yaml.safe_load(shown.out)["task"] == "causal_lm"
    # gone on with, it is as it was; with another task said it is not
    shutil.rmtree(out / "checkpoints" / "checkpoint-2")
    (out / "result.json").unlink()
    again = command(*line, "--resume")
    assert again.code == 0, again.err
    assert "a guess" not in again.out
    other = command(*line, "--resume", "--task", "summarization")
    assert other.code == IntegrityError.exit_code
    assert "differing keys: task" in other.err


def test_looking_and_planning_guess_alike(
    llama_folder: str,
    instructions_file: str,
    reviews_file: str,
    command: Command,
    tmp_path: Path,
) -> None:
    checked = command("data", "check", "--model", llama_folder, "--data", instructions_file)
    assert checked.out.startswith("task causal_lm, a guess: ")
    with_data = plan(asked(llama_folder, instructions_file), device="cpu")
    assert with_data.notes[0].startswith("task causal_lm, a guess: the column output")
    without = plan(asked(llama_folder, "not-here"), device="cpu")
    assert plan(asked(llama_folder, str(tmp_path)), device="cpu") == without  # an empty folder
    assert without.notes == [
        "task causal_lm, a guess: the model is a causal language model; --task (task: in a recipe) "
        "says another"
    ]
    assert without.stages == with_data.stages
    with pytest.raises(InputError, match=r"one of causal_lm, classification$"):
        plan(asked(llama_folder, reviews_file), device="cpu")


def test_the_runs_of_a_study_have_the_task_of_their_data(
    bert_folder: str, llama_folder: str, reviews_file: str, instructions_file: str
) -> None:
    base = recipe(bert_folder, reviews_file, "unused")
    del base["task"], base["output"]
    pairs = [
        {"label": "a", "model": bert_folder, "data.train": reviews_file},
        {"label": "b", "model": llama_folder, "data.train": instructions_file},
    ]
    values = {"name": "s", "base": base, "grid": {"on": pairs}, "baseline": "linear_decay"}
    study = Study.model_validate({**values, "report": {"metric": "eval_loss"}})
    planned = make_plan(study)
    assert [one["config"]["task"] for one in planned] == ["classification", "causal_lm"]
    assert [one["task"] for one in planned] == ["classification", "causal_lm"]
    said = base | {"task": "classification"}
    (first, *_) = make_plan(study.model_copy(update={"base": said, "grid": {"seed": [42]}}))
    assert first["id"] == planned[0]["id"]  # guessed or said, it is one run
    unclear = base | {"model": llama_folder}
    with pytest.raises(InputError, match=r"study s, run .*: the columns of .*causal_lm, classific"):
        make_plan(study.model_copy(update={"base": unclear, "grid": {"seed": [42]}}))


def test_plain_text_and_documents_are_found_without_being_named(
    llama_folder: str, t5_folder: str, tmp_path: Path
) -> None:
    """The only column of texts; afterwards too."""
    for model, data, column in (
        (llama_folder, "story", "story"),
        (t5_folder, "articles", "document"),
    ):
        file = write_jsonl(tmp_path / f"{column}.jsonl", DATA[data](24))
        values = recipe(model, file, tmp_path / column, training={"max_steps": 2})
        values["generation"] = {"max_new_tokens": 2}
        del values["task"]
        result = run(parse(values))
        assert result["data"]["text"] == column
        assert use.open_run(tmp_path / column).task.data.text == column
