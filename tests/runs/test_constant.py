"""Regression begins at the labels' mean; of a model that says the same of every record that is
said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import (
    Command,
    instructions,
    prepare,
    recipe,
    result_of,
    reviews,
    tagged,
    topics,
    write_jsonl,
)
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers import BertForSequenceClassification as Bert

from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.loading import load_model
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.base import alike

pytest_plugins = ("model_folders",)
# A step this small changes parameters, and no answer.
STILL: dict[str, Any] = {"learning_rate": 1e-7, "num_train_epochs": 1, "save_strategy": "no"}
SAYS = "every evaluation record gets the same prediction, though their labels differ"


def scores(count: int, offset: float) -> list[dict[str, Any]]:
    return [
        {"text": record["text"], "label": offset + 2 * (record["label"] == "positive") - 0.25}
        for record in reviews(count)
    ]


def test_a_new_head_begins_at_the_mean_and_nothing_else_of_it_is_changed(
    bert_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", scores(40, 100.0))
    config = parse(recipe(bert_folder, file, tmp_path / "run", task="regression"))
    task = prepare(bert_folder, file, task="regression").task
    torch.manual_seed(1)
    model, _, notes = load_model(config, task)
    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=1)
    changed = {
        name for name, parameter in model.named_parameters()
        if not torch.equal(parameter, plain.get_parameter(name))
    }  # fmt: skip
    assert changed == {"classifier.bias"}
    assert (
        model.classifier.bias.item() == pytest.approx(task.mean) == pytest.approx(100.75, abs=0.5)
    )
    assert f"the new head begins at the labels' mean, {task.mean:g}" in notes

    llama = parse(recipe(llama_folder, file, tmp_path / "run", task="regression"))
    # Its head has no bias.
    assert not any("begins at" in note for note in load_model(llama, task)[2])


def test_a_trained_head_stays_as_it_is_and_one_of_another_size_begins_anew(
    bert_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", scores(40, 100.0))
    for outputs, expected in ((1, 7.0), (3, None)):
        base = str(tmp_path / f"base-{outputs}")
        model = Bert(BertConfig.from_pretrained(bert_folder, num_labels=outputs))
        torch.nn.init.constant_(model.classifier.bias, 7.0)
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(bert_folder).save_pretrained(base)
        task = prepare(base, file, task="regression").task
        loaded, _, notes = load_model(parse(recipe(base, file, "o", task="regression")), task)
        assert loaded.classifier.bias.item() == pytest.approx(expected or task.mean)
        assert any("begins at the labels' mean" in note for note in notes) == (expected is None)


def test_labels_far_from_zero_are_learned_with_few_steps(bert_folder: str, tmp_path: Path) -> None:
    """From 0 the mean alone, 100, would be 10,000 steps of 0.01 away."""
    file = write_jsonl(tmp_path / "x.jsonl", scores(80, 100.0))
    training = {"num_train_epochs": 10, "save_strategy": "no", "eval_strategy": "no"}
    result = run(
        parse(recipe(bert_folder, file, tmp_path / "run", task="regression", training=training))
    )
    variance = np.var([record["label"] for record in scores(80, 100.0)])
    assert result["metrics"]["eval_mse"] < variance
    assert result["metrics"]["eval_pearson"] > 0.5
    assert result["constant_predictions"] is False
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=1)
    stock = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        (logit,) = stock(input_ids=torch.tensor([[2, 17, 18, 3]])).logits
    assert 95 < logit.item() < 106  # in the labels' unit, for whoever loads it


@pytest.mark.parametrize(
    ("task", "records"),
    [
        ("classification", reviews(40)),
        ("multi_label_classification", topics(40)),
        ("token_classification", tagged(40)),
        ("regression", scores(40, 0.0)),
    ],
)
def test_a_model_that_says_the_same_of_every_record_is_said_to_and_is_no_failure(
    task: str,
    records: list[dict[str, Any]],
    bert_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", records)
    values = recipe(bert_folder, file, tmp_path / "run", task=task, training=STILL)
    # An encoder that tells nothing apart, as one that training has spoilt.
    original = load_model

    def flat(*args: Any, **kwargs: Any) -> Any:
        model, new, notes = original(*args, **kwargs)
        with torch.no_grad():
            model.classifier.weight.mul_(1e-6)
            model.classifier.bias[0] += 1
        return model, new, notes

    monkeypatch.setattr("adaptive_lora.runs.run.load_model", flat)
    result = run(parse(values))
    assert (result["status"], result["constant_predictions"]) == ("ok", True)
    assert result_of(tmp_path / "run")["constant_predictions"] is True
    assert SAYS in " ".join(capsys.readouterr().out.split())


def test_a_model_that_tells_records_apart_is_not_said_to(
    classification_run: Path, causal_run: Path
) -> None:
    assert result_of(classification_run)["constant_predictions"] is False
    assert result_of(causal_run)["constant_predictions"] is None  # it writes


def test_a_run_resumed_after_its_last_evaluation_says_the_same(
    classification_run: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(classification_run, folder)
    before = result_of(folder)
    (folder / "result.json").unlink()
    ended = command("train", "--config", folder / "config.yaml", "--resume", "--output", folder)
    assert ended.code == 0, ended.err
    assert result_of(folder)["constant_predictions"] is before["constant_predictions"] is False


def test_labels_that_do_not_differ_accuse_nobody(bert_folder: str, tmp_path: Path) -> None:
    task = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", scores(20, 0.0)),
                   task="regression").task  # fmt: skip
    assert task.constant(np.ones((3, 1)), np.ones(3)) is False
    assert task.constant(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) is True
    # What was once measured: a spread of 0.010 over labels from 0 to 5.
    spread = np.random.default_rng(0)
    assert task.constant(spread.normal(2.5, 0.01, (50, 1)), spread.uniform(0, 5, 50)) is True
    assert task.constant(spread.normal(2.5, 0.2, (50, 1)), spread.uniform(0, 5, 50)) is False
    one = prepare(bert_folder, write_jsonl(tmp_path / "y.jsonl", reviews(20))).task
    assert one.constant(np.array([[1.0, 0.0]] * 3), np.array([0, 1, 0])) is True
    assert one.constant(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) is False
    assert alike([]) is True


def test_tasks_that_write_have_no_answers_to_compare(llama_folder: str, tmp_path: Path) -> None:
    task = prepare(llama_folder, write_jsonl(tmp_path / "x.jsonl", instructions(20)),
                   task="causal_lm").task  # fmt: skip
    assert task.constant(np.ones((2, 2)), np.ones(2)) is None
