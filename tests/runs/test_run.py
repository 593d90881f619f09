"""A run: what is in its directory is complete, strict, true of the saved tensors, and the same
however it came about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_folders import (
    TIMES,
    Command,
    digests,
    instructions,
    recipe,
    result_of,
    reviews,
    rows_of,
    weights_of,
    write_jsonl,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adaptive_lora.errors import DivergedError
from adaptive_lora.recipe.config import DataConfig, parse
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.causal_lm import prompt_of
from adaptive_lora.tasks.data import load_splits

pytest_plugins = ("model_folders",)

RESULT_KEYS = (
    {
        "status",
        "reason",
        "method",
        "task",
        "model",
        "seed",
        "metrics",
        "initial_ranks",
        "ranks",
        "train_seconds",
    }
    | {"lora_parameters", "budget_parameters", "trainable_parameters", "total_parameters"}
    | {"peak_memory_bytes", "versions", "skipped_steps", "metric", "data", "steps"}
)


def test_a_run_directory_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "result.json",
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {
        "checkpoint-4",
        "checkpoint-8",
    }
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(
        digests(finished / "adapter")
    )
    config = parse(yaml.safe_load((finished / "config.yaml").read_text()))
    assert config.to_yaml() == (finished / "config.yaml").read_text()
    assert set(result_of(finished)) >= RESULT_KEYS
    assert [row["step"] for row in rows_of(finished) if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows_of(finished) if "eval_loss" in row] == [4, 8]


def test_the_result_says_what_the_recipe_said_and_what_the_tensors_are(finished: Path) -> None:
    result, config = result_of(finished), yaml.safe_load((finished / "config.yaml").read_text())
    assert (result["status"], result["reason"]) == ("ok", None)
    assert [result[key] for key in ("task", "model", "seed")] == [
        config[key] for key in ("task", "model", "seed")
    ]
    assert result["method"] == config["method"]["name"]
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    shapes = {
        n.removeprefix(prefix).removesuffix(suffix): len(t)
        for n, t in tensors.items()
        if n.endswith(suffix)
    }
    assert result["ranks"] == shapes
    assert set(shapes.values()) == {4, 2}
    assert result["lora_parameters"] == sum(t.numel() for n, t in tensors.items() if ".lora_" in n)
    assert result["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert result["total_parameters"] > result["trainable_parameters"]
    last = [row for row in rows_of(finished) if "eval_loss" in row][-1]
    assert {
        k: v for k, v in result["metrics"].items() if not k.endswith(TIMES)
    }.items() <= last.items()


def held_out(folder: Path) -> list[dict[str, Any]]:
    data = DataConfig(**yaml.safe_load((folder / "config.yaml").read_text())["data"])
    return load_splits(data).eval.records.to_list()


def test_stock_peft_loads_the_adapter_and_reproduces_the_reported_accuracy_and_loss(
    classification_run: Path,
) -> None:
    metrics = result_of(classification_run)["metrics"]
    base = AutoModelForSequenceClassification.from_pretrained(
        result_of(classification_run)["model"], num_labels=2
    )
    model = PeftModel.from_pretrained(base, str(classification_run / "adapter")).eval()
    config = model.peft_config["default"]
    assert (config.lora_alpha / config.r, config.lora_dropout) == (1.5, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(classification_run / "adapter")
    records, labels = held_out(classification_run), ["negative", "positive"]
    losses, hits = [], 0
    for record in records:
        with torch.no_grad():
            logits = model(**tokenizer(record["text"], return_tensors="pt")).logits[0]
        truth = labels.index(record["label"])
        losses.append(-torch.log_softmax(logits.double(), 0)[truth].item())
        hits += int(logits.argmax()) == truth
    assert len(records) == 8
    assert metrics["eval_accuracy"] == hits / 8
    # fp32 logits of order 1, padded or not: a few ulp of 1.2e-7 each.
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_perplexity_weighs_every_token_alike(causal_run: Path) -> None:
    """One record and one token at a time, without padding, in float64; a mean over batches of 3
    would differ."""
    base = AutoModelForCausalLM.from_pretrained(result_of(causal_run)["model"])
    model = PeftModel.from_pretrained(base, str(causal_run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(causal_run / "adapter")
    records: list[list[float]] = []
    for record in held_out(causal_run):
        prompt = tokenizer(prompt_of(record["instruction"], record["input"]))["input_ids"]
        answer = [
            *tokenizer(record["output"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        records.append(
            [
                -torch.log_softmax(logits[i], 0)[t].item()
                for i, t in zip(places, answer, strict=True)
            ]
        )
    tokens = [loss for record in records for loss in record]
    slow = sum(tokens) / len(tokens)
    batches = [[loss for record in records[i : i + 3] for loss in record] for i in (0, 3, 6)]
    by_batch = sum(sum(batch) / len(batch) for batch in batches) / 3
    assert abs(by_batch / slow - 1) > 1e-4
    metrics = result_of(causal_run)["metrics"]
    # fp32 against float64, about 40 summands of order 3: relative error well below 1e-5.
    assert metrics["eval_token_loss"] == pytest.approx(slow, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(slow), rel=3e-5)


def test_the_same_recipe_gives_the_same_bytes_and_metrics(finished: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text())
    run(parse(values | {"output": str(tmp_path / "again")}))
    assert weights_of(tmp_path / "again") == weights_of(finished)
    assert rows_of(tmp_path / "again") == rows_of(finished)
    run(parse(values | {"output": str(tmp_path / "other"), "seed": 43}))
    assert weights_of(tmp_path / "other") != weights_of(finished)


@pytest.mark.parametrize("finished", ["classification_run", "causal_run"], indirect=True)
def test_divergence_is_a_failed_run_with_step_and_reason_and_exit_code_3(
    finished: Path, command: Command, tmp_path: Path
) -> None:
    """Step 1 has rate 0 (warm-up) and step 2 moves the weights by 1e30: the loss of step 3
    overflows."""
    ended = command(
        "train", "--config", finished / "config.yaml", "--output", tmp_path / "run", "--lr", "1e30"
    )
    assert ended.code == 3
    result = result_of(tmp_path / "run")
    assert (result["status"], result["step"]) == ("failed", 3)
    assert ended.err == f"error: {result['reason']}\n"
    assert "step 3: the loss is nan" in result["reason"]
    assert set(result) >= RESULT_KEYS - {"train_seconds", "metric", "data", "steps"}
    assert set(result["ranks"].values()) == {4, 2}
    # and strict JSON in every line
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture
def poisoned(bert_folder: str, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe for 12 steps, 2 of which (one each epoch) meet a token whose embedding is
    NaN."""
    model, word = (
        str(tmp_path / "poisoned"),
        AutoTokenizer.from_pretrained(bert_folder).get_vocab()["sum"],
    )
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(model)
    base = AutoModel.from_pretrained(bert_folder)
    base.embeddings.word_embeddings.weight.data[word] = math.nan
    base.save_pretrained(model)
    train = [*reviews(40), {"text": "the sum is good", "label": "positive"}]
    data = [
        write_jsonl(tmp_path / name, rows)
        for name, rows in (("t.jsonl", train), ("e.jsonl", reviews(8)))
    ]
    return recipe(model, data[0], tmp_path / "run", data={"eval": data[1]})


