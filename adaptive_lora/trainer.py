"""`transformers.Trainer` that never trains on, or reports, a number that is not finite."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from adaptive_lora.adapters import base_of, infer_task_type, non_finite
from adaptive_lora.errors import DivergedError

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdaptiveTrainerMixin(_Base):
    """Mix into any `Trainer` subclass, before it: `class Mine(AdaptiveTrainerMixin, Seq2SeqTrainer)`.

    A loss or gradient that is NaN or infinite raises `DivergedError` with the step and the layers, before the
    optimizer sees it; nothing is logged as 0.0, clipping cannot spread it, and the state after the last whole step is
    saved as a checkpoint. With finite numbers it is the `Trainer`, bit for bit, but for one thing: batch 8 equals
    batch 4 x accumulation 2 for classification too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer would log a NaN loss as the mean of earlier ones; here it never gets that far.
        self.args.logging_nan_inf_filter = False
        # The Trainer takes any model with **kwargs for one that divides its loss by the tokens of all micro-batches. Only
        # language models do; the gradient of the others would grow with the number of accumulation steps.
        if infer_task_type(base_of(self.model)) not in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, None):
            self.model_accepts_loss_kwargs = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            where = non_finite(model) or first_non_finite_output(model, self._prepare_inputs(inputs))
            raise self._diverged(model, f"the loss is {loss.item()}", where)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        return self._finite_grad_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._finite_grad_norm(model, math.inf) if grad_norm is None else grad_norm

    def _finite_grad_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor | float | None:
        if self.accelerator.scaler is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # fp16: infinite gradients are the loss scaler's daily business, it skips the step. Sharded: not ours to clip.
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        try:  # the same operations as accelerator.clip_grad_norm_, but nothing is scaled when the norm is not finite
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True)
        except RuntimeError:
            bad = tuple(
                name
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad.norm())
            )
            raise self._diverged(model, "the gradient is not finite", bad) from None

    def _diverged(self, model: nn.Module, what: str, where: tuple[str, ...]) -> DivergedError:
        """Keep the state after the last whole step, if its weights are finite, and return the error to raise."""
        step = self.state.global_step + 1
        if self.state.global_step > 0 and self.args.should_save and not non_finite(model):
            self._save_checkpoint(model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        listed = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        return DivergedError(
            f"training stopped at step {step}: {what}; first seen in {listed or 'the loss itself'}. "
            "Lower the learning rate, warm it up for longer, or look at the data of this step",
            step=step,
            where=where,
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DivergedError(
                    f"evaluation after step {self.state.global_step}: {name} is {value}", step=self.state.global_step
                )
        return metrics


class AdaptiveTrainer(AdaptiveTrainerMixin, Trainer):
    """The `Trainer` of the command line."""


def first_non_finite_output(model: nn.Module, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Run `model` once more without gradients and return the first module whose output is not finite, or ()."""
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


class MetricsFile(TrainerCallback):
    """Append every log row to `metrics.jsonl`; after a resume, first rewrite the rows up to the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(map(self._line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return `value` with every float that is not finite replaced by None: strict JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_SHOWN = {"loss", "accuracy", "perplexity", "norm", "rate"}


def log_line(state: Any, logs: dict[str, Any]) -> str:
    """Return what a person wants of a log row in one line, "" when there is nothing."""
    shown = "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if k.split("_")[-1] in _SHOWN)
    return f"step {state.global_step:>6}/{state.max_steps}  {shown}" if shown else ""


class PlainProgress(TrainerCallback):
    """One line per log row, for output that is not a terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := log_line(state, logs or {})):
            print(line, flush=True)


class ProgressBars(ProgressCallback):
    """The Trainer's bars, with the same lines above them, for a terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and (line := log_line(state, logs or {})):
            self.training_bar.write(line)


def use_progress(trainer: Trainer, *, quiet: bool = False, stream: Any = None) -> None:
    """Replace the Trainer's own output: bars on a terminal, plain lines elsewhere, nothing when `quiet`."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not quiet:
        trainer.add_callback(ProgressBars if (stream or sys.stderr).isatty() else PlainProgress)
