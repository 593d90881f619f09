"""Every recipe as a dry run at full size: random weights of the real shapes, two steps of two short
records each.

    python benchmarks/recipes.py [--only NAME] [--output FILE.json]

Neither the hub nor any weights are needed: the sizes of each model are written below, the tokenizer
knows a few words, the records are made up and have the columns of the data set. Everything else is
the recipe's, but for batches of 2 without accumulation and at most 8 tokens written. Each recipe
has a process of its own, whose peak memory is the figure (CUDA's allocator where there is a GPU,
else the resident set). Rows of earlier calls stay in the file. Not part of the tests, which do the
same with narrow models (`tests/test_recipes.py`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from adaptive_lora.cli.quiet import quiet
from adaptive_lora.files import read_recipe
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.runs.run import run

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parent / "recipes").glob("*.yaml"))
# Hub name -> configuration class, and what its config.json says beyond that class's defaults.
FULL_SIZE: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "distilbert/distilbert-base-uncased": (DistilBertConfig, {}),
    "google-bert/bert-base-uncased": (BertConfig, {}),
    "google-bert/bert-base-cased": (BertConfig, {"vocab_size": 28_996}),
    "google/vit-base-patch16-224-in21k": (ViTConfig, {}),
    "microsoft/DialoGPT-medium": (GPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "facebook/bart-large": (BartConfig, {}),
    "microsoft/deberta-v3-base": (
        DebertaV2Config,
        {
            "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072, "type_vocab_size": 0, "relative_attention": True,
            "position_buckets": 256,
            "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
}  # fmt: skip
WORDS = ["the", "film", "meal", "day", "was", "good", "bad", "and", "long", "what", "one"]
# Model type -> special tokens in the order of their numbers, template of a text, of a pair, names
# of the tokens.
BERT_LIKE = (
    ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
    {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
)  # fmt: skip
SPECIAL: dict[str, tuple[tuple[str, ...], str, str | None, dict[str, str]]] = {
    "gpt2": (("<|endoftext|>",), "$A", None,
             dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")),
    "bart": (
        ("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>", "<s> $A </s> </s> $B </s>",
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}  # fmt: skip


def model_config(name: str, **narrower: Any) -> PretrainedConfig:
    """Return the configuration of a model on the hub, with sizes changed as given."""
    kind, sizes = FULL_SIZE[name]
    return kind(**{**sizes, **narrower})


def write_model(folder: Path, config: PretrainedConfig) -> None:
    """Make a model folder without weights: the configuration, and a tokenizer or image processor
    that fits it."""
    config.save_pretrained(folder)
    if isinstance(config, ViTConfig):
        size = {"height": config.image_size, "width": config.image_size}
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "do_normalize": True,
            "size": size,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
        return
    special, single, pair, names = SPECIAL.get(config.model_type, BERT_LIKE)
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS, *"#:.?"])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    length = config.max_position_embeddings
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, **names
    ).save_pretrained(folder)


def write_data(folder: Path, recipe: RunConfig) -> str:
    """Make a file of short records with the columns that the recipe's data set has on the hub; a
    folder of images."""
    data, count = recipe.data, recipe.data.rows or 40
    if recipe.task == "image_classification":
        for number in range(count):
            image = folder / "images" / ("light" if number % 2 else "dark") / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (200 * (number % 2), number, 90)).save(image)
        return str(folder / "images")
    sentences = [
        f"the {('film', 'meal', 'day')[n % 3]} was {('good', 'bad')[n % 2]}" + " and long" * (n % 5)
        for n in range(count)
    ]
    records: list[dict[str, Any]] = [{"idx": number} for number in range(count)]
    for number, (record, sentence) in enumerate(zip(records, sentences, strict=True)):
        if recipe.task == "classification":
            columns = [data.text] if isinstance(data.text, str) else data.text or []
            record |= dict.fromkeys(columns, sentence) | {
                data.label: number % len(data.classes or [])
            }
        elif recipe.task == "multi_label_classification":
            labels = [name for name in ("film", "good") if name in sentence]
            record |= {"text": sentence, "label": labels}
        elif recipe.task == "token_classification":
            words = sentence.split()
            tags = ["O", "B-THING", "O", "B-VIEW", *["O"] * (len(words) - 4)]
            record |= {"tokens": words, "ner_tags": tags}
        elif recipe.task == "summarization":
            record |= {
                "id": f"{number:040x}",
                data.text: f"{sentence} . " * 3,
                data.summary: sentence,
            }
        elif recipe.task == "question_answering":
            word = sentence.split()[3]
            answers = {"text": [word], "answer_start": [sentence.index(word)]}
            record |= {
                "id": f"{number:024x}",
                "question": "what was the day ?",
                "context": sentence,
                "answers": answers,
            }
        else:
            record |= {
                "instruction": "what was good ?",
                "input": "one" * (number % 2),
                "output": sentence,
                "text": sentence,
            }
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def stand_in(recipe: Path, folder: Path, config: PretrainedConfig, **training: Any) -> RunConfig:
    """Return a recipe whose model, data and output are in `folder`, with `training` changed as
    given."""
    values = read_recipe(recipe)
    original = parse(values, origin=str(recipe))
    write_model(folder / "model", config)
    source = write_data(folder, original)
    where: dict[str, Any] = {
        "train": source,
        "extra_eval": dict.fromkeys(original.data.extra_eval_split, source),
    }
    if original.data.eval_split is not None:
        where["eval"] = source
    values |= {"model": str(folder / "model"), "output": str(folder / "run")}
    values["data"] = {**values.get("data", {}), **where}
    values["training"] = {**values["training"], **training}
    return parse(values, origin=str(recipe))


def measure(recipe: Path) -> dict[str, Any]:
    """Return the figures of one recipe: for a process of its own."""
    short = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = stand_in(recipe, Path(folder), model_config(read_recipe(recipe)["model"]), **short)
        generation = config.generation.model_copy(update={"max_new_tokens": 8, "batch_size": 2})
        started = time.perf_counter()
        result = run(config.model_copy(update={"generation": generation}), dry_run=True)
    return {
        "method": result["method"],
        # The frozen parameters: those of the base, with the head as it came.
        "base_parameters": result["total_parameters"] - result["trainable_parameters"],
        "lora_parameters": result["lora_parameters"],
        "targets": len(result["ranks"]),
        "seconds": time.perf_counter() - started,
        "training_seconds": result["train_seconds"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "machine": platform.machine(),
        "versions": result["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[path.stem for path in RECIPES], metavar="NAME")
    parser.add_argument("--output", type=Path, default=HERE / "recipes.json")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    for recipe in RECIPES:
        if options.only not in (None, recipe.stem):
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            try:
                rows[recipe.stem] = alone.submit(measure, recipe).result()
            except Exception as error:  # also a process that was killed: the others go on
                rows[recipe.stem] = {"error": f"{type(error).__name__}: {error}"}
        text = json.dumps(dict(sorted(rows.items())), indent=2)
        options.output.write_text(text + "\n", encoding="utf-8")
    print(f"\n{'':42}{'base':>14}{'LoRA':>12}{'seconds':>9}{'peak, MiB':>11}")
    for name, row in sorted(rows.items()):
        if "error" in row:
            print(f"{name:42}  {row['error']}")
        else:
            memory = row["peak_memory_bytes"] / 2**20
            print(
                f"{name:42}{row['base_parameters']:14,}{row['lora_parameters']:12,}"
                f"{row['seconds']:9.1f}{memory:11,.0f}"
            )


if __name__ == "__main__":
    main()
