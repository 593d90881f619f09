"""`AdaptiveLoRA`: fine-tune a classifier with ranks from gradient norms and weight changes, in one
call."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, TaskType
from transformers import PreTrainedModel, TrainingArguments, default_data_collator, set_seed

from adaptive_lora.allocation.allocate import RankPattern
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.importance import GradientNorm, WeightDelta
from adaptive_lora.errors import InputError, nearest
from adaptive_lora.files import HISTORY_FILE
from adaptive_lora.methods import grad_delta
from adaptive_lora.model.adapters import ranks
from adaptive_lora.model.attach import attach, infer_task_type
from adaptive_lora.model.saving import save
from adaptive_lora.model.targets import ALL_LINEAR
from adaptive_lora.training.callback import AdaptiveRankCallback
from adaptive_lora.training.trainer import AdaptiveTrainer, use_progress

LABELS = ("labels", "label")
IGNORED = -100  # the label of what the loss leaves out
# Fields of `TrainingArguments` that are arguments of `AdaptiveLoRA`, by the name they have there.
OWN = {
    "output_dir": "output_dir",
    "seed": "seed",
    "num_train_epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What the ranks were decided from, and the ranks: one number for each target, {full name:
    value}.

    Args:
        G: mean over the warm-up steps of ‖∂L/∂A‖ + ‖∂L/∂B‖, as measured.
        W: ‖A − A₀‖ + ‖B − B₀‖ after the warm-up, as measured.
        s: α G̃ + β W̃, both min-max normalised over the targets.
        r: the rank decided.
    """

    G: Mapping[str, float]
    W: Mapping[str, float]
    s: Mapping[str, float]
    r: Mapping[str, int]

    @property
    def correlation(self) -> float | None:
        """Pearson's correlation of G and W over the targets, in [-1, 1]; None where it is
        undefined: fewer than two targets, all G or all W equal, or a value that is not finite."""
        return pearson(list(self.G.values()), [self.W[name] for name in self.G])


def pearson(x: list[float], y: list[float]) -> float | None:
    """Return Σ (x − x̄)(y − ȳ) / √(Σ (x − x̄)² Σ (y − ȳ)²); None where it is undefined or not
    finite.

    >>> pearson([1.0, 2.0, 3.0], [6.0, 4.0, 2.0])
    -1.0
    >>> pearson([1.0, 2.0], [5.0, 5.0])
    """
    if not all(map(math.isfinite, [*x, *y])) or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    value = float(np.corrcoef(x, y)[0, 1])
    return value if math.isfinite(value) else None


