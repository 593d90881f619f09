"""A worker: takes one run of a study after the other until all are over. The same behind every
executor.

    python -m adaptive_lora.study.worker STUDY_DIR

Any number may work on one folder, from any number of machines; each may be killed at any time.
torch is imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_lora.errors import AdaptiveLoraError, InputError, IntegrityError
from adaptive_lora.files import ADAPTER_FOLDER, CHECKPOINT_FOLDER, RESULT_FILE
from adaptive_lora.study import after, claims
from adaptive_lora.study.outcomes import digests, is_over, write_outcome
from adaptive_lora.study.plan import read_plan
from adaptive_lora.study.records import CLAIMS, LOGS, RUNS, VERSION, Outcome, PlannedRun

TRAIN = "adaptive_lora.runs.run:run"
MAX_CRASHES = 3
WAIT = 1.0  # seconds between two looks at runs that others work on
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

Train = Callable[..., Any]
"""(config, resume=bool) -> None: makes the run directory config.output with its result.json, or
raises."""


def work(folder: str | Path, train: Train) -> None:
    """Do runs until every run of the study in `folder` is over, whoever does it."""
    study, threads = Path(folder).resolve(), read_plan(folder)["threads"]
    todo: list[PlannedRun] = read_plan(folder)["runs"]
    while todo:
        for one in todo:
            if "after" in one and not is_over(study, one["after"]["run"]):
                continue  # its turn comes
            claim = None if is_over(study, one["id"]) else claims.take(study / CLAIMS, one["id"])
            if claim is None:
                continue
            if not is_over(study, one["id"]):  # by a worker that was faster
                # In this process: a fork for each run takes 30 ms; a worker that dies is replaced.
                perform(study, one, claim, train, threads=threads)
            claim.release()
        todo = [one for one in todo if not is_over(study, one["id"])]
        if todo:
            time.sleep(WAIT)


def perform(
    study: Path, planned: PlannedRun, claim: claims.Claim, train: Train, *, threads: int
) -> None:
    """Do one run and write its outcome, whatever happens; only an interruption leaves none."""
    folder, attempts = study / RUNS / planned["id"], claims.attempts(claim.folder.parent)
    with _log(study / LOGS / f"{planned['id']}.log"), claims.Heartbeat(claim) as heart:
        reason = None
        try:
            if claims.crashes(claim.folder.parent) >= MAX_CRASHES:
                raise AdaptiveLoraError(
                    f"{MAX_CRASHES} workers died of this run; is memory short? See its log in "
                    f"{LOGS}"
                )
            if "after" in planned:
                source = study / RUNS / planned["after"]["run"]
                train = partial(after.make, source=source, do=load(planned["after"]["do"]))
            _train(folder, planned, train, begun=claim.number > 0)
        except AdaptiveLoraError as error:
            print(f"failed: {error}", flush=True)
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        except BaseException:  # Ctrl-C, or the executor's end
            claim.release()
            raise
    if not claim.in_force():
        return
    result = (
        json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if (folder / RESULT_FILE).is_file()
        else {}
    )
    if reason is None and result.get("status") != "ok":
        reason = result.get("reason") or f"the run left no {RESULT_FILE}"
    outcome: Outcome = {
        "version": VERSION,
        "id": planned["id"],
        "status": "ok" if reason is None else "failed",
        "reason": None
        if reason is None
        else reason.replace(f"{study}/", ""),  # the same wherever the study lies
        "files": digests(folder),
        "component_parameters": _costliest_component(folder),
        "costs": {
            "train_seconds": result.get("train_seconds"),
            "peak_memory_bytes": _cuda_peak() or heart.peak_rss,
            "attempts": attempts,
        },
    }
    write_outcome(study, outcome)


def _train(folder: Path, planned: PlannedRun, train: Train, *, begun: bool) -> None:
    """Train where nothing is, go on where an earlier claim has left a run, if that gives the same
    result."""
    from adaptive_lora.recipe.config import parse

    config = parse({**planned["config"], "output": str(folder)}, origin=planned["id"])
    if folder.is_dir() and any(folder.iterdir()):
        if not begun:
            raise IntegrityError(
                f"{folder} was there before the run; move it away, and use --retry-failed"
            )
        if (folder / RESULT_FILE).is_file():  # written last, and whole
            return
        if any((folder / CHECKPOINT_FOLDER).glob("checkpoint-*")):
            try:
                train(config, resume=True)
                return
            except IntegrityError as error:
                print(f"{error}; starting again", flush=True)
        shutil.rmtree(folder)  # what a killed worker of this study began, and nothing to go on from
    train(config, resume=False)


@contextlib.contextmanager
def _log(file: Path) -> Iterator[None]:
    """Send what this process prints, from C too, to the end of `file`."""
    file.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = file.open("a", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _costliest_component(folder: Path) -> int | None:
    """Return I + O of the costliest target with an adapter; None without a saved adapter."""
    from adaptive_lora.model.adapter_file import WEIGHTS_NAME, component_costs

    file = folder / ADAPTER_FOLDER / WEIGHTS_NAME
    return max(component_costs(file).values(), default=None) if file.is_file() else None


def _cuda_peak() -> int:
    """Return the peak of CUDA's allocator since the last call, 0 without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return int(peak)


def load(name: str) -> Any:
    """Return the function that `module:function` names. Raises `InputError` when there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"there is no {name}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Do the runs of a study until all are over.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", default=TRAIN, help="module:function that trains one run")
    parser.add_argument(
        "--with-parent",
        action="store_true",
        help="end when standard input does: its writer is gone",
    )
    options = parser.parse_args()
    if options.with_parent:
        # sys.exit would end this thread only, and a run that nobody waits for would go on.
        threading.Thread(target=lambda: os.read(0, 1) or os._exit(130), daemon=True).start()
    threads = str(read_plan(options.folder)["threads"])
    os.environ.update(dict.fromkeys(THREADS, threads) | QUIET)  # before torch and numpy load
    train = load(options.train)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    work(options.folder, train)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
