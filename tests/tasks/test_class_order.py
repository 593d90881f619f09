"""A base with a head knows its classes by an order of its own: what it knows before its first step
depends neither on that order nor on the form in which the data says its classes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from model_folders import (
    VOCABULARY,
    prepare,
    questions,
    recipe,
    result_of,
    reviews,
    rows_of,
    strict_json,
    write_jsonl,
)
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from adaptive_lora.adapter_tools.export import export
from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import class_names
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs import use
from adaptive_lora.runs.loading import load_task
from adaptive_lora.runs.run import run
from adaptive_lora.tasks.class_order import GLUE, in_order, order_of
from adaptive_lora.tasks.classification import Classification

pytest_plugins = ("model_folders",)
CLASSES = ["negative", "positive"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bert_folder: str, reviews_file: str) -> Path:
    """A classifier that tells most reviews; output 0 is negative."""
    folder = tmp_path_factory.mktemp("trained")
    run(parse(recipe(bert_folder, reviews_file, folder / "run", training={"num_train_epochs": 10})))
    export(folder / "run", "merged", folder / "model")
    return folder / "model"


def reordered(trained: Path, to: Path, names: list[str] | None, **changes: Any) -> str:
    """Copy a classifier with the order of its outputs turned round: the same function."""
    shutil.copytree(trained, to)
    model = BertForSequenceClassification.from_pretrained(trained)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(to)
    config = json.loads((to / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    if names is not None:
        config["id2label"] = {str(place): name for place, name in enumerate(names)}
        config["label2id"] = {name: place for place, name in enumerate(names)}
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return str(to)


def in_form(form: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a file of reviews that says its classes in one of the ways, and the recipe's part."""
    records, file = reviews(40), str(folder / "reviews.parquet")
    if form == "text":
        return write_jsonl(folder / "x.jsonl", records), {}
    if form == "numbers":
        numbers = [record | {"label": CLASSES.index(record["label"])} for record in records]
        return write_jsonl(folder / "x.jsonl", numbers), {"classes": CLASSES}
    columns = {key: [record[key] for record in records] for key in ("text", "label")}
    columns["label"] = [CLASSES.index(name) for name in columns["label"]]
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=CLASSES)})
    Dataset.from_dict(columns, features=kinds).to_parquet(file)
    return file, {}


def at_start(model: str, file: str, output: Path, **data: Any) -> dict[str, float]:
    """Return the metrics before the first step; the run in `output` takes one that changes next to
    nothing."""
    training = {"max_steps": 1, "learning_rate": 1e-6, "warmup_steps": 0, "eval_on_start": True}
    run(parse(recipe(model, file, output, data=data, training=training)))
    metrics = ("accuracy", "f1", "f1_macro", "matthews", "loss")
    return {name: rows_of(output)[0][f"eval_{name}"] for name in metrics}