class AdaptiveLoRA:
    """Fine-tune a classifier with LoRA; after a warm-up every target gets the rank that its
    training so far earns.

    s_i = α G̃_i + β W̃_i and r_i = r_min + ⌊s_i (r_max − r_min)⌋ for target i, with s_i cut to [0,
    1], G̃ and W̃ as in `Scores`, and both bounds cut to min(I, O). Then training goes on: what was
    learned in the kept components, the optimizer state and the schedule stay. The update is scale ·
    B A throughout, scale = alpha / r.

    Args:
        model: a Hugging Face model with a classification head; adapted in place, so give a fresh
            one to each object.
        train_dataset, val_dataset: datasets, lists of dicts of tensors or numbers, or torch
            Datasets, already tokenized, with the class number as `labels` or `label`; without a
            `data_collator` all items are of one length.
        r: rank of every target during the warm-up (with `rank` or `budget`: only the scale follows
            from it).
        alpha: the scale times r.
        monitor_alpha, monitor_beta: α, the weight of gradient norms, and β, the weight of weight
            changes.
        min_r, max_r: bounds of the ranks decided.
        warmup_steps: optimizer steps before the decision, or a fraction of the training below 1.
            (The learning rate has a warm-up of its own, none unless `training_arguments` give
            "warmup_steps".)
        num_train_epochs: passes over the training data.
        learning_rate: the peak, of AdamW unless `training_arguments` say otherwise.
        batch_size: items a device takes at a time, in training and (unless given) evaluation.
        rank: spend as many parameters as uniform rank `rank`; or
        budget: this many parameters, Σ R (I + O); ranks are then proportional to s_i + r_min /
            (r_max − r_min). With neither, the ranks above are used as they are, whatever they cost.
        targets: "all-linear", a regular expression over full names, or a list of names.
        output_dir: for checkpoints, if `training_arguments` ask for some, and the decision
            (allocations.jsonl); None means a temporary folder, removed at the end.
        seed: of the adapters' first weights, dropout and order of the data.
        data_collator: items to a batch; None stacks them.
        training_arguments: any further fields of `TrainingArguments`; with "disable_tqdm": True
            nothing is printed.

    Raises `InputError` for arguments that cannot work, `DivergedError` when a loss or gradient is
    not finite, `NothingLearnedError` when training changed nothing. Source: system 2, Adaptive LoRA
    by gradient norms and weight deltas (2024).

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = BertConfig(vocab_size=9, num_hidden_layers=2, **sizes)
    >>> model = BertForSequenceClassification(config)
    >>> data = [{"input_ids": torch.tensor([i % 9, 1, 2]), "labels": i % 2} for i in range(16)]
    >>> quiet = {"disable_tqdm": True, "use_cpu": True}
    >>> settings = {"max_r": 8, "warmup_steps": 2, "batch_size": 8}
    >>> tuner = AdaptiveLoRA(model, data, data, **settings, training_arguments=quiet)
    >>> accuracy = tuner.train()
    >>> tuner.ranks == tuner.scores.r and set(tuner.ranks.values()) <= set(range(2, 9))
    True
    """

    def __init__(
        self,
        model: Any,
        train_dataset: Any,
        val_dataset: Any,
        r: int = 4,
        alpha: float = 16,
        monitor_alpha: float = 0.5,
        monitor_beta: float = 0.5,
        min_r: int = 2,
        max_r: int = 16,
        warmup_steps: float = 200,
        num_train_epochs: float = 3,
        *,
        learning_rate: float = 5e-4,
        batch_size: int = 16,
        rank: int | None = None,
        budget: int | None = None,
        targets: str | Iterable[str] = ALL_LINEAR,
        output_dir: str | Path | None = None,
        seed: int = 0,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        training_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        for what, value in {"r": r, "max_r": max_r, "batch_size": batch_size}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{what} is {value!r}; expected a whole number >= 1")
        if min_r > max_r:
            raise InputError(f"min_r is {min_r} and max_r {max_r}; expected 0 <= min_r <= max_r")
        positive = {
            "alpha": alpha,
            "learning_rate": learning_rate,
            "num_train_epochs": num_train_epochs,
        }
        for what, number in positive.items():
            if not (math.isfinite(number) and number > 0):
                raise InputError(f"{what} is {number}; expected a finite number above 0")
        for what, number in {"monitor_alpha": monitor_alpha, "monitor_beta": monitor_beta}.items():
            if not math.isfinite(number):
                raise InputError(f"{what} is {number}; expected a finite number, such as 0.5")
        _check_data("train_dataset", train_dataset, labelled=data_collator is None)
        _check_data("val_dataset", val_dataset, labelled=data_collator is None)
        _check_classifier(model)
        self._arguments = _training_arguments(training_arguments or {}) | {
            "num_train_epochs": num_train_epochs,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "seed": seed,
        }
        self._arguments.setdefault("per_device_eval_batch_size", batch_size)
        try:
            # now, while the model is as it was
            TrainingArguments(output_dir="unused", **self._arguments)
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"training_arguments: {error}") from error
        self._output = Path(output_dir) if output_dir is not None else None
        self._data = {
            "train_dataset": train_dataset,
            "eval_dataset": val_dataset,
            "data_collator": data_collator or partial(_stack, n_classes=model.config.num_labels),
        }
        self._method = grad_delta(
            rank,
            budget=budget,
            initial_rank=r,
            monitor_alpha=monitor_alpha,
            monitor_beta=monitor_beta,
            warmup_steps=warmup_steps,
            min_rank=min_r,
            max_rank=max_r,
        )
        self._history: list[Decision] | None = None
        self._started = False
        # Here, for A is drawn when the adapters are attached.
        set_seed(seed)
        self._model = attach(model, self._method, targets, scale=alpha / r)

    def train(self) -> float:
        """Fine-tune, once, and return the accuracy on `val_dataset` at the end, in [0, 1].

        Raises `InputError` before the first step when the training is shorter than the warm-up, and
        at a second call.
        """
        if self._started:
            raise InputError(
                "train() was called before; make a new AdaptiveLoRA, with a freshly loaded model"
            )
        self._started = True
        if self._output is not None:
            self._output.mkdir(parents=True, exist_ok=True)
            return self._train(self._output)
        with tempfile.TemporaryDirectory(prefix="adaptive-lora-") as folder:
            return self._train(Path(folder))

    def _train(self, folder: Path) -> float:
        callback = AdaptiveRankCallback(self._method, folder / HISTORY_FILE)
        trainer = AdaptiveTrainer(
            model=self._model,
            args=TrainingArguments(output_dir=str(folder), **self._arguments),
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_classes,
            callbacks=[callback],
            **self._data,
        )
        use_progress(trainer, quiet=bool(trainer.args.disable_tqdm))
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        self._history = callback.history
        return accuracy

    @property
    def model(self) -> PeftModel:
        """The fine-tuned model. `InputError` before `train()` has ended, like everything below."""
        self._trained()
        return self._model

    @property
    def ranks(self) -> RankPattern:
        """{full target name: rank}, read from the shapes of the tensors."""
        return ranks(self.model)

    @property
    def history(self) -> list[Decision]:
        """The decisions of the training: one, at the end of the warm-up."""
        return self._trained()

    @property
    def scores(self) -> Scores:
        """G, W, s and r of every target at the decision, and the correlation of G and W."""
        decision = self._trained()[-1]
        gradient, delta = (decision.parts[kind.__name__] for kind in (GradientNorm, WeightDelta))
        return Scores(G=gradient, W=delta, s=decision.scores, r=decision.pattern)

    def save(self, path: str | Path) -> Path:
        """Write adapter and head as a PEFT checkpoint into the folder `path`, and return it."""
        return save(self.model, path)

    def _trained(self) -> list[Decision]:
        if self._history is None:
            raise InputError("nothing is trained yet: call train() first, and let it end")
        return self._history


