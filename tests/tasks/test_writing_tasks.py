"""Tasks that write: what is cut, what bears loss, what is counted, and text that does not depend on
its batch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_gpt2
from model_folders import (
    VOCABULARY,
    articles,
    instructions,
    prepare,
    recipe,
    reviews,
    rows_of,
    write_jsonl,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from adaptive_lora.errors import InputError
from adaptive_lora.recipe.config import GenerationConfig, parse
from adaptive_lora.runs.loading import load_task
from adaptive_lora.runs.run import run
from adaptive_lora.runs.task_trainer import TaskTrainer
from adaptive_lora.tasks import Task, metrics
from adaptive_lora.tasks.base import IGNORED
from adaptive_lora.tasks.data import load_splits
from adaptive_lora.tasks.generation import generate
from adaptive_lora.tasks.language_model import BYTES, PROMPT
from adaptive_lora.tasks.summarization import REFERENCES

pytest_plugins = ("model_folders",)

TEMPLATE = "Input: {text} Response:"
LENGTHS = {"longest": 20, "max_target_length": 5}


@pytest.fixture
def long_articles(tmp_path: Path) -> str:
    """Return a file of texts of 10 to 17 words, and one of 100 words with a summary of 30."""
    long = {"text": "one two three four " * 25, "summary": "good day " * 15}
    return write_jsonl(tmp_path / "x.jsonl", [*articles(20), long])


def words(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_causal_summary_loses_the_end_of_the_text_and_nothing_else(
    llama_folder: str, long_articles: str
) -> None:
    prepared = prepare(
        llama_folder,
        long_articles,
        task="summarization",
        prompt=TEMPLATE,
        eval=long_articles,
        **LENGTHS,
    )
    tokenizer = prepared.task.tokenizer
    before = [tokenizer.bos_token_id, *words(tokenizer, "Input:")]
    after = words(tokenizer, "Response:")
    room = 20 - 5 - len(before) - len(after)
    records = [*articles(20), {"text": "one two three four " * 25, "summary": "good day " * 15}]
    for item, record in zip(prepared.train, records, strict=True):
        prompt = [*before, *words(tokenizer, record["text"])[:room], *after]
        target = [*words(tokenizer, record["summary"]), tokenizer.eos_token_id][:5]
        assert item["input_ids"] == prompt + target
        assert item["labels"] == [IGNORED] * len(prompt) + target
        assert item[PROMPT] == prompt
        assert len(item["input_ids"]) <= 20
    cut = sum(len(words(tokenizer, record["text"])) > room for record in records)
    assert any(f"{cut} longer than {room} and cut" in note for note in prepared.task.notes)
    assert any("1 summaries longer than 5 tokens and cut" in note for note in prepared.task.notes)


def test_an_encoder_reads_the_text_and_a_decoder_learns_the_summary(
    t5_folder: str, long_articles: str
) -> None:
    prepared = prepare(
        t5_folder, long_articles, task="summarization", eval=long_articles, **LENGTHS
    )
    tokenizer = prepared.task.tokenizer
    end = tokenizer.eos_token_id
    for item, record in zip(prepared.train, articles(20), strict=False):
        assert item["input_ids"] == [*words(tokenizer, record["text"])[:19], end]
        assert item["labels"] == [*words(tokenizer, record["summary"]), end][:5]
    assert prepared.train[20]["input_ids"] == [
        *words(tokenizer, "one two three four " * 25)[:19],
        end,
    ]
    batch = prepared.task.collator()([prepared.train[0], prepared.train[20]])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "Input: {summary}"}, r"expected the column \{text\} once"),
        ({"prompt": "{text} {text}"}, r"expected the column \{text\} once"),
        ({"prompt": "text"}, "names no column"),
        ({"prompt": "{text"}, "is no template"),
        (
            {"longest": 8, "max_target_length": 5},
            "leave no room for a text: 10 are taken by the template and",
        ),
        ({"text": ["text", "summary"]}, "summarization reads one column"),
        ({"text": "body", "prompt": None}, "no column 'body'"),
        ({"summary": "sumary"}, r"no column 'sumary'\. Did you mean 'summary'\?"),
    ],
)
def test_a_template_or_column_that_does_not_fit_is_named(
    data: dict[str, Any], message: str, llama_folder: str, long_articles: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(llama_folder, long_articles, task="summarization", **{"prompt": TEMPLATE, **data})


@pytest.mark.parametrize("folder", ["llama_folder", "t5_folder"])
def test_rouge_is_of_what_generate_writes(
    folder: str, long_articles: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One record at a time by transformers' own `generate`; `rows` takes the first ones of the
    file."""
    model_folder = request.getfixturevalue(folder)
    auto = AutoModelForCausalLM if folder == "llama_folder" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(model_folder).eval()
    for rows in (None, 4):
        task, features, scored = evaluate(
            model,
            model_folder,
            long_articles,
            tmp_path,
            "summarization",
            generation={"max_new_tokens": 5, "rows": rows},
        )
        written = []
        for prompt in features[PROMPT][: rows or len(features)]:
            ids = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=5, do_sample=False, pad_token_id=task.tokenizer.pad_token_id,
            )[0]  # fmt: skip
            new = ids[len(prompt) :] if folder == "llama_folder" else ids
            written.append(task.tokenizer.decode(new, skip_special_tokens=True))
        expected = metrics.rouge(written, features[REFERENCES][: rows or len(features)])
        assert {name: scored[f"eval_{name}"] for name in expected} == expected