@pytest.mark.parametrize("form", ["text", "numbers", "ClassLabel"])
def test_what_a_base_knows_at_the_start_does_not_depend_on_its_order(
    form: str, trained: Path, tmp_path: Path
) -> None:
    file, data = in_form(form, tmp_path)
    expected = at_start(str(trained), file, tmp_path / "plain", **data)
    assert expected["accuracy"] > 0.8
    base = reordered(trained, tmp_path / "base", [" POSITIVE", "Negative"])
    output = tmp_path / "run"
    assert at_start(base, file, output, **data) == pytest.approx(expected, abs=1e-6)
    said = result_of(output)["data"]
    assert (said["classes"], said["class_order"]) == (CLASSES, ["positive", "negative"])
    # afterwards too, with the labels written as the data writes them
    opened = use.open_run(output)
    assert use.evaluate(opened)["eval_accuracy"] == expected["accuracy"]
    use.predict(opened, file, tmp_path / "answers.jsonl")
    answers = [strict_json(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = [
        answer["prediction"] == record["label"]
        for answer, record in zip(answers, reviews(40), strict=True)
    ]
    assert sum(right) / 40 > 0.8
    # and the base still says what it calls its outputs
    export(output, "merged", tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == {
        0: " POSITIVE",
        1: "Negative",
    }


def test_the_order_of_a_base_can_be_said_where_it_has_no_names(
    trained: Path, reviews_file: str, tmp_path: Path
) -> None:
    """Without names the classes are SST-2's, and its order is taken, in which this base is not."""
    base = reordered(trained, tmp_path / "base", None)
    order = ["Positive", "Negative"]
    right = at_start(str(trained), reviews_file, tmp_path / "plain")
    found = at_start(base, reviews_file, tmp_path / "said", class_order=order)
    assert found == pytest.approx(right, abs=1e-6)
    for file in ("said", "plain"):  # spelled as in the data from now on
        order = result_of(tmp_path / file)["data"].get("class_order")
        assert order == (["positive", "negative"] if file == "said" else None)
    run(
        parse(
            recipe(
                str(trained),
                reviews_file,
                tmp_path / "same",
                data={"class_order": ["Negative", "Positive"]},
            )
        )
    )
    assert use.open_run(tmp_path / "same").task.data.class_order == CLASSES
    wrong = at_start(base, reviews_file, tmp_path / "not-said")
    assert wrong["accuracy"] == pytest.approx(1 - right["accuracy"])
    with pytest.raises(
        InputError, match=r"class_order is \['a', 'b'\]; expected each of the class"
    ):
        prepare(base, reviews_file, classes=CLASSES, class_order=["a", "b"])


def test_numbers_without_names_are_places_of_a_base_with_names(
    trained: Path, tmp_path: Path
) -> None:
    records = [r | {"label": str(1 - CLASSES.index(r["label"]))} for r in reviews(40)]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    base = reordered(trained, tmp_path / "base", ["POSITIVE", "NEGATIVE"])
    assert at_start(base, file, tmp_path / "run")["accuracy"] > 0.8
    task = prepare(base, file).task
    assert task.model_arguments()["id2label"] == {0: "POSITIVE", 1: "NEGATIVE"}
    assert any(
        "labels are numbers of outputs of the base's head for 0 POSITIVE" in note
        for note in task.notes
    )


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_base_of_another_problem_learns_classes(
    problem: str, trained: Path, reviews_file: str, tmp_path: Path
) -> None:
    base = reordered(trained, tmp_path / "base", ["positive", "negative"], problem_type=problem)
    assert at_start(base, reviews_file, tmp_path / "run")["accuracy"] > 0.8


@pytest.mark.parametrize("names", GLUE, ids="/".join)
def test_a_head_without_names_has_glues_order_whatever_the_datas(names: list[str]) -> None:
    """But the data's where that is one of GLUE's: WNLI numbers the classes of RTE the other way
    round."""
    for shuffled in itertools.permutations(names):
        order, whose = order_of(list(shuffled), None)
        assert order in GLUE
        assert (whose == "") == (order == list(shuffled)) == (list(shuffled) in GLUE)
    assert order_of([name.upper() for name in names], None)[0] == [name.upper() for name in names]


def test_names_of_its_own_decide_only_where_all_of_them_agree() -> None:
    assert order_of(["a", "b", "c"], ["c", "B", " a"]) == (["c", "b", "a"], "the base")
    assert order_of(CLASSES, ["joy", "fear"]) == (CLASSES, "")
    assert order_of(CLASSES, ["positive", "negative", "mixed"]) == (CLASSES, "")
    # MNLI's names in a base with others: nothing is known of GLUE's order
    assert order_of(sorted(GLUE[4]), ["x", "y", "z"]) == (sorted(GLUE[4]), "")
    # names that differ in case only are told apart where the base has them so too
    assert in_order(["a", "A"], ["A", "a"]) == ["A", "a"]
    assert in_order(["a", "A"], ["a", "a"]) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, None),
        ({"id2label": {1: "a", 0: "b"}}, ["b", "a"]),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"a": 1, "b": 0}}, ["b", "a"]),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"a": 1, "b": 2}}, None),
    ],
)
def test_the_names_of_a_configuration_may_be_in_either_of_its_tables(
    fields: dict[str, Any], expected: list[str] | None, bert_folder: str, tmp_path: Path
) -> None:
    config = json.loads((Path(bert_folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    assert class_names(AutoConfig.from_pretrained(tmp_path)) == expected


def test_the_order_is_noted_where_it_is_not_the_datas(
    trained: Path, reviews_file: str, tmp_path: Path
) -> None:
    assert not any("order" in note for note in prepare(str(trained), reviews_file).task.notes)
    base = reordered(trained, tmp_path / "base", ["positive", "negative"])
    notes = prepare(base, reviews_file).task.notes
    assert any("the order of the base: 0 positive, 1 negative" in note for note in notes)
    other = reordered(trained, tmp_path / "other", ["joy", "fear"])
    notes = prepare(other, reviews_file).task.notes
    assert any(
        "head for 0 joy, 1 fear is trained on, for 0 negative, 1 positive" in note for note in notes
    )


def test_a_recipe_that_says_no_order_has_no_key_for_it() -> None:
    """The runs of a study are named by their recipes: those of version 0.1 keep their names."""
    config = parse(recipe("m", "x.csv", "out"))
    assert "class_order" not in config.model_dump(mode="json")["data"]
    said = parse(recipe("m", "x.csv", "out", data={"class_order": ["a", "b"]}))
    assert parse(said.model_dump(mode="json")).data.class_order == ["a", "b"]


def test_a_run_of_version_0_1_is_read_in_the_order_it_was_trained_in(
    trained: Path, tmp_path: Path
) -> None:
    """It said no order: its outputs were the classes as they were sorted, whatever the base's."""
    base = reordered(trained, tmp_path / "base", ["positive", "negative"])
    config = parse(recipe(base, "x.jsonl", "out", data={"text": ["text"], "classes": CLASSES}))
    task = load_task(config)
    assert isinstance(task, Classification)
    assert (task.order, task.model_arguments()["id2label"]) == (CLASSES, dict(enumerate(CLASSES)))


# --- a head of another size ---


@pytest.fixture
def three(bert_folder: str, tmp_path: Path) -> str:
    """A base with a trained head of three classes."""
    folder = shutil.copytree(bert_folder, tmp_path / "three")
    names = {0: "x", 1: "y", 2: "z"}
    base = BertForSequenceClassification.from_pretrained(
        bert_folder, num_labels=3, id2label=names, label2id={n: i for i, n in names.items()}
    )
    base.save_pretrained(folder)
    return str(folder)


def test_a_head_of_another_size_is_drawn_anew_and_said(
    three: str, reviews_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(parse(recipe(three, reviews_file, tmp_path / "run")))
    said = " ".join(capsys.readouterr().out.split())
    assert "the base's head of 3 classes (x, y, z) is not used: a new head of 2 is drawn" in said
    opened = use.open_run(tmp_path / "run")
    expected = result_of(tmp_path / "run")["metrics"]["eval_accuracy"]
    assert use.evaluate(opened)["eval_accuracy"] == expected
    assert not any("is drawn" in note for note in opened.task.notes)  # it is loaded now
    base = AutoModelForSequenceClassification.from_pretrained(
        three, num_labels=2, ignore_mismatched_sizes=True
    )
    stock: Any = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(
            stock.eval()(input_ids=ids).logits, opened.model.eval()(input_ids=ids).logits
        )
    export(tmp_path / "run", "merged", tmp_path / "merged")  # read back and compared
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_draws_its_head_too(
    quantization: str, wide_bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = str(shutil.copytree(wide_bert_folder, tmp_path / "three"))
    BertForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    values = recipe(folder, reviews_file, tmp_path / "run", quantization=quantization)
    assert run(parse(values))["status"] == "ok"


def test_classes_become_a_number_and_numbers_classes(
    three: str, reviews_file: str, tmp_path: Path
) -> None:
    numbers = [{"text": r["text"], "label": i / 8} for i, r in enumerate(reviews(40))]
    file = write_jsonl(tmp_path / "x.jsonl", numbers)
    run(parse(recipe(three, file, tmp_path / "numbers", task="regression")))
    export(tmp_path / "numbers", "merged", tmp_path / "one")
    config = AutoConfig.from_pretrained(tmp_path / "one")
    assert (config.num_labels, config.problem_type) == (1, "regression")
    result = run(parse(recipe(str(tmp_path / "one"), reviews_file, tmp_path / "classes")))
    assert result["status"] == "ok"
    export(tmp_path / "classes", "merged", tmp_path / "two")
    config = AutoConfig.from_pretrained(tmp_path / "two")
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")


def test_another_task_draws_its_head_on_a_base_with_classes(three: str, tmp_path: Path) -> None:
    """A start and an end, though the configuration says three classes."""
    file = write_jsonl(tmp_path / "x.jsonl", questions(40))
    sizes = {"max_length": 24, "stride": 4}
    values = recipe(three, file, tmp_path / "run", task="question_answering", data=sizes)
    assert run(parse(values))["status"] == "ok"


def test_only_a_head_may_have_another_size(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(
        InputError,
        match=r"'bert\.encoder\.layer\.0\.intermediate\.dense\.bias' of shape \(24,\).*\(32,\)",
    ):
        run(parse(recipe(str(folder), reviews_file, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_padding_takes_the_token_its_model_knows(
    llama_folder: str, tmp_path: Path
) -> None:
    """A causal classifier reads its answer off the last token that is no padding."""
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    file = write_jsonl(tmp_path / "x.jsonl", reviews(20))
    config = json.loads((folder / "config.json").read_text())
    for known, expected in ((VOCABULARY["[PAD]"], "[PAD]"), (-1, "</s>"), (None, "</s>")):
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": known}))
        assert prepare(str(folder), file).task.tokenizer.pad_token == expected
