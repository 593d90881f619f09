"""PEFT's way to make an adapter smaller, the same rank for every layer: what `compress.yaml` holds
ours against, and an example of a function that makes a run of a trained one."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import save_as_lora

from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.runs.use import open_run


def cut(run: Path, config: RunConfig, output: Path) -> None:
    """Write the adapter of `run`, every layer cut to the rank of the method in `config`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is alr")
        save_as_lora(output, open_run(run).model, config.method.arguments["rank"])
