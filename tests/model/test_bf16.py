"""Bases in bfloat16, adapters in float32 and bfloat16: what is read back is what was trained, to
what rounding explains."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "bf16.py"


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["BERT", "GPT-2", "Llama", "T5"])
def test_a_bf16_base_is_trained_with_changing_ranks_saved_and_read(kind: str, adapter: str) -> None:
    row = runpy.run_path(str(BENCHMARK))["measure"](kind, adapter)
    assert row["in float32"] <= 1e-6
    assert row["type kept"] == 0
    assert row["off"] <= row["rounding"]
