"""Tags of words: every word has one, whatever the tokenizer makes of it, and entities are counted
as CoNLL counts them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from model_folders import (
    PIECES,
    Command,
    prepare,
    recipe,
    result_of,
    reviews,
    strict_json,
    tagged,
    write_jsonl,
)
from peft import PeftModel
from reference import entity_scores, entity_spans
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from adaptive_lora.adapter_tools.export import export
from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import read_config
from adaptive_lora.recipe.config import parse
from adaptive_lora.runs import use
from adaptive_lora.runs.memory_plan import plan
from adaptive_lora.runs.run import run
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import IGNORED, ROW
from adaptive_lora.tasks.conll import read_conll
from adaptive_lora.tasks.token_classification import WORDS, TokenClassification

pytest_plugins = ("model_folders",)
TASK = "token_classification"
TAGS = ["O", *(f"{letter}-{kind}" for letter in "BIESLU" for kind in ("X", "Y")), "B", "I"]
sentences = st.lists(st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), max_size=8), min_size=1)


def tags_of(prepared: Any, features: Dataset) -> dict[int, dict[int, str]]:
    """Return {row: {word: tag}} of what bears loss."""
    found: dict[int, dict[int, str]] = {}
    for row, words, labels in zip(features[ROW], features[WORDS], features["labels"], strict=True):
        assert [word == IGNORED for word in words] == [label == IGNORED for label in labels]
        for word, label in zip(words, labels, strict=True):
            if word != IGNORED:
                assert found.setdefault(row, {}).setdefault(word, "") == ""
                found[row][word] = prepared.task.order[label]
    return found


@pytest.fixture(scope="module")
def tags_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("tags") / "tags.jsonl", tagged(80))


@pytest.fixture(scope="module")
def tagging_run(tmp_path_factory: pytest.TempPathFactory, bert_folder: str, tags_file: str) -> Path:
    folder = tmp_path_factory.mktemp("tagging") / "run"
    training = {"num_train_epochs": 12, "save_strategy": "no", "eval_strategy": "no"}
    run(parse(recipe(bert_folder, tags_file, folder, task=TASK, training=training)))
    return folder


@given(sentences)
def test_entities_are_those_of_the_definition(pairs: list[list[tuple[str, str]]]) -> None:
    predicted, truth = ([[pair[side] for pair in some] for some in pairs] for side in (0, 1))
    for tags in (*predicted, *truth):
        assert set(metrics.spans(tags)) == entity_spans(
            [tag.replace("L", "E", 1).replace("U", "S", 1) for tag in tags]
        )
    if not any(truth):
        with pytest.raises(InputError, match="one word at least"):
            metrics.entities(predicted, truth)
        return
    scores = metrics.entities(predicted, truth)
    assert scores.pop("accuracy") == pytest.approx(
        np.mean([p == t for some in pairs for p, t in some])
    )
    assert scores == {
        k: pytest.approx(float(v)) for k, v in entity_scores(predicted, truth).items()
    }


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O", [(0, 1, "A")]),
        ("B-A B-A", [(0, 0, "A"), (1, 1, "A")]),
        ("O I-A I-A", [(1, 2, "A")]),  # IOB1, and a predicted entity without its beginning
        ("B-A I-B", [(0, 0, "A"), (1, 1, "B")]),
        ("B-A E-A S-A", [(0, 1, "A"), (2, 2, "A")]),
        ("B-A L-A U-A", [(0, 1, "A"), (2, 2, "A")]),
        ("E-A I-A", [(0, 0, "A"), (1, 1, "A")]),
        ("B-x-y I-x-y", [(0, 1, "x-y")]),
        ("B I O I", [(0, 1, ""), (3, 3, "")]),
        ("O O", []),
    ],
)
def test_spans(tags: str, expected: list[tuple[int, int, str]]) -> None:
    assert metrics.spans(tags.split()) == expected


def test_scores_of_no_entity_are_zero_and_sentences_must_have_a_tag_for_every_word() -> None:
    assert metrics.entities([["O"]], [["O"]]) == {
        "f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0,
    }  # fmt: skip
    with pytest.raises(InputError, match="a tag for every word"):
        metrics.entities([["O"]], [["O", "O"]])
    assert metrics.tags([["N", "V", "N"]], [["N", "N", "N"]]) == {
        "accuracy": pytest.approx(2 / 3), "f1_macro": pytest.approx(0.4),
    }  # fmt: skip


def test_the_first_token_of_a_word_bears_its_tag(bert_folder: str, tags_file: str) -> None:
    """As `is_split_into_words` has it."""
    prepared = prepare(bert_folder, tags_file, task=TASK, eval=tags_file)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    pieces = 0
    for item, record in zip(prepared.eval, tagged(80), strict=True):
        encoded = tokenizer(record["tokens"], is_split_into_words=True)
        assert item["input_ids"] == encoded["input_ids"]
        before, expected = None, []
        for word in encoded.word_ids():
            expected.append(IGNORED if word is None or word == before else word)
            before = word
        assert item[WORDS] == expected
        pieces += len(encoded.word_ids()) - 2 - len(record["tokens"])
    assert pieces > 0  # some words have two
    found = tags_of(prepared, prepared.eval)
    assert [list(found[row].values()) for row in sorted(found)] == [
        record["ner_tags"] for record in tagged(80)
    ]


def byte_level(folder: Path) -> None:
    """Write a tokenizer as GPT-2's: bytes, the blank before a word part of its first token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [" ".join(record["tokens"]) for record in tagged(40)]
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, pad_token="!", cls_token="#"
    ).save_pretrained(str(folder))


