"""Does llama.cpp answer as PEFT does? A small Llama and an adapter of mixed ranks, converted and
loaded for real.

    python benchmarks/llama_cpp.py --model FOLDER --sources LLAMA_CPP --python INTERPRETER [--output
    FILE]

`LLAMA_CPP` is a checkout of llama.cpp (also inside the source archive of llama-cpp-python, as
`vendor/llama.cpp`), whose two converters are run; `INTERPRETER` a Python with llama-cpp-python.
Logits of 48 seeded random tokens, float32 GGUF, CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from rich.table import Table
from transformers import AutoModelForCausalLM

import adaptive_lora as al
from adaptive_lora.adapter_tools.export import GGUF_FILE, export
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.model.adapters import adapters, weights
from adaptive_lora.report.tables import show

READER = """
import json, sys
import llama_cpp
model, adapter, tokens = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
settings = {"logits_all": True, "n_ctx": 256, "n_threads": 1, "verbose": False}
llm = llama_cpp.Llama(model, lora_path=adapter, type_k=0, type_v=0, **settings)
llm.eval(tokens)  # type 0 is float32: half-precision keys and values would hide small differences
print(json.dumps({"version": llama_cpp.__version__, "logits": llm.scores[: len(tokens)].tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a small Llama in a folder, with its tokenizer"
    )
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet()
    converter = options.sources / "convert_lora_to_gguf.py"

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = torch.randint(
        3, base.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        plain = base(tokens).logits[0]
    torch.manual_seed(0)
    model = al.attach(base, al.methods.linear_decay(base_rank=12, min_rank=2), scale=1.5)
    for layer in adapters(model).values():  # as if trained: B is zero at the start
        torch.nn.init.normal_(weights(layer)[1], std=0.1)
    model.peft_config["default"].base_model_name_or_path = options.model

    rows = {}
    with TemporaryDirectory() as folder:
        there = Path(folder)
        al.save(model, there / "adapter")
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            str(there / "adapter"),
        ).eval()
        with torch.no_grad():
            expected = peft(tokens).logits[0]
        convert = [sys.executable, str(options.sources / "convert_hf_to_gguf.py"), options.model]
        run([*convert, "--outtype", "f32", "--outfile", str(there / "base.gguf")])
        export(there / "adapter", "gguf", there / "uniform", converter=converter)
        export(there / "adapter", "native", there / "native")
        native = there / "native" / GGUF_FILE
        run([sys.executable, str(converter), "--base", options.model, "--outtype", "f32",
             "--outfile", str(native),
             str(there / "native")])  # fmt: skip
        for name, adapter, target in (
            ("base model, no adapter", "", plain),
            ("uniform form", str(there / "uniform" / GGUF_FILE), expected),
            ("native form (mixed ranks)", str(native), expected),
        ):
            command = [
                options.python,
                "-c",
                READER,
                str(there / "base.gguf"),
                adapter,
                json.dumps(tokens[0].tolist()),
            ]
            answer = json.loads(run(command))
            logits = torch.tensor(answer["logits"])
            rows[name] = {
                "relative_difference": float((logits - target).abs().max() / target.abs().max()),
                "same_next_token": float((logits.argmax(1) == target.argmax(1)).float().mean()),
            }
    moved = float((expected - plain).abs().max() / plain.abs().max())
    result = {"llama_cpp_python": answer["version"], "ranks": sorted(set(al.ranks(model).values())),
              "adapter_moves_logits_by": moved, "rows": rows}  # fmt: skip

    table = Table(
        title=f"llama.cpp (llama-cpp-python {answer['version']}) against PEFT, logits of "
        f"{tokens.numel()} tokens"
    )
    for column in (
        "what llama.cpp loads",
        "largest difference, of the largest logit",
        "same next token",
    ):
        table.add_column(column, justify="left" if column.startswith("what") else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['relative_difference']:.1e}", f"{row['same_next_token']:.1%}")
    show(table)
    print(f"the adapter moves the logits by {moved:.2f} of the largest; ranks {result['ranks']}")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[:2]} failed: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
