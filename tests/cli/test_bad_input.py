"""Every mistake at the command line is exit code 2, one line on stderr, and nothing on disk."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import TRAIN, Command, Outcome, arguments, digests

pytest_plugins = ("model_folders",)

# Name -> (what to add to TRAIN, words of the message).
BAD: dict[str, tuple[str, list[str]]] = {
    "unknown method": (
        "--method liner_decay",
        ["unknown method 'liner_decay'", "Did you mean 'linear_decay'?"],
    ),
    "rank above min(I, O)": ("--rank 17", ["rank 17", "min(16, 16) = 16"]),
    "uniform rank above every min(I, O)": (
        "--method empirical --rank 99",
        ["rank 99 exceeds", "at most 16"],
    ),
    "rank 0": ("--rank 0", ["rank is 0"]),
    "rank and budget": ("--rank 2 --budget 900", ["rank (2) or budget (900)"]),
    "budget too small": (
        "--method empirical --budget 1",
        ["budget of 1 parameters is below the minimum"],
    ),
    "no target": (
        "--set adapters.targets=[qury]",
        ["'qury' matches no", "Did you mean", "attention.self.query", "pooler"],
    ),
    "one target of two": (
        "--set adapters.targets=[query,vale]",
        ["target 'vale' matches no", "attention.self.value"],
    ),
    "no target by pattern": (
        "--set adapters.targets=.*foo",
        ["'.*foo' match no linear module", "intermediate.dense"],
    ),
    "broken pattern": ("--set adapters.targets=(", ["'(' is not a valid regular expression"]),
    "missing model": ("--model {tmp}/none", ["model folder {tmp}/none does not exist"]),
    "file as model": ("--model {data}", ["model folder {data}"]),
    "folder without model": ("--model {tmp}", ["{tmp} has no config.json"]),
    "hub name offline": (
        "--model nobody/none",
        ["'nobody/none'", "local folder", "local cache", "HF_HUB_OFFLINE is set"],
    ),
    "hub data offline": (
        "--data nobody/none",
        ["'nobody/none'", "local file", "local cache", "HF_HUB_OFFLINE is set"],
    ),
    "missing data": ("--data {tmp}/none.csv", ["data file {tmp}/none.csv does not exist"]),
    "missing column": ("--text txt", ["no column 'txt'", "Its columns: text, label"]),
    "empty split": ("--set data.eval_size=40", ["leaves 0 to train on"]),
    "label outside classes": (
        "--set data.classes=[a,b]",
        ["{data}, record", "outside the classes ['a', 'b']"],
    ),
    "unknown key": (
        "--set training.learning_rat=1",
        ["unknown key training.learning_rat", "'learning_rate'"],
    ),
    "broken --set": ("--set seed", ["--set 'seed'"]),
    "negative rate": ("--lr -1", ["training.learning_rate is -1.0"]),
    "rate that is no number": ("--lr nan", ["training.learning_rate is nan"]),
    "negative seed": ("--seed -1", ["seed is -1"]),
    "unknown optimizer": (
        "--set training.optim=adam",
        ["training: adam is not a valid OptimizerNames"],
    ),
    "optimizer not installed": ("--set training.optim=galore_adamw", ["training: "]),
    "unknown tracker": ("--set training.report_to=foo", ["training: foo is not supported"]),
    "plateau without evaluation": (
        "--method plateau --set training.eval_strategy=no",
        ["nothing is evaluated"],
    ),
    "one checkpoint only": (
        "--method adalora --set training.save_total_limit=1",
        ["save_total_limit is 1"],
    ),
    "budget below the minimum": (
        "--method adalora --rank 2 --set method.min_rank=3",
        ["below the minimum"],
    ),
    "optimizer that cannot be resized": (
        "--method adalora --rank 2 --set training.optim=adafactor",
        ["Adafactor"],
    ),
    "schedule that does not fit": (
        "--method adalora --rank 2 --set method.initial=900",
        ["does not fit"],
    ),
    "too short for PEFT's AdaLoRA": (
        "--method peft_adalora --rank 2 --set training.max_steps=2",
        ["after step 1 of 2"],
    ),
    "unknown metric": (
        "--set training.metric_for_best_model=acuracy",
        ["'acuracy'", "Did you mean 'accuracy'?", "f1_macro"],
    ),
    "negative workers": (
        "--set training.dataloader_num_workers=-1",
        ["training.dataloader_num_workers is -1"],
    ),
    "missing recipe": ("--config {tmp}/none.yaml", ["cannot read the recipe {tmp}/none.yaml"]),
    "nothing to resume": ("--resume", ["nothing to resume: {out}"]),
    "output inside a file": (
        "--output {data}/out",
        ["cannot write to the output folder {data}/out"],
    ),
    "output that is a file": ("--output {data}", ["output {data} is a file"]),
}


def refused(ended: Outcome, words: list[str], files: dict[str, str]) -> None:
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert [word for word in words if word not in ended.err] == []
    assert not Path(files["out"]).exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    name: str, files: dict[str, str], command: Command
) -> None:
    addition, words = BAD[name]
    before, started = digests(Path(files["tmp"])), time.monotonic()
    words = [word.format_map(files) for word in words]
    refused(command(*arguments(f"{TRAIN} {addition}", files)), words, files)
    assert time.monotonic() - started < 5  # also where a network would be asked
    assert digests(Path(files["tmp"])) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"layer_ranks": [4, 4, 4]}', ["layer_ranks has 3 ranks, expected 2"]),
        ('{"layer_ranks": [4, -1]}', ["layer_ranks[1] is -1"]),
        ('{"layer_ranks": [4, 2.5]}', ["layer_ranks[1] is 2.5"]),
        ('{"layer_ranks": [4, "four"]}', ["layer_ranks[1] is 'four'"]),
        ('{"layer_ranks": [4, true]}', ["layer_ranks[1] is True"]),
        ('{"layer_ranks": [0, 0]}', ["rank 0"]),
        ('{"layer_ranks": [4, 17]}', ["rank 17", "= 16"]),
        ('{"layer_ranks": 4}', ["layer_ranks is 4"]),
        ('{"layer_rank": [4, 4]}', ["unknown key 'layer_rank'", "Did you mean 'layer_ranks'?"]),
        ('{"rank_pattern": {".*query": 2}}', ["no entry of the rank pattern matches target"]),
        ('{"rank_pattern": {".*": 2, "qery": 2}}', ["'qery' matches no target"]),
        ('{"layer_ranks": [4,\n 4}', ["not valid JSON: line 2, column 3"]),
        ("[4, 4]", ["holds a list"]),
    ],
)
def test_a_bad_rank_file_is_named_with_the_fault(
    content: str, words: list[str], files: dict[str, str], command: Command
) -> None:
    file = Path(files["tmp"]) / "ranks.json"
    file.write_text(content)
    ended = command(*arguments(f"{TRAIN} --method custom --set method.file={file}", files))
    refused(ended, words, files)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [m\ndata: }", ["line 2, column 5"]),
        (b"", ["NoneType"]),
        (b"model: \xff", ["utf-8"]),
        (b"data: x.csv", ["data is 'x.csv'"]),
    ],
)
def test_a_broken_recipe_is_named_with_the_place(
    content: bytes, words: list[str], files: dict[str, str], command: Command
) -> None:
    file = Path(files["tmp"]) / "recipe.yaml"
    file.write_bytes(content)
    refused(
        command(
            *arguments("train --config {tmp}/recipe.yaml --model {model} --output {out}", files)
        ),
        [str(file), *words],
        files,
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--lr fast", ["--lr", "number"]),
        ("--rank 2.5", ["--rank", "integer"]),
        ("--metod lora", ["--metod", "--method"]),
    ],
)
def test_a_flag_or_value_the_parser_refuses_is_named(
    line: str, words: list[str], files: dict[str, str], command: Command
) -> None:
    ended = command(*arguments(f"{TRAIN} {line}", files))
    assert (ended.code, ended.out) == (2, "")
    assert [word for word in words if word not in ended.err] == []
    assert "Traceback" not in ended.err
    assert not Path(files["out"]).exists()


def test_a_folder_that_holds_a_run_stays_as_it_is_bit_for_bit(
    classification_run: Path, files: dict[str, str], command: Command
) -> None:
    before = digests(classification_run)
    ended = command(*arguments(TRAIN, files | {"out": str(classification_run)}))
    refused(ended, [str(classification_run), "is not empty", "--resume", "another folder"], files)
    assert digests(classification_run) == before


def damaged(model: str, to: Path, name: str, change: Callable[[bytes], bytes | None]) -> str:
    shutil.copytree(model, to)
    content = change((to / name).read_bytes())
    (to / name).unlink() if content is None else (to / name).write_bytes(content)
    return str(to)


def without_tokens(content: bytes) -> bytes:
    return json.dumps(
        {k: v for k, v in json.loads(content).items() if not k.endswith("_token")}
    ).encode()


@pytest.mark.parametrize(
    ("name", "change", "code", "message"),
    [
        ("model.safetensors", lambda content: content[:-50], 4, "weights of .* are damaged"),
        ("model.safetensors", lambda content: None, 2, "cannot load the model"),
        ("config.json", lambda content: b"{", 2, "cannot load the configuration"),
        (
            "config.json",
            lambda content: b'{"model_type": "none"}',
            2,
            "cannot load the configuration",
        ),
        ("tokenizer.json", lambda content: b"{", 2, "cannot load the tokenizer"),
        ("tokenizer.json", lambda content: None, 2, "tokenizer"),
    ],
)
def test_a_damaged_model_folder_is_refused_before_anything_is_made(
    name: str,
    change: Callable[[bytes], bytes | None],
    code: int,
    message: str,
    files: dict[str, str],
    command: Command,
) -> None:
    model = damaged(files["model"], Path(files["tmp"]) / "model", name, change)
    ended = command(*arguments(TRAIN, files | {"model": model}))
    assert ended.code == code
    assert ended.err.startswith("error: ")
    assert re.search(message, ended.err)
    assert not Path(files["out"]).exists()


def test_a_model_of_which_nothing_says_how_to_pad_is_refused(
    files: dict[str, str], command: Command
) -> None:
    model = damaged(
        files["model"], Path(files["tmp"]) / "m", "tokenizer_config.json", without_tokens
    )
    config = Path(model) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token_id": None}))
    refused(command(*arguments(TRAIN, files | {"model": model})), ["no padding token"], files)


def test_a_model_folder_without_any_tokenizer_is_refused(
    files: dict[str, str], command: Command
) -> None:
    """transformers would make up an empty one and train on unknown tokens."""
    model = Path(shutil.copytree(files["model"], Path(files["tmp"]) / "model"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(
        command(*arguments(TRAIN, files | {"model": str(model)})),
        [f"{str(model)!r} has no tokenizer"],
        files,
    )


def test_no_garbage_after_set_ends_in_a_traceback(files: dict[str, str], command: Command) -> None:
    draw = random.Random(0)
    keys = [
        "seed",
        "data.rows",
        "method.rank",
        "training.optim",
        "a",
        "data",
        "training",
        "[",
        "str",
        "",
    ]
    pieces = [
        "=",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "!!int ",
        "&a ",
        "*a",
        "'",
        '"',
        "1e3",
        "-",
        ".",
        "x",
        "2001-99-99",
        "\n",
        "\t",
        "é",
    ]
    for _ in range(100):
        garbage = (
            draw.choice(keys)
            + "=" * draw.randint(0, 1)
            + "".join(draw.choices(pieces, k=draw.randint(0, 5)))
        )
        ended = command(*arguments(TRAIN, files), "--print-config", "--set", garbage)
        assert ended.code in (0, 2), garbage
        assert (ended.err == "") == (ended.code == 0), garbage