def metaspace(folder: Path) -> None:
    """Write a tokenizer as SentencePiece's: a token of the blank alone before odd words."""
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), *(
        (f"▁{piece}", -3.0) for piece in PIECES if piece.isalpha()
    ), *((letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzé")], unk_id=0))  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, pad_token="<unk>", unk_token="<unk>"
    ).save_pretrained(str(folder))


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_every_word_has_its_tag_with_other_kinds_of_tokenizers(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=320, num_hidden_layers=1, max_position_embeddings=64, **sizes)
    config.save_pretrained(tmp_path)
    draw = random.Random(0)
    records = []
    for record in tagged(40):
        words = [draw.choice([word, word + "é", "xé", "東京"]) for word in record["tokens"]]
        records.append({**record, "tokens": words})
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(str(tmp_path), file, task=TASK, eval=file, longest=20)
    found = tags_of(prepared, prepared.eval)
    assert [list(found[row].values()) for row in sorted(found)] == [
        record["ner_tags"] for record in records
    ]
    assert not [note for note in prepared.task.notes if "has no token" in note]


def test_a_long_record_is_cut_into_inputs_and_no_word_is_lost(
    bert_folder: str, tmp_path: Path
) -> None:
    long = {key: [one for record in tagged(12) for one in record[key]] for key in tagged(1)[0]}
    file = write_jsonl(tmp_path / "x.jsonl", [*tagged(12), long])
    prepared = prepare(bert_folder, file, task=TASK, eval=file, longest=16)
    assert max(map(len, prepared.eval["input_ids"])) == 16
    found = tags_of(prepared, prepared.eval)
    assert list(found[12].values()) == long["ner_tags"]
    assert prepared.eval[ROW].count(12) > 4
    assert any("13 records; where one is cut, the rest is read" in n for n in prepared.task.notes)
    dropped = prepare(bert_folder, file, task=TASK, eval=file, longest=16, too_long="drop")
    assert set(dropped.eval[ROW]) == set(range(12))
    with pytest.raises(InputError, match=r"x\.jsonl, record 13: \d+ tokens are more than 16"):
        prepare(bert_folder, file, task=TASK, eval=file, longest=16, too_long="refuse")


def test_words_without_a_token_are_counted_and_get_a_tag_all_the_same(
    bert_folder: str, tagging_run: Path, tmp_path: Path
) -> None:
    records = [{**record, "tokens": list(record["tokens"])} for record in tagged(12)]
    records[2]["tokens"][0] = " "
    file = write_jsonl(tmp_path / "x.jsonl", records)
    prepared = prepare(bert_folder, file, task=TASK, eval=file)
    assert "evaluation: 1 words of which the tokenizer has no token" in prepared.task.notes
    use.predict(use.open_run(tagging_run), file, tmp_path / "out.jsonl")
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["prediction"]) for row in rows] == [len(row["tokens"]) for row in rows]
    assert rows[2]["prediction"][0] == "O"


