"""How far a saved adapter of a bfloat16 base is from the trained model, beside what bfloat16 itself
costs.

    python benchmarks/bf16.py            # benchmarks/bf16.json, anew; a minute

Four tiny random architectures, adapters in float32 and bfloat16, six steps of a stock `Trainer` in
which ranks change. "off" is the largest difference of logits over the largest logit after `al.save`
and stock PEFT's reading on a fresh bfloat16 base. PEFT makes float32 of bfloat16 adapters, so these
compute with other roundings: "rounding" is how far the trained and the read model are from
themselves in float32, together; "in float32" and "type kept" compare them without that.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import adaptive_lora as al
from adaptive_lora.model.adapters import adapters

OUTPUT = Path(__file__).with_suffix(".json")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
         "num_hidden_layers": 2, "vocab_size": 64}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64}
IDS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))


def base(kind: str) -> Any:
    """Return a random base model in bfloat16, the same at every call."""
    torch.manual_seed(0)
    made = {
        "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
        "GPT-2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
        ),
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
        "T5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**T5, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
    }[kind]()
    return made.to(torch.bfloat16)


KINDS = ("BERT", "GPT-2", "Llama", "T5")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def answers(model: Any, kind: str) -> torch.Tensor:
    """Return the logits in float32."""
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "T5" else {})}
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return max |one - two| / max |two|."""
    return float((one - two).abs().max() / two.abs().max())


def measure(kind: str, adapter: str) -> dict[str, Any]:
    """Train, save, read back; return the four distances."""
    method = al.methods.adalora(rank=2, factor=2.0, initial=1, final=1, every=2)
    model = al.attach(base(kind), method)
    for layer in adapters(model).values():
        layer.lora_A.to(TYPES[adapter])
        layer.lora_B.to(TYPES[adapter])
    rows = [{"input_ids": row, "labels": row[0] % 2 if kind == "BERT" else row} for row in IDS]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callback = al.AdaptiveRankCallback(method)
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        assert any(row.status == "changed" for row in callback.history)
        place = str(al.save(model, f"{folder}/adapter"))
        read = PeftModel.from_pretrained(base(kind), place)
        # PEFT makes adapters in the type of the base, and float32 of them unless told not to.
        same = {"autocast_adapter_dtype": adapter == "float32"}
        kept = PeftModel.from_pretrained(base(kind), place, **same)
    trained, again = answers(model, kind), answers(read, kind)
    exact, exact_again = (answers(copy.deepcopy(one).float(), kind) for one in (model, read))
    return {
        "base": kind,
        "adapters": adapter,
        "off": apart(again, trained),
        "rounding": apart(trained, exact) + apart(again, exact),
        "type kept": apart(answers(kept, kind), trained),
        "in float32": apart(exact_again, exact),
    }


if __name__ == "__main__":
    found = [measure(kind, adapter) for kind in KINDS for adapter in TYPES]
    OUTPUT.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=2) + "\n")
    for row in found:
        numbers = "  ".join(f"{key} {row[key]:.2g}" for key in list(row)[2:])
        print(f"{row['base']:6} {row['adapters']:9} {numbers}")
