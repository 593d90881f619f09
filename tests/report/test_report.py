"""Reports: ranks come from the tensors, failure is said, and a damaged run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from model_folders import Command, recipe
from safetensors.numpy import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.model.targets import find_targets
from adaptive_lora.recipe.config import parse
from adaptive_lora.report import read_run, report
from adaptive_lora.report.figures import rank_heatmap
from adaptive_lora.report.tables import rank_table, show
from adaptive_lora.runs.run import run

pytest_plugins = ("model_folders",)


@pytest.fixture
def folder(classification_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classification_run, tmp_path / "run"))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)


def change_result(folder: Path, **values: Any) -> None:
    file = folder / "result.json"
    result = json.loads(file.read_text())
    for key, value in values.items():
        result[key] = value
    file.write_text(json.dumps(result))


KEY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_{}.weight"


def cut_query(tensors: dict[str, Any]) -> None:
    tensors[KEY.format("A")] = tensors[KEY.format("A")][:1]
    tensors[KEY.format("B")] = tensors[KEY.format("B")][:, :1]


def add_target(tensors: dict[str, Any]) -> None:
    tensors[KEY.format("A").replace(".1.", ".7.")] = tensors[KEY.format("A")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_query, "rank 1 for 'bert.encoder.layer.1.attention.self.query', result.json says 2"),
        (
            lambda tensors: tensors.pop(KEY.format("A")),
            "rank 0 for 'bert.encoder.layer.1.attention.self.query'",
        ),
        (
            add_target,
            "rank 2 for 'bert.encoder.layer.7.attention.self.query', result.json says None",
        ),
    ],
)
def test_an_adapter_of_other_ranks_than_the_result_states_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path, command: Command
) -> None:
    change_tensors(folder, change)
    ended = command("report", folder)
    assert (ended.code, ended.out) == (4, "")
    assert message in ended.err
    assert not (folder / "report").exists()


def test_ranks_are_those_of_the_tensors_whatever_config_and_result_agree_on(folder: Path) -> None:
    """The tensors and the result are changed alike, the PEFT config is not: the record follows the
    tensors."""
    change_tensors(folder, cut_query)
    target = "bert.encoder.layer.1.attention.self.query"
    change_result(
        folder, ranks=json.loads((folder / "result.json").read_text())["ranks"] | {target: 1}
    )
    assert read_run(folder).ranks[target] == 1


def test_a_target_without_tensors_has_rank_0(
    bert_folder: str, reviews_file: str, tmp_path: Path
) -> None:
    method = {"name": "custom", "pattern": {".*query": 2, ".*": 0}}
    values = recipe(bert_folder, reviews_file, tmp_path / "run", training={"max_steps": 2}) | {
        "method": method
    }
    run(parse(values))
    assert sorted(read_run(tmp_path / "run").ranks.values()) == [0] * 11 + [2] * 2
    assert len(report(tmp_path / "run")) == 2


def test_a_failed_run_is_reported_as_failed(
    bert_folder: str, reviews_file: str, tmp_path: Path, command: Command
) -> None:
    with pytest.raises(DivergedError):
        run(
            parse(
                recipe(
                    bert_folder, reviews_file, tmp_path / "run", training={"learning_rate": 1e30}
                )
            )
        )
    ended = command("report", tmp_path / "run")
    assert ended.code == 0
    shown = " ".join(ended.out.replace("│", " ").split())
    assert "failed: training stopped at step 3: the loss is nan" in shown
    assert "accuracy" not in shown


def pixels(file: Path) -> np.ndarray:
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(file)[..., :3]


def test_the_figures_show_something(folder: Path) -> None:
    figures = report(folder)
    assert figures == [folder / "report" / "ranks.png", folder / "report" / "loss.png"]
    for figure in figures:
        image = pixels(figure)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
        assert 0.01 < (image.min(axis=2) < 0.9).mean() < 0.9  # neither blank nor covered


def test_the_heatmap_shows_every_rank_by_colour_and_number(folder: Path) -> None:
    """Another rank changes its whole cell, not a number's few pixels, and the cell is not of one
    colour."""
    ranks = read_run(folder).ranks
    before = pixels(rank_heatmap({"a": ranks}, folder / "a.png"))
    for number, name in enumerate(ranks):
        after = pixels(rank_heatmap({"a": ranks | {name: 3}}, folder / f"{number}.png"))
        rows, columns = np.nonzero((after != before).any(axis=2))
        cell = after[
            rows.min() + 2 : rows.max() - 1, columns.min() + 2 : columns.max() - 1
        ].reshape(-1, 3)
        assert len(rows) > 0.5 * len(cell) > 200, name
        assert len(np.unique(cell, axis=0)) > 2, name


def test_the_two_stacks_of_an_encoder_decoder_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    targets = find_targets(T5ForConditionalGeneration(config))
    ranks = {t.name: (3 if t.stack.startswith("encoder") else 5) for t in targets}
    monkeypatch.setenv("COLUMNS", "100")
    show(rank_table(ranks))
    lines = [line for line in capsys.readouterr().out.splitlines() if "SelfAttention.q" in line]
    assert [
        ("encoder." in line, "decoder." in line, " 3  3 " in line, " 5  5 " in line)
        for line in lines
    ] == [
        (True, False, True, False),
        (False, True, False, True),
    ]
    # 18 kinds, not 10
    assert pixels(rank_heatmap({"t5": ranks}, tmp_path / "t5.png")).shape[0] > 500


@pytest.mark.parametrize("columns", ["60", "100", "300"])
def test_tables_are_at_most_100_columns_wide_and_lose_nothing(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ranks = {f"model.layers.{layer}.self_attn.q_proj": layer + 100 for layer in range(48)}
    show(rank_table(ranks))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= min(int(columns), 100)
    assert set(map(str, ranks.values())) <= set(out.replace("│", " ").split())


def test_brackets_in_a_name_are_no_markup(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_result(
        folder, status="failed", reason="expected [a, b] or [/c]", model="models/[red]bert"
    )
    renamed = folder.rename(folder.parent / "a[bold]b")
    report(renamed)
    # Where a title or a cell is wrapped depends on how long the temporary folder's name is.
    out = "".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("a[bold]b", "expected [a, b] or [/c]", "models/[red]bert"):
        assert text.replace(" ", "") in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", b"{"),
        ("result.json", b"{}"),
        ("result.json", b"[]"),
        ("result.json", b"\xff"),
        ("metrics.jsonl", b'{"step": 1}\n{"st'),
        ("metrics.jsonl", b"[1]\n"),
        ("adapter/adapter_model.safetensors", b"x"),
        ("adapter/adapter_model.safetensors", None),
    ],
)
def test_a_damaged_run_is_refused(name: str, content: bytes | None, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"run"):
        report(folder)


def test_a_folder_without_a_result_holds_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        read_run(tmp_path)
