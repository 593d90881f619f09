"""The table of a study: one row a method and condition, its setting chosen by the rule, compared
with the baseline. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_lora.study import evidence
from adaptive_lora.study.records import Comparison, NoiseFloor, RunRow, StudyHead, TableRow
from adaptive_lora.study.selection import RULES
from adaptive_lora.study.study_file import rises as rises_by_name

FLAT = {"task": "task", "model": "model", "budget": "budget"}  # axes that are columns of their own
Component = Mapping[str, int]  # id of a run -> parameters of its costliest component


@dataclass(frozen=True)
class Table:
    """What `make_table` makes of runs."""

    rows: list[TableRow]
    noise: list[NoiseFloor]
    wins: dict[str, dict[str, int]]
    notes: list[str]


def make_table(head: StudyHead, runs: Sequence[RunRow], components: Component) -> Table:
    """Choose one setting a method in every condition, summarise its seeds, compare it with the
    baseline on equal seeds.

    A condition is a setting of all axes but method, seed and the selected ones. Holm's correction
    goes over the methods of a condition.
    """
    rows: list[TableRow] = []
    noise: list[NoiseFloor] = []
    conditions: dict[str, dict[str, list[RunRow]]] = {}
    for run in runs:
        conditions.setdefault(_key(_condition(run, head)), {}).setdefault(run["method"], []).append(
            run
        )
    for methods in conditions.values():
        chosen = {method: _choose(head, mine) for method, mine in methods.items()}
        base = chosen.get(head["baseline"])
        made = {
            method: _row(head, mine, len(_settings(head, methods[method])))
            for method, mine in chosen.items()
        }
        if base is not None:
            noise.append(_noise(head, base, made[head["baseline"]]))
            _compare(head, chosen, made, noise[-1]["floor"])
            _parameters(head, chosen, made, components)
            _at_equal_settings(head, methods, made)
        rows += made.values()
    return Table(rows, noise, _wins(head, rows), _notes(head, rows))


def figure(run: RunRow, metric: str) -> float | None:
    """Return a run's figure, None where it failed or has none."""
    return run["metrics"].get(metric) if run["status"] == "ok" else None


