"""Trainers of others, each of a tiny random model of its kind: TRL's and transformers' own
sequence-to-sequence one, to be handed adapters from `attach`, or a plain base with a
`LoraConfig`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from model_folders import VOCABULARY, instructions
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

import adaptive_lora as al
from adaptive_lora import methods
from adaptive_lora.model.adapters import targets_of
from adaptive_lora.testing import callback_of

STEPS, SAVED_EVERY = 8, 3  # decisions after steps 1 to 6; checkpoints after 3, 6, 8
WAYS = ("attach", "peft_config")
METHODS = {
    "attach": lambda: methods.adalora(2, factor=2.0, initial=1, final=2, every=1),
    "peft_config": lambda: methods.squeeze(2, factor=2.0, initial=1, final=2, every=1),
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
WHISPER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_mel_bins": 4, "max_source_positions": 8,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip
Rows = list[dict[str, Any]]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("one") + 0.1 * len(set(text)) for text in completions]


def prompts() -> Rows:
    return [{"prompt": row["instruction"]} for row in instructions(32)]


def texts() -> Rows:
    return [{"text": " ".join(row.values())} for row in instructions(32)]


def pairs() -> Rows:
    return [
        {"prompt": row["instruction"], "chosen": " " + row["output"], "rejected": " bad night"}
        for row in instructions(32)
    ]


def judged() -> Rows:
    return [
        {
            "prompt": row["prompt"],
            "completion": row[("chosen", "rejected")[i % 2]],
            "label": not i % 2,
        }
        for i, row in enumerate(pairs())
    ]


def whole_pairs() -> Rows:
    return [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in pairs()]


def written() -> Rows:
    """Features of an encoder-decoder model of texts."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 64, (32, 2, 6), generator=draw)
    return [{"input_ids": row[0], "labels": row[1]} for row in rows]


def spoken() -> Rows:
    """Features of a model of speech."""
    draw = torch.Generator().manual_seed(3)
    return [
        {"input_features": torch.randn(4, 16, generator=draw), "labels": row["labels"]}
        for row in written()
    ]


def causal(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def judge(folder: str) -> PreTrainedModel:
    torch.manual_seed(0)  # of the head, which is in no folder
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=VOCABULARY["[PAD]"]
    )


def half(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def t5(_: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))


