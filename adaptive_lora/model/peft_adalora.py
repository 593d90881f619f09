"""PEFT's own AdaLoRA (`AdaLoraModel`), driven as its documentation asks, and turned into plain LoRA
at the end.

PEFT must be called at every optimizer step, with that step's gradients, numbered so that the final
allocation is met; it adds its orthogonality penalty to the evaluation loss, and it saves a
checkpoint that cannot go on. `PeftAdaLora` does the calling and mends the rest from outside:
penalty in training only, checkpoints with every component and all statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel, PeftModel
from torch import nn

from adaptive_lora.allocation.allocate import RankPattern, Resize
from adaptive_lora.allocation.budget import Cubic
from adaptive_lora.allocation.importance import Sensitivity, Statistic, Statistics
from adaptive_lora.allocation.method import Adaptation, Method
from adaptive_lora.allocation.target import Target
from adaptive_lora.allocation.when import At
from adaptive_lora.errors import DivergedError, InputError
from adaptive_lora.model.adapters import (
    adapters,
    base_of,
    is_masked,
    lora_parameters,
    park,
    ranks,
    scaled_config,
    sync_config,
    target_modules,
    weights,
)
from adaptive_lora.model.driver import Driver, Outcome
from adaptive_lora.model.memory import size

BUFFERS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator: {parameter name: tensor}


class PeftAdaLora(Driver):
    """Calls PEFT's `update_and_allocate` after every optimizer step, with the gradients of that
    step.

    Args:
        model: attached with `methods.peft_adalora`.
        optimizer: not looked at; nothing is resized before the end.
        method: that method.
        total: optimizer steps of the whole training.

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512; PEFT's documentation of
    `AdaLoraModel.update_and_allocate`.
    """

    needs_every_step = True

    def __init__(self, model: PeftModel, optimizer: Any, method: Method, total: int) -> None:
        adaptation = method.adaptation
        assert isinstance(adaptation, MaskedByPeft)
        adaptation.schedule.check(total)
        if not is_masked(model):
            raise InputError(
                "the model has plain LoRA adapters; attach it with methods.peft_adalora to train "
                "with that"
            )
        assert isinstance(model.base_model, AdaLoraModel)
        self.model, self._tuner = model, model.base_model
        self._config = cast(Any, model.peft_config[model.active_adapter])
        if type(model) is PeftModel and adaptation.orthogonality:
            raise InputError(
                "PEFT adds its orthogonality penalty only to models with a task type, and this one "
                "has none: give orthogonality=0, or attach with a task_type"
            )
        first, last = adaptation.schedule.span(total)
        if last < 2:
            raise InputError(
                f"PEFT's AdaLoRA would allocate after step {last} of {total}, before it has scored "
                "anything: train for longer, or lower final"
            )
        self._last = last
        self._config.tinit, self._config.tfinal, self._config.total_step = (
            first,
            total - last,
            total,
        )
        # PEFT's masks by gate name, kept here: with them in its config PEFT would drop masked
        # components when it saves.
        self._masks: dict[str, list[bool]] | None = None
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._done = False
        self._without_penalty_in_evaluation()

    def _without_penalty_in_evaluation(self) -> None:
        # PEFT adds its penalty in evaluations too; the loss reported is the task's alone.
        weight = self._config.orth_reg_weight

        def before(tuner: nn.Module, _arguments: Any) -> None:
            self._config.orth_reg_weight = weight if tuner.training else 0.0

        def after(*_: Any) -> None:
            self._config.orth_reg_weight = weight

        self._tuner.register_forward_pre_hook(before)
        # Also after a forward pass that raises: the weight must not stay 0.
        self._tuner.register_forward_hook(after, always_call=True)

    def watching(self, step: int) -> bool:
        return not self._done

    def skip(self, step: int) -> None:
        """Raise `DivergedError`: PEFT must see the gradients of every step."""
        raise DivergedError(
            f"step {step} cannot be skipped: PEFT's AdaLoRA needs its gradients", step=step
        )

    def observe(self, step: int) -> None:
        """Keep the gradients while PEFT still scores: `step()` comes when they are gone."""
        if step > self._last:
            return
        named = self._tuner.model.named_parameters()
        parameters = [p for name, p in named if "lora_" in name and p.requires_grad]
        # A target that took no part in this step (LayerDrop) shows nothing.
        self._gradients = [
            (p, torch.zeros_like(p) if p.grad is None else p.grad.clone()) for p in parameters
        ]
        if all(p.grad is None for p in parameters):
            raise InputError(
                "observe() found no gradients; call it after loss.backward() and before zero_grad()"
            )

    def step(self, step: int) -> Outcome | None:
        """Let PEFT score and mask after optimizer step `step`.

        Raises `DivergedError` when a score is not finite.
        """
        if self._done:
            return None
        # Lent to PEFT for its call; whoever called has cleared them and must find them cleared.
        afterwards = [p.grad for p, _ in self._gradients]
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        allocator, before = self._tuner.rankallocator, self._masks
        # PEFT drops them at the last allocation
        moments = (allocator.exp_avg_ipt, allocator.exp_avg_unc)
        self._config.rank_pattern = before
        # Counted from 1: from 0 the last allocation would never come where no steps follow it.
        self._tuner.update_and_allocate(step)
        self._masks, self._config.rank_pattern = self._config.rank_pattern, None
        for (parameter, _), gradient_now in zip(self._gradients, afterwards, strict=True):
            parameter.grad = gradient_now
        self._gradients = []
        if self._masks is before:
            return None
        scores = {
            name: _score(name, *moments, self.model.active_adapter) for name in adapters(self.model)
        }
        if not all(map(math.isfinite, scores.values())):
            raise DivergedError(f"step {step}: PEFT's importance scores are not finite", step=step)
        alive = {name: float(len(kept)) for name, kept in self.alive().items()}
        return Outcome(status="masked", scores=scores, parts={"components alive": alive})

    def evaluated(self, step: int, losses: Sequence[float]) -> Outcome | None:
        return None

    def settle(self, step: int, *, decided: bool) -> Outcome | None:
        """Let PEFT mask to its target now, by what it has scored."""
        scored = bool(self._tuner.rankallocator.exp_avg_ipt)
        alive = self.alive()
        above = sum(map(len, alive.values())) > self._config.target_r * len(alive)
        if self._done or not above or not scored:
            return None
        outcome = self.step(self._last)
        reason = f"training ended after step {step}: the last decision"
        return outcome and replace(outcome, reason=reason)

    def finish(self) -> Outcome | None:
        """Turn what is left into plain LoRA."""
        if self._done:
            return None
        before = lora_parameters(self.model)
        changes = self.to_lora()
        self._done = True
        reason = "plain LoRA from PEFT's"
        return Outcome(status="changed", reason=reason, parameters_before=before, changes=changes)

    @classmethod
    def planned_bytes(cls, method: Method, model: PeftModel) -> int:
        # PEFT keeps a score, its mean and its spread for each parameter, and gate.
        adapted = [p for layer in adapters(model).values() for p in (*(weights(layer) or ()),
                   *layer.lora_E.values())]  # fmt: skip
        return 3 * sum(map(size, adapted))

    def alive(self) -> dict[str, list[int]]:
        """Return the components of every target whose gate is not zero."""
        gates = {
            name: layer.lora_E[self.model.active_adapter]
            for name, layer in adapters(self.model).items()
        }
        return {
            name: gate.detach().flatten().nonzero().flatten().tolist()
            for name, gate in gates.items()
        }

    @property
    def statistics(self) -> Statistics:
        """All that PEFT remembers, to be saved."""
        if self._done:
            return {}
        masks = {
            name: Statistic(torch.tensor(mask), None) for name, mask in (self._masks or {}).items()
        }
        buffers = {
            kind: {
                name: Statistic(tensor, None)
                for name, tensor in getattr(self._tuner.rankallocator, kind).items()
            }
            for kind in BUFFERS
        }
        return {**buffers, "mask": masks}

    def restore(self, statistics: Statistics) -> None:
        for kind in BUFFERS:
            tensors = {
                name: statistic.tensor for name, statistic in statistics.get(kind, {}).items()
            }
            setattr(self._tuner.rankallocator, kind, tensors)
        masks = statistics.get("mask", {})
        self._masks = {name: statistic.tensor.tolist() for name, statistic in masks.items()} or None

    def to_lora(self) -> dict[str, Resize]:
        """Turn the adapters into plain LoRA, in place, and return what was kept of each.

        B diag(Λ) A · α / r₀ = s B' A' with A' the rows and B' = B Λ · (α / r₀) / s the columns of
        the gates that are not zero; s = α / r₀ as given to `attach`, up to PEFT's 1e-5 beside r₀. A
        target without any gets rank 0.
        """
        model, config, adapter = self.model, self._config, self.model.active_adapter
        scale = config.lora_alpha / config.init_r
        alive = self.alive()
        if not any(alive.values()):  # nothing is learned yet: plain LoRA at its start, B' = 0
            alive = {name: list(range(rank)) for name, rank in ranks(model).items()}
        before, base = adapters(model), base_of(model)
        pairs = {name: _plain(layer, adapter, alive[name], scale) for name, layer in before.items()}
        for name, layer in before.items():
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
        # PEFT cannot create rank 0.
        created = {name: max(len(kept), 1) for name, kept in alive.items()}
        carried = ("lora_dropout", "modules_to_save", "task_type", "fan_in_fan_out")
        plain = LoraConfig(
            target_modules=target_modules(base, created),  # type: ignore[arg-type]
            base_model_name_or_path=config.base_model_name_or_path,
            **{key: getattr(config, key) for key in carried},
            **scaled_config(created, scale),
        )
        head = [parameter for parameter in base.parameters() if parameter.requires_grad]
        # PEFT would take the old config for that of a second adapter, and warn.
        del base.peft_config
        # A is drawn, only to be replaced: no random number of the training's is used up.
        with torch.random.fork_rng():
            model.base_model = LoraModel(base, plain, adapter)
        model.base_model.training = self._tuner.training
        for parameter in head:  # PEFT has just frozen it
            parameter.requires_grad_(True)
        for name, layer in adapters(model).items():
            layer.train(before[name].training)
            if not alive[name]:
                park(layer)
                continue
            for parameter, value in zip(weights(layer) or (), pairs[name], strict=True):
                # `.data` will do: new parameters, which no graph and no optimizer knows.
                parameter.data = value
        sync_config(model)
        return {name: Resize(tuple(kept)) for name, kept in alive.items()}


def _plain(
    layer: Any, adapter: str, kept: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A', B') of one AdaLoRA layer, with the kept components only."""
    a, b, gate = (part[adapter].detach() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
    # PEFT divides by the first rank, masked or not, and guards that against 0.
    factor = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5) / scale
    return a[kept].clone(), (b * (gate.T * factor))[:, kept].clone()


