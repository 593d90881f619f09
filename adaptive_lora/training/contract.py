"""What model, method and training owe each other at the start, whoever enters: a `Trainer` by the
callback, or a loop of one's own by the `RankController`.

What cannot work is refused before the first step. A model that starts otherwise than the method,
as TRL's `peft_config=` makes it, is brought to the method's start, which is said. What works but
costs more, or reaches less, than its user may think is said too.
"""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from adaptive_lora.allocation.method import Method
from adaptive_lora.errors import InputError
from adaptive_lora.model.adapters import (
    adapters,
    all_weights,
    is_masked,
    linear_adapters,
    lora_parameters,
    ranks,
    targets_of,
)
from adaptive_lora.model.condition import Need, is_compiled
from adaptive_lora.model.deciding import (
    Deciding,
    decision_steps,
    driver_of,
    kept_parameters,
    within,
)
from adaptive_lora.model.driver import Driver
from adaptive_lora.model.resize import check_model, resize

logger = logging.getLogger(__name__)


def model_for(model: Any, method: Method) -> PeftModel:
    """Return the `PeftModel` that `model` is or holds. Raises `InputError` unless it is fit to be
    trained, and to change its ranks if the method does."""
    need = Need.TRAIN if method.adaptation is None else Need.TRAIN | Need.CHANGE
    return check_model(model, need).model


def bring_to_start(
    model: PeftModel, method: Method, optimizer: Any = None, *, fresh_only: bool = False
) -> None:
    """Give `model` the ranks that `method` starts with, and say so; nothing happens to a model that
    has them.

    Args:
        model: with adapters, attached by whomever.
        method: how ranks are chosen.
        optimizer: that trains the model, if there is one already.
        fresh_only: leave a model alone whose adapters are trained already.

    Raises `InputError` when trained components would be lost: cut them by `compress`, which keeps
    the largest.
    """
    if is_masked(model):  # PEFT's AdaLoRA: its driver looks
        return
    start = within(method, kept_parameters(model)).initial_pattern(targets_of(model))
    now = ranks(model)
    changes = {name: rank for name, rank in start.items() if rank != now[name]}
    if not changes:
        return
    layers = linear_adapters(model)
    trained = [name for name in layers if bool(all_weights(layers[name])[1].any())]
    if trained and fresh_only:
        return
    lost = [name for name in trained if start[name] < now[name]]
    if lost:
        raise InputError(
            f"method {method.name!r} starts at rank {start[lost[0]]} for {lost[0]!r}, whose "
            f"adapter is trained already, at rank {now[lost[0]]}: its components would be lost. "
            "Cut it first with adaptive_lora.compress, or let the method start higher"
        )
    before = lora_parameters(model)
    resize(model, changes, optimizer)
    logger.warning(
        "method %r starts at other ranks than the model was attached with: %d of %d adapters were "
        "brought there, %s -> %s LoRA parameters",
        method.name, len(changes), len(start), f"{before:,}", f"{lora_parameters(model):,}",
    )  # fmt: skip


def check_arguments(args: TrainingArguments, method: Method) -> None:
    """Raise `InputError` for a training in which the ranks of `method` cannot change."""
    if method.adaptation is None:
        return
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


def tell(
    args: TrainingArguments, state: TrainerState, model: PeftModel, method: Method, driver: Driver
) -> None:
    """Say what works, but otherwise than its user may think."""
    if method.adaptation is None:
        return
    for line in (
        _resumes(args),
        _kept(model),
        _compiled(args, state, model, method),
        _reach(args, state, method, driver),
    ):
        if line:
            logger.warning("%s", line)


def _resumes(args: TrainingArguments) -> str:
    if not args.save_only_model or args.save_strategy == SaveStrategy.NO:
        return ""
    return (
        "save_only_model: these checkpoints hold no optimizer state, so none can be resumed exactly"
    )


def _kept(model: PeftModel) -> str:
    linear = linear_adapters(model)
    kept = [name for name in adapters(model) if name not in linear]
    if not kept:
        return ""
    return (
        f"{len(kept)} adapters lie on what is no linear module ({', '.join(kept[:3])}"
        f"{', ...' if len(kept) > 3 else ''}): they are trained, counted and saved, and keep their "
        "rank"
    )


def _compiled(
    args: TrainingArguments, state: TrainerState, model: PeftModel, method: Method
) -> str:
    if not args.torch_compile and not is_compiled(model):
        return ""
    assert method.adaptation is not None
    moments = len(decision_steps(method.adaptation.when, state.max_steps))
    count = f"up to {moments} times" if moments else "at each plateau"
    return (
        f"the model is compiled, and its ranks change {count}: torch compiles it anew each time, "
        "which takes as long as the first step. Decide less often (every=), or do not compile"
    )


def _reach(args: TrainingArguments, state: TrainerState, method: Method, driver: Driver) -> str:
    """Return what to say where a method that grows at plateaus meets too few evaluations."""
    if not isinstance(driver, Deciding) or driver.budget is None:
        return ""
    if not driver.adaptation.when.needs_evaluation:
        return ""
    # What is evaluated after the last step grows nothing.
    if args.eval_strategy == IntervalStrategy.STEPS:
        evaluations = (state.max_steps - 1) // max(1, int(state.eval_steps or 1))
    else:
        evaluations = max(0, -int(-args.num_train_epochs // 1) - 1)
        if args.max_steps > 0:
            return ""  # epochs are not known yet
    decisions, reached = driver.reach(evaluations)
    budget = driver.budget + driver.kept
    if reached + min(driver.costs.values()) > budget:
        return ""
    return (
        f"method {method.name!r} cannot reach its budget: {evaluations} evaluations before the "
        f"last step allow {decisions} decisions at most, to {reached:,} of {budget:,} parameters. "
        "Evaluate more often (eval_strategy: steps, eval_steps), or grow by more at a time (step)"
    )
