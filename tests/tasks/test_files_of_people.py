"""Plain text, JSON in the forms that people have, texts in lists, several references: all read,
with nothing lost."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import Command, articles, instructions, prepare, questions, reviews, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import DataConfig
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED
from adaptive_lora.tasks.data import load_splits
from adaptive_lora.tasks.language_model import BYTES, byte_sizes
from adaptive_lora.tasks.summarization import REFERENCES
from adaptive_lora.tasks.tables import read_table
from adaptive_lora.tasks.text_files import Form, Unit

pytest_plugins = ("model_folders",)

STORY = "the day is good\r\nand the night\n\n \n  a \u2028 film\n\n\nof a meal"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", ["the day is good", "and the night", "  a \u2028 film", "of a meal"]),
        ("paragraph", ["the day is good\r\nand the night", "  a \u2028 film", "of a meal"]),
        ("file", [STORY]),
    ],
)
def test_a_text_file_is_lines_paragraphs_or_one_text(
    unit: Unit, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text(STORY, encoding="utf-8", newline="")
    notes: list[str] = []
    table = read_table(str(tmp_path / "x.txt"), form=Form(unit=unit), notes=notes)
    assert table["text"][:] == expected
    assert notes == [f"{tmp_path / 'x.txt'}: {len(expected)} records, each a {unit}, of 8 lines"]
    (tmp_path / "x.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=r"x.txt has no records"):
        read_table(str(tmp_path / "x.txt"), form=Form(unit=unit))


def test_a_text_file_of_columns_is_one_where_its_delimiter_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text('Quality\t#1 String\n1\ta "day\n')
    read = read_table(str(tmp_path / "x.txt"), form=Form(delimiter="\t"))
    assert read.to_list() == [{"Quality": 1, "#1 String": 'a "day'}]


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("longest", [3, 7, 40])
def test_a_file_in_windows_teaches_every_token_once(
    opening: bool, longest: int, llama_folder: str, tmp_path: Path
) -> None:
    text = "the day is good and the night\nof a film is a poor meal\n" * 7
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "eval.txt").write_text(text[:100])
    prepared = prepare(
        llama_folder, str(tmp_path / "x.txt"), task="causal_lm", unit="file", longest=longest,
        eval=str(tmp_path / "eval.txt"),
    )  # fmt: skip
    task, split = prepared.task, load_splits(prepared.task.data).train
    if not opening:
        task.tokenizer = _plain(task.tokenizer)
    features = task.features(split)
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    learned = [label for row in features["labels"] for label in row if label != IGNORED]
    assert learned == [*ids[0 if opening else 1 :], task.tokenizer.eos_token_id]
    assert max(map(len, features["input_ids"])) <= longest
    assert sum(features[BYTES]) == len(text.encode()) - (0 if opening else len("the"))
    assert f"in {len(features)} windows of at most {longest}; nothing is cut" in task.notes[-2]


def _plain(tokenizer: Any) -> Any:
    """Return the tokenizer without an opening token."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    from tokenizers.processors import ByteLevel

    inner.post_processor = ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")


def test_the_end_of_a_text_is_held_out_and_nothing_between_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a story\n" for i in range(50)) + "the end"
    (tmp_path / "x.txt").write_text(text)
    data: dict[str, Any] = {"train": str(tmp_path / "x.txt"), "unit": "file"}
    splits = load_splits(DataConfig(**data, eval_size=0.2))
    start, end = splits.train.records["text"][0], splits.eval.records["text"][0]
    assert start + end == text
    assert start.endswith("\n")
    assert 0.1 < len(end) / len(text) < 0.2
    with pytest.raises(InputError, match=r"eval_size is 5; expected a fraction of each text"):
        load_splits(DataConfig(**data, eval_size=5))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(InputError, match=r"record 1 in .*x.txt is too short to hold out its end"):
        load_splits(DataConfig(**data))


