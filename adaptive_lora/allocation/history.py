"""The allocation history: one row a decision, in `allocations.jsonl`. Replaying it gives the final
pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adaptive_lora.allocation.allocate import RankPattern, Resize
from adaptive_lora.files import to_json, write_text


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided after optimizer step `step`, and from what.

    `status` is "changed", "kept" (nothing to change), "masked" (by PEFT's AdaLoRA: the ranks stay
    as they are), "refused" (with the `reason`; the ranks stay as they are) or "loaded" (the ranks
    of the best checkpoint, which was loaded at the end).
    """

    step: int
    status: str
    reason: str | None
    budget: int | None  # parameters allowed
    parameters_before: int
    parameters_after: int
    changes: dict[str, Resize]  # only the targets that changed
    pattern: RankPattern  # all targets, after the decision
    scores: dict[str, float]  # one for each target
    # adapters, gradients, optimizer state, statistics
    bytes_after: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    # {part: {target: score}} that scores are made of
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the row as one line of strict JSON; a score that is not finite becomes null."""
        return to_json(asdict(self))


def _with_nan(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if score is None else score for name, score in scores.items()}


def write(path: Path, rows: Iterable[Decision]) -> None:
    """Write all rows, replacing the file."""
    write_text(path, "".join(row.to_json() + "\n" for row in rows))


def from_json(row: Mapping[str, Any]) -> Decision:
    """Return the `Decision` of a parsed row."""
    parts = {part: _with_nan(scores) for part, scores in row.get("parts", {}).items()}
    changes = {
        name: Resize(tuple(change["keep"]), change["grow"], change.get("rotated", False))
        for name, change in row["changes"].items()
    }
    return Decision(
        **{**row, "scores": _with_nan(row["scores"]), "parts": parts, "changes": changes}
    )


def replay(initial: RankPattern, rows: Iterable[Decision]) -> RankPattern:
    """Return the pattern after applying the changes of all `rows` to `initial`."""
    pattern = dict(initial)
    for row in rows:
        pattern |= {name: change.rank for name, change in row.changes.items()}
    return pattern
