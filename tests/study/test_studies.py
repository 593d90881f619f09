"""The comparison of methods says what its runs say: intervals, spans, failures."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

STUDY = runpy.run_path(str(Path(__file__).parent.parent.parent / "studies" / "methods.py"))
BUDGET = 147_456
ACCURACIES = {"lora": [0.85, 0.86, 0.84], "plateau": [0.86, 0.865, 0.87]}


def _run(method: str, seed: int, accuracy: float, end: int = BUDGET) -> object:
    return STUDY["Figures"](
        method=method, seed=seed, status="ok", accuracy=accuracy, eval_loss=0.4,
        parameters_start=36_864,
        parameters_end=end, rank_min=2, rank_max=8, steps=90, parameters_untrained=0, seconds=1.0,
    )  # fmt: skip


def _runs() -> list[object]:
    runs = [
        _run(method, seed, a) for method, row in ACCURACIES.items() for seed, a in enumerate(row)
    ]
    return [
        *runs,
        STUDY["Figures"](method="adalora", seed=0, status="failed", reason="the loss is nan"),
    ]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    mean, half = STUDY["paired_interval"]([1.0, 0.5, 3.0])  # sd √1.75, t(0.975, 2) = 4.30265
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(4.30265 * math.sqrt(1.75 / 3), rel=1e-5)
    expected = ttest_rel(ACCURACIES["plateau"], ACCURACIES["lora"]).confidence_interval(0.95)
    cell = STUDY["rows"](_runs())[1][4]
    assert cell == f"+1.50 [{100 * expected.low:+.2f}, {100 * expected.high:+.2f}]"


def test_pairs_are_made_by_seed_and_a_run_without_a_partner_is_in_no_pair() -> None:
    runs = [
        _run("lora", 1, 0.80),
        _run("lora", 0, 0.90),
        _run("plateau", 0, 0.91),
        _run("plateau", 7, 0.50),
    ]
    assert STUDY["rows"](runs)[1][4] == "+1.00 (one pair)"


def test_a_failed_run_is_shown_and_a_missed_budget_is_said(tmp_path: Path) -> None:
    runs = [*_runs(), _run("adalora", 1, 0.85), _run("grad_delta", 0, 0.85, end=73_728)]
    cells = STUDY["rows"](runs)
    assert [row[0] for row in cells] == ["lora", "plateau", "adalora", "grad_delta"]
    assert cells[2][2] == "85.00 (1 of 2 failed)"
    assert cells[3][1] == "36,864 → 73,728"
    assert STUDY["rows"](_runs())[2][2] == "failed, 1 of 1"
    assert STUDY["remarks"](runs, BUDGET) == [
        "grad_delta did not end at the budget in 1 of 1 runs.",
        "adalora seed 0 failed: the loss is nan",
    ]
    STUDY["draw"](runs, tmp_path / "figure.png", title="synthetic")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_the_study_of_compression_pairs_by_seed_and_draws(tmp_path: Path) -> None:
    study = runpy.run_path(str(Path(__file__).parent.parent.parent / "studies" / "compress.py"))
    rows = [
        study["row_of"](kind, seed, rank, 100 * rank,
                        {"eval_accuracy": base + seed / 100, "eval_loss": 0.4})
        for seed in (0, 1, 2)
        for kind, rank, base in (
            ("whole", 8, 0.80), (study["GLOBAL"], 2, 0.79), (study["PER_LAYER"], 2, 0.78),
            (study["TRAINED"], 2, 0.70),
        )
    ]  # fmt: skip
    columns, cells, notes = study["table"](
        [row for row in rows if (row["kind"], row["seed"]) != ("PEFT per layer", 2)]
    )
    assert [row[0] for row in cells] == ["800 (whole)", "200"]
    by_name = dict(zip(columns, cells[1], strict=True))
    assert by_name["compress"] == "80.00"
    # of two pairs: the third has no partner
    assert by_name["compress - PEFT"] == "+1.00 [+1.00, +1.00]"
    assert by_name["compress - whole"] == "-1.00 [-1.00, -1.00]"
    assert "rank 2 0.4000 / 0.4000" in notes[1]
    study["draw"](rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
