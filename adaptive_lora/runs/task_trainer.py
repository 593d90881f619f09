"""The Trainer of the command line: `AdaptiveTrainer` bound to a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction
from transformers.trainer_pt_utils import get_length_grouped_indices

from adaptive_lora.tasks import Task
from adaptive_lora.tasks.base import LENGTH
from adaptive_lora.training.trainer import AdaptiveTrainer


class TaskTrainer(AdaptiveTrainer):
    """Takes from a task how batches are made and outputs scored.

    Evaluation goes from long inputs to short ones, so that little is padded. Training batches
    grouped by length depend on the seed and the epoch alone.
    """

    def __init__(self, *args: Any, task: Task, **kwargs: Any) -> None:
        self.task = task
        self.evaluated: Any = None  # the features of the evaluation in progress, in its order
        self.constant: bool | None = None  # as `Task.constant`, of the last evaluation
        super().__init__(
            *args,
            processing_class=task.tokenizer,
            data_collator=task.collator(),
            compute_metrics=self._score,
            preprocess_logits_for_metrics=task.reduce,
            **kwargs,
        )

    def predict_rows(self, features: Dataset) -> list[dict[str, Any]]:
        """Return the task's predictions for features without labels, in their records' order."""
        outputs = self.predict(features).predictions if self.task.needs_outputs else None
        features = features if outputs is None else self.evaluated
        return self.task.predict(outputs, features, self.model)  # type: ignore[arg-type]

    def _score(self, outcome: EvalPrediction) -> dict[str, float]:
        model: Any = self.model
        predictions: Any = outcome.predictions
        self.constant = self.task.constant(predictions, outcome.label_ids)
        return self.task.score(predictions, outcome.label_ids, self.evaluated, model)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        # The Trainer's is a mean over batches, in which the tokens of short records count for more.
        metrics: Any = output.metrics
        if f"{metric_key_prefix}_token_loss" in metrics:
            metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_token_loss"]
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # kept under one name for all sets, with persistent workers
        vars(self).pop("_eval_dataloaders", None)
        return super().get_eval_dataloader(
            self._by_length(self.eval_dataset if eval_dataset is None else eval_dataset)
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._by_length(test_dataset))

    def _by_length(self, features: Dataset) -> Dataset:
        self.evaluated = features.select(np.argsort(-np.asarray(features[LENGTH]), kind="stable"))
        return self.evaluated

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers' own sampler reorders the records, which a metric on text must find by place.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        features: Any = self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(list(features[LENGTH]), batch, seed)


class GroupedByLength(Sampler[int]):
    """transformers' grouping of batches by length, drawn from (seed, epoch) and not from the global
    generator: a run resumed in mid-epoch sees the batches it would have seen."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
