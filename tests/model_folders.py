"""Tiny random models with real tokenizers in folders, recipes and runs that use them, and the
command line in-process.

A test file gets the fixtures with `pytest_plugins = ("model_folders",)`: each folder and run is
then made once a session; whoever changes one works on a copy. (PYTEST_DONT_REWRITE: test files
import helpers before pytest could.)
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from adaptive_lora.cli.main import main
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.loading import load_task
from adaptive_lora.runs.run import run
from adaptive_lora.tasks import Task
from adaptive_lora.tasks.data import load_splits

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
OPINIONS = ["good", "fine", "great", "bad", "awful", "poor"]
NUMBERS = ["one", "two", "three", "four"]
PIECES = [
    *OPINIONS,
    *NUMBERS,
    "day",
    "night",
    "meal",
    "film",
    "sum",
    "of",
    "is",
    "the",
    "a",
    "and",
    "##s",
]
PUNCTUATION = list("#:.,+=")
HEADINGS = ["Instruction", "Input", "Response"]
VOCABULARY = {
    piece: number for number, piece in enumerate([*SPECIAL, *PIECES, *PUNCTUATION, *HEADINGS])
}
LAYERS, HIDDEN, FEED_FORWARD = 2, 16, 24


def _tokenizer(template: str, **names: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = f"{template} $B:1 [SEP]:1" if "[SEP]" in template else None
    inner.post_processor = processors.TemplateProcessing(
        single=template, pair=pair, special_tokens=[(name, VOCABULARY[name]) for name in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", model_max_length=48, **names
    )


def _bert(folder: Path, hidden: int, feed_forward: int) -> str:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    _tokenizer("[CLS] $A [SEP]", **names).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,  # so that logits differ between tokens from the start
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def _llama(folder: Path, hidden: int, feed_forward: int) -> str:
    _tokenizer("<s> $A", bos_token="<s>", eos_token="</s>").save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=48,
        initializer_range=0.3,  # so that logits differ between tokens from the start
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with an encoder of 2 layers x 6 linear modules and a pooler, hidden size
    16."""
    return _bert(tmp_path_factory.mktemp("models") / "bert", HIDDEN, FEED_FORWARD)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a causal model of 2 layers x 7 linear modules and a tokenizer without a
    padding token."""
    return _llama(tmp_path_factory.mktemp("models") / "llama", HIDDEN, FEED_FORWARD)


@pytest.fixture(scope="session")
def wide_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `bert_folder`, of widths that 4-bit kernels compute rightly on every processor: multiples
    of 64."""
    return _bert(tmp_path_factory.mktemp("models") / "wide-bert", 64, 128)


