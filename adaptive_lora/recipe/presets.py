"""Presets: well-known data sets by name. Each is a fragment of a recipe; whatever the recipe itself
says wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptive_lora.errors import InputError, unknown

# Where the records are on the hub: keys that a recipe with files of its own does not take.
_WHERE = ("train", "config", "train_split", "eval_split", "extra_eval_split")


def _glue(
    name: str, text: str | list[str], classes: list[str] | None, metric: str, **data: Any
) -> dict[str, Any]:
    """GLUE, with its columns, class names in the order of its label numbers, and official metric
    (Wang et al. 2018, arXiv 1804.07461, table 1)."""
    return {
        "task": "regression" if classes is None else "classification",
        "metric": metric,
        "data": {
            "train": "nyu-mll/glue",
            "config": name,
            "train_split": "train",
            "eval_split": "validation",
            "text": text,
            "label": "label",
            **({} if classes is None else {"classes": classes}),
            **data,
        },
    }


_ENTAILMENT = ["entailment", "not_entailment"]
PRESETS: dict[str, dict[str, Any]] = {
    "cola": _glue("cola", "sentence", ["unacceptable", "acceptable"], "matthews", max_length=64),
    "sst2": _glue("sst2", "sentence", ["negative", "positive"], "accuracy"),
    "mrpc": _glue("mrpc", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "f1"),
    "qqp": _glue("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"], "f1"),
    "stsb": _glue("stsb", ["sentence1", "sentence2"], None, "pearson"),
    "mnli": _glue(
        "mnli",
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        "accuracy",
        eval_split="validation_matched",
        extra_eval_split={"mismatched": "validation_mismatched"},
        max_length=256,
    ),
    "qnli": _glue("qnli", ["question", "sentence"], _ENTAILMENT, "accuracy", max_length=256),
    "rte": _glue("rte", ["sentence1", "sentence2"], _ENTAILMENT, "accuracy", max_length=256),
    "wnli": _glue("wnli", ["sentence1", "sentence2"], ["not_entailment", "entailment"], "accuracy"),
    "squad": {
        "task": "question_answering",
        "metric": "f1",
        "data": {
            "train": "rajpurkar/squad",
            "eval_split": "validation",
            "max_length": 384,
            "stride": 128,
        },
    },
    "cnn_dailymail": {
        "task": "summarization",
        "metric": "rougeLsum",
        "data": {
            "train": "abisee/cnn_dailymail",
            "config": "3.0.0",
            "eval_split": "validation",
            "text": "article",
            "summary": "highlights",
            "max_length": 1024,
        },
    },
    "alpaca": {"task": "causal_lm", "data": {"train": "tatsu-lab/alpaca", "max_length": 512}},
}


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with what its preset says filled in. Raises `InputError` on an unknown
    preset, or one for another task.

    >>> data = {"train": "mine.csv", "max_length": 32}
    >>> expand({"preset": "cola", "data": data})["data"]["max_length"]
    32
    """
    name = values.get("preset")
    if name is None:
        return dict(values)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise InputError(unknown(f"unknown preset {name!r}", name, PRESETS))
    if values.get("task") not in (None, preset["task"]):
        raise InputError(
            f"preset {name!r} is for the task {preset['task']}; got the task {values['task']!r}. "
            "Leave one of them out"
        )
    data = values.get("data") or {}
    if not isinstance(data, Mapping):
        return dict(values)  # not a mapping: the recipe's check says so
    filled = {k: v for k, v in preset["data"].items() if k not in _WHERE or "train" not in data}
    return {**preset, **values, "data": {**filled, **data}}
