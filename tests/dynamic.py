"""Methods whose ranks change in a training of `STEPS` steps, and that training:
`adaptive_lora.testing`."""

from __future__ import annotations

from adaptive_lora import methods
from adaptive_lora.testing import STEPS, callback_of, make_model, make_trainer, records, state_of

__all__ = ["DYNAMIC", "STEPS", "callback_of", "make_model", "make_trainer", "records", "state_of"]

# Every kind of decision: many small ones, one big one, and growth on evaluations (a threshold no
# loss can beat).
DYNAMIC = {
    "adalora": lambda: methods.adalora(2, factor=2.0, initial=2, final=2, every=2),
    "squeeze": lambda: methods.squeeze(2, factor=2.0, initial=2, final=2, every=2),
    "peft_adalora": lambda: methods.peft_adalora(2, initial_rank=4, initial=2, final=2, every=2),
    "grad_delta": lambda: methods.grad_delta(3, warmup_steps=5, min_rank=1, max_rank=8),
    "grad_delta unbudgeted": lambda: methods.grad_delta(
        warmup_steps=4, initial_rank=3, min_rank=1, max_rank=6
    ),
    "plateau": lambda: methods.plateau(initial_rank=1, max_rank=5, rank_step=2, threshold=100.0),
    "plateau per target": lambda: methods.plateau(
        initial_rank=1, max_rank=4, rank_step=1, threshold=100.0, per_target=True
    ),
}
