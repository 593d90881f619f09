"""Labels and classes: a label is a class by its text, by its number only where that is said, and
never by accident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from model_folders import Command, pictures, prepare, recipe, reviews, write_jsonl

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)


def table(path: Path, labels: list[Any], kind: Any = None) -> str:
    """Write a parquet file of different texts with these labels."""
    texts = [record["text"] for record in reviews(len(labels))]
    columns = {"text": pa.array(texts), "label": pa.array(labels, kind)}
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def trained_on(model: str, train: str, held_out: str, **data: Any) -> tuple[list[str], list[str]]:
    """Return the name of the class of each training and each evaluation record, in their order."""
    prepared = prepare(model, train, eval=held_out, **data)
    names = prepared.task.data.classes or []
    return [names[i] for i in prepared.train["labels"]], [names[i] for i in prepared.eval["labels"]]


def test_the_number_of_a_class_label_is_a_number_whatever_the_classes_are_called(
    bert_folder: str, tmp_path: Path
) -> None:
    """Stars from "1" to "3" have the numbers 0 to 2."""
    ids = [0, 1, 2] * 4
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2", "3"])})
    columns = {"text": [record["text"] for record in reviews(12)], "label": ids}
    file = str(tmp_path / "stars.parquet")
    Dataset.from_dict(columns, features=features).to_parquet(file)
    assert trained_on(bert_folder, file, file) == ([str(i + 1) for i in ids],) * 2


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ([1.0, 2.0, 3.0], [1, 2, 3]),
        ([1, 2, 3], ["1", "2", "3"]),
        (["1", "2", "3"], [1.0, 2.0, 3.0]),
    ],
)
def test_a_number_is_one_class_however_it_is_written(
    train: list[Any], held_out: list[Any], bert_folder: str, tmp_path: Path
) -> None:
    files = [
        table(tmp_path / f"{i}.parquet", labels * 3) for i, labels in enumerate((train, held_out))
    ]
    assert trained_on(bert_folder, *files) == (["1", "2", "3"] * 3,) * 2


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0], ["0", "1"], ["neg", "pos"]])
def test_where_the_recipe_names_classes_a_label_may_be_the_number_of_one(
    labels: list[Any], bert_folder: str, tmp_path: Path
) -> None:
    file = table(tmp_path / "x.parquet", labels * 4)
    assert trained_on(bert_folder, file, file, classes=["neg", "pos"]) == (["neg", "pos"] * 4,) * 2


def test_classes_read_off_the_records_have_no_numbers(bert_folder: str, tmp_path: Path) -> None:
    train, held_out = (
        table(tmp_path / "a.parquet", ["p", "n"] * 4),
        table(tmp_path / "b.parquet", [0, 1] * 4),
    )
    with pytest.raises(
        InputError,
        match=r"b.parquet, record 1: label 0 .* outside the classes \['n', 'p'\] of the training",
    ):
        prepare(bert_folder, train, eval=held_out)


def test_a_recipe_may_say_that_labels_are_numbers_of_classes(
    bert_folder: str, tmp_path: Path
) -> None:
    train, held_out = (
        table(tmp_path / "a.parquet", ["p", "n"] * 4),
        table(tmp_path / "b.parquet", [0, 1] * 4),
    )
    assert trained_on(bert_folder, train, held_out, class_numbers=True)[1] == ["n", "p"] * 4


def test_numbers_outside_the_classes_are_refused(bert_folder: str, tmp_path: Path) -> None:
    for bad in (2, -1, "2"):
        file = table(tmp_path / "x.parquet", [type(bad)(v) for v in (0, 1, 0, 1)] + [bad])
        with pytest.raises(InputError, match=r"record 5: label .* is outside the classes"):
            prepare(bert_folder, file, classes=["neg", "pos"], eval_size=1)


@pytest.mark.parametrize(
    ("bad", "kind"), [("", None), (" ", None), (float("nan"), pa.float64()), (None, None)]
)
@pytest.mark.parametrize("given", [None, ["0", "1"]])
def test_no_label_is_no_class(
    bad: Any, kind: Any, given: list[str] | None, bert_folder: str, tmp_path: Path
) -> None:
    good = [0.0, 1.0] if kind is not None else ["0", "1"]
    file = table(tmp_path / "x.parquet", [*good * 3, bad], kind)
    with pytest.raises(
        InputError, match=r"record 7: column 'label' is .*; expected a text or a number"
    ):
        prepare(bert_folder, file, classes=given, eval_size=1)


def test_classes_in_a_recipe_may_be_numbers_and_not_bare_yes_and_no(bert_folder: str) -> None:
    values = recipe(bert_folder, "x.csv", "out", data={"classes": [0, 1]})
    assert parse(values).data.classes == ["0", "1"]
    with pytest.raises(InputError, match=r"data.classes holds False: YAML reads a bare yes, no"):
        parse(recipe(bert_folder, "x.csv", "out", data={"classes": [False, True]}))


def test_a_folder_of_images_is_no_text(bert_folder: str, tmp_path: Path, command: Command) -> None:
    """The paths hold the names of the classes: it would train, on them."""
    folder = pictures(tmp_path / "images", 8)
    ended = command("train", "--model", bert_folder, "--data", folder, "--output", tmp_path / "out")
    assert ended.code == 2
    assert "use --task image_classification" in ended.err


def test_further_sets_are_scored_on_their_own_records_with_persistent_workers(
    bert_folder: str, tmp_path: Path
) -> None:
    """The Trainer keeps the loader of an evaluation set under one name for all."""
    records = reviews(24)
    swapped = [
        {**r, "label": "positive" if r["label"] == "negative" else "negative"} for r in records
    ]
    train = write_jsonl(tmp_path / "train.jsonl", records)
    other = write_jsonl(tmp_path / "other.jsonl", swapped)
    workers = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "num_train_epochs": 1,
    }
    values = recipe(
        bert_folder,
        train,
        tmp_path / "out",
        data={"eval": train, "extra_eval": {"other": other}},
        training=workers,
    )
    metrics = run(parse(values))["metrics"]
    assert metrics["eval_other_accuracy"] == pytest.approx(1 - metrics["eval_accuracy"])
    assert metrics["eval_other_loss"] != metrics["eval_loss"]
