"""What a training will need, from its recipe and the model's configuration alone: no weights, no
data, no storage."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel

from adaptive_lora import methods
from adaptive_lora.allocation.allocate import RankPattern, proportional
from adaptive_lora.allocation.target import Target
from adaptive_lora.errors import InputError
from adaptive_lora.model.adapters import base_of, lora_parameters
from adaptive_lora.model.attach import attach
from adaptive_lora.model.base_model import Base, read_config
from adaptive_lora.model.deciding import driver_of
from adaptive_lora.model.memory import account, total
from adaptive_lora.model.quantization import check_plain, compute_dtype, left_out
from adaptive_lora.model.targets import find_targets, head_modules
from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.runs.simulation import BatchShapes, pack, step_bytes
from adaptive_lora.tasks import TASKS
from adaptive_lora.tasks.guess import with_task_of_model

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CUDA_RESERVE = 10**9  # bytes of a card left to CUDA's context and to fragmentation
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}  # of an optimizer for each parameter


@dataclass(frozen=True)
class Stage:
    """Memory at one moment of the schedule, in bytes. `exact` is False where ranks are bounds,
    chosen by the training."""

    name: str
    parameters: int  # LoRA parameters
    account: dict[str, Any]  # as `memory.account`
    activations: int  # and temporaries, at the peak of a step, beside the gradients
    exact: bool = True

    @property
    def peak(self) -> int:
        """The peak of a step at this stage."""
        return total(self.account) + self.activations


@dataclass(frozen=True)
class Plan:
    """The stages of a training from its start to its end, in order, and what was assumed."""

    stages: list[Stage]
    device: str
    notes: list[str]

    @property
    def peak(self) -> int:
        """The highest peak of all stages, in bytes."""
        return max(stage.peak for stage in self.stages)

    def fits(self, size: int) -> bool:
        """True when the training fits in `size` bytes, with what CUDA keeps for itself."""
        return self.peak + (CUDA_RESERVE if self.device == "cuda" else 0) <= size


def plan(config: RunConfig, *, device: str | None = None) -> Plan:
    """Return the memory that the training of `config` needs, for its batch size and
    `data.max_length`.

    peak = base + head + adapters + gradients + optimizer + statistics + activations, at the start
    and at the end of the schedule. Activations are those of a simulated step (see `simulation`);
    all else is counted on a model without storage.

    Args:
        config: a recipe; of its data only `max_length`, `max_target_length` and `classes` matter,
            and without a task the columns of a file that is here.
        device: "cpu" or "cuda"; None: what is here. On CUDA attention is taken to be fused.

    Raises `InputError` for a model whose configuration cannot be read, or that is quantised
    already.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, notes = with_task_of_model(config)
    if config.data.max_length is None:
        notes += [
            f"inputs of {config.usual_length:,} tokens, or as many as the model reads, are planned "
            "for; data.max_length says another number"
        ]
    method = methods.build(config.method.name, config.method.arguments)
    model = _model(config, device, method)
    base: Any = base_of(model)
    targets = find_targets(_skeleton(config, device), config.adapters.targets)
    stages = [_stage("start", config, device, method, model)]
    if config.quantization != "none":
        dtype = compute_dtype(config.dtype, device=device)
        notes += ["the head and the output embeddings are not quantised"]
        notes += left_out(base, config.quantization, dtype, device)
    if method.adaptation is not None:
        pattern, exact = _last_pattern(method, targets)
        static = methods.Method(name=method.name, shape=lambda _: pattern)
        last = _stage("end", config, device, static, _model(config, device, static))
        stages.append(replace(last, exact=exact))
        if not exact:
            notes.append(
                "the ranks at the end are chosen by the training; counted is the most the method "
                "allows"
            )
    if config.training["optim"] not in MOMENTS:
        notes.append(
            f"optimizer {config.training['optim']}: its state is not known here and counted as "
            "that of AdamW"
        )
    return Plan(stages, device, notes)


