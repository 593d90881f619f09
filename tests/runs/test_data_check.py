"""`adaptive-lora data check`: what a model will see, counted and shown, without its weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from model_folders import (
    Command,
    articles,
    instructions,
    pictures,
    questions,
    ratings,
    reviews,
    write_jsonl,
)

pytest_plugins = ("model_folders",)


@pytest.fixture
def no_weights(
    tmp_path: Path, bert_folder: str, llama_folder: str, t5_folder: str, vit_folder: str
) -> dict[str, str]:
    """Return copies of the model folders without weights."""
    folders = {"bert": bert_folder, "llama": llama_folder, "t5": t5_folder, "vit": vit_folder}
    ignore = shutil.ignore_patterns("*.safetensors")
    return {
        name: str(shutil.copytree(path, tmp_path / name, ignore=ignore))
        for name, path in folders.items()
    }


def test_counts_cuts_overlap_and_first_records_of_a_classification(
    no_weights: dict[str, str], tmp_path: Path, command: Command
) -> None:
    records = [*reviews(12), {"text": "good day " * 30, "label": "positive"}, reviews(1)[0]]
    train = write_jsonl(tmp_path / "train.jsonl", records)
    held_out = write_jsonl(
        tmp_path / "eval.jsonl", [*reviews(2), {"text": "a poor film", "label": "negative"}]
    )
    before = sorted(tmp_path.rglob("*"))
    ended = command(
        "data",
        "check",
        "--model",
        no_weights["bert"],
        "--data",
        train,
        "--eval-data",
        held_out,
        "--max-length",
        10,
    )
    assert (ended.code, ended.err) == (0, "")
    for line in (
        "classification of text into 2 classes (negative, positive)",
        "training: positive 8, negative 6; the largest class is 57.1%",
        "evaluation: negative 2, positive 1; the largest class is 66.7%",
        "; 1 longer than 10 and cut",
        "training: 1 inputs occur more than once",
        "evaluation: 2 of 3 inputs are also training inputs",
        "--- training record 1 as the model reads it\n[CLS] the day is good [SEP]\n",
        "--- training record 3 as the model reads it",
    ):
        assert line in re.sub(r"\n    ", " ", ended.out)
    assert "training record 4" not in ended.out
    assert max(map(len, ended.out.splitlines())) <= 100
    assert sorted(tmp_path.rglob("*")) == before


def test_what_bears_loss_is_marked(
    no_weights: dict[str, str], tmp_path: Path, command: Command
) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", instructions(20))
    ended = command(
        "data", "check", "--model", no_weights["llama"], "--task", "causal_lm", "--data", data
    )
    assert (ended.code, ended.err) == (0, "")
    marked = re.findall(r"\[learned: ([^]]*)\]", ended.out.replace("\n", " "))
    assert len(marked) == 3
    # the first word of every output, and no word of a prompt
    assert {text.split()[0] for text in marked} == {"is"}
    assert {text.split()[-1] for text in marked} == {"</s>"}
    assert re.search(r"training: \d+ tokens bear loss", ended.out)


@pytest.mark.parametrize(
    ("model", "task", "extra", "words"),
    [
        (
            "bert",
            "regression",
            ["--text", "sentence1", "--text", "sentence2"],
            ["regression of sentence1", "mean"],
        ),
        (
            "bert",
            "question_answering",
            ["--set", "data.stride=4"],
            ["windows", "hold their answer", "[learned: "],
        ),
        ("t5", "summarization", [], ["tokens bear loss", "[learned: the day is"]),
        (
            "llama",
            "summarization",
            ["--set", "data.max_target_length=6"],
            ["tokens bear loss", "[learned: the day is"],
        ),
        ("vit", "image_classification", [], ["images into 2 classes (dark, light)", ".png"]),
    ],
)
def test_every_task_can_be_checked(
    model: str,
    task: str,
    extra: list[str],
    words: list[str],
    no_weights: dict[str, str],
    tmp_path: Path,
    command: Command,
) -> None:
    records = {"regression": ratings, "question_answering": questions, "summarization": articles}
    if task == "image_classification":
        data = pictures(tmp_path / "images", 20)
    else:
        data = write_jsonl(tmp_path / "x.jsonl", records[task](20))
    ended = command(
        "data", "check", "--model", no_weights[model], "--task", task, "--data", data, *extra
    )
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.split())
    assert [word for word in words if word not in text] == []


def test_a_very_long_record_is_shown_by_its_ends(
    no_weights: dict[str, str], tmp_path: Path, command: Command
) -> None:
    records = instructions(6)
    for record in records:
        record["output"] = "one two three four " * 2000
    data = write_jsonl(tmp_path / "x.jsonl", records)
    path = Path(no_weights["llama"])
    for name in ("config.json", "tokenizer_config.json"):
        (path / name).write_text((path / name).read_text().replace(": 48", ": 100000"))
    line = [
        "data",
        "check",
        "--model",
        path,
        "--task",
        "causal_lm",
        "--data",
        data,
        "--max-length",
        9000,
    ]
    ended = command(*line, "--set", "data.eval_size=2")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"\[\.\.\. [\d,]+\s+characters\s+\.\.\.\]", ended.out)
    assert len(ended.out) < 5000


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--label", "lable"], "no column 'lable'. Did you mean 'label'?"),
        (["--text", "txt"], "no column 'txt'. Did you mean 'text'?"),
        (["--set", "data.classes=[a, b]"], "outside the classes ['a', 'b']"),
        (["--set", "data.max_lenght=3"], "unknown key data.max_lenght. Did you mean 'max_length'?"),
    ],
)
def test_what_training_would_refuse_is_refused_here(
    extra: list[str], message: str, no_weights: dict[str, str], reviews_file: str, command: Command
) -> None:
    ended = command("data", "check", "--model", no_weights["bert"], "--data", reviews_file, *extra)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err