def evaluate(
    model: Any, folder: str, file: str, output: Path, task: str, **sections: Any
) -> tuple[Task, Any, dict[str, float]]:
    """Return (task, features, metrics) of an untrained model on every record of a file, in batches
    of 3."""
    data = {"eval": file, "max_length": 20, "max_target_length": 5, **sections.pop("data", {})}
    config = parse(recipe(folder, file, output, task=task, data=data, **sections))
    loaded = load_task(config)
    features = loaded.features(load_splits(config.data).eval)
    trainer = TaskTrainer(
        model=model,
        args=config.training_arguments(output_dir=str(output)),
        task=loaded,
        eval_dataset=features,
    )
    return loaded, features, trainer.evaluate()


@pytest.mark.parametrize(
    ("folder", "task"),
    [
        ("llama_folder", "causal_lm"),
        ("llama_folder", "summarization"),
        ("t5_folder", "summarization"),
    ],
)
def test_perplexity_and_bits_per_byte_equal_those_of_one_record_at_a_time(
    folder: str, task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In float64 from the model's log-probabilities; some records are cut, and count the bytes that
    are left."""
    model_folder = request.getfixturevalue(folder)
    records = [r | s for r, s in zip(instructions(10), articles(10), strict=True)]
    records[2]["summary"] = records[2]["output"] = "a good day and a fine night and poor"
    file = write_jsonl(tmp_path / "x.jsonl", records)
    auto = AutoModelForSeq2SeqLM if folder == "t5_folder" else AutoModelForCausalLM
    model = auto.from_pretrained(model_folder).eval()
    data = {"max_length": 24} if task == "causal_lm" else {}
    _, features, scored = evaluate(model, model_folder, file, tmp_path / "out", task, data=data)
    nll, tokens, text = 0.0, 0, ""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for item in features:
        learned = [label for label in item["labels"] if label != IGNORED]
        inputs = {"input_ids": torch.tensor([item["input_ids"]])}
        if folder == "t5_folder":
            inputs["decoder_input_ids"] = torch.tensor([[VOCABULARY["[PAD]"], *learned[:-1]]])
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        places = (
            range(len(learned))
            if folder == "t5_folder"
            else range(len(logits) - len(learned) - 1, len(logits) - 1)
        )
        for place, token in zip(places, learned, strict=True):
            nll -= torch.log_softmax(logits[place], 0)[token].item()
        tokens += len(learned)
        text += tokenizer.decode(learned, skip_special_tokens=True)
    assert sum(features[BYTES]) == len(text.encode())
    # fp32 against float64, some 60 summands of order 3: relative error well below 1e-5.
    assert scored["eval_token_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert scored["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert scored["eval_bits_per_byte"] == pytest.approx(
        nll / math.log(2) / len(text.encode()), rel=1e-5
    )


def test_bits_per_byte_counts_bytes_and_not_characters(llama_folder: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"instruction": "a", "output": "ä good day"}] * 8)
    prepared = prepare(llama_folder, file, task="causal_lm", eval=file)
    assert set(prepared.train[BYTES]) == {len("ä good day".encode())} == {11}


def gpt2() -> Any:
    return make_gpt2(2, vocab_size=len(VOCABULARY), initializer_range=0.5, n_positions=48).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("folder", ["llama_folder", "t5_folder", "gpt2"])
def test_what_is_written_does_not_depend_on_the_batch(
    folder: str, beams: int, llama_folder: str, request: pytest.FixtureRequest
) -> None:
    """Prompts of 1 to 47 of 48 positions. Random weights of this size keep logits apart by far more
    than rounding."""
    if folder == "gpt2":
        tokenizer, model = AutoTokenizer.from_pretrained(llama_folder), gpt2()
    else:
        path = request.getfixturevalue(folder)
        auto = AutoModelForSeq2SeqLM if folder == "t5_folder" else AutoModelForCausalLM
        tokenizer, model = AutoTokenizer.from_pretrained(path), auto.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    draw = np.random.default_rng(0)
    prompts = [
        draw.integers(6, len(VOCABULARY), n).tolist() for n in (3, 47, 1, 40, 12, 43, 40, 5, 30)
    ]
    model.train()
    written = []
    for size in (1, 4, 9):
        settings = GenerationConfig(max_new_tokens=9, num_beams=beams, batch_size=size)
        written.append(generate(model, tokenizer, prompts, settings, limit=48))
    assert written[0] == written[1] == written[2]
    assert len(set(written[0])) > 4
    assert model.training  # as it was


def test_a_prompt_that_fills_every_position_is_refused(llama_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    with pytest.raises(
        InputError, match="a prompt of 48 tokens leaves no room in the model's 48 positions"
    ):
        generate(gpt2(), tokenizer, [[7], [7] * 48], GenerationConfig(max_new_tokens=4), limit=48)


def test_dropped_records_are_counted_once(llama_folder: str, tmp_path: Path) -> None:
    """Prompts with an input have 25 tokens here, those without 17; "drop" leaves no empty record to
    drop again."""
    file = write_jsonl(tmp_path / "x.jsonl", instructions(40))
    prepared = prepare(llama_folder, file, task="causal_lm", longest=25, too_long="drop", eval=file)
    notes = [note for note in prepared.task.notes if note.startswith("training")]
    assert any("; 20 longer than 25 and dropped" in note for note in notes)
    assert not any("no token to learn from" in note for note in notes)
    assert len(prepared.train) == 20


def test_an_encoder_decoder_run_writes_what_it_learned(t5_folder: str, tmp_path: Path) -> None:
    """Every summary is the same; ROUGE at the end is far above that before training."""
    records = [record | {"summary": "the day is good"} for record in articles(40)]
    values = recipe(
        t5_folder,
        write_jsonl(tmp_path / "x.jsonl", records),
        tmp_path / "run",
        task="summarization",
    )
    values["generation"] = {"max_new_tokens": 6}
    values["training"] |= {
        "num_train_epochs": 12,
        "learning_rate": 0.03,
        "eval_on_start": True,
        "save_strategy": "no",
    }
    run(parse(values))
    scores = [row["eval_rougeLsum"] for row in rows_of(tmp_path / "run") if "eval_rougeLsum" in row]
    assert scores[-1] > 2 * scores[0]


def test_a_causal_summary_of_reviews_needs_no_template(llama_folder: str, tmp_path: Path) -> None:
    records = [{"text": record["text"], "summary": record["label"]} for record in reviews(12)]
    prepared = prepare(
        llama_folder,
        write_jsonl(tmp_path / "x.jsonl", records),
        task="summarization",
        max_target_length=4,
    )
    # so the heading is an unknown token here; a real vocabulary has it
    assert "Summary" not in VOCABULARY
    assert prepared.task.show(prepared.train[0]).endswith("]")


@pytest.mark.parametrize(
    ("task", "instead"), [("causal_lm", ""), ("summarization", " or an encoder-decoder")]
)
def test_an_encoder_is_no_causal_model(
    task: str, instead: str, bert_folder: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", articles(12))
    config = parse(recipe(bert_folder, file, "never-made", task=task))
    with pytest.raises(
        InputError,
        match=rf"is an encoder \(bert\).*; {task} expects a causal model[^;]*{instead}.*; give",
    ):
        load_task(config)


def test_a_decoder_of_an_encoders_kind_is_a_causal_model(bert_folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(bert_folder, tmp_path / "bert")
    values = json.loads((copy / "config.json").read_text()) | {"is_decoder": True}
    (copy / "config.json").write_text(json.dumps(values))
    load_task(
        parse(
            recipe(
                str(copy),
                write_jsonl(tmp_path / "x.jsonl", articles(12)),
                "never-made",
                task="causal_lm",
            )
        )
    )


@pytest.fixture(scope="session")
def bart_folder(tmp_path_factory: pytest.TempPathFactory, t5_folder: str) -> str:
    """Return a folder with an encoder-decoder that has 16 positions."""
    folder = tmp_path_factory.mktemp("models") / "bart"
    AutoTokenizer.from_pretrained(t5_folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(VOCABULARY), d_model=16, max_position_embeddings=16, encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, init_std=0.5,
        pad_token_id=VOCABULARY["[PAD]"], bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
        decoder_start_token_id=VOCABULARY["</s>"], forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_a_summary_is_no_longer_than_the_positions_of_the_decoder(
    bart_folder: str, tmp_path: Path
) -> None:
    """Summaries of 50 words for 16 positions: cut, counted, trained on, and no more than that
    written."""
    records = [record | {"summary": "good day " * 25} for record in articles(20)]
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(bart_folder, file, task="summarization", eval=file, max_target_length=100)
    assert {len(labels) for labels in prepared.train["labels"]} == {16}
    assert any("20 summaries longer than 16 tokens and cut" in note for note in prepared.task.notes)
    values = recipe(
        bart_folder, file, tmp_path / "run", task="summarization", generation={"max_new_tokens": 99}
    )
    values["training"] |= {"num_train_epochs": 1, "save_strategy": "no"}
    run(parse(values))


@pytest.mark.parametrize("folder", ["bart_folder", "t5_folder"])
def test_label_smoothing_leaves_a_decoder_its_inputs(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """They are those the model itself makes of the labels: the same logits."""
    path = request.getfixturevalue(folder)
    file = write_jsonl(tmp_path / "x.jsonl", articles(20))
    values = recipe(
        path, file, tmp_path / "run", task="summarization", training={"label_smoothing_factor": 0.1}
    )
    values["training"] |= {"num_train_epochs": 1, "save_strategy": "no"}
    task = load_task(parse(values))
    features = task.features(load_splits(task.data).train)
    batch = task.collator()([features[0], features[5]])
    model = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = model(
            **{key: value for key, value in batch.items() if key != "decoder_input_ids"}
        ).logits
        got = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert torch.equal(got, expected)
    run(parse(values))


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_not_its_logits(
    llama_folder: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=48,
        initializer_range=0.3,
        output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    file = write_jsonl(tmp_path / "x.jsonl", instructions(8))
    scores = evaluate(
        model, llama_folder, file, tmp_path / "out", "causal_lm", data={"max_length": 48}
    )[2]
    model.config.output_router_logits = False
    plain = evaluate(
        model, llama_folder, file, tmp_path / "out", "causal_lm", data={"max_length": 48}
    )[2]
    assert scores["eval_token_loss"] == plain["eval_token_loss"]
