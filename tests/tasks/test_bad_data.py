"""Data that cannot be trained on is refused with file and record before anything is written; what
can be, trains."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_folders import (
    TRAIN,
    VOCABULARY,
    Command,
    arguments,
    digests,
    instructions,
    recipe,
    result_of,
    reviews,
    rows_of,
    weights_of,
    write_jsonl,
)

from adaptive_lora.errors import IntegrityError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)

QUICK = "--epochs 1 --batch-size 16 --rank 2 --set training.warmup_steps=0 "
QUICK += "--set training.dataloader_pin_memory=false"


def changed(records: list[dict[str, Any]], row: int, **change: Any) -> list[dict[str, Any]]:
    return [record | change if i == row else record for i, record in enumerate(records)]


def no_output(records: list[dict[str, str]]) -> list[dict[str, str]]:
    return [record | {"output": ""} for record in records]


GOOD = instructions(20)
# Name -> (task, training records, evaluation records or None, further arguments, words of the
# message).
BAD: dict[str, tuple[str, list[Any], list[Any] | None, str, list[str]]] = {
    "nothing bears loss": (
        "causal_lm",
        no_output(GOOD),
        GOOD,
        "",
        ["{train}: no training record has a token to learn"],
    ),
    "nothing bears loss in evaluation": (
        "causal_lm",
        GOOD,
        no_output(GOOD),
        "",
        ["{eval}: no evaluation record has a token to learn"],
    ),
    "label outside the classes": (
        "classification",
        reviews(20),
        changed(reviews(8), 4, label="neutral"),
        "",
        ["{eval}, record 5: label 'neutral'"],
    ),
    "class number out of range": (
        "classification",
        [record | {"label": i % 2} for i, record in enumerate(reviews(20))],
        [{"text": "a day", "label": i % 3} for i in range(6)],
        "--set data.classes=[bad,good]",
        ["{eval}, record 3: label 2 in column 'label' is outside the classes ['bad', 'good']"],
    ),
    "empty training file": ("classification", [], reviews(8), "", ["{train} has no records"]),
    "empty evaluation file": ("classification", reviews(8), [], "", ["{eval} has no records"]),
    "missing column": (
        "classification",
        reviews(8),
        [{"text": "a"}],
        "",
        ["{eval} has no column 'label'", "columns: text"],
    ),
    "one class": (
        "classification",
        [r | {"label": "good"} for r in reviews(8)],
        None,
        "",
        ["{train}: column 'label' holds one class only, ['good']"],
    ),
    "duplicate ids": (
        "classification",
        changed([r | {"id": i} for i, r in enumerate(reviews(20))], 12, id=3),
        None,
        "",
        ["{train}: records 4 and 13 share the id 3", "duplicate_ids: keep"],
    ),
    "duplicate ids in evaluation": (
        "classification",
        reviews(8),
        [r | {"key": "k"} for r in reviews(8)],
        "--set data.id=key",
        ["{eval}: records 1 and 2 share the key 'k'"],
    ),
    "unknown metric": (
        "classification",
        reviews(20),
        None,
        "--set metric=acuracy",
        ["metric is 'acuracy'. Did you mean 'accuracy'?", "matthews"],
    ),
    "metric of another task": (
        "causal_lm",
        GOOD,
        None,
        "--set metric=accuracy",
        ["'accuracy'", "perplexity"],
    ),
    "unknown metric for the best model": (
        "causal_lm",
        GOOD,
        None,
        "--set training.metric_for_best_model=perplexty",
        ["Did you mean 'perplexity'?"],
    ),
    "too long and refused": (
        "classification",
        changed(reviews(20), 6, text="good day " * 40),
        reviews(8),
        "--set data.too_long=refuse",
        ["{train}, record 7: 82 tokens are more than 48"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_one_line_with_file_and_record_and_leave_nothing(
    name: str, files: dict[str, str], command: Command, llama_folder: str
) -> None:
    task, train, held_out, further, words = BAD[name]
    tmp = Path(files["tmp"])
    files["train"] = files["data"] = write_jsonl(tmp / "train.jsonl", train)
    files["eval"] = write_jsonl(tmp / "eval.jsonl", held_out or [])
    if task == "causal_lm":
        files["model"] = llama_folder
    before = digests(tmp)
    line = f"{TRAIN} --task {task} {further}" + ("" if held_out is None else " --eval-data {eval}")
    ended = command(*arguments(line, files))
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert [
        word.format_map(files) for word in words if word.format_map(files) not in ended.err
    ] == []
    assert digests(tmp) == before
    assert not Path(files["out"]).exists()


def test_a_token_id_outside_the_vocabulary_of_the_model_is_named(
    files: dict[str, str], command: Command
) -> None:
    """On a GPU it would be an assertion deep in a kernel."""
    tmp, size = Path(files["tmp"]), VOCABULARY["night"]
    model = Path(shutil.copytree(files["model"], tmp / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    records = [{"text": f"{word} day", "label": word} for word in ("good", "bad")] * 8
    files["data"] = write_jsonl(tmp / "x.jsonl", changed(records, 4, text="good night"))
    files["eval"] = write_jsonl(tmp / "eval.jsonl", records)
    ended = command(*arguments(f"{TRAIN} --eval-data {{eval}}", files | {"model": str(model)}))
    assert ended.code == 2
    place = f"{files['data']}, record 5: token id {size} ('night')"
    assert (
        f"{place} is outside the model's vocabulary of {size}; the tokenizer belongs to another "
        "model" in ended.err
    )
    assert not Path(files["out"]).exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "x.csv",
            "text,label\na good day,yes\nein schöner Tag,no\n".encode("latin-1"),
            ["x.csv, line 3: not UTF-8"],
        ),
        (
            "x.jsonl",
            '{"text": "a"}\n{"text": "ä"}\n'.encode("utf-16"),
            ["x.jsonl, line 1: not UTF-8"],
        ),
        ("x.csv", b"text,label\n", ["x.csv has no records"]),
        ("x.jsonl", b"\n", ["x.jsonl has no records"]),
        ("x.parquet", b"PAR1", ["cannot read", "x.parquet"]),
        (
            "x.py",
            b"raise SystemExit('this ran')",
            ["x.py has the ending '.py'; expected one of .csv"],
        ),
        ("x.pkl", b"cos\nsystem\n(S'true'\ntR.", ["x.pkl has the ending '.pkl'"]),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    name: str, content: bytes, words: list[str], files: dict[str, str], command: Command
) -> None:
    file = Path(files["tmp"]) / name
    file.write_bytes(content)
    ended = command(*arguments(TRAIN, files | {"data": str(file)}))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert [word for word in words if word not in ended.err] == []
    assert not Path(files["out"]).exists()


def test_records_of_one_id_are_kept_when_asked_and_missing_ids_are_no_duplicates(
    files: dict[str, str], command: Command
) -> None:
    tmp = Path(files["tmp"])
    files["data"] = write_jsonl(
        tmp / "same.jsonl", [record | {"id": "k"} for record in reviews(20)]
    )
    kept = command(*arguments(f"{TRAIN} {QUICK} --set data.duplicate_ids=keep", files))
    assert (kept.code, kept.err) == (0, "")
    for missing in (None, ""):
        files["data"] = write_jsonl(
            tmp / "none.jsonl", [record | {"id": missing} for record in reviews(20)]
        )
        assert command(*arguments("data check --model {model} --data {data}", files)).code == 0


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_record_of_100_000_characters_trains_cut_and_counted(
    suffix: str, files: dict[str, str], command: Command
) -> None:
    records = changed(reviews(20), 4, text="a good day " * 9091)
    assert len(records[4]["text"]) > 100_000
    file = Path(files["tmp"]) / f"x.{suffix}"
    if suffix == "csv":
        with file.open("w", encoding="utf-8", newline="") as table:
            writer = csv.DictWriter(table, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        write_jsonl(file, records)
    files["data"], files["eval"] = (
        str(file),
        write_jsonl(Path(files["tmp"]) / "eval.jsonl", reviews(8)),
    )
    started = time.monotonic()
    ended = command(*arguments(f"{TRAIN} --eval-data {{eval}} {QUICK}", files))
    assert time.monotonic() - started < 20
    assert (ended.code, ended.err) == (0, "")
    assert "27,275 tokens" in ended.out
    assert "1 longer than 48 and cut" in ended.out.replace("\n    ", " ")
    assert result_of(Path(files["out"]))["status"] == "ok"


def test_inputs_beyond_the_positions_are_noted(files: dict[str, str], command: Command) -> None:
    ended = command(*arguments(f"{TRAIN} {QUICK} --max-length 512", files))
    assert (ended.code, ended.err) == (0, "")
    assert "data.max_length 512 is more than the model reads: 48 is used" in ended.out


def test_a_csv_of_ones_own_trains_with_three_flags(files: dict[str, str], command: Command) -> None:
    """Other column names, string labels, a column that is not read."""
    file = Path(files["tmp"]) / "mine.csv"
    rows = [
        f'{i},2024-01-0{1 + i % 9},"{r["text"]}, said",{r["label"].upper()}'
        for i, r in enumerate(reviews(40))
    ]
    file.write_text("n,when,what was said,verdict\n" + "\n".join(rows) + "\n", encoding="utf-8")
    flags = ["--data", file, "--text", "what was said", "--label", "verdict"]
    ended = command("train", "--model", files["model"], "--output", files["out"], *flags)
    assert (ended.code, ended.err) == (0, "")
    result = result_of(Path(files["out"]))
    assert result["data"]["classes"] == ["NEGATIVE", "POSITIVE"]
    assert 0 <= result["metrics"]["eval_accuracy"] <= 1
    found = command(
        "predict", files["out"], "--input", file, "--output", Path(files["tmp"]) / "out.csv"
    )
    assert (found.code, found.err) == (0, "")


REMOTE = """
from pathlib import Path
from transformers import BertConfig
Path(__file__).with_name("ran").write_text("")
Path({marker!r}).write_text("")
class Mine(BertConfig):
    model_type = "mine"