def test_skip_goes_on_and_counts_and_stop_is_a_failed_run(
    poisoned: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(poisoned))
    skipping = command(
        "train", "--config", file, "--set", "on_non_finite=skip", "--set", "max_skipped=2"
    )
    assert skipping.code == 0
    result, rows = result_of(tmp_path / "run"), rows_of(tmp_path / "run")
    assert (result["status"], result["steps"], result["skipped_steps"]) == ("ok", 12, 2)
    skipped = [row["step"] for row in rows if "skipped_steps" in row]
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [1, 2]
    assert [row["step"] for row in rows if "loss" in row] == [
        step for step in range(1, 13) if step not in skipped
    ]
    assert all(row["loss"] > 0 for row in rows if "loss" in row)
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values()
    )

    for extra, step, count in (
        (["max_skipped=1", "on_non_finite=skip"], skipped[1], 1),
        ([], skipped[0], 0),
    ):
        output = tmp_path / f"stopped-{count}"
        ended = command(
            "train",
            "--config",
            file,
            "--output",
            output,
            *(word for a in extra for word in ("--set", a)),
        )
        assert ended.code == 3
        result = result_of(output)
        assert (result["status"], result["step"], result["skipped_steps"]) == (
            "failed",
            step,
            count,
        )
        assert (output / result["last_good_checkpoint"]).name == f"checkpoint-{step - 1}"
        assert ("word_embeddings" in ended.err, f"step {step}: the loss is nan" in ended.err) == (
            True,
            True,
        )


