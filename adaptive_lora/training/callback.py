"""`AdaptiveRankCallback`: ranks that change inside an unmodified `Trainer`, `Seq2SeqTrainer` or TRL
`SFTTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from adaptive_lora.allocation import history
from adaptive_lora.allocation.history import Decision
from adaptive_lora.allocation.method import Method
from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.model.adapter_file import tensor_ranks
from adaptive_lora.model.adapters import ranks
from adaptive_lora.model.deciding import driver_of
from adaptive_lora.model.quantization import keep_trainable
from adaptive_lora.model.resize import resize
from adaptive_lora.training.controller import RankController


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
    after it; checkpoints carry what an exact resume needs. One callback belongs to one training.

    Args:
        method: the method the model was attached with.
        history_file: where to write one line a decision; None keeps the history in `.history` only.

    Raises `InputError` at the start for what cannot work: wrapped or sharded models,
    `load_best_model_at_end` with changing ranks, a plateau method without evaluation;
    `NeverDecidedError` at the end when nothing was ever decided.
    """

    def __init__(self, method: Method, history_file: str | Path | None = None) -> None:
        self.method = method
        self.history_file = Path(history_file) if history_file is not None else None
        self.controller: RankController | None = None
        self._resumed_from: Path | None = None
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
        if not isinstance(model, PeftModel):
            raise InputError(
                "AdaptiveRankCallback needs a model from adaptive_lora.attach(base, method)"
            )
        keep_trainable(model)
        if self.method.adaptation is None:
            return
        _check_arguments(args, self.method)
        # The Trainer has no event between this one and the loading of a checkpoint.
        plain_load = model.load_adapter

        def load_adapter(
            model_id: Any, adapter_name: str, *load_args: Any, **load_kwargs: Any
        ) -> Any:
            if adapter_name != model.active_adapter:
                return plain_load(model_id, adapter_name, *load_args, **load_kwargs)
            # The Trainer loads the checkpoint's adapter into the model, which must have its ranks.
            self._resumed_from = Path(model_id)
            match_ranks(model, self._resumed_from)
            # And its dtype: PEFT would make float32 of adapters that are trained in bfloat16.
            return plain_load(
                model_id,
                adapter_name,
                *load_args,
                **{"autocast_adapter_dtype": False, **load_kwargs},
            )

        model.load_adapter = load_adapter  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._ended = False
        self.controller = RankController(
            model, optimizer, self.method, state.max_steps, self._write
        )
        if self.method.adaptation is not None and self._resumed_from is not None:
            self.controller.load_state(self._resumed_from)
        vars(model).pop("load_adapter", None)  # the Trainer has loaded by now
        if self.method.adaptation is not None and self.controller.step_count != state.global_step:
            raise IntegrityError(
                f"the Trainer resumes at step {state.global_step}, the rank controller is at "
                f"{self.controller.step_count}: the callback did not see the checkpoint load. Give "
                "the Trainer callbacks=[...] and model=, not add_callback or model_init="
            )
        # The file may hold decisions after the checkpoint, of the training that was cut off.
        self._write(None)

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
        self.controller.finish(stopped_early=state.global_step < state.max_steps)

    def _write(self, decision: Decision | None) -> None:
        if self.history_file is None or self.controller is None or self.method.adaptation is None:
            return
        if decision is None:
            self.history_file.parent.mkdir(parents=True, exist_ok=True)
            history.write(self.history_file, self.controller.history)
        else:
            with self.history_file.open("a", encoding="utf-8") as file:
                file.write(decision.to_json() + "\n")


def _check_arguments(args: TrainingArguments, method: Method) -> None:
    assert method.adaptation is not None
    if args.load_best_model_at_end:
        raise InputError(
            "load_best_model_at_end does not work with changing ranks: the best checkpoint may "
            "have other ranks than the model at the end. Set it to false; every checkpoint can be "
            "loaded with adaptive_lora.load"
        )
    if args.save_total_limit == 1 and args.save_strategy != SaveStrategy.NO:
        raise InputError(
            "save_total_limit is 1; expected at least 2 with changing ranks: the Trainer deletes "
            "the last checkpoint before the new one is complete, and a run killed in between could "
            "not be resumed"
        )
    if args.deepspeed or args.fsdp:
        raise InputError(
            "ranks cannot change under DeepSpeed or FSDP, which keep parameters of their own; "
            "train without"
        )
    if args.fp16 and driver_of(method).needs_every_step:
        raise InputError(
            "PEFT's AdaLoRA needs the gradients of every step, and fp16's loss scaler skips some: "
            "use bf16"
        )
    if args.n_gpu > 1 or args.world_size > 1:
        raise InputError(
            "ranks cannot change in DataParallel or DistributedDataParallel "
            f"({max(args.n_gpu, args.world_size)} devices), whose replicas keep the old shapes; "
            "run on one device (CUDA_VISIBLE_DEVICES=0)"
        )
    if method.adaptation.when.needs_evaluation and args.eval_strategy == IntervalStrategy.NO:
        raise InputError(
            f"method {method.name!r} waits for a plateau of the evaluation loss, but nothing is "
            "evaluated; give an evaluation set and eval_strategy steps or epoch"
        )


def match_ranks(model: PeftModel, checkpoint: Path) -> None:
    """Give `model` the ranks of the adapter in `checkpoint`; a target absent there gets rank 0."""
    saved, now = tensor_ranks(checkpoint / "adapter_model.safetensors"), ranks(model)
    if saved:  # none in a checkpoint of PEFT's AdaLoRA, which keeps its first ranks to the end
        resize(model, {name: saved.get(name, 0) for name in now if saved.get(name, 0) != now[name]})
