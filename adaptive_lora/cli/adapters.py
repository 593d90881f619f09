"""Commands on adapter folders. As in `cli`: each reads arguments, calls one function of the
library, and prints."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_lora.cli.once import App
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.files import check_new, to_json

app = App()

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A PEFT LoRA adapter folder, or a run directory.")
]


@app.command()
def export(
    adapter: Adapter,
    to: Annotated[str, typer.Option(help="native, uniform, merged or gguf; see docs/serving.md.")],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    model: Annotated[
        str | None, typer.Option(help="The base model. Default: what the adapter names.")
    ] = None,
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_lora_to_gguf.py, for gguf.")
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Write only; compare nothing with the adapter.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let code that comes with the base model run."),
    ] = False,
) -> None:
    """Write an adapter in the form that PEFT, vLLM, llama.cpp or others need, and check that it
    answers the same."""
    from adaptive_lora.adapter_tools.export import export as write
    from adaptive_lora.report.tables import WIDTH

    quiet()
    done = write(
        adapter,
        to,
        output,
        model=model,
        check=not no_check,
        converter=converter,
        trust_remote_code=trust_remote_code,
    )
    for line in done.lines():
        wrapped = textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        typer.echo(line if line.startswith(" ") else wrapped)


@app.command()
def compress(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="The adapter folder to make.")],
    budget: Annotated[
        float | None,
        typer.Option(help="LoRA parameters to keep; below 1 a share of those there are: 0.25."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Budget: the parameters of this uniform rank.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Keep this share of all squared singular values, with few parameters: 0.99."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Records to measure the adapter on, before and after.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="The run that says how to measure; without --data, on its records."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is now, to measure with.")
    ] = None,
) -> None:
    """Shrink any trained adapter under one budget for all its layers, by singular values."""
    from adaptive_lora.adapter_tools.compress import compress as shrink
    from adaptive_lora.adapter_tools.folder import find_folder
    from adaptive_lora.report.figures import rank_heatmap
    from adaptive_lora.report.tables import kept_table, show

    quiet()
    check_new(output)
    folder, before = find_folder(adapter), None
    if data is not None or run is not None:
        from adaptive_lora.runs import use

        run = run or use.run_of(folder)
        before = use.evaluate(use.open_run(run, model=model, adapter=folder), data)
    done = shrink(folder, budget=budget, rank=rank, energy=energy, output=output)
    show(kept_table(done.after, done.kept))
    dropped = sum(not rank for rank in done.after.values())
    typer.echo(
        f"LoRA parameters {done.parameters_before:,} -> {done.parameters_after:,} "
        f"({100 * done.parameters_after / done.parameters_before:.1f} %), energy kept "
        f"{100 * done.energy:.2f} %"
        + (f", {dropped} of {len(done.after)} targets dropped" if dropped else "")
    )
    if before is not None and run is not None:
        after = use.evaluate(use.open_run(run, model=model, adapter=output), data)
        for name, value in before.items():
            changed = "" if name == "records" else f" -> {after[name]:.6g}"
            typer.echo(f"{name:<28}{value:.6g}{changed}")
    ranks = {
        f"before: {done.parameters_before:,}": done.before,
        f"after: {done.parameters_after:,}": done.after,
    }
    typer.echo(f"figure: {rank_heatmap(ranks, output / 'ranks.png')}")
    typer.echo(f"adapter: {output}")


@app.command()
def convert(
    adalora_dir: Annotated[
        Path, typer.Argument(metavar="ADALORA_DIR", help="A folder with PEFT's AdaLoRA adapter.")
    ],
    output: Annotated[Path, typer.Option(help="The adapter folder to make.")],
) -> None:
    """Turn a PEFT AdaLoRA checkpoint into plain LoRA with its true ranks, exactly."""
    from adaptive_lora.adapter_tools.convert import convert as to_lora
    from adaptive_lora.report.tables import rank_table, show

    quiet()
    converted = to_lora(adalora_dir, output)
    show(rank_table(converted.ranks))
    typer.echo(
        f"{converted.parameters:,} LoRA parameters on {len(converted.ranks)} targets; scale "
        f"{_scale(converted)}"
    )
    typer.echo(f"adapter: {output}")


def _scale(adapter: Any) -> str:
    return f"{next(iter(adapter.updates.values())).scale:g}"


@app.command()
def inspect(
    adapter: Adapter,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every singular value, and no table.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="A .png, .pdf or .svg file to draw.")] = None,
) -> None:
    """Show what is in an adapter: ranks, scales, sizes, effective ranks, what is wasted, what is
    wrong."""
    from adaptive_lora.adapter_tools.inspect import check_figure, rows, summary
    from adaptive_lora.adapter_tools.inspect import inspect as look
    from adaptive_lora.report.figures import adapter_spectra
    from adaptive_lora.report.tables import WIDTH, adapter_table, show

    quiet()
    if figure is not None:
        check_figure(figure)
    found = look(adapter)
    if as_json:
        typer.echo(to_json(found.to_dict(), indent=2))
    else:
        show(adapter_table(rows(found), found.folder))
        for line in summary(found):
            typer.echo(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False))
    if figure is not None:
        facts = found.targets
        adapter_spectra(
            {name: one.effective_rank for name, one in facts.items()},
            {name: one.norm for name, one in facts.items()},
            {name: one.spectrum for name, one in facts.items()},
            figure,
        )
        typer.echo(f"figure: {figure}", err=as_json)