@pytest.fixture(scope="session")
def wide_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `llama_folder`, of widths that 4-bit kernels compute rightly on every processor: multiples
    of 64."""
    return _llama(tmp_path_factory.mktemp("models") / "wide-llama", 128, 128)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with an encoder-decoder model of 1 + 1 layers whose inputs end with </s>."""
    folder = str(tmp_path_factory.mktemp("models") / "t5")
    _tokenizer("$A </s>", pad_token="[PAD]", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=HIDDEN,
        d_kv=8,
        d_ff=FEED_FORWARD,
        num_layers=1,
        num_heads=2,
        initializer_factor=3.0,
        pad_token_id=VOCABULARY["[PAD]"],
        eos_token_id=VOCABULARY["</s>"],
        decoder_start_token_id=VOCABULARY["[PAD]"],
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with an image encoder of 2 layers for 8 x 8 pixels, and its image
    processor."""
    folder = str(tmp_path_factory.mktemp("models") / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
    )
    ViTModel(config).save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int) -> str:
    """Make `count` images of 12 x 10 pixels in two classes that brightness tells apart; return the
    folder."""
    draw = np.random.default_rng(0)
    for i in range(count):
        low = 150 * (i % 2)
        pixels = draw.integers(low, low + 100, (10, 12, 3), dtype=np.uint8)
        file = folder / ("dark", "light")[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return str(folder)


def reviews(count: int) -> list[dict[str, str]]:
    """Return `count` different records of two classes that a word tells apart."""
    words = {"positive": ("good", "fine", "great"), "negative": ("bad", "awful", "poor")}
    things = ("day", "night", "meal", "film")
    labels = list(words)
    return [
        {
            "text": f"the {things[i % 4]} is {words[labels[i % 2]][i // 2 % 3]}"
            + " and" * (i // 12),
            "label": labels[i % 2],
        }
        for i in range(count)
    ]


def instructions(count: int) -> list[dict[str, str]]:
    """Return `count` Alpaca-style records, every second one with an input; outputs differ in
    length."""
    numbers = ("one", "two", "three", "four")
    return [
        {
            "instruction": f"the sum of {numbers[i % 4]} and {numbers[i // 4 % 4]}",
            "input": "a good sum" if i % 2 else "",
            "output": " ".join(["is", *numbers[: 1 + i % 4]]),
        }
        for i in range(count)
    ]


def ratings(count: int) -> list[dict[str, Any]]:
    """Return `count` pairs of texts with a number from 0 to 5 each."""
    return [
        {
            "sentence1": f"the {NUMBERS[i % 4]} is good",
            "sentence2": f"a {NUMBERS[i // 4 % 4]} day",
            "label": i % 11 / 2,
        }
        for i in range(count)
    ]


def articles(count: int) -> list[dict[str, str]]:
    """Return `count` texts of 10 to 17 words, with a summary."""
    return [
        {
            "text": " ".join(
                ["the", *(NUMBERS[(i + j) % 4] for j in range(8 + i % 8)), "is", OPINIONS[i % 6]]
            ),
            "summary": f"the day is {OPINIONS[i % 6]}",
        }
        for i in range(count)
    ]


def questions(count: int) -> list[dict[str, Any]]:
    """Return `count` questions in SQuAD's form; contexts of 8 to 40 words, the answer anywhere, of
    1 to 2 words."""
    records = []
    for i in range(count):
        words = [("day", "night", "film", "and", "of")[(i + j) % 5] for j in range(8 + i * 7 % 33)]
        answer = " ".join(("one two", "three", "four")[i % 3].split())
        words.insert(i * 5 % len(words), answer)
        context = " ".join(words)
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        records.append(
            {"id": f"q{i}", "question": "the sum is", "context": context, "answers": answers}
        )
    return records


def tagged(count: int) -> list[dict[str, list[str]]]:
    """Return `count` sentences of 3 to 9 words with a tag each: numbers are amounts, of one word or
    two, and opinions are single words; plurals have two tokens."""
    records = []
    for i in range(count):
        number = [NUMBERS[i % 4], *([NUMBERS[i // 4 % 4]] if i % 3 else [])]
        words = ["the", ("days", "film", "meals", "night")[i // 2 % 4], "is", OPINIONS[i % 6]]
        tags = ["O", "O", "O", "B-OPINION"]
        at = (0, 2, 4)[i % 3]
        words[at:at] = number
        tags[at:at] = ["B-AMOUNT", "I-AMOUNT"][: len(number)]
        words += ["and"] * (i % 4)
        records.append({"tokens": words, "ner_tags": tags + ["O"] * (i % 4)})
    return records


def topics(count: int) -> list[dict[str, Any]]:
    """Return `count` texts with the classes that words say: any of film, food and good, or none."""
    things = {"film": ["film"], "meal": ["food"], "day": [], "film and a meal": ["film", "food"]}
    records = []
    for i in range(count):
        thing, view = list(things)[i % 4], OPINIONS[i // 4 % 6]
        good = ["good"] if view in ("good", "fine", "great") else []
        records.append(
            {"text": f"the {thing} is {view}" + " and" * (i // 24), "label": things[thing] + good}
        )
    return records


def write_jsonl(path: Path, records: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def recipe(
    model: str, train: str, output: Path | str, *, task: str = "classification", **sections: Any
) -> dict[str, Any]:
    """Return a recipe that trains for two short epochs; `sections` add to its sections, or set
    other keys."""
    values: dict[str, Any] = {
        "model": model,
        "task": task,
        "output": str(output),
        "data": {"train": train, "eval_size": 8},
        "method": {"name": "linear_decay", "base_rank": 4, "min_rank": 2},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            # does not divide the 8 evaluation records: a mean over batches would show
            "per_device_eval_batch_size": 3,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "dataloader_pin_memory": False,  # torch warns where there is no accelerator
        },
    }
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


class Prepared(NamedTuple):
    """What a task makes of the training and the evaluation records."""

    train: Dataset
    eval: Dataset
    task: Task


def prepare(
    model: str, train: str | Path, *, task: str = "classification", longest: int = 48, **data: Any
) -> Prepared:
    """Return the features of a recipe; `longest` is data.max_length, and `data` its other keys."""
    config = parse(
        recipe(model, str(train), "never-made", task=task, data={"max_length": longest, **data})
    )
    loaded, splits = load_task(config), load_splits(config.data)
    loaded.learn(splits.train)
    return Prepared(loaded.features(splits.train), loaded.features(splits.eval), loaded)


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", reviews(40))


@pytest.fixture(scope="session")
def instructions_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "instructions.jsonl", instructions(40))


@pytest.fixture(scope="session")
def classification_run(
    tmp_path_factory: pytest.TempPathFactory, bert_folder: str, reviews_file: str
) -> Path:
    """Return a finished run, LoRA dropout on, with checkpoints after steps 4 and 8. Read only."""
    output = tmp_path_factory.mktemp("runs") / "classification"
    run(parse(recipe(bert_folder, reviews_file, output, adapters={"dropout": 0.1, "scale": 1.5})))
    return output


@pytest.fixture(scope="session")
def causal_run(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: str, instructions_file: str
) -> Path:
    """Return a finished run of instruction tuning. Read only."""
    output = tmp_path_factory.mktemp("runs") / "causal"
    run(parse(recipe(llama_folder, instructions_file, output, task="causal_lm")))
    return output


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the command line in this process. A traceback is the test's
    failure."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["adaptive-lora", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(int(stop.value.code or 0), *capsys.readouterr())

    return call


def strict_json(text: str) -> Any:
    """Parse JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def digests(folder: Path) -> dict[str, str]:
    """Return {relative path: SHA-256} of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


TIMES = ("runtime", "per_second")


def result_of(folder: Path) -> dict[str, Any]:
    return strict_json((folder / "result.json").read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the wall-clock times, and without transformers'
    closing mean of the training loss: after a resume it is taken over the resumed steps only."""
    rows = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.endswith(TIMES) and k != "train_loss"}
        for row in rows
    ]


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(params=["classification_run", "causal_run"])
def finished(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def files(tmp_path: Path, bert_folder: str, reviews_file: str) -> dict[str, str]:
    """Return what the commands below name: {model}, {data}, {tmp}, and {out}, which must not come
    into being."""
    return {
        "model": bert_folder,
        "data": reviews_file,
        "tmp": str(tmp_path),
        "out": str(tmp_path / "out"),
    }


def arguments(command_line: str, files: dict[str, str]) -> list[str]:
    """Return the words of a command line, with names put in. Of an option that takes one value, the
    last takes the place of those before it: the command line itself refuses two."""
    words = [word.format_map(files) for word in command_line.split()]
    for option in ("--model", "--output", "--task", "--label", "--epochs", "--device"):
        for place in [i for i, word in enumerate(words) if word == option][-2::-1]:
            del words[place : place + 2]
    return words


TRAIN = "train --model {model} --data {data} --output {out}"
