"""Tasks: what the records mean. One file each; `TASKS` maps a recipe's `task` to its class."""

from adaptive_lora.tasks.base import Prepared, Task
from adaptive_lora.tasks.causal_lm import CausalLanguageModelling
from adaptive_lora.tasks.classification import Classification

TASKS: dict[str, type[Task]] = {"classification": Classification, "causal_lm": CausalLanguageModelling}

__all__ = ["TASKS", "Prepared", "Task"]