def largest_budget(config: RunConfig, size: int, *, device: str | None = None) -> tuple[int, Plan]:
    """Return the largest budget in LoRA parameters with which the training fits in `size` bytes,
    and its plan.

    The peak is all but linear in the budget: a line through two plans gives a guess, which is then
    planned, and lowered while it does not fit. Raises `InputError` when nothing fits, or the method
    takes no budget.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, guessed = with_task_of_model(config)
    targets = find_targets(_skeleton(config, device), config.adapters.targets)

    def planned(budget: int) -> Plan:
        arguments = {
            k: v for k, v in config.method.arguments.items() if k not in ("rank", "budget")
        }
        changed = config.method.model_validate(
            {"name": config.method.name, **arguments, "budget": budget}
        )
        found = plan(config.model_copy(update={"method": changed}), device=device)
        return replace(found, notes=[*guessed, *found.notes])

    reserve = CUDA_RESERVE if device == "cuda" else 0
    least, most = sum(t.cost for t in targets), sum(t.cost * t.full_rank for t in targets)
    factor = _start_factor(config)
    # The method starts at this factor of its budget, and no target can hold more than full rank.
    most = int(most / factor)
    low = planned(least)
    if not low.fits(size):
        raise InputError(
            f"even rank 1 on every target needs {low.peak / 1e9:.2f} "
            f"GB{' and CUDA 1 GB' if reserve else ''}, more than {size / 1e9:.2f} GB: lower the "
            "batch size or data.max_length, turn training.gradient_checkpointing on, or set "
            "quantization: nf4"
        )
    second = min(most, 8 * least)
    slope = (planned(second).peak - low.peak) / max(second - least, 1)
    budget = min(most, least + int((size - reserve - low.peak) / slope)) if slope > 0 else most
    while True:
        found = planned(budget)
        if found.fits(size):
            return budget, found
        budget -= max(least, int((found.peak + reserve - size) / slope))
        if budget <= least:
            return least, low


def alternatives(config: RunConfig, *, device: str | None = None) -> dict[str, Plan]:
    """Return plans of the training with one change that saves memory, by what is changed."""
    batch = config.training["per_device_train_batch_size"]
    changes: dict[str, Callable[[], dict[str, Any]]] = {}
    if not config.checkpointing:
        changes["training.gradient_checkpointing: true"] = lambda: _training(
            config, gradient_checkpointing=True
        )
    if config.quantization == "none":
        changes["quantization: nf4"] = lambda: {"quantization": "nf4"}
    if batch > 1:
        steps = config.training.get("gradient_accumulation_steps", 1)
        smaller = {
            "per_device_train_batch_size": batch // 2,
            "gradient_accumulation_steps": 2 * steps,
        }
        changes[f"batch size {batch // 2}, twice the accumulation"] = lambda: _training(
            config, **smaller
        )
    return {
        what: plan(config.model_copy(update=change()), device=device)
        for what, change in changes.items()
    }


def _training(config: RunConfig, **values: Any) -> dict[str, Any]:
    return {"training": {**config.training, **values}}


def parse_size(text: str) -> int:
    """Return bytes from text such as 24GB (10⁹) or 24GiB (2³⁰).

    >>> parse_size("24GB"), parse_size("1.5 GiB")
    (24000000000, 1610612736)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise InputError(
            f"memory size is {text!r}; expected a number and a unit, such as 24GB or 8GiB"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def _skeleton(config: RunConfig, device: str) -> Any:
    """Return the base model without storage, with stand-ins for quantised modules."""
    assert config.task is not None
    head: dict[str, Any] = {}
    if config.task is not None and config.task.endswith("classification"):
        columns = config.data.label if isinstance(config.data.label, list) else None
        head["num_labels"] = len(config.data.classes or columns or (0, 1))
    if config.task == "regression":
        head["num_labels"] = 1
    if config.task == "question_answering":
        head["num_labels"] = 2
    trusted = config.trust_remote_code
    model_config = read_config(config.model, head, trust_remote_code=trusted)
    if config.quantization != "none":
        check_plain(model_config, config.model)
    dtype = _base_dtype(config, model_config, device)
    # its fused kernels keep no matrix of attention weights, with dropout neither
    if device == "cuda":
        for name in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"):
            if getattr(model_config, name, 0):
                setattr(model_config, name, 0.0)
    kind = TASKS[config.task].model_class(model_config)
    model = Base(config.model, kind, head, trusted).draw(model_config, device="meta", dtype=dtype)
    if config.quantization != "none":
        pack(model, config.quantization, dtype, device)
        for name in head_modules(model):
            # As it is trained: the head of a quantised base is float32.
            model.get_submodule(name).float()
    return model


def _base_dtype(config: RunConfig, model_config: Any, device: str) -> torch.dtype:
    if config.quantization != "none" or config.dtype != "auto":
        return compute_dtype(config.dtype, device=device)
    saved = getattr(model_config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _model(config: RunConfig, device: str, method: methods.Method) -> PeftModel:
    base = _skeleton(config, device)
    settings = config.adapters
    with torch.device("meta"):
        return attach(
            base, method, settings.targets, scale=settings.scale, dropout=settings.dropout
        )


def _stage(
    name: str, config: RunConfig, device: str, method: methods.Method, model: PeftModel
) -> Stage:
    parts = account(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = MOMENTS.get(config.training["optim"], 2)
    # A moment has the type of its parameter; Adam's step count is one float.
    parts["optimizer"] = moments * parts["gradients"] + (4 * len(trained) if moments else 0)
    parts["statistics"] = driver_of(method).planned_bytes(method, model)
    parameters = lora_parameters(model)
    inputs, autocast = _inputs(config, model), _autocast(config, device)
    step = step_bytes(model, inputs, checkpointing=config.checkpointing, autocast=autocast)
    # The simulated step makes the gradients too, which are a part of their own.
    return Stage(name, parameters, parts, max(step - parts["gradients"], 0))


def _autocast(config: RunConfig, device: str) -> torch.dtype | None:
    if config.training.get("bf16"):
        return torch.bfloat16
    if config.training.get("fp16"):
        return torch.float16
    if config.quantization == "none":
        return None
    dtype = compute_dtype(config.dtype, device=device)
    return None if dtype == torch.float32 else dtype


def _inputs(config: RunConfig, model: PeftModel) -> BatchShapes:
    """Return the shapes of one training batch of the longest inputs."""
    batch = config.training["per_device_train_batch_size"]
    length = config.data.max_length or config.usual_length
    base_config: Any = model.get_base_model().config
    limit = getattr(base_config, "max_position_embeddings", None)
    length = min(length, limit) if isinstance(limit, int) else length
    whole, rows = torch.int64, (batch,)
    if config.task == "image_classification":
        side = base_config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        pixels = (batch, getattr(base_config, "num_channels", 3), height, width)
        return {"pixel_values": (torch.float32, pixels)}
    tokens = {"input_ids": (whole, (batch, length)), "attention_mask": (whole, (batch, length))}
    if config.task in ("classification", "multi_label_classification", "regression"):
        # DeBERTa picks records by their labels, which have no values here; its loss weighs nothing
        return tokens
    if config.task == "question_answering":
        return {**tokens, "start_positions": (whole, rows), "end_positions": (whole, rows)}
    if getattr(base_config, "is_encoder_decoder", False):
        return {**tokens, "labels": (whole, (batch, config.data.max_target_length))}
    return {**tokens, "labels": (whole, (batch, length))}


def _start_factor(config: RunConfig) -> float:
    """Return how far above its budget the method starts."""
    adaptation = methods.build(config.method.name, config.method.arguments).adaptation
    return 1.0 if adaptation is None else max(1.0, adaptation.schedule.factor)


def _last_pattern(method: methods.Method, targets: list[Target]) -> tuple[RankPattern, bool]:
    """Return a pattern with as many parameters as the last, and whether that number is certain."""
    adaptation = method.adaptation
    assert adaptation is not None
    if (known := adaptation.last_pattern(targets)) is not None:
        return known, True
    most = {t.name: min(adaptation.max_rank or t.full_rank, t.full_rank) for t in targets}
    budget = method.budget_parameters(targets)
    costs = {t.name: t.cost for t in targets}
    if budget is None or budget >= sum(costs[name] * rank for name, rank in most.items()):
        return most, False
    ones = dict.fromkeys(most, 1)
    # The ranks themselves are chosen by the training; their sum in parameters is the budget.
    return proportional(ones, costs, budget, minimum=dict.fromkeys(most, 0), maximum=most), True
