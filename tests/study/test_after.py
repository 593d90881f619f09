"""Runs made of a trained run's adapter: planned, done after it, evaluated as it was, and rows like
any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import study_data
import torch
from model_folders import recipe
from safetensors.torch import load_file
from study_data import plan_in, study

import adaptive_lora as al
from adaptive_lora.errors import InputError
from adaptive_lora.report.study_read import read_study as read_folder
from adaptive_lora.runs import use
from adaptive_lora.runs.run import run
from adaptive_lora.study.analysis import analyse
from adaptive_lora.study.plan import identity, make_plan, plan_of
from adaptive_lora.study.study import write_results
from adaptive_lora.study.worker import work

pytest_plugins = ("model_folders",)
COMPRESS = {"run": {"method.rank": 4}, "do": "adaptive_lora.study.after:compress"}


def copied(source: Path, config: Any, output: Path) -> None:
    shutil.copytree(source / "adapter", output)


def broken(source: Path, config: Any, output: Path) -> None:
    raise RuntimeError("no such singular value")


def arms(*, do: str = "copied", **changes: Any) -> list[dict[str, Any]]:
    """Return three methods: what is made of a run stands before the run."""
    lora = {"name": "lora"}
    made = {"run": {"method.rank": 4}, "do": f"{__name__}:{do}", **changes}
    return [
        {"label": "compressed", "method": lora, "after": COMPRESS},
        {"label": "made", "method": lora, "after": made},
        lora,
    ]


def grid(**changes: Any) -> dict[str, Any]:
    return {"method": arms(**changes), "method.rank": [2, 4], "seed": [0, 1]}


def test_what_is_made_of_a_run_is_a_row_beside_it(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    base = recipe(bert_folder, reviews_file, "")
    base["data"] |= {"extra_eval": {"test": reviews_file}}
    del base["output"]
    made = study(base=base, grid=grid(), select={}, report={"metric": "eval_test_accuracy"})
    plan_in(tmp_path, made)
    work(tmp_path, run)
    record = write_results(tmp_path)
    assert [row["reason"] for row in record["runs"]] == [None] * 12
    by_arm = {(row["method"], row["settings"]["method.rank"], row["seed"]): row
              for row in record["runs"]}  # fmt: skip
    for seed in (0, 1):
        whole = by_arm["lora", 4, seed]
        for rank in (2, 4):  # a copy is the run over again, whatever its recipe says
            copy = by_arm["made", rank, seed]
            assert copy["metrics"] == whole["metrics"]
            assert copy["ranks"] == whole["ranks"]
        cut = by_arm["compressed", 2, seed]
        folder, source = (tmp_path / "runs" / row["id"] for row in (cut, whole))
        kept = al.compress(source, rank=2, output=tmp_path / f"by-hand-{seed}")
        assert cut["lora_parameters"] == kept.parameters_after
        saved, expected = (
            load_file(place / "adapter_model.safetensors")
            for place in (folder / "adapter", tmp_path / f"by-hand-{seed}")
        )
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)
        assert use.evaluate(use.open_run(folder))["eval_loss"] == cut["metrics"]["eval_loss"]
        assert cut["metrics"]["eval_loss"] != whole["metrics"]["eval_loss"]
        result = json.loads((folder / "result.json").read_text())
        assert result["made_of"] == whole["id"]
    assert read_folder(tmp_path).problems == []
    rows = {(row["method"], row["settings"]["method.rank"]): row for row in record["table"]}
    assert rows["compressed", 2]["parameters_equal"] is True
    assert rows["made", 2]["parameters_equal"] is False

    shutil.rmtree(folder / "adapter")  # cut off in the middle: made again, nothing else
    (folder / "result.json").unlink()
    (tmp_path / "outcomes" / f"{folder.name}.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    work(tmp_path, run)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert write_results(tmp_path)["runs"] == record["runs"]


def test_a_run_that_is_trained_keeps_the_name_it_had_before_there_were_others() -> None:
    text = b'{"config": {"a": 1}, "threads": 1}'
    assert identity({"a": 1}, threads=1) == hashlib.sha256(text).hexdigest()[:16]
    plan = make_plan(study(grid=grid()))
    assert len({one["id"] for one in plan}) == 12
    whole = {one["seed"]: one["id"] for one in plan if one["method"] == "lora"}
    assert {one["after"]["run"] for one in plan if "after" in one} == set(whole.values())
    assert all("after" not in one["config"] for one in plan)


def test_a_function_that_makes_recipes_may_say_it_too() -> None:
    lora = [{**study().base, "method": {"name": "lora", "rank": rank}} for rank in (2, 4)]
    plan = plan_of(study(), [*lora, {**lora[0], "after": COMPRESS}])
    assert plan[2]["after"]["run"] == plan[1]["id"]
    assert plan[2]["method"] != plan[0]["method"] == "lora"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not in the study": (
        {"run": {"method.rank": 8}},
        "method made, method.rank 2, seed 0 is made of a run that is not in the study",
    ),
    "unknown key": ({"rum": {}}, "after: unknown key rum. Did you mean 'run'"),
    "no function": ({"do": "compress"}, "after: do is 'compress': .*pattern"),
    "unknown recipe key": ({"run": {"methd.rank": 4}}, "after.run: .*Did you mean 'method'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_ones_are_refused_by_name(case: str) -> None:
    changes, message = BAD[case]
    values = arms()
    values[1]["after"] |= changes
    with pytest.raises(InputError, match=message):
        make_plan(study(grid={**grid(), "method": values}))


def test_what_cannot_be_made_is_a_failed_row_and_fails_nobody_else(
    bert_folder: str, tmp_path: Path
) -> None:
    base, reasons = {**study().base, "model": bert_folder}, {}
    for do in ("broken", "missing"):
        rates = {"training.learning_rate": [2.0, 1e-3]}
        plan = make_plan(made := study(base=base, grid={**grid(do=do), **rates}))
        plan_in(tmp_path / do, made)
        work(tmp_path / do, study_data.train)
        rows = analyse(tmp_path / do)["runs"]
        assert {row["status"] for row in rows if row["method"] == "made"} == {"failed"}
        assert [row["status"] for row in rows if row["method"] == "lora"] == ["failed", "ok"] * 4
        reasons[do] = [row["reason"] for row in rows if row["method"] == "made"]
    source = next(one["after"]["run"] for one in plan if one["method"] == "made")
    assert f"the run in runs/{source} did not succeed: diverged" in reasons["broken"][0]
    assert reasons["broken"][1] == "RuntimeError: no such singular value"
    assert f"there is no {__name__}:missing" in reasons["missing"][1]
