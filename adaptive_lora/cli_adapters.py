"""Commands on adapter folders. As in `cli`: each reads arguments, calls one function of the library, and prints."""

from __future__ import annotations

import typer

app = typer.Typer()
