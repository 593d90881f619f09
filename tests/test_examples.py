"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from adaptive_lora.model.adapters import targets_of

LOOP = Path(__file__).parent.parent / "examples" / "loop.py"


def test_the_loop_is_short_its_ranks_change_and_its_loss_falls(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 40
    names = runpy.run_path(str(LOOP))
    assert names["before"].keys() == names["after"].keys()
    assert names["before"] != names["after"]
    assert names["method"].budget_parameters(targets_of(names["model"])) >= names[
        "al"
    ].lora_parameters(names["model"])
    losses = names["losses"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    printed = capsys.readouterr().out
    assert f"after: {names['al'].lora_parameters(names['model']):,} LoRA parameters" in printed
    assert all(name in printed for name in names["after"])