def whisper(_: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(WhisperConfig(**WHISPER))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A trainer of others, with what it is given."""

    name: str  # of the class, without "Trainer"
    module: str = "trl"
    base: Callable[[str], PreTrainedModel] = causal
    rows: Callable[[], Rows]
    task_type: str | None = "CAUSAL_LM"
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = False  # is a copy of a PeftModel's adapter kept as the reference?


SAMPLES = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5}
REWARD = {"reward_funcs": reward}
KINDS = {
    "SFT": Kind(name="SFT", rows=texts),
    "SFT, bf16 base": Kind(name="SFT", rows=texts, base=half, arguments={"bf16": True}),
    "DPO": Kind(name="DPO", rows=pairs, reference=True),
    "KTO": Kind(name="KTO", rows=judged, reference=True),
    "GRPO": Kind(name="GRPO", rows=prompts, arguments=SAMPLES, options=REWARD),
    "GRPO, beta": Kind(
        name="GRPO", rows=prompts, arguments=SAMPLES | {"beta": 0.1}, options=REWARD, reference=True
    ),
    "RLOO": Kind(name="RLOO", rows=prompts, arguments=SAMPLES, options=REWARD, reference=True),
    "reward": Kind(name="Reward", rows=whole_pairs, base=judge, task_type="SEQ_CLS"),
    "ORPO": Kind(name="ORPO", module="trl.experimental.orpo", rows=pairs),
    "T5": Kind(
        name="Seq2Seq", module="transformers", rows=written, base=t5, task_type="SEQ_2_SEQ_LM"
    ),
    # PEFT's class for SEQ_2_SEQ_LM hands on input_ids, which Whisper does not take.
    "Whisper": Kind(
        name="Seq2Seq", module="transformers", rows=spoken, base=whisper, task_type=None
    ),
}  # fmt: skip


class Seen(TrainerCallback):
    """What the model was when a checkpoint was written: {checkpoint's name: (ranks, answers)}."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.at: dict[str, tuple[dict[str, int], torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.at[f"checkpoint-{state.global_step}"] = al.ranks(model), answers(self.kind, model)


@dataclass
class Made:
    """A trainer that was made, and what it said while that and while it trained."""

    kind: Kind
    trainer: Trainer
    seen: Seen
    said: list[str]
    # of the reference adapter at the start, where there is one
    reference: dict[str, torch.Tensor]
    reference_answers: torch.Tensor | None

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def train(self, **options: Any) -> Made:
        with listening(self.said):
            self.trainer.train(**options)
        return self


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Add to `said` what this library warns of, by its log."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("adaptive_lora")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def make(
    name: str,
    way: str,
    llama: str,
    folder: Path,
    *,
    method: al.Method | None = None,
    model: PeftModel | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> Made:
    """Make the trainer `name` of `KINDS`, of 8 steps.

    Args:
        name: of `KINDS`.
        way: "attach", or "peft_config": a plain base, and what PEFT makes of it, of rank 8.
        llama: a folder with a causal model.
        folder: the trainer's own.
        method: of `METHODS`, by the way, unless given.
        model: instead of a new one with adapters.
        callbacks: instead of ours.
        arguments: further ones of the trainer's config.
    """
    kind = KINDS[name]
    method = method or METHODS[way]()
    seen = Seen(kind)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1, task_type=kind.task_type)
    options, said, is_trl = dict(kind.options), list[str](), kind.module.startswith("trl")
    set_seed(5)
    given: Any = model or kind.base(llama)
    if model is None and way == "attach":
        given = al.attach(given, method, dropout=0.1)
    elif model is None and is_trl:
        options["peft_config"] = lora
    elif model is None:
        given = get_peft_model(given, lora)
    if is_trl:
        options["processing_class"] = AutoTokenizer.from_pretrained(llama, pad_token="[PAD]")
    module = import_module(kind.module)
    config = f"{kind.name}Config" if is_trl else f"{kind.name}TrainingArguments"
    values: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": SAVED_EVERY, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    ours = [al.AdaptiveRankCallback(method)] if callbacks is None else callbacks
    data = Dataset.from_list(kind.rows()).with_format("torch" if not is_trl else None)
    with listening(said):
        trainer = getattr(module, f"{kind.name}Trainer")(
            model=given,
            args=getattr(module, config)(
                output_dir=str(folder), **{**values, **kind.arguments, **arguments}
            ),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            callbacks=[*ours, seen],
            **options,
        )
    reference = {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if ".ref." in name
    }
    there = answers(kind, trainer.model, adapter="ref") if reference else None
    return Made(kind, trainer, seen, said, reference, there)


def answers(kind: Kind, model: Any, adapter: str | None = None) -> torch.Tensor:
    """Return the model's logits of four records, without dropout; no random number is drawn."""
    active, was_training = model.active_adapter, model.training
    if adapter is not None:
        model.set_adapter(adapter)
    # Without the autocast that accelerate wraps round the PEFT model's forward.
    base = model.get_base_model().eval()
    with torch.no_grad():
        found = base(**batch(kind)).logits
    model.train(was_training)
    if adapter is not None:
        model.set_adapter(active)
    return found


def batch(kind: Kind) -> dict[str, torch.Tensor]:
    """Return four records."""
    if kind.module == "transformers":
        rows = kind.rows()[:4]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {"input_ids": torch.arange(4, 32).reshape(4, 7) % len(VOCABULARY)}


def unspent(model: Any) -> tuple[int, int]:
    """Return the parameters left of the budget, uniform rank 2, and those of the cheapest
    component."""
    costs = [target.cost for target in targets_of(model)]
    return 2 * sum(costs) - al.lora_parameters(model), min(costs)


def decisions(trainer: Trainer) -> list[tuple[Any, ...]]:
    return [
        (r.step, r.status, r.budget, r.pattern, r.scores, r.changes)
        for r in callback_of(trainer).history
    ]


def losses(trainer: Trainer) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