def _training_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return our defaults with `given` on top. Raises `InputError` for a name `TrainingArguments`
    does not have."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in given:
        if name in OWN:
            raise InputError(
                f"training_arguments: give {name!r} as the argument {OWN[name]!r} of AdaptiveLoRA"
            )
        if name not in known:
            raise InputError(
                "training_arguments: TrainingArguments has no field "
                f"{name!r}.{nearest(name, known)}"
            )
    return {
        "save_strategy": "no",
        "report_to": "none",
        "label_names": [LABELS[0]],
        # torch warns of pinned memory where there is no accelerator.
        "dataloader_pin_memory": torch.cuda.is_available(),
        **given,
    }


def _check_classifier(model: Any) -> None:
    use = "use adaptive_lora.attach with AdaptiveTrainer and AdaptiveRankCallback for other tasks"
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"the model is a {type(model).__name__}; expected a transformers model without "
            f"adapters. Or {use}"
        )
    problem, labels = model.config.problem_type, model.config.num_labels
    other = infer_task_type(model) not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, None)
    if other or not labels or labels < 2 or problem not in (None, "single_label_classification"):
        raise InputError(
            f"the model is a {type(model).__name__} with num_labels {labels} and problem_type "
            f"{problem}; expected a classifier of two or more classes, one to each item: "
            f"AdaptiveLoRA returns accuracy. Or {use}"
        )


def _check_data(what: str, dataset: Any, *, labelled: bool) -> None:
    if not isinstance(dataset, Sized) or isinstance(dataset, Mapping) or len(dataset) == 0:
        sized = isinstance(dataset, Sized) and not isinstance(dataset, Mapping)
        problem = "is empty" if sized else f"is a {type(dataset).__name__}"
        raise InputError(
            f"{what} {problem}; expected items: one split of a dataset, a list or a torch Dataset "
            "with a length"
        )
    first = cast(Any, dataset)[0]
    if labelled and not (isinstance(first, Mapping) and any(name in first for name in LABELS)):
        found = (
            f"the keys {sorted(first)}"
            if isinstance(first, Mapping)
            else f"a {type(first).__name__}"
        )
        raise InputError(
            f"{what}: its first item has {found}; expected a dict with {LABELS[0]!r} or "
            f"{LABELS[1]!r}, the class number; rename the column, or give a data_collator that "
            "makes such batches"
        )


def _stack(items: list[Any], *, n_classes: int) -> dict[str, Any]:
    """Return the items as one batch. Raises `InputError` for items of different lengths, and for a
    class there is not."""
    try:
        batch = default_data_collator(items)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise InputError(
            f"a batch cannot be stacked: {type(error).__name__}: {error}. Give all items the same "
            "keys, and pad them to one length, or give a data_collator that does, such as "
            "transformers.DataCollatorWithPadding(tokenizer)"
        ) from error
    labels = batch[LABELS[0]]
    odd = labels[((labels < 0) & (labels != IGNORED)) | (labels >= n_classes)]
    if len(odd):
        raise InputError(
            f"label {odd[0].item()} is outside the {n_classes} classes of the model; expected "
            f"0..{n_classes - 1}"
        )
    return batch


def _classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(B, C) logits, alone or first of the model's outputs -> (B,) class numbers: all that accuracy
    needs is kept."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    counted = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions == prediction.label_ids)[counted].mean())}