def test_a_whole_file_is_for_a_task_that_reads_windows(bert_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.unit is file, and classification reads no text in"):
        prepare(bert_folder, str(tmp_path / "x.txt"), unit="file")


def test_a_text_file_trains_by_its_name_alone(
    llama_folder: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "x.txt").write_text("the day is good and the night\nof a film\n" * 40)
    for unit in ("line", "file"):
        ended = command(
            "train", "--model", llama_folder, "--data", tmp_path / "x.txt", "--output",
            tmp_path / unit, "--epochs", 1, "--set", f"data.unit={unit}", "--set",
            "training.warmup_steps=0", "--set", "training.dataloader_pin_memory=false",
        )  # fmt: skip
        assert (ended.code, ended.err) == (0, "")
        assert "plain text of the column 'text'" in ended.out


RECORDS = [{"text": "a day", "label": "x"}, {"text": "a night", "label": "y"}]


@pytest.mark.parametrize(
    "value",
    [
        RECORDS,
        {"0": RECORDS[0], "1": RECORDS[1]},
        {"first": RECORDS[0], "second": RECORDS[1]},
        {"data": RECORDS},
        {"version": "1.1", "n": 2, "records": RECORDS, "empty": []},
        {"text": ["a day", "a night"], "label": ["x", "y"]},
        {"text": {"0": "a day", "1": "a night"}, "label": {"0": "x", "1": "y"}},
    ],
)
def test_records_in_json_are_found_in_every_form(value: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value, indent=1))
    assert read_table(str(tmp_path / "x.json")).to_list() == RECORDS


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    assert read_table(str(tmp_path / "x.json")).to_list() == RECORDS
    (tmp_path / "x.json").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match=r"x.json, line 2, column 10: not valid JSON"):
        read_table(str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"train": RECORDS, "test": RECORDS}, "holds 2 lists of records (train, test)"),
        ({"a": 1}, "holds a dict without records in it"),
        ("a", "holds a str without records in it"),
        ({}, "holds a dict without records in it"),
        ([{"paragraphs": [{"qas": [{}]}]}], "record 1: paragraphs as SQuAD has them"),
    ],
)
def test_json_without_one_list_of_records_is_refused(
    value: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as error:
        read_table(str(tmp_path / "x.json"))
    assert words in str(error.value)


def test_squad_as_it_is_published_is_read(bert_folder: str, tmp_path: Path) -> None:
    flat = questions(20)
    articles = [
        {
            "title": "Days",
            "paragraphs": [
                {
                    "context": record["context"],
                    "qas": [
                        {
                            "id": str(i),
                            "question": record["question"],
                            "answers": [{"text": text, "answer_start": start}],
                        }
                        for text, start in zip(*record["answers"].values(), strict=True)
                    ],
                }
            ],
        }
        for i, record in enumerate(flat)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    same = write_jsonl(tmp_path / "flat.jsonl", flat)
    published, plain = (
        prepare(bert_folder, file, task="question_answering", stride=4)
        for file in (str(tmp_path / "x.json"), same)
    )
    assert published.train.to_list() == plain.train.to_list()


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.txt"])
def test_packed_files_are_read_and_broken_ones_named(name: str, tmp_path: Path) -> None:
    content = {"x.csv": "text,n\na,1\n", "x.tsv": "text\tn\na\t1\n", "x.txt": "a\n"}
    content["x.json"] = '[{"text": "a", "n": 1}]\n'
    plain = content.get(name, '{"text": "a", "n": 1}\n').encode()
    (tmp_path / name).write_bytes(plain)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(plain))
    assert read_table(str(packed)).to_list() == read_table(str(tmp_path / name)).to_list()
    for broken in (gzip.compress(plain)[:-9], plain):
        packed.write_bytes(broken)
        with pytest.raises(InputError, match=rf"{packed} is no whole gzip file"):
            read_table(str(packed))


def test_a_text_in_a_list_of_sentences_is_one_text(bert_folder: str, tmp_path: Path) -> None:
    records = reviews(20)
    split = [record | {"text": record["text"].split()} for record in records]
    listed, plain = (
        prepare(bert_folder, write_jsonl(tmp_path / f"{i}.jsonl", some), text="text")
        for i, some in enumerate((split, records))
    )
    assert listed.train.to_list() == plain.train.to_list()
    split[3]["text"] = []
    with pytest.raises(InputError, match=r"record 4: column 'text' is \[\]; expected text"):
        prepare(bert_folder, write_jsonl(tmp_path / "x.jsonl", split), text="text")


def test_a_list_as_input_of_an_instruction_is_joined(llama_folder: str, tmp_path: Path) -> None:
    records: list[Any] = [
        record | {"input": record["input"].split()} for record in instructions(20)
    ]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(llama_folder, file, task="causal_lm")
    plain = prepare(
        llama_folder, write_jsonl(tmp_path / "p.jsonl", instructions(20)), task="causal_lm"
    )
    assert prepared.train["input_ids"][:] == plain.train["input_ids"][:]


@pytest.mark.parametrize("form", ["list", "numbered", "named"])
def test_all_references_are_scored_and_the_first_is_learned(
    form: str, t5_folder: str, tmp_path: Path
) -> None:
    """A list as SciTLDR's `target`, columns as summary1, summary2, ..., or columns by name."""
    plain = articles(20)
    others = [["the film", "a poor meal"][: i % 3] for i in range(20)]
    data: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for record, more in zip(plain, others, strict=True):
        every = [record["summary"], *more]
        padded = dict(zip("123", [*every, None, None], strict=False))
        if form == "list":
            records.append({"text": record["text"], "target": every})
            data = {"summary": "target"}
        elif form == "numbered":
            records.append(
                {"text": record["text"], **{f"summary{i}": text for i, text in padded.items()}}
            )
        else:
            records.append({"text": record["text"], **padded})
            data = {"summary": ["1", "2", "3"]}
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(t5_folder, file, task="summarization", **data)
    alone = prepare(t5_folder, write_jsonl(tmp_path / "p.jsonl", plain), task="summarization")
    for given, one in ((prepared.train, alone.train), (prepared.eval, alone.eval)):
        rest = [name for name in given.column_names if name != REFERENCES]
        assert given.select_columns(rest).to_list() == one.select_columns(rest).to_list()
    found = {tuple(texts) for part in (prepared.train, prepared.eval) for texts in part[REFERENCES]}
    assert found == {(r["summary"], *more) for r, more in zip(plain, others, strict=True)}
    assert "up to 3 references of a text; the first is learned" in " ".join(prepared.task.notes)


def test_a_record_without_any_reference_is_named(t5_folder: str, tmp_path: Path) -> None:
    records = [{"text": "a day", "summary1": "day", "summary2": None} for _ in range(20)]
    records[6]["summary1"] = ""
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(InputError, match=r"record 7: column 'summary1 \+ summary2' is ''"):
        prepare(t5_folder, file, task="summarization")
    with pytest.raises(InputError, match="has no column 'summary3'"):
        prepare(t5_folder, file, task="summarization", summary=["summary1", "summary3"])


def test_rouge_of_several_references_is_the_largest_of_each_score() -> None:
    draw = random.Random(0)
    words = ["cat", "sat", "mat", "dog", "ran", "on", "the"]

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 9)))

    predictions = [text() for _ in range(60)]
    references = [[text() for _ in range(draw.randint(1, 4))] for _ in predictions]
    expected: dict[str, list[float]] = {name: [] for name in metrics.ROUGE_TYPES}
    for prediction, several in zip(predictions, references, strict=True):
        each = [metrics.rouge([prediction], [one]) for one in several]
        for name, values in expected.items():
            values.append(max(scores[name] for scores in each))
    found = metrics.rouge(predictions, references)
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_the_best_reference_may_be_another_for_each_score() -> None:
    """By hand: one reference has both words in the other order, one has the pair among others."""
    scores = metrics.rouge(["cat sat"], [["sat cat", "cat sat on the mat there now"]])
    assert scores["rouge1"] == pytest.approx(100.0)  # of the first: 2 of 2, 2 of 2
    assert scores["rouge2"] == pytest.approx(100 * 2 / 7)  # of the second: 1 of 1, 1 of 6


