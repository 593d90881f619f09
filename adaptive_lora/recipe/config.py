"""The recipe of a run: what a YAML file may say, with every default in one place."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from transformers import TrainingArguments

from adaptive_lora import methods
from adaptive_lora.errors import InputError, nearest
from adaptive_lora.model.quantization import Precision, Quantization, compute_dtype
from adaptive_lora.recipe.presets import expand
from adaptive_lora.recipe.strict import Strict, check

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range
# a path, in which ~ is the home folder, or a hub name
Location = Annotated[str, AfterValidator(os.path.expanduser)]


def _class_name(value: Any) -> Any:
    if isinstance(value, bool):
        raise InputError(
            f"data.classes holds {value}: YAML reads a bare yes, no, on or off so; put it in quotes"
        )
    return str(value) if isinstance(value, int | float) else value


ClassName = Annotated[str, BeforeValidator(_class_name)]


def _delimiter(value: Any) -> Any:
    return {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "\\t": "\t"}.get(value, value)


def _one_mark(value: str) -> str:
    if len(value) != 1 or ord(value) > 127 or value in '"\r\n\\':
        raise InputError(
            f"data.delimiter is {value!r}; expected comma, semicolon, tab, bar, or one character "
            "of ASCII"
        )
    return value


Delimiter = Annotated[str, BeforeValidator(_delimiter), AfterValidator(_one_mark)]


class Source(Strict):
    """One of several places of records, and how much of it is trained on."""

    path: Location
    # how often each record is there in an epoch: 2 twice, 0.5 a seeded half of them, 1.5 all and
    # half of them again
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def _places(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    expected = "expected a path, a name on the hub, or a list of these or of {path, weight}"
    if not several:
        raise InputError(f"data names no place of records; {expected}")
    for one in several:
        if isinstance(one, dict):
            check(Source, one)
        elif not isinstance(one, str | Source):
            raise InputError(f"data has {one!r:.60} for a place of records; {expected}")
    return value if isinstance(value, str) else several


Sources = Annotated[Location | list[Location | Source], BeforeValidator(_places)]


def sources(given: Sources) -> list[Source]:
    """Return the places of records that a recipe names, each with its weight."""
    several = given if isinstance(given, list) else [given]
    return [one if isinstance(one, Source) else Source(path=one) for one in several]


def spelled(given: Sources) -> str:
    """Return the places of records as messages name them: "a.csv + b.csv"."""
    return " + ".join(one.path for one in sources(given))


# keys of `data` that 0.1 did not have
SINCE_0_2 = {
    "class_order",
    "delimiter",
    "quoting",
    "columns",
    "unit",
    "streaming",
    "piece",
    "label_form",
}


class DataConfig(Strict):
    """Where the records come from and what their columns mean. Names of columns that a task does
    not read are ignored."""

    # a CSV / TSV / JSON / JSONL / parquet / text file, a folder of images, or a data set name on
    # the hub; a folder of such files; or a list of these
    train: Sources
    eval: Sources | None = None  # likewise; None cuts `eval_size` off the training records
    # name -> further records, evaluated once after training
    extra_eval: dict[str, Sources] = Field(default_factory=dict)
    # whether training records are read while they are trained on, over and over; needs
    # training.max_steps, and data.eval or a number as data.eval_size
    streaming: bool = False
    # streaming: records that are read, and shuffled among each other, at a time
    piece: Positive = 1000
    config: str | None = None  # hub only: the configuration, such as sst2 of nyu-mll/glue
    train_split: str = "train"  # hub only
    eval_split: str | None = None  # hub only
    extra_eval_split: dict[str, str] = Field(default_factory=dict)  # hub only: name -> split
    rows: Positive | None = None  # take this many records (a seeded choice); None: all
    eval_rows: Positive | None = None
    # a fraction, or a number of records
    eval_size: Annotated[float, Field(gt=0, lt=1)] | Positive = 0.1
    seed: Seed = 0  # of the split and of the choice of rows, not of the training
    # CSV and TSV; None: as the file has it
    delimiter: Delimiter | None = None
    # what a double quote is; None: in a file of tabs text, else as all its records fit
    quoting: Literal["quotes", "escapes", "text"] | None = None
    # of files without a header; "header": the first line is one, however it looks
    columns: list[str] | Literal["header"] | None = None
    # what of a .txt file is a record; a file is read in windows of the model's length
    unit: Literal["line", "paragraph", "file"] = "line"
    id: str = "id"  # where there is such a column, no two records may share a value
    duplicate_ids: Literal["refuse", "keep"] = "refuse"
    # tokens of an input; None: `USUAL_LENGTH` of the task, or the model's window where that is less
    max_length: Positive | None = None
    # what becomes of a longer one; counted and printed
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    # what is read: one column, or a pair (classification, regression); of lists of words
    # (token_classification)
    text: str | list[str] | None = None
    # classification, regression; lists of classes, or several columns of 0 and 1
    # (multi_label_classification); lists of tags (token_classification)
    label: str | list[str] | None = None
    # classification: names of the classes; None reads them off the training split
    classes: list[ClassName] | None = None
    # whether a label may be the number of a class; turned on by giving classes without numbers
    class_numbers: bool = False
    # in which form predictions give a class; read off the training records
    label_form: Literal["int", "float", "bool"] | None = None
    # the classes in the order of the model's outputs; None: the base's own order where its names
    # agree, GLUE's where it has no names and the classes are a GLUE task's, else as in `classes`
    class_order: list[ClassName] | None = None
    instruction: str = "instruction"  # causal_lm, Alpaca-style records
    input: str = "input"
    output: str = "output"  # causal_lm: what is learned, after the prompt
    # causal_lm, summarization: a template over columns, such as "{question}\nAnswer: "
    prompt: str | None = None
    # summarization; several columns, or a list in one, are references of one text
    summary: str | Annotated[list[str], Field(min_length=1)] = "summary"
    max_target_length: Positive = 128  # summarization: tokens of a summary
    question: str = "question"  # question_answering
    context: str = "context"
    # a text, a list of texts, or SQuAD's {"text": [...], "answer_start": [...]}
    answers: str = "answers"
    # characters; without this column the first occurrence is taken
    answer_start: str = "answer_start"
    # whether no answer is an answer; turned on by training records without one
    unanswerable: bool = False
    stride: Positive = 64  # tokens that two windows of one long context share
    max_answer_length: Positive = 30  # tokens

    @model_validator(mode="after")
    def _weights_are_of_training(self) -> Self:
        for given in (self.eval or [], *self.extra_eval.values()):
            for one in sources(given):
                if one.weight != 1:
                    raise InputError(
                        f"data.eval gives {one.path} the weight {one.weight:g}; only records to "
                        "train on have weights"
                    )
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The runs of a study are named by their recipes: one that does not say these keys keeps its
        # name of version 0.1.
        values: dict[str, Any] = dump(self)
        for key in SINCE_0_2 & values.keys():
            if values[key] == type(self).model_fields[key].default:
                del values[key]
        return values


class GenerationConfig(Strict):
    """How text is generated, by tasks that are scored on it and by `adaptive-lora generate`. Always
    greedy or beam search."""

    max_new_tokens: Positive = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    num_beams: Positive = 1
    # of beams; above 0 favours longer texts
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    # no run of so many tokens twice; 0: no such rule
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 16
    # how many evaluation records are generated for at each evaluation; None: all
    rows: Positive | None = None


class MethodConfig(BaseModel):
    """A name in `adaptive_lora.METHODS` and its arguments."""

    model_config = ConfigDict(extra="allow")
    name: str = "lora"

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AdapterConfig(Strict):
    """Where adapters go, and their constant scale."""

    targets: str | list[str] = "all-linear"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


# What we set where a default of `TrainingArguments` does not suit LoRA; any field may be given.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,  # below 1: a fraction of all steps
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    # Not fused, the Trainer's default: that one never looks at the shapes of its moments.
    "optim": "adamw_torch",
    "logging_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    # Of one the Trainer would delete the last checkpoint before the next is complete.
    "save_total_limit": 2,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
}
# Fields the run decides itself, with the recipe key that sets them.
TRAINING_RESERVED = {"output_dir": "output", "seed": "seed", "resume_from_checkpoint": "--resume"}

TaskName = Literal[
    "classification",
    "multi_label_classification",
    "token_classification",
    "regression",
    "causal_lm",
    "summarization",
    "question_answering",
    "image_classification",
]


# Tokens of an input where a recipe says nothing. What is written is as long as people write; a
# class is mostly told early, and a question's context, or a list of words, is read in windows.
USUAL_LENGTH: dict[TaskName, int] = {
    "classification": 128,
    "multi_label_classification": 128,
    "token_classification": 256,
    "regression": 128,
    "causal_lm": 1024,
    "summarization": 1024,
    "question_answering": 384,
    "image_classification": 128,  # an image has no tokens
}
# Version 0.1 had 128 for every task: recipes of these are written with it, as they were then, so
# that the runs of a study keep their names.
LENGTH_AS_BEFORE: tuple[TaskName, ...] = ("classification", "regression", "image_classification")


class RunConfig(Strict):
    """Everything that determines a run."""

    model: Location  # a local folder, or a model name on the hub
    # what the records mean; None: by the model and the columns of its records, where these leave no
    # choice
    task: TaskName | None = None
    data: DataConfig
    output: Location
    # a name in `presets.PRESETS`, from which keys not given were filled in
    preset: str | None = None
    metric: str | None = None  # the one to report first; None: the task's
    method: MethodConfig = MethodConfig()
    adapters: AdapterConfig = AdapterConfig()
    generation: GenerationConfig = GenerationConfig()
    training: dict[str, Any] = Field(default_factory=dict)
    # what a NaN or infinite loss or gradient does to its step
    on_non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: Positive = 5  # steps that "skip" may drop in all; the next one stops
    # of the base: nf4 (4 bits, double quantisation) or int8; see docs/quantization.md
    quantization: Quantization = "none"
    # Of the base's weights and, on a quantised base, of its arithmetic; auto: as in the model's
    # files, and on a quantised base float32 on a CPU, bfloat16 (else float16) on CUDA.
    dtype: Precision = "auto"
    seed: Seed = 42
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _training_is_known(self) -> Self:
        self.training = _check_training({**TRAINING_DEFAULTS, **self.training})
        return self

    @model_validator(mode="after")
    def _length_as_before(self) -> Self:
        if self.task in LENGTH_AS_BEFORE and self.data.max_length is None:
            self.data = self.data.model_copy(update={"max_length": USUAL_LENGTH[self.task]})
        return self

    def with_task(self, task: TaskName | None) -> Self:
        """Return the recipe as if it had named this task."""
        return type(self).model_validate({**self.model_dump(), "task": task})

    @property
    def usual_length(self) -> int:
        """The tokens of an input where the recipe says nothing and the model reads as many."""
        assert self.task is not None
        return USUAL_LENGTH[self.task]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed anew in the backward pass, by either name that
        transformers gives it."""
        return any(
            bool(self.training.get(f"{kind}_checkpointing")) for kind in ("activation", "gradient")
        )

    def training_arguments(self, **overrides: Any) -> TrainingArguments:
        """Return this run's `TrainingArguments`. Raises `InputError` in transformers' words."""
        values = {**self.training, "seed": self.seed, **overrides}
        if self.quantization != "none" and not (values.get("bf16") or values.get("fp16")):
            # Autocast joins the float32 head and what the base computes in 16 bits.
            dtype = compute_dtype(self.dtype)
            values |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        # the name before transformers 5.23
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            newer = name.replace("gradient", "activation")
            if name in values and newer in {
                field.name for field in dataclasses.fields(TrainingArguments)
            }:
                values.setdefault(newer, values.pop(name))
        try:
            return TrainingArguments(**values)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"training: {error}") from error

    def to_yaml(self) -> str:
        """Return the resolved recipe; `parse(yaml.safe_load(...))` gives the same config back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _check_training(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with each field as its declared type (YAML reads 3e-4 as a string)."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    checked = {}
    for name, value in values.items():
        if name in TRAINING_RESERVED:
            raise InputError(f"training.{name} cannot be set; use {TRAINING_RESERVED[name]}")
        if name not in known:
            raise InputError(
                f"unknown key training.{name}.{nearest(name, known)} Fields are those of "
                "TrainingArguments"
            )
        checked[name] = _as_declared(name, value)
    batches = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    )
    for name in ("learning_rate", "num_train_epochs", *batches):
        if name in checked and not checked[name] > 0:
            raise InputError(f"training.{name} is {checked[name]}; expected a number above 0")
    return checked


def _as_declared(name: str, value: Any) -> Any:
    """Return the value of a field of `TrainingArguments` as its declared type, plain data."""
    if value is False and name.endswith("_strategy"):
        value = "no"  # YAML 1.1 reads a bare `no` as false
    kind = _training_type(name)
    try:
        checked = value if kind is None else kind.validate_python(value)
    except ValidationError as error:
        raise InputError(f"training.{name} is {value!r}: {error.errors()[0]['msg']}") from None
    if isinstance(checked, float) and not math.isfinite(checked):
        raise InputError(f"training.{name} is {value!r}; expected a finite number")
    return checked.value if hasattr(checked, "value") else checked  # of an enum


@functools.cache  # a study checks thousands of recipes
def _training_type(name: str) -> TypeAdapter[Any] | None:
    """Return what checks a field of `TrainingArguments`; None for a type that pydantic cannot
    check: its own check will."""
    try:
        return TypeAdapter(_training_hints()[name])
    except PydanticSchemaGenerationError:
        return None


@functools.cache
def _training_hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainingArguments)


def parse(values: Mapping[str, Any], *, origin: str = "recipe") -> RunConfig:
    """Return the `RunConfig` of a plain mapping, such as a parsed YAML file.

    Raises `InputError` naming `origin`, the key, and the nearest known spelling. The method is
    built once, so that a wrong method or argument is found here and not after the model is loaded.
    """
    try:
        config = check(RunConfig, expand(values))
        methods.build(config.method.name, config.method.arguments)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    return config