def test_a_tagger_learns_and_what_it_saved_is_what_it_scored(
    tagging_run: Path, tags_file: str, tmp_path: Path
) -> None:
    result = result_of(tagging_run)
    assert (result["status"], result["metric"], result["task"]) == ("ok", "eval_f1", TASK)
    # All "O" has f1 0; what the random encoder lacks is the order of two numbers.
    assert result["metrics"]["eval_f1"] > 0.5
    opened = use.open_run(tagging_run)
    found = use.evaluate(opened)
    assert found.pop("records") == 8
    assert found == {k: pytest.approx(result["metrics"][k], rel=1e-6) for k in found}
    assert list(found) == ["eval_f1", "eval_precision", "eval_recall", "eval_accuracy", "eval_loss"]

    bare = write_jsonl(tmp_path / "in.jsonl", [{"tokens": r["tokens"]} for r in tagged(80)])
    assert use.predict(opened, bare, tmp_path / "out.jsonl") == 80
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [record["tokens"] for record in tagged(80)]
    whole = use.evaluate(opened, tags_file)
    written = metrics.entities([r["prediction"] for r in rows], [r["ner_tags"] for r in tagged(80)])
    assert written == {k: pytest.approx(whole[f"eval_{k}"]) for k in written}
    first = write_jsonl(tmp_path / "one.jsonl", [{"tokens": tagged(80)[7]["tokens"]}])
    use.predict(opened, first, tmp_path / "one-out.jsonl")
    assert strict_json((tmp_path / "one-out.jsonl").read_text()) == rows[7]


def test_a_record_of_several_inputs_is_predicted_as_a_whole(
    tagging_run: Path, tmp_path: Path
) -> None:
    opened = use.open_run(tagging_run)
    words = [word for record in tagged(20) for word in record["tokens"]]
    file = write_jsonl(tmp_path / "in.jsonl", [{"tokens": words}, {"tokens": ["one", "day"]}])
    use.predict(opened, file, tmp_path / "out.jsonl")
    rows = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["prediction"]) for row in rows] == [len(words), 2]
    assert all(row["prediction"].count(None) == 0 for row in rows)


