"""The task of a recipe that names none: by what the model was made for, and by the columns of the
data. A guess that might as well be another is refused, with the choices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import architectures, read_config
from adaptive_lora.recipe.config import DataConfig, RunConfig, TaskName, sources, spelled
from adaptive_lora.tasks.data import only_text, read_records, summary_columns
from adaptive_lora.tasks.streaming import training_pieces
from adaptive_lora.tasks.tables import files_of
from adaptive_lora.tasks.text import LABEL_COLUMNS
from adaptive_lora.tasks.token_classification import TAG_COLUMNS, TOKENS

Kind = Literal["images", "questions", "classes", "tags", "encoder-decoder", "causal", "encoder"]
BY_ENDING: dict[str, Kind] = {
    "ForImageClassification": "images",
    "ForQuestionAnswering": "questions",
    "ForSequenceClassification": "classes",
    "ForTokenClassification": "tags",
}
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
CHAT = ("messages", "conversations")
# What a model is said to be, the tasks it takes on without being asked, and the one it is for.
ANSWERS: tuple[TaskName, ...] = (
    "classification", "regression", "question_answering", "token_classification",
    "multi_label_classification",
)  # fmt: skip
KINDS: dict[Kind, tuple[str, tuple[TaskName, ...], TaskName]] = {
    "images": ("a model of images", ("image_classification",), "image_classification"),
    "questions": ("a model that answers questions", ANSWERS, "question_answering"),
    "classes": ("a classifier", ANSWERS, "classification"),
    "tags": ("a model that tags words", ANSWERS, "token_classification"),
    "encoder-decoder": (
        "an encoder-decoder",
        ("summarization", "question_answering"),
        "summarization",
    ),
    "causal": (
        "a causal language model",
        ("causal_lm", "summarization", "question_answering"),
        "causal_lm",
    ),
    "encoder": ("an encoder", ANSWERS, "classification"),
}


def with_task(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the recipe with its task, and a line to print where that was guessed.

    Raises `InputError` when model and columns fit several tasks, or none, and as reading them does.
    """
    if config.task is not None:
        return config, []
    model_config = read_config(config.model, trust_remote_code=config.trust_remote_code)
    data = config.data
    if data.streaming:
        table = next(training_pieces(data)).records
    else:
        table = read_records(data, data.train, data.train_split).table
    task, why = guess(model_config, table, data)
    return _told(config, task, f"{why} for {KINDS[kind_of(model_config)][0]}")


