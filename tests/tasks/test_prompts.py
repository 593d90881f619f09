"""Prompts: templates are filled literally, and what is too long is cut where it does least harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from model_folders import VOCABULARY, instructions, prepare, recipe, write_jsonl
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs.loading import load_task
from adaptive_lora.tasks import Task
from adaptive_lora.tasks.base import IGNORED, ROW
from adaptive_lora.tasks.data import load_splits
from adaptive_lora.tasks.language_model import BYTES, PROMPT, WritingTask, fill, template_columns

pytest_plugins = ("model_folders",)


def words(task: Task, text: str) -> list[int]:
    return list(task.tokenizer(text, add_special_tokens=False)["input_ids"])


def loaded(
    model: str, file: str, *, task: str = "causal_lm", data: Any = None, **sections: Any
) -> WritingTask:
    """Return the task of a recipe that trains on a whole file and evaluates on it."""
    made = load_task(
        parse(
            recipe(
                model,
                file,
                "never-made",
                task=task,
                data={"eval": file, **(data or {})},
                **sections,
            )
        )
    )
    assert isinstance(made, WritingTask)
    return made


def to_answer(task: WritingTask) -> Dataset:
    return task.features(load_splits(task.data).train, labelled=False)


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> str:
    """Return a folder with the causal model and a tokenizer that opens a text with no token."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    bare = Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
    )
    names = {"unk_token": "[UNK]", "eos_token": "</s>"}
    type(tokenizer)(tokenizer_object=bare, model_max_length=48, **names).save_pretrained(folder)
    LlamaForCausalLM.from_pretrained(llama_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{0} x", r"got the number \{0\}"),
        ("{q:d}", r"got \{q:d\}; leave out what follows 'q'"),
        ("{q!r}", r"got \{q!r\}; leave out what follows 'q'"),
        ("{q:{n}}", r"got \{q:\{n\}\}; leave out what follows 'q'"),
        ("{text!s}", r"got \{text!s\}"),
        ("{text:.20}", r"got \{text:\.20\}"),
        ("{} x", "names no column"),
        ("{q", "is no template"),
    ],
)
@pytest.mark.parametrize("task", ["causal_lm", "summarization"])
def test_a_template_that_asks_for_more_than_a_column_is_refused(
    template: str, message: str, task: str, llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(
        tmp_path / "x.jsonl", [{"q": "one", "text": "two", "output": "a", "summary": "a"}] * 4
    )
    with pytest.raises(InputError, match=message):
        prepare(llama_folder, file, task=task, prompt=template, eval=file, max_target_length=4)


def test_a_template_is_filled_literally() -> None:
    assert template_columns("{article.body} {{q}} {a[0]}") == ["article.body", "a[0]"]
    assert fill("{{q}} {a.b}{c}!", {"a.b": "{c}", "c": "{0}"}) == "{q} {c}{0}!"


def test_braces_around_the_text_of_a_summary_are_kept(llama_folder: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "one two", "summary": "a day"}] * 4)
    settings = {"prompt": "{{text}} : {text} ={{", "eval": file, "max_target_length": 4}
    prepared = prepare(llama_folder, file, task="summarization", **settings)
    ids = (
        words(prepared.task, "{text} : ")
        + words(prepared.task, "one two")
        + words(prepared.task, " ={")
    )
    assert prepared.train[0][PROMPT] == [VOCABULARY["<s>"], *ids]


@pytest.mark.parametrize("folder", ["llama_folder", "t5_folder"])
@pytest.mark.parametrize("column", ["article.body", "a: b", "art {x}", "0"])
def test_without_a_template_a_column_may_have_any_name(
    column: str, folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{column: "one two", "summary": "a day"}] * 4)
    settings = {"text": column, "eval": file, "max_target_length": 4}
    prepared = prepare(request.getfixturevalue(folder), file, task="summarization", **settings)
    learned = prepared.task.show(prepared.train[0])
    assert "one two" in learned
    assert "a day" in learned