def test_stock_peft_and_the_exports_read_the_tagger(
    tagging_run: Path, bert_folder: str, tmp_path: Path
) -> None:
    opened = use.open_run(tagging_run)
    ids = {"input_ids": torch.tensor([[2, 6, 8, 12, 9, 3]])}
    with torch.no_grad():
        expected = opened.model.eval()(**ids).logits
    base = AutoModelForTokenClassification.from_pretrained(bert_folder, num_labels=4)
    stock = PeftModel.from_pretrained(base, tagging_run / "adapter").eval()
    export(tagging_run, "merged", tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for other in (stock, merged):
            torch.testing.assert_close(other(**ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(opened.task.order))
    assert "B-AMOUNT" in merged.config.label2id


def test_a_model_that_reads_from_the_left_tags_too(
    llama_folder: str, tags_file: str, tmp_path: Path
) -> None:
    training = {"num_train_epochs": 1, "save_strategy": "no"}
    result = run(
        parse(recipe(llama_folder, tags_file, tmp_path / "run", task=TASK, training=training))
    )
    assert result["metric"] == "eval_f1"
    use.evaluate(use.open_run(tmp_path / "run"))


def test_tags_by_number_have_the_names_of_the_column_of_the_recipe_or_of_the_base(
    bert_folder: str, tmp_path: Path
) -> None:
    names = ["O", "B-AMOUNT", "I-AMOUNT", "B-OPINION"]
    numbers = [
        {**record, "ner_tags": [names.index(tag) for tag in record["ner_tags"]]}
        for record in tagged(20)
    ]
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
    )
    columns = {key: [record[key] for record in numbers] for key in ("tokens", "ner_tags")}
    parquet = str(tmp_path / "x.parquet")
    Dataset.from_dict(columns, features=features).to_parquet(parquet)
    jsonl = write_jsonl(tmp_path / "x.jsonl", numbers)
    base = tmp_path / "tagger"
    config = BertConfig.from_pretrained(bert_folder, id2label=dict(enumerate(names)))
    torch.manual_seed(0)
    BertForTokenClassification(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(str(base))
    expected = [record["ner_tags"] for record in tagged(20)]
    for model, file, data in (
        (bert_folder, parquet, {}),
        (bert_folder, jsonl, {"classes": names}),
        (str(base), jsonl, {}),
    ):
        prepared = prepare(model, file, task=TASK, eval=file, **data)
        found = tags_of(prepared, prepared.eval)
        assert [list(found[row].values()) for row in sorted(found)] == expected
        assert prepared.task.metrics[0] == "f1"
    prepared = prepare(bert_folder, jsonl, task=TASK, eval=jsonl)
    assert prepared.task.metrics == ("accuracy", "f1_macro")
    assert any("they name no entities" in note for note in prepared.task.notes)


def test_the_order_of_the_outputs_is_the_bases_own(
    bert_folder: str, tags_file: str, tmp_path: Path
) -> None:
    names = ["B-OPINION", "O", "I-AMOUNT", "B-AMOUNT"]
    config = BertConfig.from_pretrained(bert_folder, id2label=dict(enumerate(names)))
    BertForTokenClassification(config).save_pretrained(tmp_path / "tagger")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(str(tmp_path / "tagger"))
    prepared = prepare(str(tmp_path / "tagger"), tags_file, task=TASK)
    assert prepared.task.order == names
    assert prepared.task.model_arguments()["id2label"] == dict(enumerate(names))


BAD = [
    ({"ner_tags": ["O"]}, r"record 3: column 'ner_tags' is \['O'\]; expected a list of \d tags"),
    ({"ner_tags": None}, r"record 3: column 'ner_tags' is None; expected a list of \d tags"),
    ({"tokens": []}, r"record 3: column 'tokens' is \[\]; expected a list of words"),
    ({"tokens": ["", " "]}, r"record 3: column 'tokens' is \['', ' '\]; expected a list of words"),
    ({"tokens": None}, r"record 3: column 'tokens' is None; expected a list of words"),
    ({"tokens": [None, "a"]}, r"record 3: column 'tokens' is \[None, 'a'\]; expected a list"),
    ({"tokens": ["a"], "ner_tags": [None]}, r"record 3: column 'ner_tags' is None; expected a"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_record_that_cannot_be_tagged_is_named(
    change: dict[str, Any], message: str, bert_folder: str, tmp_path: Path
) -> None:
    records = tagged(10)
    records[2] = {**records[2], **change}
    file = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(InputError, match=f"x.jsonl, {message}"):
        prepare(bert_folder, file, task=TASK, eval=file)


def test_tags_that_training_has_not_and_texts_are_refused_in_a_sentence(
    bert_folder: str, tags_file: str, tmp_path: Path, command: Command
) -> None:
    other = write_jsonl(tmp_path / "e.jsonl", [{"tokens": ["a"], "ner_tags": ["B-NEW"]}])
    texts = write_jsonl(tmp_path / "t.jsonl", [{"tokens": r["text"], "ner_tags": ["O"]}
                                               for r in reviews(8)])  # fmt: skip
    flags = ["train", "--model", bert_folder, "--task", TASK, "--output", tmp_path / "out"]
    for data, sentence in (
        (["--data", tags_file, "--eval-data", other], "e.jsonl, record 1: label 'B-NEW' in column"),
        (["--data", texts], "column 'tokens' is 'the day is great'; expected a list of words"),
    ):
        ended = command(*flags, *data)
        assert ended.code == 2
        assert sentence in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_data_check_guesses_the_task_and_shows_a_tag_after_each_word(
    bert_folder: str, tags_file: str, command: Command
) -> None:
    ended = command("data", "check", "--model", bert_folder, "--data", tags_file)
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.split())
    for part in (
        "task token_classification, a guess: the columns tokens, ner_tags for an encoder",
        "tags of the words in tokens: 4 classes (B-AMOUNT, B-OPINION, I-AMOUNT, O)",
        "training: O ",
        "[CLS] ",
        "the [O] meal ##s [O] two [B-AMOUNT] four [I-AMOUNT] is [O] fine [B-OPINION] and [O] [SEP]",
    ):
        assert part in text, part


CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
WITH_COMMENTS = "# id 1 domain=en\n#\tO\nfine\tO\n\n# id 2\nNew York\tB-LOC\n\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONLL_2003, [(["EU", "rejects"], ["B-ORG", "O"]),
                      (["Peter", "Blackburn"], ["B-PER", "I-PER"])]),
        (CONLL_2003.replace("\n", "\r\n"), [(["EU", "rejects"], ["B-ORG", "O"]),
                                            (["Peter", "Blackburn"], ["B-PER", "I-PER"])]),
        (WITH_COMMENTS, [(["#", "fine"], ["O", "O"]), (["New York"], ["B-LOC"])]),
        ("", []),
    ],
)  # fmt: skip
def test_conll_files_are_read(text: str, expected: list[Any]) -> None:
    found = read_conll(text, Path("x.conll"))
    assert list(zip(found["tokens"], found.get("ner_tags", []), strict=True)) == expected
    assert read_conll("a\nb\n\nc\n", Path("x.conll")) == {"tokens": [["a", "b"], ["c"]]}


