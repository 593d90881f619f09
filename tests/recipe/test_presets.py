"""Presets: each fits the data set it is named after, trains on local files of those columns, and
yields to the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import Command, articles, instructions, questions, result_of, write_jsonl

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.recipe.presets import PRESETS
from adaptive_lora.runs.run import run
from adaptive_lora.tasks import TASKS

pytest_plugins = ("model_folders",)

# GLUE as its paper and the data sets' cards have it: columns read, number of labels, official
# metric.
GLUE = {
    "cola": (["sentence"], 2, "matthews"),
    "sst2": (["sentence"], 2, "accuracy"),
    "mrpc": (["sentence1", "sentence2"], 2, "f1"),
    "qqp": (["question1", "question2"], 2, "f1"),
    "stsb": (["sentence1", "sentence2"], 1, "pearson"),
    "mnli": (["premise", "hypothesis"], 3, "accuracy"),
    "qnli": (["question", "sentence"], 2, "accuracy"),
    "rte": (["sentence1", "sentence2"], 2, "accuracy"),
    "wnli": (["sentence1", "sentence2"], 2, "accuracy"),
}


def glue_records(name: str, count: int) -> list[dict[str, Any]]:
    """Return records with the columns of the hub's table; labels are numbers there."""
    columns, labels, _ = GLUE[name]
    words = ("good", "bad", "fine", "poor", "the day")
    return [
        {
            **{column: f"{words[(i + j) % 5]} {words[i % 4]}" for j, column in enumerate(columns)},
            "idx": i,
        }
        | {"label": i % 11 / 2 if labels == 1 else i % labels}
        for i in range(count)
    ]


def two_steps(preset: str, model: str, train: str, output: Path, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "preset": preset,
        "model": model,
        "output": str(output),
        "data": {"train": train, "eval_size": 6},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "warmup_steps": 0,
        },
    }
    values["training"] |= {
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


def test_every_glue_preset_is_listed_here() -> None:
    assert {
        name for name, preset in PRESETS.items() if preset["data"]["train"] == "nyu-mll/glue"
    } == set(GLUE)


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_preset_trains_on_a_local_file_of_its_columns(
    name: str, bert_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", glue_records(name, 24))
    result = run(parse(two_steps(name, bert_folder, file, tmp_path / "run")))
    columns, labels, metric = GLUE[name]
    assert result["data"]["text"] == columns
    assert result["metric"] == f"eval_{metric}"
    assert isinstance(result["metrics"][f"eval_{metric}"], float)
    assert len(result["data"]["classes"] or "1") == labels
    head = result["trainable_parameters"] - result["lora_parameters"]
    assert head == labels * (16 + 1)


@pytest.mark.parametrize(
    ("name", "folder", "records"),
    [
        ("squad", "bert_folder", questions(24)),
        (
            "cnn_dailymail",
            "t5_folder",
            [{"article": r["text"], "highlights": r["summary"]} for r in articles(24)],
        ),
        ("alpaca", "llama_folder", instructions(24)),
    ],
)
def test_the_other_presets_do_too(
    name: str,
    folder: str,
    records: list[dict[str, Any]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", records)
    settings: dict[str, Any] = {"data": {"stride": 4}, "generation": {"max_new_tokens": 4}}
    result = run(
        parse(two_steps(name, request.getfixturevalue(folder), file, tmp_path / "run", **settings))
    )
    wanted = PRESETS[name].get("metric", "token_loss")
    assert result["metric"] == f"eval_{wanted}"
    assert f"eval_{wanted}" in result["metrics"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_a_whole_recipe_on_the_hub(name: str) -> None:
    config = parse({"preset": name, "model": "m", "output": "o"})
    assert config.data.train == PRESETS[name]["data"]["train"]
    assert config.metric is None or config.metric in TASKS[config.task].metrics
    assert parse(yaml.safe_load(config.to_yaml())) == config


def fields(config: RunConfig, *names: str) -> list[Any]:
    return [getattr(config.data, name) for name in names]


def test_files_of_ones_own_drop_what_is_about_the_hub_and_keep_the_columns() -> None:
    config = parse({"preset": "mnli", "model": "m", "output": "o", "data": {"train": "mine.csv"}})
    assert fields(config, "train", "config", "eval_split", "extra_eval_split") == [
        "mine.csv",
        None,
        None,
        {},
    ]
    assert fields(config, "text", "max_length") == [["premise", "hypothesis"], 256]
    assert config.metric == "accuracy"


def test_what_the_recipe_says_wins() -> None:
    data = {"text": "body", "classes": ["no", "yes"], "max_length": 32, "eval_split": "test"}
    config = parse(
        {"preset": "sst2", "model": "m", "output": "o", "metric": "matthews", "data": data}
    )
    assert fields(config, *data) == list(data.values())
    assert config.metric == "matthews"
    assert fields(config, "train", "config") == ["nyu-mll/glue", "sst2"]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("sst-2", "unknown preset 'sst-2'. Did you mean 'sst2'? Known: cola"),
        (3, "unknown preset 3."),
    ],
)
def test_an_unknown_preset_is_refused_with_the_nearest(
    preset: Any, message: str, command: Command
) -> None:
    with pytest.raises(InputError) as error:
        parse({"preset": preset, "model": "m", "output": "o"})
    assert message in str(error.value)
    if isinstance(preset, str):
        ended = command(
            "train", "--preset", preset, "--model", ".", "--output", "o", "--print-config"
        )
        assert (ended.code, message in ended.err) == (2, True)


def test_a_task_other_than_the_presets_is_refused_and_the_same_is_not(command: Command) -> None:
    for task in PRESETS["squad"]["task"], None:
        values = {"preset": "squad", "model": "m", "output": "o"} | ({"task": task} if task else {})
        assert parse(values).task == "question_answering"
    flags = [
        "--preset",
        "squad",
        "--task",
        "classification",
        "--model",
        "m",
        "--output",
        "o",
        "--print-config",
    ]
    ended = command("train", *flags)
    assert (ended.code, ended.out) == (2, "")
    assert (
        "preset 'squad' is for the task question_answering; got the task 'classification'"
        in ended.err
    )
    assert ended.err.count("\n") == 1


def test_a_preset_with_data_that_is_no_mapping_is_named() -> None:
    with pytest.raises(InputError, match=r"data is 'x\.csv'"):
        parse({"preset": "sst2", "model": "m", "output": "o", "data": "x.csv"})


def test_the_recipe_a_run_leaves_behind_resumes_it(bert_folder: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", glue_records("sst2", 24))
    values = two_steps(
        "sst2",
        bert_folder,
        file,
        tmp_path / "run",
        training={"save_strategy": "steps", "save_steps": 1},
    )
    whole = run(parse(values))
    left = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert left["preset"] == "sst2"
    again = run(parse(left), resume=True)
    assert again["metrics"]["eval_loss"] == whole["metrics"]["eval_loss"]
    assert result_of(tmp_path / "run")["metric"] == "eval_accuracy"
