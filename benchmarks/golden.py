"""Does a change of the code change any outcome? Tiny trainings and commands, recorded and compared,
bit for bit.

    python benchmarks/golden.py --record FILE     # before a refactoring
    python benchmarks/golden.py --compare FILE    # after it: exit code 1 and the keys that differ

Every method trains a tiny BERT inside a stock Trainer (12 steps, dropout, accumulation,
evaluations); the command line trains, compresses, converts, exports and runs a study. Digests hold
on one machine only: processors round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from adaptive_lora import methods
from adaptive_lora.testing import callback_of, make_trainer, state_of

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "linear_decay": {"base_rank": 4, "min_rank": 2},
    "linear_increase": {"base_rank": 4, "min_rank": 2},
    "attention_heavy": {"base_rank": 4, "min_rank": 2},
    "empirical": {"base_rank": 5},
    "custom": {"layer_ranks": [4, 2]},
    "adalora": {"rank": 2, "factor": 2.0, "initial": 2, "final": 2, "every": 2},
    "squeeze": {"rank": 2, "factor": 2.0, "initial": 2, "final": 2, "every": 2},
    "peft_adalora": {"rank": 2, "initial_rank": 4, "initial": 2, "final": 2, "every": 2},
    "grad_delta": {"rank": 3, "warmup_steps": 5, "min_rank": 1, "max_rank": 8},
    "plateau": {"initial_rank": 1, "max_rank": 5, "rank_step": 2, "threshold": 100.0},
}
TIMES = ("runtime", "per_second", "seconds", "bytes", "memory", "versions", "train_loss")


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def timeless(value: Any) -> Any:
    """Return plain data without what the clock, the memory or the installation decides."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in sorted(value.items()) if not any(t in k for t in TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def trainings(folder: Path) -> dict[str, Any]:
    """Return the outcome of every method in a stock `Trainer`."""
    found = {}
    for name, arguments in METHODS.items():
        method = methods.build(name, arguments)
        trainer = make_trainer(folder / name, method, save_strategy="no")
        trainer.train()
        decisions = [json.loads(row.to_json()) for row in callback_of(trainer).history]
        found[name] = {"state": digest(state_of(trainer)), "decisions": timeless(decisions)}
        found[name]["log"] = timeless(trainer.state.log_history)
    return found


def make_base(folder: Path) -> Path:
    """Write a BERT of two layers with a tokenizer, and a file of records; return the model's
    folder."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "day",
        "night",
        "is",
        "good",
        "bad",
        "and",
        "very",
    ]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **names).save_pretrained(
        folder / "bert"
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(
        vocab_size=len(words), max_position_embeddings=32, initializer_range=0.3, **sizes
    )
    BertModel(config).save_pretrained(folder / "bert")
    rows = [
        {
            "text": f"the {('day', 'night')[i // 2 % 2]} is {'very ' * (i // 4)}"
            + ("good", "bad")[i % 2],
            "label": "gb"[i % 2],
        }
        for i in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "bert"


def call(*words: object) -> None:
    """Run the command line in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "adaptive_lora.cli", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def recipe(folder: Path, method: str) -> dict[str, Any]:
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.01,
                "logging_steps": 1,
                "eval_strategy": "steps", "eval_steps": 3,
                "dataloader_pin_memory": False}  # fmt: skip
    return {
        "model": str(folder / "bert"), "task": "classification", "output": str(folder / method),
        "data": {"train": str(folder / "data.jsonl"), "eval_size": 8, "text": "text",
                 "label": "label"},
        "method": {"name": method, **METHODS[method]}, "training": training,
        "adapters": {"dropout": 0.1},
    }  # fmt: skip


def commands(folder: Path) -> dict[str, Any]:
    """Return the outcome of runs, of commands on their adapters, and of a study."""
    make_base(folder)
    found: dict[str, Any] = {}
    for method in ("linear_decay", "adalora", "peft_adalora", "plateau"):
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump(recipe(folder, method)))
        call("train", "--config", file)
        run = folder / method
        result = json.loads((run / "result.json").read_text())
        found[method] = {"result": timeless({k: v for k, v in result.items() if k != "model"})}
        found[method]["weights"] = digest(load_file(run / "adapter" / "adapter_model.safetensors"))
        rows = (
            (run / "allocations.jsonl").read_text() if (run / "allocations.jsonl").is_file() else ""
        )
        found[method]["decisions"] = [timeless(json.loads(row)) for row in rows.splitlines()]
    for what, words in {
        "compress": ["compress", folder / "linear_decay", "--budget", 0.5],
        "uniform": ["export", folder / "linear_decay", "--to", "uniform"],
        "merged": ["export", folder / "adalora", "--to", "merged"],
    }.items():
        call(*words, "--output", folder / what)
        tensors = {
            k: v
            for file in (folder / what).glob("*.safetensors")
            for k, v in load_file(file).items()
        }
        found[what] = digest(tensors)
    base = {k: v for k, v in recipe(folder, "lora").items() if k not in ("method", "output")}
    grid = {
        "method": [{"name": "lora", "rank": 2}, {"name": "linear_decay", "rank": 2}],
        "seed": [0, 1],
    }
    study = {"name": "golden", "base": base, "grid": grid, "baseline": "lora"}
    study["report"] = {"metric": "eval_accuracy"}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    call("study", folder / "study.yaml", "--output", folder / "study")
    results = json.loads((folder / "study" / "results.json").read_text())
    text = json.dumps(timeless(results)).replace(str(folder), "FOLDER")
    for number, one in enumerate(results["runs"]):  # an id is a hash of the recipe, paths and all
        text = text.replace(one["id"], f"RUN{number}")
    found["study"] = json.loads(text)
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: leaf}."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if pairs is None:
        return {prefix: value}
    return {
        k: v for key, item in pairs for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path)
    parser.add_argument("--compare", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"machine": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
        found |= {"trainings": trainings(Path(folder)), "commands": commands(Path(folder))}
    found = json.loads(json.dumps(found))
    if chosen.record:
        chosen.record.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if chosen.compare:
        before, now = flat(json.loads(chosen.compare.read_text())), flat(found)
        differing = sorted(
            key for key in before.keys() | now.keys() if before.get(key) != now.get(key)
        )
        print(f"{len(before)} values compared on {platform.machine()}, {len(differing)} differ")
        for key in differing[:40]:
            print(f"  {key}: {before.get(key)!r} -> {now.get(key)!r}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
