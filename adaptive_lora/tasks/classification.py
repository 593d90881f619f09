"""Classes: of one text or a pair of texts (sequence classification), and what every task with
classes shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List
from torch import nn

from adaptive_lora.errors import InputError
from adaptive_lora.model.base_model import architectures, class_names
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import ROW, Task, alike, by_record
from adaptive_lora.tasks.class_order import in_order, order_of
from adaptive_lora.tasks.data import RECORD, Split
from adaptive_lora.tasks.text import LABEL_COLUMNS, TextTask, label_column, one_label

# What classes of models are called whose head gives classes of texts, images or words.
HEADS = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification")


# What a label is made of the name of its class, by `data.label_form`.
FORMS: dict[str | None, Callable[[str], Any]] = {"int": int, "float": float, None: str}


class ClassTask(Task):
    """A task whose label is one of several classes: those seen in training, or those the recipe
    names.

    A label is a class by its text (1, 1.0 and "1" are one class). Where the recipe names the
    classes, and none of the names is a number, it may also be the number of a class, from 0; in a
    `ClassLabel` column, as hub data sets have, it always is. That is the data's order, `names`. The
    model's outputs have an order of their own, `order`: the base's, where it knows these classes.
    """

    metrics: tuple[str, ...] = ("accuracy", "f1", "f1_macro", "matthews")
    label_columns: ClassVar[tuple[str, ...]] = LABEL_COLUMNS  # usual names, the first there is

    def learn(self, split: Split) -> None:
        if not isinstance(self.data.label, list):
            label = label_column(split, self.data.label, self.label_columns)
            self.learned(label=label)
        asked = self.data.class_order
        names, given = self._named(split)
        numbers = self.data.class_numbers or (given and not any(map(_is_number, names)))
        order = self._order(names)
        self.learned(
            classes=names,
            class_numbers=numbers,
            label_form=None
            if isinstance(self.data.label, list)
            else _form_of(split.records.features[self.label], names),
            # Also where it is said and is the data's: the recipe may spell it otherwise.
            class_order=order if order != names or asked is not None else None,
        )
        self._check_present(split)
        self.metrics = self._metrics()

    def _named(self, split: Split) -> tuple[list[str], bool]:
        """Return the classes, and whether the recipe names them."""
        given, asked = self.data.classes, self.data.class_order
        names = given if given is not None else self._names(split)
        listed = given is not None or self._class_label(split) is not None
        if asked is not None and not listed and in_order(names, asked) is None:
            names = given = asked  # classes by number, or more than the records have
        if self.data.streaming and given is None and not listed:
            raise InputError(
                "the classes of records that are streamed cannot be collected before they are "
                "read; name them all with data.classes"
            )
        if len(set(names)) < len(names):
            raise InputError(f"data.classes names a class twice: {names}")
        return names, given is not None

    @property
    def names(self) -> list[str]:
        return self.data.classes or []

    @property
    def order(self) -> list[str]:
        """The classes in the order of the model's outputs, as the data spells them."""
        return self.data.class_order or self.names

    @property
    def label(self) -> str:
        return one_label(self.data) or self.label_columns[0]

    def _each(self, split: Split) -> Iterable[tuple[int, Any]]:
        """Return (record, label) for every label of a split, in order."""
        return zip(split.records[RECORD], split.records[self.label], strict=True)

    def _class_label(self, split: Split) -> ClassLabel | None:
        """Return what names the classes of the label column, or of the lists in it, on the hub."""
        if isinstance(self.data.label, list):
            return None
        feature = split.records.features[self.label]
        inner = feature.feature if isinstance(feature, List | LargeList) else feature
        return inner if isinstance(inner, ClassLabel) else None

    def _names(self, split: Split) -> list[str]:
        """Return the classes of the training records; numbers sort as numbers, so that class 10
        comes after class 9."""
        if (named := self._class_label(split)) is not None:
            return list(named.names)
        found = {_name(split, record, self.label, value) for record, value in self._each(split)}
        return sorted(found, key=float) if all(map(_is_number, found)) else sorted(found)

    def _check_present(self, split: Split) -> None:
        """Raise `InputError` where the training records leave nothing to learn."""
        present = sorted({self.names[index] for index in self._ids(split)})
        if len(present) < 2 and not self.data.streaming:
            raise InputError(
                f"{split.source}: column {self.label!r} holds one class only, {present}; nothing "
                "to classify"
            )

    def _metrics(self) -> tuple[str, ...]:
        """Return the metrics that these classes have: F1 of "the positive class" needs two."""
        usual = type(self).metrics
        return usual if len(self.names) == 2 else tuple(name for name in usual if name != "f1")

    def _order(self, names: list[str]) -> list[str]:
        """Return the order of the model's outputs, and note it where it is not the data's."""
        asked, own = self.data.class_order, class_names(self.model_config)
        if asked is not None:
            order = in_order(names, asked)
            if order is None:
                raise InputError(
                    f"data.class_order is {asked}; expected each of the classes {names} once, in "
                    "the order of the model's outputs"
                )
            return order
        order, whose = order_of(names, own)
        if order != names:
            self.notes.append(
                f"the model's outputs have the order of {whose}: {_numbered(own or order)}; "
                "data.class_order says another"
            )
        elif own is not None and len(own) == len(names) and in_order(names, own) is None:
            head = f"the base's head for {_numbered(own)}"
            if _are_places(names):
                self.notes.append(f"labels are numbers of outputs of {head}")
            elif any(kind in name for name in architectures(self.model_config) for kind in HEADS):
                self.notes.append(f"{head} is trained on, for {_numbered(names)}")
        return order

    def model_arguments(self) -> dict[str, Any]:
        own = class_names(self.model_config)
        names = self.order
        # What the base calls its outputs stays, where it means the same.
        if own is not None and len(set(own)) == len(own) == len(names):
            names = own if _are_places(names) or in_order(names, own) == names else names
        arguments = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if getattr(self.model_config, "problem_type", None) is not None:
            arguments["problem_type"] = "single_label_classification"  # whatever the base was for
        return arguments

    def labels(self, split: Split) -> list[Any]:
        """Return the class number of each record. Raises `InputError` at the first label outside
        the classes."""
        ids = self._ids(split)
        self.notes.append(f"{split.part}: {self._counts(ids)}")
        outputs = self._outputs()
        return [outputs[index] for index in ids]

    def _counts(self, ids: Sequence[int]) -> str:
        counts = Counter(ids)
        shown = ", ".join(
            f"{self.names[index]:.30} {count:,}" for index, count in counts.most_common(8)
        )
        more = f" and {len(counts) - 8} classes more" if len(counts) > 8 else ""
        return f"{shown}{more}; the largest class is {max(counts.values()) / len(ids):.1%}"

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        # By the data's order, so that F1 is of the same class whatever the base's.
        places = self._outputs()
        return metrics.classification(np.asarray(outputs)[:, places], np.argsort(places)[labels])

    def constant(self, outputs: Any, labels: Any) -> bool | None:
        return alike(np.argmax(outputs, axis=-1)) and not alike(labels)

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        # Less the largest logit, or exp would overflow.
        shifted = np.exp(outputs - np.max(outputs, axis=-1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
        best = probabilities.argmax(axis=-1)
        rows = [
            {"prediction": self._as_given(self.order[index]), "probability": float(row[index])}
            for index, row in zip(best, probabilities, strict=True)
        ]
        return by_record(features[ROW], rows)

    def _as_given(self, name: str) -> Any:
        """Return a class in the form that the training records give it in: a number, a truth value
        or text."""
        form = self.data.label_form
        return name == "True" if form == "bool" else FORMS[form](name)

    def _listed(self) -> str:
        shown = ", ".join(f"{name:.30}" for name in self.names[:6])
        return f"{len(self.names)} classes ({shown}{', ...' if len(self.names) > 6 else ''})"

    def _outputs(self) -> list[int]:
        """Return the output of the model that each class of the data is."""
        places = {name: place for place, name in enumerate(self.order)}
        return [places[name] for name in self.names]

    def _ids(self, split: Split) -> list[int]:
        """Return the place of each label's class among the data's."""
        by_name = {name: index for index, name in enumerate(self.names)}
        numbered = self._class_label(split) is not None
        ids = []
        for record, value in self._each(split):
            name = _name(split, record, self.label, value)
            if self.data.label_form == "bool" and name.lower() in ("true", "false"):
                name = name.capitalize()  # a CSV has no truth values, but their spellings
            index = None if numbered else by_name.get(name)
            if (
                index is None
                and (numbered or self.data.class_numbers)
                and name.isdecimal()
                and int(name) < len(self.names)
            ):
                index = int(name)
            if index is None:
                unseen = "" if split.part == "training" else (
                    " of the training records; name all classes with data.classes, or give "
                    "evaluation records of your own"
                )  # fmt: skip
                raise InputError(
                    f"{split.at(record)}: label {value!r} in column {self.label!r} is outside the "
                    f"classes {self.names}{unseen}"
                )
            ids.append(index)
        return ids


class Classification(ClassTask, TextTask):
    """Accuracy, F1 and Matthews' correlation of classes of texts."""

    def learn(self, split: Split) -> None:
        TextTask.learn(self, split)
        ClassTask.learn(self, split)
        self.notes.append(f"classification of {' + '.join(self.columns)} into {self._listed()}")


def _form_of(feature: Any, names: Sequence[str]) -> str | None:
    """Return "int", "float" or "bool" where the labels are such values, and the classes too; None
    where they are text, or numbers of classes that have names."""
    kind = "" if isinstance(feature, ClassLabel) else str(getattr(feature, "dtype", ""))
    if kind == "bool":
        return "bool" if set(names) <= {"True", "False"} else None
    form = "float" if kind.startswith("float") else "int"
    if not kind.startswith(("int", "uint", "float")):
        return None
    try:
        return (
            form if all(str(FORMS[form](name)) in (name, f"{name}.0") for name in names) else None
        )
    except ValueError:
        return None


def _name(split: Split, record: int, label: str, value: Any) -> str:
    """Return the class a label means, as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps, or saved by pandas
    text, many = str(value), isinstance(value, list)
    odd = (
        value is None
        or isinstance(value, list | dict)
        or (isinstance(value, float) and math.isnan(value))
    )
    if odd or not text.strip():
        raise InputError(
            f"{split.at(record)}: column {label!r} is {value!r:.60}; expected a text or a number"
            + ("; for lists of classes: --task multi_label_classification" if many else "")
        )
    return text


def _numbered(names: Sequence[str]) -> str:
    shown = ", ".join(f"{place} {name:.30}" for place, name in enumerate(names[:6]))
    return f"{shown}{', ...' if len(names) > 6 else ''}"


def _are_places(names: Sequence[str]) -> bool:
    """True when the classes are the numbers from 0: those of outputs, in their order."""
    return list(names) == [str(place) for place in range(len(names))]


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