"""


def test_code_that_comes_with_a_model_is_not_run(files: dict[str, str], command: Command) -> None:
    tmp = Path(files["tmp"])
    model = Path(shutil.copytree(files["model"], tmp / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(REMOTE.format(marker=str(tmp / "ran")))
    ended = command(*arguments(TRAIN, files | {"model": str(model)}))
    assert ended.code == 2
    assert ended.err.startswith("error: cannot load the configuration")
    assert "trust_remote_code" in ended.err
    assert not list(tmp.rglob("ran"))
    assert not Path(files["out"]).exists()


@pytest.fixture
def two_checkpoints(classification_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classification_run, tmp_path / "run"))


def resumed(folder: Path) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text()) | {"output": str(folder)}
    run(parse(values), resume=True)


@pytest.mark.parametrize("what", ["the folder", "a file"])
def test_a_checkpoint_that_is_a_link_is_passed_over_or_refused(
    what: str,
    two_checkpoints: Path,
    classification_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever can place a link would choose what is loaded."""
    elsewhere = tmp_path / "elsewhere"
    last = two_checkpoints / "checkpoints" / "checkpoint-8"

    def link(checkpoint: Path) -> None:
        target = checkpoint if what == "the folder" else checkpoint / "optimizer.pt"
        shutil.move(target, elsewhere / checkpoint.name)
        target.symlink_to(elsewhere / checkpoint.name)

    elsewhere.mkdir()
    link(last)
    capsys.readouterr()
    resumed(two_checkpoints)
    first = capsys.readouterr().out.splitlines()[0]
    assert str(last) in first
    assert first.endswith(
        "is a symbolic link; a checkpoint is resumed only from files of its own; resuming from "
        "checkpoint-4"
    )
    assert rows_of(two_checkpoints) == rows_of(classification_run)
    assert weights_of(two_checkpoints) == weights_of(classification_run)

    alone = Path(shutil.copytree(classification_run, tmp_path / "alone"))
    shutil.rmtree(alone / "checkpoints" / "checkpoint-8")
    link(alone / "checkpoints" / "checkpoint-4")
    with pytest.raises(IntegrityError, match="is a symbolic link"):
        resumed(alone)


def test_a_run_whose_validation_labels_are_all_ignored_says_so(
    llama_folder: str, tmp_path: Path
) -> None:
    """One record with an answer among many without: the rest is dropped and counted."""
    records = [*no_output(instructions(19)), instructions(20)[19]]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    values = recipe(llama_folder, file, tmp_path / "run", task="causal_lm", data={"eval": file})
    values["training"] |= {
        "num_train_epochs": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "warmup_steps": 0,
    }
    result = run(parse(values))
    assert result["steps"] == 3  # one record, one step an epoch
    assert result["metrics"]["eval_token_loss"] > 0
