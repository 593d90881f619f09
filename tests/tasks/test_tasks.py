"""Tasks: what becomes of records, labels, lengths and batches. Text that is written and questions
have their own files."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from model_folders import (
    VOCABULARY,
    pictures,
    prepare,
    ratings,
    recipe,
    result_of,
    reviews,
    rows_of,
    strict_json,
    weights_of,
    write_jsonl,
)
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
)

from adaptive_lora.errors import InputError
from adaptive_lora.files import HISTORY_FILE
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run
from adaptive_lora.runs.task_trainer import GroupedByLength, TaskTrainer
from adaptive_lora.tasks import TASKS
from adaptive_lora.tasks.base import LENGTH, ROW, by_record, positions

pytest_plugins = ("model_folders",)

PAIR = {"text": ["sentence1", "sentence2"]}
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
}


def test_a_regression_label_is_the_number_itself_and_the_head_has_one_output(
    bert_folder: str, tmp_path: Path
) -> None:
    records = ratings(40)
    records[3]["label"] = "2.25"  # numbers written as text, as in a CSV with a stray quote
    file = write_jsonl(tmp_path / "x.jsonl", [r | {"label": str(r["label"])} for r in records])
    prepared = prepare(bert_folder, file, task="regression", **PAIR)
    assert prepared.task.model_arguments() == {"num_labels": 1, "problem_type": "regression"}
    found = [*prepared.train["labels"], *prepared.eval["labels"]]
    assert sorted(found) == sorted(float(record["label"]) for record in records)
    scored = prepared.task.score(
        np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 2.0, 4.0]), prepared.eval, None
    )
    assert scored == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 5 / 3})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "'label' is 3.0 in every record; nothing to predict"),
        ("good", r"x.jsonl, record 1: column 'label' is 'good'; expected a finite number"),
        (None, r"x.jsonl, record 1: column 'label' is None; expected a finite number"),
    ],
)
def test_a_column_that_is_no_measure_is_refused(
    label: Any, message: str, bert_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [record | {"label": label} for record in ratings(20)])
    with pytest.raises(InputError, match=message):
        prepare(bert_folder, file, task="regression", eval=file, **PAIR)


def test_an_infinite_number_is_named(bert_folder: str, tmp_path: Path) -> None:
    records = ratings(20)
    records[6]["label"] = math.inf
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(
        InputError, match="record 7: column 'label' is inf; expected a finite number"
    ):
        prepare(bert_folder, file, task="regression", eval=file, **PAIR)


def test_the_two_texts_of_a_pair_are_read_as_the_tokenizer_reads_pairs(
    bert_folder: str, tmp_path: Path
) -> None:
    records = [record | {"label": "ab"[i % 2]} for i, record in enumerate(ratings(20))]
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", records), **PAIR)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    pairs = [tokenizer(record["sentence1"], record["sentence2"])["input_ids"] for record in records]
    assert sorted([*prepared.train["input_ids"], *prepared.eval["input_ids"]]) == sorted(pairs)
    assert all(ids.count(tokenizer.sep_token_id) == 2 for ids in pairs)
    with pytest.raises(
        InputError, match=r"2 text columns besides 'label' \(sentence1, sentence2\).*data\.text"
    ):
        prepare(bert_folder, str(tmp_path / "x.jsonl"))
    with pytest.raises(InputError, match=r"data\.text names 3 columns"):
        prepare(bert_folder, str(tmp_path / "x.jsonl"), text=["sentence1", "sentence2", "label"])


def test_f1_of_the_positive_class_is_a_metric_of_two_classes_only(
    bert_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(
        tmp_path / "x.jsonl", [{"text": "a day", "label": "abc"[i % 3]} for i in range(30)]
    )
    assert prepare(bert_folder, file).task.metrics == ("accuracy", "f1_macro", "matthews")
    for changes in (
        {"metric": "f1"},
        {"training": {"metric_for_best_model": "f1", "load_best_model_at_end": True}},
    ):
        with pytest.raises(
            InputError, match=r"'f1'\. Known(:| here:) .*accuracy, f1_macro, matthews"
        ):
            run(parse(recipe(bert_folder, file, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", [name for name in TASKS if name != "image_classification"])
def test_every_task_says_its_metrics_and_names_records_in_their_order(task: str) -> None:
    assert len(set(TASKS[task].metrics)) == len(TASKS[task].metrics) > 0
    assert by_record([2, 0, 1], ["c", "a", "b"]) == ["a", "b", "c"]


def test_a_folder_of_images_is_classified_by_the_names_of_its_folders(
    vit_folder: str, tmp_path: Path
) -> None:
    images = pictures(tmp_path / "images", 24)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    prepared = prepare(vit_folder, images, task="image_classification")
    assert prepared.task.model_arguments()["id2label"] == {0: "dark", 1: "light"}
    assert len(prepared.train) + len(prepared.eval) == 24
    for item in prepared.train:
        assert Path(item["image"]).parent.name == ("dark", "light")[item["labels"]]
    batch = prepared.task.collator()([prepared.train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert batch["labels"].tolist() == prepared.train["labels"][:5]
    result = run(parse(recipe(vit_folder, images, tmp_path / "run", task="image_classification")))
    assert result["metrics"]["eval_accuracy"] == 1.0  # brightness alone decides


def test_a_table_of_images_says_paths_as_they_are_seen_from_it(
    vit_folder: str, tmp_path: Path
) -> None:
    pictures(tmp_path / "images", 12)
    rows = [
        {"image": f"images/{('dark', 'light')[i % 2]}/{i:03}.png", "label": "dl"[i % 2]}
        for i in range(12)
    ]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    prepared = prepare(vit_folder, file, task="image_classification", eval_size=4)
    assert prepared.task.model_arguments()["num_labels"] == 2
    rows[4]["image"] = "images/none.png"
    with pytest.raises(InputError, match=r"x.jsonl, record 5: cannot read the image .*none.png"):
        prepare(
            vit_folder,
            write_jsonl(tmp_path / "x.jsonl", rows),
            task="image_classification",
            eval_size=4,
        )


def test_a_table_that_holds_the_images_themselves_gives_the_same_pixels(
    vit_folder: str, tmp_path: Path
) -> None:
    """As hub data sets do; the column may have another name."""
    folder = pictures(tmp_path / "images", 8)
    files = sorted(Path(folder).rglob("*.png"))
    columns = {
        "picture": [str(file) for file in files],
        "label": [file.parent.name for file in files],
    }
    file = str(tmp_path / "images.parquet")
    datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image()).to_parquet(file)
    batches = []
    for source, data in ((folder, {}), (file, {"text": "picture"})):
        prepared = prepare(vit_folder, source, task="image_classification", eval_size=2, **data)
        batches.append(prepared.task.collator()(list(prepared.train)))
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_a_damaged_image_is_named_before_training(vit_folder: str, tmp_path: Path) -> None:
    images = Path(pictures(tmp_path / "images", 12))
    file = images / "dark" / "004.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"record 3: cannot read the image \S+dark/004.png"):
        run(parse(recipe(vit_folder, str(images), tmp_path / "run", task="image_classification")))
    assert not (tmp_path / "run").exists()


def test_an_image_whose_damage_only_decoding_shows_is_named_when_it_is_read(
    vit_folder: str, tmp_path: Path
) -> None:
    images = Path(pictures(tmp_path / "images", 12))
    for file in list(images.rglob("*.png")):
        Image.open(file).resize((64, 64)).save(file.with_suffix(".jpg"))
        file.unlink()
    for file in images.rglob("*.jpg"):  # all of them: whichever comes first is named
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        InputError, match=r"cannot read the image \S+\.jpg: image file is truncated"
    ):
        run(parse(recipe(vit_folder, str(images), tmp_path / "run", task="image_classification")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**SMALL), 512),
        (RobertaConfig(**SMALL, max_position_embeddings=514), 512),
        (GPT2Config(n_embd=8, n_head=2, n_layer=1), 1024),
        (T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), None),
    ],
)
def test_positions_are_those_a_text_may_have(
    config: PretrainedConfig, expected: int | None
) -> None:
    assert positions(config) == expected


def test_a_max_length_above_the_positions_is_noted_and_the_positions_hold(
    bert_folder: str, tmp_path: Path
) -> None:
    records = [
        record | {"text": "good day " * 60} if i < 3 else record
        for i, record in enumerate(reviews(20))
    ]
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", records), longest=512)
    assert "data.max_length 512 is more than the model reads: 48 is used" in prepared.task.notes
    assert max(max(part[LENGTH]) for part in (prepared.train, prepared.eval)) == 48


@pytest.fixture
def two_long(tmp_path: Path) -> str:
    """Return a file of 20 records, the 4th and 9th of which have 22 tokens; the others 6."""
    records = [{"text": "the day is " + OPINION[i % 2], "label": "ab"[i % 2]} for i in range(20)]
    for i in (3, 8):
        records[i]["text"] += " and good" * 8
    return write_jsonl(tmp_path / "x.jsonl", records)


OPINION = ("good", "bad")


def test_too_long_records_are_cut_or_dropped_or_refused_and_counted(
    bert_folder: str, two_long: str, tmp_path: Path
) -> None:
    held_out = write_jsonl(
        tmp_path / "e.jsonl", [{"text": "a day", "label": "ab"[i % 2]} for i in range(8)]
    )
    cut = prepare(bert_folder, two_long, longest=10, eval=held_out)
    assert sorted(cut.train[LENGTH])[-3:] == [6, 10, 10]
    counted = (
        "training: 20 records of 6 to 22 tokens (median 6, 95 % up to 22); 2 longer than 10 and "
    )
    assert counted + "cut" in cut.task.notes
    dropped = prepare(bert_folder, two_long, longest=10, eval=held_out, too_long="drop")
    assert list(dropped.train[ROW]) == [row for row in range(20) if row not in (3, 8)]
    assert counted + "dropped" in dropped.task.notes
    with pytest.raises(
        InputError, match=r"x.jsonl, record 4: 22 tokens are more than 10 \(2 such records\)"
    ):
        prepare(bert_folder, two_long, longest=10, eval=held_out, too_long="refuse")
    with pytest.raises(
        InputError, match="every training record is longer than 4 tokens and dropped"
    ):
        prepare(bert_folder, two_long, longest=4, eval=held_out, too_long="drop")


def test_batches_of_similar_length_are_a_reordering_that_depends_on_seed_and_epoch_alone() -> None:
    lengths = random.Random(0).choices(range(1, 200), k=500)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedByLength(lengths, 8, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global generator has no say
        return list(sampler)

    def padding(rows: list[int]) -> int:
        batches = [[lengths[row] for row in rows[i : i + 8]] for i in range(0, len(rows), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert sorted(order(1, 0)) == list(range(500))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)
    assert padding(order(1, 0)) < 0.3 * padding(list(range(500)))


def test_training_sees_every_record_once_an_epoch_in_an_order_of_its_own(
    bert_folder: str, tmp_path: Path
) -> None:
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", reviews(40)))
    trainer = trainer_of(prepared.task, train_dataset=prepared.train, output=tmp_path)
    loader, epochs = trainer.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([tuple(ids.tolist()) for batch in loader for ids in batch["input_ids"]])
    strip = [
        [tuple(i for i in ids if i != VOCABULARY["[PAD]"]) for ids in epoch] for epoch in epochs
    ]
    assert sorted(strip[0]) == sorted(strip[1]) == sorted(map(tuple, prepared.train["input_ids"]))
    assert strip[0] != strip[1]


def test_the_order_of_the_records_has_a_seed_of_its_own_where_one_is_given(
    bert_folder: str, tmp_path: Path
) -> None:
    prepared = prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", reviews(40)))
    trainer = trainer_of(prepared.task, train_dataset=prepared.train, output=tmp_path)
    orders = []
    for seed, data_seed in ((1, None), (1, 7), (2, 7)):
        trainer.args.seed, trainer.args.data_seed = seed, data_seed
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] != orders[1] == orders[2]


def trainer_of(task: Any, output: Path, **kwargs: Any) -> TaskTrainer:
    model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=len(VOCABULARY)))
    config = parse(recipe("m", "d", output))
    return TaskTrainer(
        model=model,
        args=config.training_arguments(output_dir=str(output), eval_strategy="no"),
        task=task,
        **kwargs,
    )


@pytest.fixture
def extra(bert_folder: str, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of a plateau method with two further files to evaluate on."""
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", reviews(count))
        for name, count in (("hard", 7), ("odd", 9))
    }
    train = write_jsonl(tmp_path / "train.jsonl", reviews(40))
    values = recipe(bert_folder, train, tmp_path / "run", data={"extra_eval": files})
    values["method"] = {"name": "plateau", "initial_rank": 2, "max_rank": 4, "threshold": 1.0}
    values["training"] |= {"num_train_epochs": 4, "learning_rate": 1e-6}
    return values


