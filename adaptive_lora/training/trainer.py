"""`transformers.Trainer` that never trains on, or reports, a number that is not finite."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from adaptive_lora.errors import DivergedError, InputError, NothingLearnedError
from adaptive_lora.files import to_json, write_text
from adaptive_lora.model.adapters import base_of, non_finite, weights
from adaptive_lora.model.attach import infer_task_type
from adaptive_lora.model.quantization import keep_trainable
from adaptive_lora.training.callback import SaveAfterEpoch

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

OnNonFinite = Literal["stop", "skip"]
logger = logging.getLogger(__name__)


class AdaptiveTrainerMixin(_Base):
    """Mix into any `Trainer` subclass, before it: `class Mine(AdaptiveTrainerMixin,
    Seq2SeqTrainer)`.

    A loss or gradient that is NaN or infinite never reaches the optimizer; nothing is logged as 0.0
    and clipping cannot spread it. An adapter that learned nothing is an error at the end of
    `train()`. With finite numbers this is the `Trainer`, bit for bit, but for three things: batch 8
    equals batch 4 x accumulation 2 for all but decoders too, training resumed after its last step
    makes no step more, and an evaluation draws no random number of the training's, so that how
    often one evaluates does not change what is trained.

    Args:
        on_non_finite: "stop" saves the state after the last whole step as a checkpoint and raises
            `DivergedError` with the step and the layers. "skip" drops the whole optimizer step, all
            its micro-batches: weights, moments and the scores of changing ranks stay as they are,
            while the schedules count it. `skipped_steps` counts, in a log row and a warning each.
            For optimizers that pass over parameters without gradients, as torch's do.
        max_skipped: steps that "skip" may drop in a run; the next one stops.

    Raises `InputError` for "skip" where it cannot work: fp16, DeepSpeed, FSDP, several processes.
    """

    def __init__(
        self, *args: Any, on_non_finite: OnNonFinite = "stop", max_skipped: int = 5, **kwargs: Any
    ) -> None:
        if on_non_finite not in ("stop", "skip"):
            raise InputError(f"on_non_finite is {on_non_finite!r}; expected 'stop' or 'skip'")
        if isinstance(max_skipped, bool) or not isinstance(max_skipped, int) or max_skipped < 1:
            raise InputError(f"max_skipped is {max_skipped!r}; expected a whole number >= 1")
        super().__init__(*args, **kwargs)
        base = base_of(self.model)
        keep_trainable(base)
        self.on_non_finite, self.max_skipped = on_non_finite, max_skipped
        if on_non_finite == "skip" and (self._scaled_or_sharded() or self.args.world_size > 1):
            raise InputError(
                "on_non_finite 'skip' does not work with fp16 (its loss scaler skips by itself), "
                "DeepSpeed, FSDP or several processes (they would not skip the same steps); use "
                "'stop', or bf16 or float32 on one device"
            )
        self.add_callback(SaveAfterEpoch)
        self._at_start: str | None = None  # digest of what is trained, where it can be taken
        self._skipping = False  # is this step to be dropped?
        # the Trainer's running sum of losses at the start of this step
        self._loss_before = torch.tensor(0.0)
        # The Trainer would log a NaN loss as the mean of earlier ones; here it never gets that far.
        self.args.logging_nan_inf_filter = False
        # The Trainer takes any model with **kwargs for one that divides its loss by the tokens of
        # all micro-batches. Only language models do, and of those not T5 and BART; the gradient of
        # the others would grow with accumulation.
        kind, divides = infer_task_type(base), divides_by_items(base)
        self._scale_by_tokens = (
            kind == TaskType.SEQ_2_SEQ_LM and not divides and self.label_smoother is None
        )
        if not self._scale_by_tokens and not (
            kind in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and divides
        ):
            self.model_accepts_loss_kwargs = False

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far. The count lives in the log, which every checkpoint carries: it
        survives a resume."""
        return sum("skipped_steps" in row for row in self.state.log_history)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        model: Any = self.model
        if self._at_start is None:
            return output
        # A finished run that is resumed makes no step, and has nothing to change.
        unchanged = (
            self.state.global_step > self._initial_global_step
            and trained_digest(model) == self._at_start
        )
        if unchanged or updates_are_zero(model):
            what = (
                "no trainable parameter changed" if unchanged else "every update B A is still zero"
            )
            raise NothingLearnedError(
                f"the adapter learned nothing in {self.state.global_step} steps: {what}. Is the "
                "learning rate 0 or tiny, or its warm-up as long as the training; are the adapters "
                "frozen; was every step skipped; does no record have a label that counts in the "
                "loss?"
            )
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Called by `train()` when a checkpoint, if any, is loaded."""
        model: Any = self.model
        # A sharded model has no process that holds all its weights.
        whole = (
            isinstance(model, PeftModel)
            and not self.is_fsdp_enabled
            and not self.is_deepspeed_enabled
        )
        self._at_start = trained_digest(model) if whole else None
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed after the last step, in mid-epoch: the Trainer would make one step more
            self.control.should_training_stop = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the Trainer once for each optimizer step, before its micro-batches."""
        self._skipping = False
        if self.on_non_finite == "skip":
            # A copy: the Trainer adds to this tensor in place.
            self._loss_before = self._tr_loss.clone()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._skipping and not torch.isfinite(loss):
            # Weights first: a broken one makes every output after it non-finite too.
            where = non_finite(model) or first_non_finite_output(
                model, self._prepare_inputs(inputs)
            )
            self._met_non_finite(model, f"the loss is {loss.item()}", where)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self._scale_by_tokens or num_items_in_batch is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        tokens = (inputs["labels"] != -100).sum()
        loss, outputs = super().compute_loss(model, inputs, True, None, **kwargs)
        # from the mean over these tokens to their share of all in the step
        loss = loss * tokens / num_items_in_batch
        if self.args.average_tokens_across_devices:
            # The tokens are those of all processes, and gradients are averaged over these.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        return None if self._skipping else self._finite_grad_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called by the Trainer once for each optimizer step, right before it."""
        if grad_norm is None and not self._skipping:
            grad_norm = self._finite_grad_norm(model, math.inf)
        if self._skipping:
            # an optimizer passes over what has no gradient: no update, no decay, no moment
            model.zero_grad()
            # The logged loss is a mean over the steps made: this one leaves sum and count.
            self._tr_loss = self._loss_before
            self._globalstep_last_logged += 1
            self._initial_global_step += 1
        return grad_norm

    def _scaled_or_sharded(self) -> bool:
        return (
            self.accelerator.scaler is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled
        )

    def _finite_grad_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor | float | None:
        if self._scaled_or_sharded():
            # fp16: infinite gradients are the loss scaler's daily business, it skips the step.
            # Sharded: not ours to clip.
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # as accelerator.clip_grad_norm_, but nothing is scaled when the norm is not finite
        try:
            return torch.nn.utils.clip_grad_norm_(
                model.parameters(), max_norm, error_if_nonfinite=True
            )
        except RuntimeError:
            bad = tuple(
                name
                for name, parameter in model.named_parameters()
                # By the norm: finite entries whose squares overflow are culprits too.
                if parameter.grad is not None and not torch.isfinite(parameter.grad.norm())
            )
        self._met_non_finite(model, "the gradient is not finite", bad)
        return None

    def _met_non_finite(self, model: nn.Module, what: str, where: tuple[str, ...]) -> None:
        """Stop, or have this step skipped if the policy says so and allows one more."""
        listed = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        what, step, skipped = (
            f"{what}; first seen in {listed or 'the loss itself'}",
            self.state.global_step + 1,
            0,
        )
        if self.on_non_finite == "skip":
            skipped = self.skipped_steps
            if skipped < self.max_skipped:
                self._skipping = True
                logger.warning(
                    "step %d skipped (%d of at most %d): %s",
                    step,
                    skipped + 1,
                    self.max_skipped,
                    what,
                )
                return
        # The state after the last whole step, if its weights are finite.
        if self.state.global_step > 0 and self.args.should_save and not non_finite(model):
            self._save_checkpoint(model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        before = f" Skipped before: {skipped}, all that max_skipped allows." if skipped else ""
        raise DivergedError(
            f"training stopped at step {step}: {what}.{before} Lower the learning rate, warm it up "
            "for longer, or look at the data of this step",
            step=step,
            where=where,
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # now the Trainer has counted the step, and the row comes before any checkpoint
        if self._skipping:
            self._skipping = False
            due = self.control.should_log
            self.log({"skipped_steps": self.skipped_steps + 1})
            self.control.should_log = due  # a row of ours does not stand for the Trainer's
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            del logs["train_loss"]  # the mean over no steps, which the Trainer gives as 0.0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Named: by default fork_rng saves the state of every device there is, and warns of it.
        accelerators = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(accelerators):  # a data loader draws a seed when it starts
            metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DivergedError(
                    f"evaluation after step {self.state.global_step}: {name} is {value}",
                    step=self.state.global_step,
                )
        return metrics


class AdaptiveTrainer(AdaptiveTrainerMixin, Trainer):
    """The `Trainer` of the command line."""


def divides_by_items(model: nn.Module) -> bool:
    """True when the model's loss is transformers' `loss_function`, which divides by
    `num_items_in_batch` if it is given; T5 and BART take the mean over their own tokens, whatever
    they are given."""
    # transformers wraps `forward` in decorators, whose code says nothing of the loss.
    forward = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return forward is not None and "loss_function" in forward.co_names


def first_non_finite_output(model: nn.Module, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Run `model` once more without gradients and return the first module whose output is not
    finite, or ()."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def trained_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the trainable parameters: equal only if every bit is."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # As bytes, for numpy knows no bfloat16.
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def updates_are_zero(model: nn.Module) -> bool:
    """True when there are LoRA adapters and B A is zero in each, because B, A or the rank is."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not layer.lora_embedding_A
    ]
    pairs = [pair for pair in map(weights, layers) if pair is not None]
    return bool(layers) and not any(bool(a.any()) and bool(b.any()) for a, b in pairs)


class MetricsFile(TrainerCallback):
    """Append every log row to `metrics.jsonl`; after a resume, first rewrite the rows up to the
    checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(self.path, "".join(map(self._line, state.log_history)))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return to_json(row) + "\n"


_SHOWN = (
    "loss", "grad_norm", "learning_rate", "accuracy", "f1", "f1_micro", "matthews", "pearson",
    "rougeLsum", "exact_match", "perplexity",
    "bits_per_byte",
)  # fmt: skip


def log_line(state: Any, logs: dict[str, Any]) -> str:
    """Return what a person wants of a log row in one line, "" when there is nothing."""
    wanted = [k for k in logs if k.endswith(tuple(f"_{name}" for name in _SHOWN)) or k in _SHOWN]
    # Without `token_loss`: an evaluation has the same number as its `loss`.
    shown = "  ".join(
        f"{k.removeprefix('eval_')} {logs[k]:.4g}" for k in wanted if not k.endswith("token_loss")
    )
    what = "eval  " if any(k.startswith("eval_") for k in wanted) else ""
    return f"step {state.global_step:>6}/{state.max_steps}  {what}{shown}" if shown else ""


class PlainProgress(TrainerCallback):
    """One line per log row, for output that is not a terminal."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and (line := log_line(state, logs or {})):
            print(line, flush=True)


class ProgressBars(ProgressCallback):
    """The Trainer's bars, with the same lines above them, for a terminal."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if (
            state.is_world_process_zero
            and self.training_bar is not None
            and (line := log_line(state, logs or {}))
        ):
            self.training_bar.write(line)


def use_progress(trainer: Trainer, *, quiet: bool = False, stream: Any = None) -> None:
    """Replace the Trainer's output: bars on a terminal, else plain lines, nothing if `quiet`."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not quiet:
        trainer.add_callback(ProgressBars if (stream or sys.stderr).isatty() else PlainProgress)
