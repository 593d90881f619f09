"""Errors a user can cause or must act on. Each carries the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


class AdaptiveLoraError(Exception):
    """Base of every error this library raises on purpose; `exit_code` is what the command line
    returns."""

    exit_code = 1


class InputError(AdaptiveLoraError, ValueError):
    """The request cannot be carried out: what was wrong, what was got, what was expected, what to
    do."""

    exit_code = 2


class DivergedError(AdaptiveLoraError, ArithmeticError):
    """A loss, gradient or weight stopped being finite. `step` is the optimizer step (from 1),
    `where` the culprits."""

    exit_code = 3

    def __init__(
        self, message: str, *, step: int | None = None, where: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        self.where = where


class IntegrityError(AdaptiveLoraError):
    """A file on disk is missing, damaged or does not belong to this run or model."""

    exit_code = 4


class NothingLearnedError(AdaptiveLoraError):
    """Training ended as if it had not been: the adapter changes nothing, or no trainable parameter
    has changed."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `' Did you mean X?'` for the nearest spelling of `name` among `known`, or `''`.

    >>> nearest("lineer_decay", ["lora", "linear_decay"])
    " Did you mean 'linear_decay'?"
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown(what: str, name: Any, known: Collection[str], listed: str = "Known") -> str:
    """Return the message for a name that is not among `known`: `what`, the nearest spelling, and
    all that there are, introduced by `listed`.

    >>> unknown("unknown form 'nativ'", "nativ", ["native", "merged"])
    "unknown form 'nativ'. Did you mean 'native'? Known: native, merged"
    """
    return f"{what}.{nearest(str(name), known)} {listed}: {', '.join(known)}"