def test_further_files_are_scored_after_training_and_disturb_nothing(
    extra: dict[str, Any], tmp_path: Path
) -> None:
    result = run(parse(extra))
    for name in ("hard", "odd"):
        assert {
            f"eval_{name}_{metric}" for metric in ("accuracy", "f1", "f1_macro", "matthews", "loss")
        } <= set(result["metrics"])
    assert round(result["metrics"]["eval_hard_accuracy"] * 7, 6) in range(8)  # of 7 records
    logged = [row["eval_accuracy"] for row in rows_of(tmp_path / "run") if "eval_accuracy" in row]
    assert result["metrics"]["eval_accuracy"] == logged[-1]
    extra["data"]["extra_eval"] = {}
    run(parse(extra | {"output": str(tmp_path / "alone")}))
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "alone")
    assert result_of(tmp_path / "alone")["ranks"] == result["ranks"]
    history = [
        [
            strict_json(line) | {"seconds": 0}
            for line in (tmp_path / name / HISTORY_FILE).read_text().splitlines()
        ]
        for name in ("run", "alone")
    ]
    assert history[0] == history[1]
    assert result["initial_ranks"] != result["ranks"]  # something was there to disturb


def test_a_resumed_run_scores_further_files_too(extra: dict[str, Any], tmp_path: Path) -> None:
    whole = run(parse(extra))
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = run(parse(extra), resume=True)
    for metric in ("eval_hard_accuracy", "eval_odd_loss"):
        assert again["metrics"][metric] == whole["metrics"][metric]
