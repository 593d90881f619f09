"""Plans against the truth: bytes of every part and the peak, for several models, methods, batches
and quantisations.

    python benchmarks/memory.py --encoder MINILM --causal STORIES --output benchmarks/memory.json
    --figure docs/memory.png

Each case trains three steps of full-length batches in a process of its own. The peak is that of the
resident set, less what the process held before the model was loaded. glibc keeps freed blocks below
a threshold that it raises as it goes, up to 32 MB: the peak with its threshold fixed at 64 KiB
(MALLOC_MMAP_THRESHOLD_) is what the tensors take; the peak with its default is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import adaptive_lora as al
from adaptive_lora.model.memory import account, total
from adaptive_lora.recipe.config import RunConfig, parse
from adaptive_lora.report.memory_plan import memory_bars, parts_of
from adaptive_lora.runs.loading import load_model, load_task
from adaptive_lora.runs.memory_plan import _inputs, plan
from adaptive_lora.runs.simulation import enable_checkpointing

STEPS = 3
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def cases(encoder: str, causal: str, llama: str) -> dict[str, dict[str, Any]]:
    """Return recipes by name."""

    def recipe(
        model: str, task: str, method: dict[str, Any], batch: int, length: int, **more: Any
    ) -> dict[str, Any]:
        training = {"per_device_train_batch_size": batch, **more.pop("training", {})}
        data: dict[str, Any] = {"train": "none", "max_length": length}
        if task == "classification":
            data["classes"] = ["0", "1"]
        rest = {"output": "none", "training": training, **more}
        return {"model": model, "task": task, "data": data, "method": method, **rest}

    lora, adalora = {"name": "lora", "rank": 8}, {"name": "adalora", "rank": 8}
    checkpointing = {"gradient_checkpointing": True}
    return {
        "MiniLM, lora, 32 x 128": recipe(encoder, "classification", lora, 32, 128),
        "MiniLM nf4, adalora, 32 x 128": recipe(
            encoder, "classification", adalora, 32, 128, quantization="nf4"
        ),
        "MiniLM int8, grad_delta, 16 x 256": recipe(
            encoder,
            "classification",
            {"name": "grad_delta", "rank": 8},
            16,
            256,
            quantization="int8",
        ),
        "MiniLM nf4, lora, 64 x 128, checkpointing": recipe(
            encoder, "classification", lora, 64, 128, quantization="nf4", training=checkpointing
        ),
        "stories-bit-3m, plateau, 16 x 256": recipe(
            causal, "causal_lm", {"name": "plateau"}, 16, 256
        ),
        "Llama 94M, lora, 4 x 256": recipe(llama, "causal_lm", lora, 4, 256),
        "Llama 94M nf4, adalora rank 32, 8 x 128": recipe(
            llama, "causal_lm", {"name": "adalora", "rank": 32}, 8, 128, quantization="nf4"
        ),
        "Llama 94M nf4, lora, 8 x 512, checkpointing": recipe(
            llama, "causal_lm", lora, 8, 512, quantization="nf4", training=checkpointing
        ),
    }


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def measure(config: RunConfig) -> dict[str, Any]:
    """Train three steps and return the account at their start and the measured growth of the
    process."""
    before = resident("VmRSS")
    task = load_task(config)
    base, *_ = load_model(config, task)
    method = al.methods.METHODS[config.method.name](**config.method.arguments)
    model = al.attach(base, method)
    if config.checkpointing:
        enable_checkpointing(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    controller = al.RankController(model, optimizer, method, total_steps=1000)
    batch = {
        name: torch.ones(shape, dtype=dtype)
        for name, (dtype, shape) in _inputs(config, model).items()
    }
    batch["attention_mask"][0, -1] = (
        0  # a padded batch: without padding some models take a shorter way
    )
    if config.task == "classification":
        batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.int64)
    # the peak of training, not of loading
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    found: dict[str, Any] = {}
    for _ in range(STEPS):
        model(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        found = account(model, optimizer, controller._statistics)
        optimizer.zero_grad()
        controller.step()
    return {
        "account": found,
        "peak": resident("VmHWM") - before,
        "parameters": al.lora_parameters(model),
    }


def in_process(recipe: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Plan and measure every case; print, write and draw the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder")
    parser.add_argument("--causal")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(parse(json.loads(options.case)))))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        tokenizer = AutoTokenizer.from_pretrained(options.causal)
        config = LlamaConfig(vocab_size=8192, num_key_value_heads=4, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, recipe in cases(options.encoder, options.causal, folder).items():
            measured = in_process(recipe, THRESHOLD)
            usual = in_process(recipe, {})
            stage = plan(parse(recipe), device="cpu").stages[0]
            held, planned = total(measured["account"]), total(stage.account)
            rows[name] = {
                "planned": {**parts_of(stage.account), "activations": stage.activations},
                "account": parts_of(measured["account"]),
                "held_ratio": planned / held,
                "planned_peak": stage.peak,
                "measured_peak": measured["peak"],
                "peak_ratio": stage.peak / measured["peak"],
                "measured_peak_default_malloc": usual["peak"],
            }
            row = rows[name]
            print(
                f"{name:<46} held {row['held_ratio']:.4f}  peak {stage.peak / 1e6:8.1f} MB, ratio "
                f"{row['peak_ratio']:.3f}, default malloc {usual['peak'] / 1e6:8.1f} MB",
                flush=True,
            )
    where = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "steps": STEPS,
    }
    options.output.write_text(
        json.dumps({"environment": where, "cases": rows}, indent=2) + "\n", encoding="utf-8"
    )
    peaks = {name: row["measured_peak"] for name, row in rows.items()}
    memory_bars(
        {name: row["planned"] for name, row in rows.items()}, options.figure, measured=peaks
    )


if __name__ == "__main__":
    main()
