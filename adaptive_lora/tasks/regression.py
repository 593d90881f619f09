"""Regression: one text or a pair of texts, one number (STS-B)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from adaptive_lora.errors import InputError
from adaptive_lora.tasks import metrics
from adaptive_lora.tasks.base import ROW, alike, by_record
from adaptive_lora.tasks.data import RECORD, Split
from adaptive_lora.tasks.text import TextTask

NOTHING = 0.02  # of the labels' standard deviation: predictions that spread less are constant


class Regression(TextTask):
    """Mean squared error of one output; Pearson's and Spearman's correlation with the labels."""

    metrics = ("pearson", "spearman", "mse")
    mean: float | None = None  # of the training labels

    def learn(self, split: Split) -> None:
        super().learn(split)
        values = self.labels(split)
        if min(values) == max(values):
            raise InputError(
                f"{split.source}: column {self.label!r} is {values[0]} in every record; nothing to "
                "predict"
            )
        self.mean = float(np.mean(values))
        self.notes.append(
            f"regression of {' + '.join(self.columns)} on {self.label}: {min(values):g} to "
            f"{max(values):g}, mean {self.mean:g}"
        )

    def model_arguments(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def start_head(self, model: nn.Module, drawn: Collection[str]) -> list[str]:
        """Have a new head begin at the mean of the labels: from 0 the first hundreds of steps would
        go into finding it. Outputs keep the unit of the labels, also for who loads the adapter
        elsewhere, which standardised labels would not."""
        biases = [p for name, p in model.named_parameters() if name in drawn and p.shape == (1,)]
        if self.mean is None or not drawn:
            return []
        for bias in biases:
            nn.init.constant_(bias, self.mean)
        return [f"the new head begins at the labels' mean, {self.mean:g}"] if biases else []

    def labels(self, split: Split) -> list[float]:
        values = []
        for record, value in zip(split.records[RECORD], split.records[self.label], strict=True):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InputError(
                    f"{split.at(record)}: column {self.label!r} is {value!r}; expected a finite "
                    "number"
                )
            values.append(number)
        return values

    def score(
        self, outputs: Any, labels: Any, features: Dataset, model: nn.Module
    ) -> dict[str, float]:
        return metrics.regression(np.asarray(outputs).reshape(-1), labels)

    def constant(self, outputs: Any, labels: Any) -> bool | None:
        # A model that has found nothing still tells records apart in the third digit.
        return float(np.std(outputs)) <= NOTHING * float(np.std(labels)) and not alike(labels)

    def predict(self, outputs: Any, features: Dataset, model: nn.Module) -> list[dict[str, Any]]:
        return by_record(
            features[ROW],
            [{"prediction": float(value)} for value in np.asarray(outputs).reshape(-1)],
        )