@dataclass(frozen=True, kw_only=True)
class MaskedByPeft(Adaptation):
    """Left to PEFT's `AdaLoraModel`, which multiplies components by a gate and sets gates to zero;
    ranks change once, at the end, when what is left becomes plain LoRA. PEFT counts components, so
    there is no budget in parameters.

    Args:
        target_rank: components at the end, as an average over the targets.
        orthogonality: weight of PEFT's penalty ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖ in the training loss.
    """

    importance: Sensitivity
    when: At
    schedule: Cubic
    target_rank: int
    orthogonality: float = 0.5

    driver: ClassVar[type[Any] | None] = PeftAdaLora

    def peft_config(self, rank: int, scale: float, common: dict[str, Any]) -> AdaLoraConfig:
        """Return PEFT's config; the driver, who knows how many steps, fills in the schedule."""
        return AdaLoraConfig(
            init_r=rank,
            target_r=self.target_rank,
            lora_alpha=scale * rank,  # type: ignore[arg-type]  # PEFT divides it by init_r
            beta1=self.importance.beta1,
            beta2=self.importance.beta2,
            deltaT=int(self.when.every),
            orth_reg_weight=self.orthogonality,
            total_step=1,
            **common,
        )

    def last_pattern(self, targets: Sequence[Target]) -> RankPattern:
        return {target.name: min(self.target_rank, target.full_rank) for target in targets}


def _score(
    name: str,
    sensitivity: dict[str, torch.Tensor],
    uncertainty: dict[str, torch.Tensor],
    adapter: str,
) -> float:
    """Return Σ_k S_k of one target, S_k = s(λ_k) + mean_j s(A_kj) + mean_o s(B_ok) with s = Ī Ū."""
    gate, a, b = (
        sensitivity[key] * uncertainty[key]
        for key in (f"{name}.lora_{part}.{adapter}" for part in ("E", "A", "B"))
    )
    return float(gate.sum() + a.mean(1).sum() + b.mean(0).sum())