def test_a_line_of_other_columns_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.conll, line 4: 1 columns where the first line of w"):
        read_conll("a O\nb O\n\nc\n", Path("x.conll"))


def test_a_run_reads_conll(bert_folder: str, tmp_path: Path, command: Command) -> None:
    blocks = ["\n".join(map(" ".join, zip(*r.values(), strict=True))) for r in tagged(40)]
    file = tmp_path / "tags.conll"
    file.write_text("\n\n".join(blocks) + "\n")
    output = tmp_path / "run"
    ended = command(
        "train", "--model", bert_folder, "--data", file, "--output", output, "--epochs", "1",
        "--set", "training.dataloader_pin_memory=false",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert result_of(output)["task"] == TASK
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["task_type"] == (
        "TOKEN_CLS"
    )
    bad = tmp_path / "bad.conll"
    bad.write_text("a O\nb\n")
    ended = command("evaluate", output, "--data", bad)
    assert (ended.code, "bad.conll, line 2: 1 columns" in ended.err) == (2, True)


def test_a_plan_counts_a_tagger(bert_folder: str, tags_file: str) -> None:
    found = plan(parse(recipe(bert_folder, tags_file, "never", task=TASK)), device="cpu")
    assert found.peak > 0


def test_a_tokenizer_without_offsets_is_refused(bert_folder: str) -> None:
    class Slow:
        is_fast, model_max_length = False, 48

    config = parse(recipe(bert_folder, "x.jsonl", "never", task=TASK))
    with pytest.raises(InputError, match=r"does not say which letters a token stands for"):
        TokenClassification(config, Slow(), read_config(bert_folder))  # type: ignore[arg-type]
