"""Who works on what: claims in a folder that any number of machines share. Standard library and
psutil only.

A claim on a run is the directory claims/ID/N with its owner inside, made complete beside it and
renamed into place: of two workers one succeeds, and nobody sees half a claim. N counts the claims
on the run; only the highest is in force. A worker that is found dead is superseded by N + 1, made
in the same way, so taking over is as free of races as claiming; nothing is ever removed.

A worker counts as dead when it ran on this machine and its process is gone, or when it ran
elsewhere and its heartbeat (the time stamp of its owner file, by the clock of the shared file
system) is older than `STALE_AFTER`. A worker that was only asleep finds itself superseded when it
wakes, and ends at once.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BEAT, STALE_AFTER = 5.0, 120.0  # seconds
OWNER_FILE, RELEASED_FILE, CRASHED_FILE = "owner.json", "released", "crashed"


@dataclass(frozen=True)
class Claim:
    """The right to work on a run, until it is superseded."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def in_force(self) -> bool:
        """True unless another worker has taken over."""
        return not (self.folder.parent / str(self.number + 1)).exists()

    def release(self) -> None:
        """Give the run back unfinished, so that the next worker need not wait."""
        (self.folder / RELEASED_FILE).touch()


def take(claims: Path, run: str, *, stale_after: float = STALE_AFTER) -> Claim | None:
    """Return a claim on `run`, or None when a living worker has it or was faster."""
    base = claims / run
    last = newest(base)
    if last is not None and not is_free(last, stale_after=stale_after):
        return None
    base.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{run}-", dir=claims))
    (staging / OWNER_FILE).write_text(json.dumps(_me()), encoding="utf-8")
    claim = Claim(base / str(last.number + 1 if last else 0))
    try:
        # refused when there is one: a claim is never an empty directory
        staging.rename(claim.folder)
    except OSError:
        (staging / OWNER_FILE).unlink()
        staging.rmdir()
        return None
    return claim


def newest(base: Path) -> Claim | None:
    """Return the claim in force on the run of which `base` holds the claims."""
    try:
        numbers = [int(path.name) for path in base.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        return None
    return Claim(base / str(max(numbers))) if numbers else None


def attempts(base: Path) -> int:
    """Return how often a worker began the run and did not give it back."""
    last = newest(base)
    return (
        0
        if last is None
        else sum(not (base / str(n) / RELEASED_FILE).exists() for n in range(last.number + 1))
    )


def mark_crashed(claims: Path, pid: int) -> None:
    """Note that the process `pid` of this machine, a worker, died of its run and not because
    everything was killed."""
    for base in claims.iterdir() if claims.is_dir() else ():
        claim = newest(base)
        if claim is not None and not (claim.folder / RELEASED_FILE).exists():
            owner = json.loads((claim.folder / OWNER_FILE).read_text(encoding="utf-8"))
            if owner["machine"] == _machine() and owner["pid"] == pid:
                (claim.folder / CRASHED_FILE).touch()


def crashes(base: Path) -> int:
    """Return how many workers died of the run of which `base` holds the claims."""
    return len(list(base.glob(f"*/{CRASHED_FILE}")))


def is_free(claim: Claim, *, stale_after: float = STALE_AFTER) -> bool:
    """True when the claim's owner has given it back, or is dead."""
    if (claim.folder / RELEASED_FILE).exists():
        return True
    owner_file = claim.folder / OWNER_FILE
    try:
        owner = json.loads(owner_file.read_text(encoding="utf-8"))
        if owner["machine"] == _machine():
            return not _alive(owner["pid"], owner["started"])
        return _now(claim.folder.parent) - owner_file.stat().st_mtime > stale_after
    except (ValueError, KeyError, TypeError, OSError):  # not ours to read: judge it by its age
        return _now(claim.folder.parent) - claim.folder.stat().st_mtime > stale_after


class Heartbeat:
    """Keeps a claim fresh while a run lasts, from a thread; `peak_rss` is the largest resident set
    seen, in bytes.

    When the claim is superseded `lost` is called, by default to end the process at once: two must
    not write in one folder.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        beat: float = BEAT,
        sample: float = 0.2,
        lost: Callable[[], Any] | None = None,
    ) -> None:
        self.claim, self.beat, self.sample = claim, beat, sample
        # sys.exit would end this thread only. 75: a temporary failure (EX_TEMPFAIL).
        self.lost = lost or (lambda: os._exit(75))
        self.peak_rss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        process, waited = psutil.Process(), 0.0
        while True:
            # Sampled: the system's own peak is of the process, with all the runs it did before.
            self.peak_rss = max(self.peak_rss, process.memory_info().rss)
            if self._stop.wait(self.sample):
                return
            waited += self.sample
            if waited >= self.beat:
                waited = 0.0
                if not self.claim.in_force():
                    self.lost()
                    return
                try:
                    os.utime(self.claim.folder / OWNER_FILE)
                except OSError:
                    # A file system that is away for a moment; if for long, another takes over.
                    continue


def _me() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        # The number may be another process's by now; a zombie has ended, and is not collected.
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _machine() -> str:
    """Return what tells apart the places in which process numbers mean the same: host, its boot,
    and the container."""
    parts = [socket.gethostname()]
    try:
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    except OSError:  # not Linux
        parts.append(str(int(psutil.boot_time())))
    return " ".join(parts)


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system that the claims are on."""
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now
