"""Where workers run: processes of this machine, Slurm jobs (submitit), Ray tasks. All start the
command of `worker`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.errors import AdaptiveLoraError, InputError, unknown
from adaptive_lora.study import claims
from adaptive_lora.study.records import CLAIMS, LOGS
from adaptive_lora.study.study_file import Study
from adaptive_lora.study.worker import TRAIN

MAX_RESTARTS = 10  # of workers, without a run that is over in between


class Executor(ABC):
    """Starts workers on a study's folder. `stop` is safe to call at any time: the folder holds all
    state."""

    def __init__(self, study: Study, folder: Path, *, workers: int, train: str = TRAIN) -> None:
        self.study, self.folder, self.workers, self.train = study, folder.resolve(), workers, train
        command = [sys.executable, "-m", "adaptive_lora.study.worker", str(self.folder)]
        self.command = [*command, *(["--train", train] if train != TRAIN else [])]
        (self.folder / LOGS).mkdir(exist_ok=True)

    @abstractmethod
    def start(self) -> None:
        """Start the workers."""

    @abstractmethod
    def living(self, *, finished: int) -> int:
        """Return how many workers are at work or waiting for a place. `finished` counts the runs
        that are over."""

    @abstractmethod
    def stop(self) -> None:
        """End the workers."""

    @abstractmethod
    def last_words(self) -> str:
        """Return why workers ended early, as far as it is known."""


class Local(Executor):
    """Processes of this machine. Where there are several GPUs each worker sees one. A worker that a
    signal kills (memory is short) is replaced, and its run given up when three have died of it."""

    def start(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.finished, self.restarts = 0, 0
        for number in range(self.workers):
            self._start(number)

    def _start(self, number: int) -> None:
        gpus = visible_gpus()
        only = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {}
        with self._log(number).open("ab") as log:
            self.processes.insert(
                number,
                subprocess.Popen(
                    [*self.command, "--with-parent"],
                    # Held open, never written to: its end tells that this process is gone.
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=os.environ | only,
                ),
            )

    def living(self, *, finished: int) -> int:
        if finished > self.finished:
            self.finished, self.restarts = finished, 0
        for number, process in enumerate(self.processes):
            killed = process.poll() is not None and process.returncode < 0
            if killed and self.restarts < MAX_RESTARTS:
                self.restarts += 1
                claims.mark_crashed(self.folder / CLAIMS, process.pid)
                _close(self.processes.pop(number))
                self._start(number)
        return sum(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()
            _close(process)

    def last_words(self) -> str:
        codes = ", ".join(str(process.poll()) for process in self.processes)
        return f"exit codes {codes}. {tail(self._log(0))}"

    def _log(self, number: int) -> Path:
        return self.folder / LOGS / f"worker-{number}.log"


class Slurm(Executor):
    """One job a worker, through submitit; where there is no Slurm, submitit's own local executor.
    `slurm:` in the study file has submitit's parameters, such as {timeout_min: 240,
    slurm_partition: gpu}; `cluster: local` is its local executor."""

    def start(self) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError(
                "--executor slurm needs submitit; get it with: pip install 'adaptive-lora[slurm]'"
            ) from None
        parameters: dict[str, Any] = {
            "name": "adaptive-lora",
            "cpus_per_task": self.study.threads,
            "timeout_min": 24 * 60,
        }
        parameters |= self.study.slurm
        executor = submitit.AutoExecutor(
            folder=self.folder / LOGS / "slurm", cluster=parameters.pop("cluster", None)
        )
        if executor.cluster == "local":
            print("no Slurm here: submitit runs the workers on this machine", flush=True)
        executor.update_parameters(**parameters)
        self.jobs = [
            executor.submit(_run, self.command, str(Path.cwd())) for _ in range(self.workers)
        ]

    def living(self, *, finished: int) -> int:
        return sum(not job.done() for job in self.jobs)

    def stop(self) -> None:
        for job in self.jobs:
            if not job.done():
                job.cancel()

    def last_words(self) -> str:
        return f"states {', '.join(job.state for job in self.jobs)}. {self.jobs[0].stderr() or ''}"[
            -2000:
        ]


class Ray(Executor):
    """One task a worker, on the cluster that RAY_ADDRESS names or a new one on this machine. `ray:`
    in the study file has the resources of a task, such as {num_gpus: 1}."""

    def start(self) -> None:
        try:
            import ray
        except ImportError:
            raise InputError(
                "--executor ray needs ray; get it with: pip install 'adaptive-lora[ray]'"
            ) from None
        self.ray = ray
        self.ours = not ray.is_initialized()
        if self.ours:
            ray.init(log_to_driver=False, include_dashboard=False)
        options: dict[str, Any] = {
            "num_cpus": self.study.threads,
            # A lost worker is not started anew by Ray: claims hand its run to the others.
            "max_retries": 0,
        } | self.study.ray
        task = ray.remote(**options)(_run)
        self.tasks = [task.remote(self.command, str(Path.cwd())) for _ in range(self.workers)]

    def living(self, *, finished: int) -> int:
        _, waiting = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        return len(waiting)

    def stop(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        if self.ours:
            self.ray.shutdown()

    def last_words(self) -> str:
        try:
            self.ray.get(self.tasks, timeout=1)
        except Exception as error:
            return str(error)[-2000:]
        return ""


EXECUTORS: dict[str, type[Executor]] = {"local": Local, "slurm": Slurm, "ray": Ray}


def executor_named(name: str) -> type[Executor]:
    """Return the executor of that name. Raises `InputError` naming the nearest."""
    if name not in EXECUTORS:
        raise InputError(unknown(f"unknown executor {name!r}", name, EXECUTORS))
    return EXECUTORS[name]


def _run(command: Sequence[str], cwd: str) -> None:
    """Run a worker to its end, in whatever process an executor gives us, and end it when that
    process is told to end."""
    with subprocess.Popen(command, cwd=cwd) as worker:
        signal.signal(signal.SIGTERM, lambda *_: worker.terminate())
        code = worker.wait()
    if code:
        raise AdaptiveLoraError(f"a worker ended with exit code {code}")


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; [] without
    any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part for part in named.split(",") if part.strip()]
    # Only where nothing names them: who starts workers needs no torch.
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log."""
    return (
        " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        if log.is_file()
        else ""
    )
