"""A command line on which no word is lost: an option that takes one value is given once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from adaptive_lora.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


class Once(TyperCommand):
    """A command that refuses an option given twice, where the parser would take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Of a copy: the parser takes what it reads off the list.
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, number in Counter(order).items():
            several = getattr(param, "multiple", True) or getattr(param, "is_flag", True)
            if number > 1 and not several:
                raise InputError(
                    f"{max(param.opts, key=len)} is given {number} times; it takes one value"
                )
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        decorator: Callable[[Function], Function] = super().command(name, cls=Once, **settings)
        return decorator
