"""System 3's memory table with true figures, and what large models need: all from configurations,
without weights.

    python studies/memory_tables.py --output docs/memory-tables.md

Writes the tables, docs/memory-tables.json beside them and two figures. Expected: 5 minutes on one
core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import DebertaV2Config, LlamaConfig

from adaptive_lora.files import read_recipe
from adaptive_lora.recipe.config import parse
from adaptive_lora.report.memory_plan import memory_bars, parts_of
from adaptive_lora.runs.memory_plan import Plan, largest_budget, plan

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
DEBERTA = DebertaV2Config(
    vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072,
    type_vocab_size=0, relative_attention=True, position_buckets=256, max_relative_positions=-1,
    norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
)  # fmt: skip
LLAMAS = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
# System 3, its table: base MB, adapter MB of LoRA, AdaLoRA, QLoRA, QLoRA + AdaLoRA.
PUBLISHED = {
    "mnli": ((351.76, 0.64), (351.76, 0.62), (67.55, 0.64), (67.55, 0.68)),
    "sst2": ((351.76, 0.64), (351.76, 0.76), (67.55, 0.64), (67.55, 0.72)),
    "cola": ((351.76, 0.64), (351.76, 0.77), (67.55, 0.64), (67.55, 0.78)),
    "qnli": ((351.76, 0.64), (351.76, 0.65), (67.55, 0.64), (67.55, 0.66)),
}
COLUMNS = {
    "LoRA": ("none", "lora"),
    "AdaLoRA": ("none", "adalora"),
    "QLoRA": ("nf4", "lora"),
    "QLoRA + AdaLoRA": ("nf4", "adalora"),
}
SECTION = ("base", "head", "adapters", "gradients", "optimizer", "statistics")


def deberta(folder: str, task: str, scheme: str, method: str) -> Plan:
    """Plan one cell of system 3's table: rank 2, batch 32, the recipe's length; 16-bit base,
    CUDA."""
    values = read_recipe(ROOT / "recipes" / f"deberta-v3-base-{task}-small.yaml")
    classes = ["0", "1", "2"] if task == "mnli" else ["0", "1"]
    values |= {
        "model": folder,
        "method": {"name": method, "rank": 2},
        "quantization": scheme,
        "dtype": "bfloat16",
    }
    values["data"] = {**values.get("data", {}), "train": "none", "classes": classes}
    values["training"]["bf16"] = True
    return plan(parse({**values, "training": {**values["training"], "bf16": True}}), device="cuda")


def llama(folder: str, scheme: str, method: dict[str, Any]) -> Any:
    """Return the recipe of instruction tuning on 2,048 tokens, batch 1, activations computed
    anew."""
    return parse(
        {
            "model": folder, "task": "causal_lm", "data": {"train": "none", "max_length": 2048},
            "output": "none",
            "method": method, "quantization": scheme, "dtype": "bfloat16",
            "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True,
                         "bf16": True},
        }
    )  # fmt: skip


def row_of(name: str, found: Plan, published: tuple[float, float] | None = None) -> dict[str, Any]:
    """Return one row of a table in MiB."""
    first, last = found.stages[0], found.stages[-1]
    return {
        "name": name,
        "lora_parameters": [first.parameters, last.parameters],
        "start": {key: value / MIB for key, value in parts_of(first.account).items()},
        "end": {key: value / MIB for key, value in parts_of(last.account).items()},
        "activations": first.activations / MIB,
        "peak": found.peak / MIB,
        "published": published,
        "fits": [size for size in (8, 16, 24, 48, 80) if found.fits(size * 10**9)][:1],
    }


def span(pair: list[Any], form: str) -> str:
    """Return "start → end", or one number where they agree."""
    texts = [format(value, form) for value in pair]
    return texts[0] if texts[0] == texts[1] else " → ".join(texts)


def main() -> None:
    """Plan every row, write tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "memory-tables.md")
    options = parser.parse_args()
    small, large = [], []
    with tempfile.TemporaryDirectory() as root:
        DEBERTA.save_pretrained(f"{root}/deberta")
        for task, published in PUBLISHED.items():
            for (column, (scheme, method)), figures in zip(COLUMNS.items(), published, strict=True):
                small.append(
                    row_of(
                        f"{task}, {column}",
                        deberta(f"{root}/deberta", task, scheme, method),
                        figures,
                    )
                )
                print(small[-1]["name"], f"{small[-1]['start']['base']:.2f} MiB", flush=True)
        for name, sizes in LLAMAS.items():
            folder = f"{root}/{name}"
            config = LlamaConfig(
                vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **sizes
            )
            config.save_pretrained(folder)
            for scheme in ("none", "int8", "nf4"):
                for method in ({"name": "lora", "rank": 16}, {"name": "adalora", "rank": 16}):
                    found = plan(llama(folder, scheme, method), device="cuda")
                    base = "bf16" if scheme == "none" else scheme
                    large.append(row_of(f"{name}, {base}, {method['name']}", found))
                    print(large[-1]["name"], f"{large[-1]['peak']:,.0f} MiB", flush=True)
        budget, fitting = largest_budget(
            llama(f"{root}/Llama-3-8B", "nf4", {"name": "lora"}), 24 * 10**9, device="cuda"
        )
    lines = [
        "# Memory tables", "",
        "By `python studies/memory_tables.py`; every figure but the published ones is a plan.", "",
        "## DeBERTa-v3-base, rank 2, batch 32 x 128, 16-bit base, MiB", "",
        "| task, method | base | published | adapters | published | LoRA parameters | gradients + "
        "optimizer | peak of a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in small:
        start, end = row["start"], row["end"]
        state = span(
            [start["gradients"] + start["optimizer"], end["gradients"] + end["optimizer"]], ".2f"
        )
        lines.append(
            f"| {row['name']} | {start['base']:.2f} | {row['published'][0]:.2f} | "
            f"{span([start['adapters'], end['adapters']], '.2f')} | {row['published'][1]:.2f} | "
            f"{span(row['lora_parameters'], ',')} | {state} | {row['peak']:,.0f} |"
        )
    lines += [
        "", "![Memory of the four ways on SST-2](memory-deberta.png)", "",
        "## Large models, rank 16 on all linear modules, batch 1 x 2,048, activations computed "
        "anew, CUDA, GiB", "",
        "| model, base, method | base | adapters | gradients + optimizer | activations | peak | "
        "fits in |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in large:
        start = row["start"]
        numbers = (
            start["base"],
            start["adapters"],
            start["gradients"] + start["optimizer"],
            row["activations"],
            row["peak"],
        )
        fits = f"{row['fits'][0]} GB" if row["fits"] else "no single card of 80 GB"
        lines.append(
            f"| {row['name']} | {' | '.join(f'{number / 1024:,.2f}' for number in numbers)} | "
            f"{fits} |"
        )
    lines += [
        "", f"Largest budget of `lora` on Llama-3-8B, nf4, in 24 GB: {budget:,} parameters, peak "
        f"{fitting.peak / 2**30:.2f} GiB.", "", "![Memory of Llama-3-8B](memory-llama.png)", "",
    ]  # fmt: skip
    options.output.write_text("\n".join(lines), encoding="utf-8")
    found_rows = {"deberta-v3-base": small, "llama": large, "largest_budget_8B_nf4_24GB": budget}
    options.output.with_suffix(".json").write_text(
        json.dumps(found_rows, indent=1) + "\n", encoding="utf-8"
    )

    def bars(rows: list[dict[str, Any]], word: str) -> dict[str, dict[str, int]]:
        return {
            row["name"]: {part: int(row["start"][part] * MIB) for part in SECTION}
            | {"activations": int(row["activations"] * MIB)}
            for row in rows
            if word in row["name"]
        }

    memory_bars(bars(small, "sst2"), options.output.parent / "memory-deberta.png")
    memory_bars(bars(large, "8B"), options.output.parent / "memory-llama.png")


if __name__ == "__main__":
    main()
