"""Commands on adapter folders. As in `cli`: each reads arguments, calls one function of the library, and prints."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from adaptive_lora.silence import quiet

app = typer.Typer()


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT LoRA adapter folder, or a run directory.")],
    to: Annotated[str, typer.Option(help="native, uniform, merged or gguf; see docs/serving.md.")],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    model: Annotated[str | None, typer.Option(help="The base model. Default: what the adapter names.")] = None,
    converter: Annotated[Path | None, typer.Option(help="llama.cpp's convert_lora_to_gguf.py, for gguf.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Write only; compare nothing with the adapter.")] = False,
) -> None:
    """Write an adapter in the form that PEFT, vLLM, llama.cpp or others need, and check that it answers the same."""
    from adaptive_lora.export import export as write
    from adaptive_lora.report.tables import WIDTH

    quiet()
    done = write(adapter, to, output, model=model, check=not no_check, converter=converter)
    for line in done.lines():
        typer.echo(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False))