def _condition(run: RunRow, head: StudyHead) -> dict[str, Any]:
    inside = {"method", "seed", *head["selection"]["axes"]}
    return {axis: label for axis, label in run["settings"].items() if axis not in inside}


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _settings(head: StudyHead, runs: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """Return the runs of each setting of the selected axes, in the order of the grid."""
    settings: dict[str, list[RunRow]] = {}
    for run in runs:
        settings.setdefault(
            _key({axis: run["settings"].get(axis) for axis in head["selection"]["axes"]}), []
        ).append(run)
    return settings


def _choose(head: StudyHead, runs: Sequence[RunRow]) -> list[RunRow]:
    settings, by = _settings(head, runs), head["selection"]["metric"]
    rises = head["greater_is_better"]
    if by != head["metric"]:
        rises = rises_by_name(by)
    rule = RULES[head["selection"]["rule"]]()
    over = ("ok", "failed")  # a run that is missing or damaged says nothing about its setting
    figures = {
        key: [figure(run, by) for run in mine if run["status"] in over]
        for key, mine in settings.items()
    }
    return settings[rule.choose(figures, greater_is_better=rises)]


def _row(head: StudyHead, runs: Sequence[RunRow], trials: int) -> TableRow:
    first = runs[0]
    points = [f for run in runs if (f := figure(run, head["metric"])) is not None]
    mean, sd, interval = evidence.summary(points) if points else (None, None, None)
    parameters = [
        run["lora_parameters"]
        for run in runs
        if run["status"] == "ok" and run["lora_parameters"] is not None
    ]
    settings = {axis: label for axis, label in _condition(first, head).items() if axis not in FLAT}
    return {
        "method": first["method"],
        "task": first["task"],
        "model": first["model"],
        "budget": first["budget"],
        "settings": settings,
        "chosen": {axis: first["settings"].get(axis) for axis in head["selection"]["axes"]},
        "learning_rate": first["learning_rate"],
        "trials": trials,
        "runs": [run["id"] for run in runs],
        "seeds": len(points),
        "failed": sum(run["status"] == "failed" for run in runs),
        "mean": mean,
        "sd": sd,
        "ci95": interval,
        "lora_parameters": round(statistics.fmean(parameters)) if parameters else None,
        "parameters_equal": None,
        "note": None,
        "comparison": None,
    }


def _noise(head: StudyHead, runs: Sequence[RunRow], row: TableRow) -> NoiseFloor:
    points = [f for run in runs if (f := figure(run, head["metric"])) is not None]
    return {
        "task": row["task"],
        "model": row["model"],
        "budget": row["budget"],
        "settings": row["settings"],
        "seeds": len(points),
        "sd": row["sd"],
        "floor": evidence.noise_floor(points) if points else None,
    }


def _compare(
    head: StudyHead,
    chosen: Mapping[str, Sequence[RunRow]],
    made: Mapping[str, TableRow],
    floor: float | None,
) -> None:
    """Fill in the comparison of every method but the baseline."""
    comparisons: dict[str, Comparison] = {}
    for method, runs in chosen.items():
        if method == head["baseline"]:
            continue
        pairs = _pairs(head, runs, chosen[head["baseline"]])
        comparisons[method] = {
            "pairs": len(pairs), "difference": None, "ci95": None, "p_t": None, "p_bootstrap": None,
            "p_wilcoxon": None,
            "p_holm": None, "noise_floor": floor, "verdict": None,
        }  # fmt: skip
        if len(pairs) == 1:
            comparisons[method]["difference"] = pairs[0][0] - pairs[0][1]
        if len(pairs) > 1:
            found = evidence.compare([a for a, _ in pairs], [b for _, b in pairs])
            comparisons[method] |= {
                "difference": found.difference, "ci95": found.ci95, "p_t": found.p_t,
                "p_bootstrap": found.p_bootstrap,
                "p_wilcoxon": found.p_wilcoxon,
            }  # fmt: skip
    tested = [method for method, one in comparisons.items() if one["p_t"] is not None]
    adjusted = evidence.holm([comparisons[method]["p_t"] or 0.0 for method in tested])
    for method, p in zip(tested, adjusted, strict=True):
        one = comparisons[method]
        assert one["difference"] is not None
        assert floor is not None  # two pairs: two seeds of the baseline
        one["p_holm"] = p
        one["verdict"] = evidence.verdict(
            one["difference"], p, floor, greater_is_better=head["greater_is_better"]
        )
    for method, comparison in comparisons.items():
        made[method]["comparison"] = comparison


def _pairs(
    head: StudyHead, runs: Sequence[RunRow], theirs: Sequence[RunRow]
) -> list[tuple[float, float]]:
    """Return the figures of equal seeds."""
    base = {run["seed"]: figure(run, head["metric"]) for run in theirs}
    mine = {run["seed"]: figure(run, head["metric"]) for run in runs}
    return [
        (a, b) for seed, a in mine.items() if a is not None and (b := base.get(seed)) is not None
    ]


def _at_equal_settings(
    head: StudyHead, methods: Mapping[str, Sequence[RunRow]], made: Mapping[str, TableRow]
) -> None:
    """Say of a difference found between unlike settings what it is at equal ones: the choice alone
    can have made it, and the noise floor, over seeds only, does not hold the choice's own luck."""
    baseline = head["baseline"]
    theirs = _settings(head, methods[baseline])
    for method, row in made.items():
        comparison = row["comparison"]
        if comparison is None or comparison["verdict"] not in ("better", "worse"):
            continue
        if row["chosen"] == made[baseline]["chosen"]:
            continue
        said = []
        for key, runs in _settings(head, methods[method]).items():
            if pairs := _pairs(head, runs, theirs.get(key, [])):
                label = ", ".join(f"{axis} {value}" for axis, value in json.loads(key).items())
                said.append(f"{statistics.fmean(a - b for a, b in pairs):+.2g} at {label}")
        _say(
            row,
            f"chosen at another setting than {baseline}; differences at equal ones: "
            f"{'; '.join(said) or 'none made'}",
        )


def _say(row: TableRow, said: str) -> None:
    row["note"] = f"{row['note']}; {said}" if row["note"] else said


def _parameters(
    head: StudyHead,
    chosen: Mapping[str, Sequence[RunRow]],
    made: Mapping[str, TableRow],
    components: Component,
) -> None:
    """Say of every row whether its parameters and steps are those of the baseline."""

    def counts(method: str, key: str) -> list[int]:
        done: list[Any] = [run for run in chosen[method] if run["status"] == "ok"]
        return [run[key] for run in done if run[key] is not None]

    baseline = head["baseline"]
    for method, row in made.items():
        mine, theirs = counts(method, "lora_parameters"), counts(baseline, "lora_parameters")
        if not mine or not theirs:
            continue
        unit = max(
            (components.get(run["id"], 0) for m in (method, baseline) for run in chosen[m]),
            default=0,
        )
        apart = max(max(mine) - min(theirs), max(theirs) - min(mine))
        row["parameters_equal"] = apart <= unit
        if not row["parameters_equal"]:
            ratio = statistics.fmean(mine) / statistics.fmean(theirs)
            _say(row, f"{ratio:.2f} × the LoRA parameters of {baseline}: not an equal budget")
        steps = set(counts(method, "steps")), set(counts(baseline, "steps"))
        if steps[0] != steps[1]:
            _say(row, f"{_span(steps[0])} optimizer steps, {baseline} {_span(steps[1])}")


def _span(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,}..{max(counts):,}"


def _wins(head: StudyHead, rows: Sequence[TableRow]) -> dict[str, dict[str, int]]:
    wins: dict[str, dict[str, int]] = {}
    for row in rows:
        comparison = row["comparison"]
        if comparison is not None and comparison["verdict"] is not None:
            mine = wins.setdefault(row["method"], {"win": 0, "tie": 0, "loss": 0})
            mine[{"better": "win", "tie": "tie", "worse": "loss"}[comparison["verdict"]]] += 1
    return wins


def _notes(head: StudyHead, rows: Sequence[TableRow]) -> list[str]:
    selection, notes = head["selection"], []
    if selection["axes"]:
        trials = sorted({row["trials"] for row in rows})
        notes.append(
            f"{', '.join(selection['axes'])}: for each method {selection['description']} of "
            f"{selection['metric']} ({selection['rule']}), of "
            f"{'..'.join(map(str, dict.fromkeys([trials[0], trials[-1]])))} tried; reported: "
            f"{head['metric']}."
        )
        if selection["metric"] == head["metric"]:
            notes.append(
                f"{head['metric']} both chose the settings and is reported: the figures are "
                "optimistic, for methods with more trials more so. Give data.extra_eval and report "
                "its metric."
            )
    else:
        notes.append(
            f"reported: {head['metric']}. Nothing was selected: each method ran with the settings "
            "shown."
        )
    pairs = sorted({row["comparison"]["pairs"] for row in rows if row["comparison"] is not None})
    if pairs:
        fewest = pairs[0]
        notes.append(
            "better / worse: Holm's p of the paired t test at most 0.05 and the difference outside "
            "the noise floor (the baseline against itself under other seeds); else a tie."
            + (
                f" With {fewest} pairs Wilcoxon's p cannot fall below {2.0 ** (1 - fewest):.3g}."
                if fewest > 1
                else ""
            )
        )
    if any(row["parameters_equal"] is False for row in rows):
        notes.append("LoRA parameters are not equal within one component: see the rows so marked.")
    if failed := sum(row["failed"] for row in rows):
        notes.append(
            f"{failed} runs behind this table failed; their rows are means over the other seeds."
        )
    return notes
