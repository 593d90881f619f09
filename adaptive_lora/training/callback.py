"""`AdaptiveRankCallback`: ranks that change inside an unmodified `Trainer`, `Seq2SeqTrainer` or TRL
`SFTTrainer`."""

from __future__ import annotations

import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from adaptive_lora.allocation import history
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.method import Method
from adaptive_lora.errors import AdaptiveLoraError, InputError, IntegrityError
from adaptive_lora.files import ADAPTER_FOLDER
from adaptive_lora.model.adapters import is_masked, ranks
from adaptive_lora.model.fingerprint import keep_fingerprint
from adaptive_lora.model.following import follow, loaded_from
from adaptive_lora.model.resize import drop_misfits, resize, unwrap
from adaptive_lora.model.saving import save
from adaptive_lora.training.contract import bring_to_start, check_arguments, model_for, tell
from adaptive_lora.training.controller import (
    STATE_FILE,
    NeverDecidedError,
    RankController,
    saved_step,
)

# {model: (its callback, the state of its training)}
IN_TRAINING: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class SaveAfterEpoch(TrainerCallback):
    """Put off a checkpoint that is due in the last step of an epoch until its end has been
    evaluated and logged.

    A run resumed from there begins with the next epoch: it would never make up for that.
    """

    _due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if (
            control.should_save
            and last
            and IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)
        ):
            control.should_save, self._due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due:
            control.should_save, self._due = True, False


