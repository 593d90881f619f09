"""Seconds and memory of compressing an adapter of Llama-2-7B's shape, next to PEFT's own
conversion.

    python benchmarks/compress_7b.py [--threads 2] [--output benchmarks/compress_7b.json]

All seven linear kinds of 32 layers at r = 64, random, float32, cut to a quarter of the parameters:
read, decomposed, chosen, written. PEFT's `convert_to_lora` forms the O x I matrix of every target
and decomposes it whole; it runs on one target of each shape, in the same process, turn by turn with
`al.compress` on the same target, and the whole is the sum over the 224 targets. Peak memory is the
process's largest resident set, read before PEFT starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import save_file
from torch import nn

import adaptive_lora as al
from adaptive_lora.runs.run import peak_memory, versions

HIDDEN, INNER, LAYERS, RANK = 4096, 11008, 32, 64
SHAPES = {  # kind: (I, O)
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


def make(folder: Path) -> None:
    """Write a random adapter whose singular values fall, so that there is something to choose."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for kind, (i, o) in SHAPES.items():
            fall = torch.logspace(0, -2, RANK)[:, None] * (1 + layer)
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = (
                fall * torch.randn(RANK, i, generator=generator) / i**0.5
            )
            tensors[f"{name}.lora_B.weight"] = torch.randn(o, RANK, generator=generator) / o**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = [kind.split(".")[-1] for kind in SHAPES]
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM"
    ).save_pretrained(str(folder))


def one_target(features: tuple[int, int]) -> PeftModel:
    """Return a model of one adapted linear layer with a random update."""
    net = nn.Sequential(nn.Linear(*features, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            net, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/compress_7b.json"))
    options = parser.parse_args()
    if options.make is not None:
        make(options.make)
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "adapter"
        # its memory is not ours
        subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
        size = (source / "adapter_model.safetensors").stat().st_size
        start = peak_memory()
        wall, processor = time.perf_counter(), time.process_time()
        result = al.compress(source, budget=0.25, output=Path(folder) / "small")
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = peak_memory()
    found: dict[str, Any] = {
        "adapter_bytes": size,
        "targets": len(result.before),
        "parameters": [result.parameters_before, result.parameters_after],
        "ranks_after": [min(result.after.values()), max(result.after.values())],
        "seconds": wall,
        "processor_seconds": processor,
        "peak_bytes": peak,
        "peak_bytes_before": start,
        "pairs": [],
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
    }
    print(
        f"compress: {wall:.1f} s ({processor:.1f} s of processor time), peak {peak / 2**30:.2f} "
        "GiB",
        flush=True,
    )
    whole = {"ours": 0.0, "peft": 0.0}
    for features in dict.fromkeys(SHAPES.values()):
        count = LAYERS * list(SHAPES.values()).count(features)
        model = one_target(features)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_to_lora(model, RANK // 4)
        peft = time.perf_counter() - began
        began = time.perf_counter()
        al.compress(model, rank=RANK // 4)
        ours = time.perf_counter() - began
        found["pairs"].append(
            {"features": features, "targets": count, "peft_seconds": peft, "our_seconds": ours}
        )
        whole["ours"] += count * ours
        whole["peft"] += count * peft
        print(
            f"{features[0]} -> {features[1]}: PEFT {peft:.1f} s, compress {ours:.3f} s, times "
            f"{count}",
            flush=True,
        )
    found |= {"peft_seconds_estimated": whole["peft"], "our_seconds_estimated": whole["ours"]}
    found["ratio"] = whole["peft"] / whole["ours"]
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(
        f"all 224 targets: PEFT {whole['peft']:.0f} s, compress {whole['ours']:.0f} s, ratio "
        f"{found['ratio']:.0f}"
    )


if __name__ == "__main__":
    main()