# What each record of a text that is spelled with special tokens, odd letters and spaces counts.
SPELLED = "the </s> day  is <s> good [PAD] naïve €  "


@pytest.mark.parametrize("longest", [3, 4, 6, 9, 40])
def test_bytes_are_those_of_the_text_as_it_stands(
    longest: int, llama_folder: str, tmp_path: Path
) -> None:
    """A special token that a text spells is text: it bears loss, and its bytes count."""
    records = [{"text": SPELLED}] * 10
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(llama_folder, file, task="causal_lm", text="text", longest=longest)
    offsets = prepared.task.tokenizer(
        SPELLED, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    kept = offsets[: longest - 1]
    end = len(SPELLED) if len(kept) == len(offsets) else kept[-1][1]
    assert set(prepared.train[BYTES]) == {len(SPELLED[:end].encode())}


def test_bytes_of_a_byte_level_tokenizer_are_its_tokens() -> None:
    """A tokenizer of bytes has a token for each: cut anywhere, as many bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({mark: i for i, mark in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = "naïve €  \U0001f600!\n"
    ends = [end for _, end in inner.encode(text).offsets]
    assert len(ends) == len(text.encode())
    assert byte_sizes(text, ends) == [1] * len(ends)


def test_sizes_of_tokens_are_all_the_bytes() -> None:
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("aß€\U0001f600 \n") for _ in range(draw.randint(1, 12)))
        ends = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(1, 15)))
        sizes = byte_sizes(text, ends)
        assert len(sizes) == len(ends)
        assert sum(sizes) == len(text.encode())
        assert min(sizes) >= 0