class AdaptiveRankCallback(SaveAfterEpoch):
    """Hand to a `Trainer`: `Trainer(model, args, ..., callbacks=[AdaptiveRankCallback(method)])`.

    Total steps come from the Trainer. Scores are taken before each optimizer step, ranks change
    after it; checkpoints carry what an exact resume needs. A model with other ranks than the method
    starts with, as TRL's `peft_config=` makes it, is brought to that start, with a warning. However
    the training ends (early, or with the best checkpoint), the ranks at the end are within the
    budget. One callback belongs to one training.

    Args:
        method: how ranks are chosen; where the model comes from `attach`, the method given there.
        history_file: where to write one line a decision; None keeps the history in `.history` only.

    Raises `InputError` at the start for what cannot work: wrapped or sharded models, adapters that
    are merged, frozen or disabled, a plateau method without evaluation; `NeverDecidedError` at the
    end when nothing was ever decided, with the adapter saved first.
    """

    def __init__(self, method: Method, history_file: str | Path | None = None) -> None:
        self.method = method
        self.history_file = Path(history_file) if history_file is not None else None
        self.controller: RankController | None = None
        self._first: _Snapshot | None = None
        self._ended = False

    @property
    def history(self) -> list[Decision]:
        """The decisions so far."""
        return self.controller.history if self.controller else []

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, model)

    def _check(self, args: TrainingArguments, model: Any) -> PeftModel:
        """Make sure that ranks can change in `model`, and that it follows the checkpoint that the
        Trainer may load next. A callback that is added later comes here at the start."""
        found = model_for(model, self.method)
        check_arguments(args, self.method)
        keep_fingerprint(found)
        follow(found, ranks=True)
        bring_to_start(found, self.method, fresh_only=True)
        return found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = state.global_step > 0
        model = model_for(kwargs["model"], self.method) if resumed else None
        model = model or self._check(args, kwargs["model"])
        check_arguments(args, self.method)
        self._alone(model, state)
        if args.auto_find_batch_size:
            self._start_anew(model, kwargs["optimizer"], resumed=resumed)
        self._ended = False
        self.controller = RankController(
            model, kwargs["optimizer"], self.method, state.max_steps, self._write
        )
        if not resumed:
            self.controller.begin()
        elif self.method.adaptation is not None:
            self.controller.load_state(self._checkpoint(args, state, model))
        tell(args, state, model, self.method, self.controller.driver)
        # The file may hold decisions after the checkpoint, of the training that was cut off.
        self._write(None)

    def _alone(self, model: PeftModel, state: TrainerState) -> None:
        """Raise `InputError` for a second callback in the same training."""
        other = IN_TRAINING.get(model)
        if other is not None and other[1]() is state and other[0]() not in (None, self):
            raise InputError(
                "the Trainer has two AdaptiveRankCallbacks, which would both change the ranks of "
                "one model; give it one"
            )
        IN_TRAINING[model] = (weakref.ref(self), weakref.ref(state))

    def _checkpoint(self, args: TrainingArguments, state: TrainerState, model: PeftModel) -> Path:
        """Return the folder that the training is resumed from, which no event tells."""
        if (known := loaded_from(model)) is not None:
            return known
        # The model lies in a module that has no `load_adapter`.
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        given = (args.resume_from_checkpoint, Path(args.output_dir or ".") / name)
        places = [Path(place) for place in given if isinstance(place, str | Path)]
        for place in places:
            if (place / STATE_FILE).is_file() and saved_step(place) == state.global_step:
                return place
        raise IntegrityError(
            f"the Trainer resumes at step {state.global_step}, but no rank state of that step is "
            f"in {', '.join(map(str, places))}; resume from a checkpoint in output_dir that was "
            "written with this callback"
        )

    def _start_anew(self, model: PeftModel, optimizer: Any, *, resumed: bool) -> None:
        """Put everything back where the training began, when `auto_find_batch_size` begins again
        with a smaller batch: weights, ranks and random numbers are those of an attempt that ran out
        of memory."""
        if self._first is None or self._first.model() is not model or self._ended:
            self._first = _Snapshot(model)
        elif self.controller is not None:
            self._first.restore()
            # of a resume they have just been loaded
            drop = drop_misfits if resumed else lambda one: unwrap(one).state.clear()
            drop(optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.controller is not None
        if self.method.adaptation is None:
            return
        # Here the gradients are whole and unscaled; in `on_step_end` they are gone.
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # No step will be made: `AdaptiveTrainer(on_non_finite="skip")` has thrown the gradients
        # away, or fp16's loss scaler is about to.
        if not gradients or (
            args.fp16 and not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        ):
            self.controller.skip()
        else:
            self.controller.observe()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.controller is not None
        # Ranks first: checkpoint and evaluation of this step see those that are trained next.
        self.controller.step()
        super().on_step_end(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.controller is None or self.method.adaptation is None or self._ended:
            return
        if "eval_loss" in kwargs["metrics"]:
            self.controller.evaluated(kwargs["metrics"]["eval_loss"])
        elif self.method.adaptation.when.needs_evaluation:
            raise InputError(
                f"method {self.method.name!r} waits for a plateau of eval_loss, but the evaluation "
                f"gave only {', '.join(kwargs['metrics'])}: give the Trainer one evaluation set, "
                "with labels"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (
            self.controller is not None
            and self.method.adaptation is not None
            and state.is_world_process_zero
        ):
            assert args.output_dir is not None
            # Beside the Trainer's files: what it deletes, it deletes together.
            self.controller.save_state(
                Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.controller is not None
        self._ended = True  # what is evaluated from here on decides nothing
        self._first = None
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self.controller.take_up(Path(state.best_model_checkpoint))
            self.controller.finish(stopped_early=state.global_step < state.max_steps)
        except (NeverDecidedError, IntegrityError) as error:
            raise type(error)(f"{error}{self._rescued(args, state)}") from error
        finally:
            IN_TRAINING.pop(self.controller.model, None)

    def _rescued(self, args: TrainingArguments, state: TrainerState) -> str:
        """Save the adapter of a training that is over, whatever is wrong with its ranks, and say
        where it is."""
        assert self.controller is not None
        beside = self.history_file.parent if self.history_file else Path(args.output_dir or ".")
        folder = beside / ADAPTER_FOLDER
        if not state.is_world_process_zero:
            return ""
        try:
            save(self.controller.model, folder)
        except (AdaptiveLoraError, OSError) as error:
            return f" The trained adapter could not be saved: {error}"
        return f" The trained adapter is in {folder}"

    def _write(self, decision: Decision | None) -> None:
        if self.history_file is None or self.controller is None or self.method.adaptation is None:
            return
        if decision is None:
            self.history_file.parent.mkdir(parents=True, exist_ok=True)
            history.write(self.history_file, self.controller.history)
        else:
            with self.history_file.open("a", encoding="utf-8") as file:
                file.write(decision.to_json() + "\n")


class _Snapshot:
    """What is trained of a model, its ranks, and the random numbers to come."""

    def __init__(self, model: PeftModel) -> None:
        self.model = weakref.ref(model)
        self.ranks = ranks(model)
        self.values = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.cpu, self.numpy, self.python = (
            torch.get_rng_state(), np.random.get_state(), random.getstate(),
        )  # fmt: skip
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        model = self.model()
        assert model is not None
        if not is_masked(model):
            now = ranks(model)
            resize(model, {name: r for name, r in self.ranks.items() if r != now[name]})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.values:
                    parameter.copy_(self.values[name])
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