def test_a_prompt_too_long_to_answer_loses_its_middle(llama_folder: str, tmp_path: Path) -> None:
    """48 positions, of which 10 are kept to write to: 38 for the prompt, half from each end."""
    records = [*instructions(4), {"instruction": "one two three four " * 25, "output": "is"}]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    task = loaded(llama_folder, file, data={"max_length": 48}, generation={"max_new_tokens": 10})
    features = to_answer(task)
    assert list(features[ROW]) == [0, 1, 2, 3, 4]
    whole = task.prompt_ids(records[-1]["instruction"])
    assert len(whole) > 100
    assert features[-1][PROMPT] == features[-1]["input_ids"] == whole[:19] + whole[-19:]
    assert features[-1][PROMPT][-len(words(task, "### Response:\n")) :] == words(
        task, "### Response:\n"
    )
    assert features[0][PROMPT] == task.prompt_ids(records[0]["instruction"])
    assert "training: 1 prompts are cut in their middle, to 38 tokens" in task.notes
    assert len(task.write(features[PROMPT], LlamaForCausalLM.from_pretrained(llama_folder))) == 5


@pytest.mark.parametrize(("longest", "new", "allowed"), [(21, 10, 21), (48, 500, 24)])
def test_what_a_prompt_is_allowed(
    longest: int, new: int, allowed: int, llama_folder: str, tmp_path: Path
) -> None:
    """Never more than data.max_length, and half the positions at least however much is to be
    written."""
    file = write_jsonl(tmp_path / "x.jsonl", [{"instruction": "one " * 60}])
    task = loaded(
        llama_folder, file, data={"max_length": longest}, generation={"max_new_tokens": new}
    )
    assert len(to_answer(task)[0][PROMPT]) == allowed


def test_a_given_text_is_put_into_the_template(llama_folder: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"q": "the sum", "output": "one"}] * 12)
    task = loaded(llama_folder, file, data={"prompt": "Input: {q} Response: "})
    trained = task.features(load_splits(task.data).train)
    assert (
        task.prompt_ids("the sum")
        == trained[0][PROMPT]
        == [VOCABULARY["<s>"], *words(task, "Input: the sum Response:")]
    )
    assert task.prompt_ids("{q}") == [VOCABULARY["<s>"], *words(task, "Input: {q} Response:")]


def test_one_text_does_not_fill_a_template_of_two_columns(
    llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"q": "one", "n": "two", "output": "a"}] * 12)
    task = loaded(llama_folder, file, data={"prompt": "{q} {n} {q}"})
    with pytest.raises(
        InputError,
        match=r"has the columns q, n; one prompt fills only one: use predict with a file",
    ):
        task.prompt_ids("one")


@pytest.mark.parametrize("folder", ["llama_folder", "t5_folder"])
def test_a_given_text_to_summarize_is_not_cut_in_silence(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "one two", "summary": "a day"}] * 12)
    data = {"max_length": 20, "max_target_length": 5}
    task = loaded(request.getfixturevalue(folder), file, task="summarization", data=data)
    assert len(task.prompt_ids("one two")) > 2
    with pytest.raises(
        InputError, match=r"a text of 60 tokens is more than the \d+ there is room for; shorten it"
    ):
        task.prompt_ids("one " * 60)


def test_nothing_can_be_written_after_nothing(
    bare_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(
        tmp_path / "x.jsonl", [{"q": "one", "output": "a"}, {"q": "", "output": "a"}]
    )
    data = {"prompt": "{q}"}
    task = loaded(llama_folder, file, data=data)
    assert to_answer(task)[1][PROMPT] == [VOCABULARY["<s>"]]
    with pytest.raises(
        InputError,
        match=r"x\.jsonl, record 2: the prompt is empty, and the tokenizer has no opening",
    ):
        to_answer(loaded(bare_folder, file, data=data))


def test_a_first_token_that_nothing_predicts_counts_neither_as_token_nor_as_bytes(
    bare_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "three one day"}] * 12)
    ids = [VOCABULARY[word] for word in ("three", "one", "day", "</s>")]
    bare = prepare(bare_folder, file, task="causal_lm", text="text", eval=file).train[0]
    assert (bare["input_ids"], bare["labels"], bare[BYTES]) == (
        ids,
        [IGNORED, *ids[1:]],
        len(" one day"),
    )
    opened = prepare(llama_folder, file, task="causal_lm", text="text", eval=file).train[0]
    assert (opened["labels"], opened[BYTES]) == ([IGNORED, *ids], len("three one day"))
    cut = prepare(bare_folder, file, task="causal_lm", text="text", eval=file, longest=2).train[0]
    assert (cut["labels"], cut[BYTES]) == ([IGNORED, ids[1]], len(" one"))
