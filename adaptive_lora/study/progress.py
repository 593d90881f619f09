"""How far a study is, read from its folder: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from adaptive_lora.study import claims
from adaptive_lora.study.outcomes import UnusableError, is_over, read_outcome
from adaptive_lora.study.records import CLAIMS


@dataclass
class Watch:
    """Counts the runs of a study that are over, failed and at work; looks only at what is new."""

    folder: Path
    runs: tuple[str, ...]
    over: set[str] = field(default_factory=set)
    failed: int = 0
    running: int = 0
    first: int = 0  # over when the watch began
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, folder: Path, runs: Iterable[str]) -> Watch:
        """Return a watch that has looked once."""
        watch = cls(folder, tuple(runs))
        watch.look()
        watch.first = len(watch.over)
        return watch

    def look(self) -> bool:
        """Read the folder; return True when every run is over."""
        for run in self.runs:
            if run not in self.over and is_over(self.folder, run):
                self.over.add(run)
                try:
                    outcome = read_outcome(self.folder, run)
                    self.failed += outcome is not None and outcome["status"] == "failed"
                except UnusableError:
                    self.failed += 1
        try:
            begun = {path.name for path in (self.folder / CLAIMS).iterdir()} & set(
                self.runs
            ) - self.over
        except FileNotFoundError:
            begun = set()
        newest = (claims.newest(self.folder / CLAIMS / run) for run in begun)
        self.running = sum(claim is not None and not claims.is_free(claim) for claim in newest)
        return len(self.over) == len(self.runs)

    def time_left(self) -> float | None:
        """Return seconds at the pace so far; None before the first run of this session is over."""
        done, left = len(self.over) - self.first, len(self.runs) - len(self.over)
        return (time.monotonic() - self.began) / done * left if done else None


class Bar:
    """The live line: done / all, running, failed, time left."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch = watch
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"), console=console, disable=not console.is_terminal,
            expand=True,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=len(watch.runs), state="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.progress.stop()

    def show(self) -> None:
        """Draw what the watch has seen."""
        watch, left = self.watch, self.watch.time_left()
        state = f"{watch.running} running, {watch.failed} failed" + (
            "" if left is None else f", {duration(left)} left"
        )
        self.progress.update(self.task, completed=len(watch.over), state=state)


def duration(seconds: float) -> str:
    """Return seconds as a person says them.

    >>> duration(42), duration(3700), duration(90000)
    ('42 s', '1 h 01 min', '25 h 00 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
