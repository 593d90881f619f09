"""Seconds of one decision with its resize on adapters of Llama-2-7B's shape, and their ratio to
copying the same bytes.

    python benchmarks/resize_7b.py [--repeats 5]

224 targets (32 layers x q, k, v, o, gate, up, down), ranks 12 -> 8 by AdaLoRA's scores, fused AdamW
with both moments. The base stays on the meta device: only adapters, moments and statistics are
real. The copy is of every tensor that a resize reads: A, B, two moments each, two statistics each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaptive_lora as al
from adaptive_lora.model.adapters import adapters, weights


def decision_seconds() -> tuple[float, float, int]:
    """Return (seconds of the decision, seconds of the copy, bytes copied)."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    method = al.methods.adalora(8, factor=1.5, initial=1, final=1, every=1)
    with torch.device("meta"):
        model = al.attach(LlamaForCausalLM(config), method)
    for layer in adapters(model).values():
        for module in (layer.lora_A["default"], layer.lora_B["default"]):
            module.weight = torch.nn.Parameter(
                torch.empty_like(module.weight, device="cpu").normal_()
            )
    pairs = [weights(layer) for layer in adapters(model).values()]
    parameters = [parameter for pair in pairs if pair is not None for parameter in pair]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    controller = al.RankController(model, optimizer, method, total_steps=4)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        state = [t for p in parameters for t in optimizer.state[p].values() if t.dim()]
        kept = [
            s.tensor
            for kind in controller._statistics.values()
            for s in kind.values()
            if s.tensor.dim() == 2
        ]
        everything = [*(p.detach() for p in parameters), *state, *kept]
        before = time.perf_counter()
        copies = [tensor.clone() for tensor in everything]
        copy_seconds = time.perf_counter() - before
        size = sum(tensor.numel() * tensor.element_size() for tensor in copies)
        del copies
        controller.step()
        if controller.history and controller.history[-1].status == "changed":
            break
    row = controller.history[-1]
    assert row.parameters_after < row.parameters_before
    print(f"{row.parameters_before:,} -> {row.parameters_after:,} parameters at step {row.step}")
    return row.seconds, copy_seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = [decision_seconds() for _ in range(options.repeats)]
    decision, copy = (statistics.median(row[i] for row in rows) for i in (0, 1))
    print(
        f"decision and resize {decision:.2f} s, copy of {rows[0][2] / 2**20:.0f} MiB {copy:.2f} s"
    )
    print(f"median ratio {statistics.median(row[0] / row[1] for row in rows):.2f}")


if __name__ == "__main__":
    main()