def test_an_adapter_that_learned_nothing_is_a_failed_run(
    finished: Path, command: Command, tmp_path: Path
) -> None:
    ended = command(
        "train",
        "--config",
        finished / "config.yaml",
        "--output",
        tmp_path / "run",
        "--lr",
        "1e-300",
    )
    assert ended.code == 2
    result = result_of(tmp_path / "run")
    assert (result["status"], result["step"], result["metrics"]) == ("failed", 8, {})
    assert result["reason"].startswith(
        "the adapter learned nothing in 8 steps: no trainable parameter changed."
    )
    assert ended.err == f"error: {result['reason']}\n"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_loss_that_is_not_finite_in_evaluation_is_written_as_null(
    classification_run: Path, tmp_path: Path
) -> None:
    """Two steps an epoch: the update of step 2 is first seen by the evaluation after it."""
    values = yaml.safe_load((classification_run / "config.yaml").read_text()) | {
        "output": str(tmp_path / "run")
    }
    values["training"] |= {"learning_rate": 1e30, "per_device_train_batch_size": 16}
    with pytest.raises(DivergedError, match="evaluation after step 2: eval_loss is nan"):
        run(parse(values))
    assert [row["eval_loss"] for row in rows_of(tmp_path / "run") if "eval_loss" in row] == [None]
    assert (result_of(tmp_path / "run")["status"], result_of(tmp_path / "run")["step"]) == (
        "failed",
        2,
    )


def test_an_encoder_saved_without_its_pooler_gives_an_adapter_that_works_elsewhere(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    """A masked-language-model checkpoint has no pooler: its base weights are part of what was
    trained on."""
    model = str(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(model)
    AutoModelForMaskedLM.from_pretrained(bert_folder).save_pretrained(model)
    run(parse(recipe(model, reviews_file, tmp_path / "run")))
    logits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=torch.tensor([[2, 6, 3]])).logits)
    torch.testing.assert_close(logits[0], logits[1])


def test_a_recipe_may_name_ranks_of_0_and_no_evaluation_while_training(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    pattern = {r".*query": 3, r".*": 0}
    values = recipe(
        bert_folder,
        reviews_file,
        tmp_path / "run",
        training={"eval_strategy": "no", "save_strategy": "no"},
    )
    result = run(parse(values | {"method": {"name": "custom", "pattern": pattern}}))
    assert {name.rsplit(".", 1)[-1]: rank for name, rank in result["ranks"].items() if rank} == {
        "query": 3
    }
    assert len(result["ranks"]) == 13
    assert "eval_accuracy" in result["metrics"]
    assert result == result_of(tmp_path / "run")


def test_training_learns_what_can_be_learned(
    bert_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    """The sign of learning, not its speed: the last evaluation loss is below the first, on data
    that one word decides."""
    for model, task, records in (
        (bert_folder, "classification", reviews(80)),
        (llama_folder, "causal_lm", instructions(80)),
    ):
        file = write_jsonl(tmp_path / f"{task}.jsonl", records)
        run(
            parse(
                recipe(
                    model,
                    file,
                    tmp_path / task,
                    task=task,
                    training={"num_train_epochs": 6, "learning_rate": 0.03},
                )
            )
        )
        losses = [row["eval_loss"] for row in rows_of(tmp_path / task) if "eval_loss" in row]
        assert losses[-1] < 0.9 * losses[0]