def with_task_of_model(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the recipe with its task as `with_task`, or by the model alone where the training
    records are not in a file here."""
    # A folder of images only a model of images reads.
    files = [file for one in sources(config.data.train) for file in files_of(one.path)]
    if config.task is not None or all(Path(file).is_file() for file in files):
        return with_task(config)
    model_config = read_config(config.model, trust_remote_code=config.trust_remote_code)
    what, _, task = KINDS[kind_of(model_config)]
    task = "regression" if task == "classification" and _one_output(model_config) else task
    return _told(config, task, f"the model is {what}")


def _told(config: RunConfig, task: TaskName, why: str) -> tuple[RunConfig, list[str]]:
    line = f"task {task}, a guess: {why}; --task (task: in a recipe) says another"
    return config.with_task(task), [line]


def guess(model_config: Any, table: Dataset, data: DataConfig) -> tuple[TaskName, str]:
    """Return the one task that model and columns fit, and which columns say so.

    Args:
        model_config: of the base, as its files have it.
        table: the training records.
        data: which columns the recipe names; a label that it names is read.

    Raises `InputError`, naming the choices, when there are several, or none.
    """
    kind = kind_of(model_config)
    what, usual, first = KINDS[kind]
    if kind == "images":
        return "image_classification", "images"
    if _has_images(table, data):
        raise InputError(
            f"{spelled(data.train)} holds images, and the model is {what}: use --task "
            "image_classification with a model of images, or give a file of texts"
        )
    offered = _of_labels(model_config, table, data)
    if data.label is None and data.classes is None:
        offered |= _of_other_columns(table, data)
    else:
        usual = ANSWERS  # said: the label is to be read
    if kind == "causal" and not offered and only_text(table, data.id) is not None:
        offered["causal_lm"] = f"the column {only_text(table, data.id)}"
    found = [task for task in offered if task in usual]
    if len(found) == 1:
        return found[0], offered[found[0]]
    # A causal model may learn to write a text that has a label, or to class it.
    others = [task for task in offered if task in {*ANSWERS, *usual}]
    choices = dict.fromkeys(found or ([first, *others] if others else usual))
    raise _unclear(table, data, what, choices)


def _unclear(table: Dataset, data: DataConfig, what: str, choices: Iterable[str]) -> InputError:
    columns = ", ".join(table.column_names)
    return InputError(
        f"the columns of {spelled(data.train)} ({columns}) and {what} do not say which task is "
        f"meant: choose with --task (task: in a recipe) one of {', '.join(choices)}"
    )


def kind_of(model_config: Any) -> Kind:
    """Return what a model was made for, by the class its weights were saved from, else by what its
    architecture can be."""
    names = architectures(model_config)
    for ending, kind in BY_ENDING.items():
        if any(name.endswith(ending) for name in names):
            return kind
    if type(model_config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "images"
    if getattr(model_config, "is_encoder_decoder", False):
        return "encoder-decoder"
    masked = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING
    # Most encoders could be decoders too, if their configuration said so.
    decodes = getattr(model_config, "is_decoder", False) or not masked
    writes = any(name.endswith(WRITERS) for name in names)
    return (
        "causal"
        if writes or (decodes and type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING)
        else "encoder"
    )


def _has_images(table: Dataset, data: DataConfig) -> bool:
    column = data.text if isinstance(data.text, str) else "image"
    folders = any(Path(file).is_dir() for one in sources(data.train) for file in files_of(one.path))
    return folders or isinstance(table.features.get(column), datasets.Image)


def _of_labels(model_config: Any, table: Dataset, data: DataConfig) -> dict[TaskName, str]:
    """Return {task: the column of labels that is there for it}."""
    if (lists := _of_lists(table, data)) or isinstance(data.label, list):
        return lists
    label = data.label or next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    if label is None:
        return {}
    one = _one_output(model_config) and _is_numeric(table, label)
    task: TaskName = "regression" if one or _is_measure(table, label) else "classification"
    return {task: f"the column {label}"}


def _of_lists(table: Dataset, data: DataConfig) -> dict[TaskName, str]:
    """Return {task: the columns} of labels that are several of a record: tags of its words, classes
    of its text."""
    if isinstance(data.label, list):
        return {"multi_label_classification": f"the columns {', '.join(data.label)}"}
    words = data.text if isinstance(data.text, str) else TOKENS
    usual = (*TAG_COLUMNS, *LABEL_COLUMNS) if data.label is None else (data.label,)
    label = next((name for name in usual if _is_list(table, name)), None)
    if label is None:
        return {}
    if _is_list(table, words):
        return {"token_classification": f"the columns {words}, {label}"}
    if data.label is None and label not in LABEL_COLUMNS:
        return {}
    return {"multi_label_classification": f"the lists in the column {label}"}


def _of_other_columns(table: Dataset, data: DataConfig) -> dict[TaskName, str]:
    """Return {task: the columns that are there for it} of tasks that read no label."""
    columns, offered = set(table.column_names), dict[TaskName, str]()
    asked = [data.question, data.context, data.answers]
    if columns.issuperset(asked):
        offered["question_answering"] = f"the columns {', '.join(asked)}"
    if summaries := summary_columns(data, columns):
        offered["summarization"] = f"the column {summaries[0]}"
    prompted = data.prompt is not None or data.instruction in columns
    if chat := [name for name in CHAT if name in columns]:
        offered["causal_lm"] = f"the column {chat[0]}"
    elif prompted and data.output in columns:
        offered["causal_lm"] = f"the column {data.output}, with prompts"
    return offered


def _one_output(model_config: Any) -> bool:
    """True for a head that gives one number."""
    return kind_of(model_config) == "classes" and model_config.num_labels == 1


def _is_list(table: Dataset, column: str) -> bool:
    return isinstance(table.features.get(column), datasets.List | datasets.LargeList)


def _is_numeric(table: Dataset, column: str) -> bool:
    kind = getattr(table.features.get(column), "dtype", "")
    return kind.startswith(("int", "uint", "float"))


def _is_measure(table: Dataset, column: str) -> bool:
    """True for a column of numbers that are not all whole: 1.0 is class 1 of a column with gaps."""
    if not getattr(table.features.get(column), "dtype", "").startswith("float"):
        return False
    values = [value for value in table[column] if value is not None and math.isfinite(value)]
    return any(value != int(value) for value in values)
