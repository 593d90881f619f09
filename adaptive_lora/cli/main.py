"""The command line. Every function here reads arguments, calls one function of the library, and
prints."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from adaptive_lora.cli import adapters as cli_adapters
from adaptive_lora.cli import study as cli_study
from adaptive_lora.cli.once import App
from adaptive_lora.cli.quiet import quiet
from adaptive_lora.errors import AdaptiveLoraError, InputError
from adaptive_lora.files import (
    ADAPTER_FOLDER,
    check_new,
    check_new_file,
    once,
    read_recipe,
    set_key,
    write_json,
)
from adaptive_lora.naming import set_dotted

if TYPE_CHECKING:
    from adaptive_lora.recipe.config import RunConfig

app = App(
    help="LoRA fine-tuning with a rank of its own for every layer. "
    "The result is an ordinary PEFT LoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = App(no_args_is_help=True)
app.add_typer(cli_adapters.app)
app.add_typer(data_app, name="data", help="Look at data before training on it.")
app.add_typer(cli_study.app)

# Flag -> where it goes in the recipe.
_FLAGS = {
    "model": "model",
    "preset": "preset",
    "task": "task",
    "train_data": "data.train",
    "eval_data": "data.eval",
    "text": "data.text",
    "label": "data.label",
    "max_length": "data.max_length",
    "method": "method.name",
    "rank": "method.rank",
    "budget": "method.budget",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "quantization": "quantization",
    "seed": "seed",
    "output": "output",
}


Config = Annotated[Path | None, typer.Option(help="A recipe (YAML). Flags and --set override it.")]
Model = Annotated[str | None, typer.Option(help="A local model folder, or a name on the hub.")]
Preset = Annotated[
    str | None,
    typer.Option(help="A known data set: its columns, classes and metric (sst2, squad)."),
]
TaskName = Annotated[
    str | None,
    typer.Option(help="classification, causal_lm, ... Default: by the model and the columns."),
]
TrainData = Annotated[
    list[str] | None,
    typer.Option("--data", help="Training file or folder, or hub data set; give several to mix."),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option("--eval-data", help="Evaluation file, or several. Default: a seeded 10 % cut."),
]
Text = Annotated[list[str] | None, typer.Option(help="Text column; give twice for a pair.")]
Label = Annotated[str | None, typer.Option(help="Label column.")]
MaxLength = Annotated[int | None, typer.Option(help="In tokens. Default: by task and model.")]
MethodName = Annotated[str | None, typer.Option(help="See `adaptive-lora methods`.")]
Rank = Annotated[int | None, typer.Option(help="Budget: the parameters of this uniform rank.")]
Budget = Annotated[int | None, typer.Option(help="Budget in LoRA parameters.")]
BatchSize = Annotated[int | None, typer.Option(help="Per device.")]
QuantizationName = Annotated[
    str | None, typer.Option(help="Of the base: none (default), nf4 or int8.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key: training.weight_decay=0.01.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Where the base model is now. Default: as trained.")
]
NewTokens = Annotated[int | None, typer.Option(help="The longest text to write, in tokens.")]


@app.command()
def train(
    config: Config = None,
    model: Model = None,
    preset: Preset = None,
    task: TaskName = None,
    train_data: TrainData = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = None,
    method: MethodName = None,
    rank: Rank = None,
    budget: Budget = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Training epochs.")] = None,
    batch_size: BatchSize = None,
    quantization: QuantizationName = None,
    seed: Annotated[int | None, typer.Option(help="Of the training.")] = None,
    output: Annotated[str | None, typer.Option(help="The run directory to make.")] = None,
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Random weights, two steps: does it all fit? Keeps nothing."
        ),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
    ] = False,
) -> None:
    """Fine-tune a model. Writes adapter, metrics and result to the output folder."""
    flags = locals()
    if dry_run and resume:
        raise InputError(
            "--dry-run keeps nothing and --resume goes on with what was kept; give one of them"
        )
    resolved = _resolve(flags, locate=not print_config)
    if print_config:
        from adaptive_lora.recipe.config import sources

        here = all(Path(one.path).exists() for one in sources(resolved.data.train))
        if Path(resolved.model).is_dir() and here:
            from adaptive_lora.tasks.guess import with_task

            resolved, _ = with_task(resolved)
        typer.echo(resolved.to_yaml(), nl=False)
        return
    # Here, as in every command: what trains takes seconds to import, and --help is not to wait.
    from adaptive_lora.report import report
    from adaptive_lora.runs.run import run

    quiet()
    main_process = os.environ.get("RANK", "0") == "0"  # of those torchrun starts
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            result = run(resolved.model_copy(update={"output": f"{folder}/run"}), dry_run=True)
        if not main_process:
            return
        parameters = (
            f"{result['lora_parameters']:,} LoRA parameters on {result['total_parameters']:,}"
        )
        typer.echo(
            f"dry run of {result['steps']} steps on random weights: ok, {parameters}; nothing is "
            "kept"
        )
        return
    run(resolved, resume=resume)
    if not main_process:
        return
    for figure in report(resolved.output):
        typer.echo(f"figure: {figure}")
    typer.echo(f"adapter: {Path(resolved.output) / ADAPTER_FOLDER}")


def _resolve(flags: dict[str, Any], *, locate: bool = True) -> RunConfig:
    """Return the recipe that --config, the flags and --set make together; by name of the command's
    parameter."""
    config = flags["config"]
    values: dict[str, Any] = read_recipe(config) if config else {}
    for flag, key in _FLAGS.items():
        if flags.get(flag) not in (None, []):
            given = flags[flag]
            value = given[0] if isinstance(given, list) and len(given) == 1 else given
            set_dotted(values, key, value, origin="command line")
    for assignment in once(flags["set_"] or []):
        set_key(values, assignment)
    if isinstance(values.get("model"), str) and locate:
        from adaptive_lora.hub import locate_model

        # before the seconds that importing transformers takes
        locate_model(str(Path(values["model"]).expanduser()))
    from adaptive_lora.recipe.config import parse

    return parse(values, origin=str(config) if config else "command line")


@app.command()
def evaluate(
    folder: Run,
    data: Annotated[
        str | None, typer.Option(help="Records with labels. Default: the run's evaluation records.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the metrics.")] = None,
    model: BaseModel = None,
) -> None:
    """Score a run's saved adapter on any file."""
    if output is not None:
        output = check_new_file(output)
    quiet()
    from adaptive_lora.runs import use

    opened = use.open_run(folder, model=model)
    metrics = use.evaluate(opened, data)
    _echo_notes(opened.task.notes)
    for name, value in metrics.items():
        typer.echo(f"{name:<28}{value:.6g}")
    if output is not None:
        write_json(output, metrics, indent=2)


@app.command()
def predict(
    folder: Run,
    input_: Annotated[
        str, typer.Option("--input", help="Records to predict for; no labels needed.")
    ],
    output: Annotated[Path, typer.Option(help="A .jsonl, .csv or .parquet file to make.")],
    model: BaseModel = None,
    max_new_tokens: NewTokens = None,
) -> None:
    """Write the records of a file with a prediction for each."""
    quiet()
    from adaptive_lora.runs import use

    opened = use.open_run(folder, model=model, max_new_tokens=max_new_tokens)
    count = use.predict(opened, input_, output)
    _echo_notes(opened.task.notes)
    typer.echo(f"{count:,} predictions: {output}")


@app.command()
def generate(
    folder: Run,
    prompt: Annotated[
        list[str], typer.Option(help="Text to answer or to go on with; may be given several times.")
    ],
    model: BaseModel = None,
    max_new_tokens: NewTokens = None,
) -> None:
    """Let a run's model write, after each prompt in the form of the training records."""
    quiet()
    from adaptive_lora.runs import use

    written = use.generate(use.open_run(folder, model=model, max_new_tokens=max_new_tokens), prompt)
    for number, text in enumerate(written, start=1):
        if len(written) > 1:
            typer.echo(f"--- prompt {number}")
        typer.echo(text)


def _echo_notes(notes: list[str]) -> None:
    from adaptive_lora.runs.run import WIDTH

    for note in notes:
        typer.echo(textwrap.fill(note, WIDTH, subsequent_indent="    "))


@data_app.command()
def check(
    config: Config = None,
    model: Model = None,
    preset: Preset = None,
    task: TaskName = None,
    train_data: TrainData = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = None,
    set_: Set = None,
) -> None:
    """Show what the model will see: first records, label counts, lengths, cuts, tokens that bear
    loss."""
    flags = locals() | {"output": "unused"}
    quiet()
    resolved = _resolve(flags)
    from adaptive_lora.runs.check import check as check_data

    for line in check_data(resolved):
        typer.echo(line)


@app.command()
def plan(
    config: Config = None,
    model: Model = None,
    preset: Preset = None,
    task: TaskName = None,
    max_length: MaxLength = None,
    method: MethodName = None,
    rank: Rank = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    quantization: QuantizationName = None,
    set_: Set = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: what is here.")] = None,
    find_budget: Annotated[
        str | None, typer.Option(help="Print the largest budget that fits, such as 24GB.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder to make: plan.json and a figure.")
    ] = None,
) -> None:
    """Say what a training will need in memory, from the model's configuration alone."""
    flags = locals() | {
        "output": "unused",
        "text": None,
        "train_data": None if config else ["unused"],
    }
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device is {device!r}; expected cpu or cuda")
    if output is not None:
        output = check_new(output)
    quiet()
    resolved = _resolve(flags)
    from adaptive_lora.report import memory_plan as shown
    from adaptive_lora.runs import memory_plan

    if find_budget is None:
        found = memory_plan.plan(resolved, device=device)
        others = (
            {}
            if found.fits(shown.SIZES["8 GB"])
            else memory_plan.alternatives(resolved, device=device)
        )
    else:
        size = memory_plan.parse_size(find_budget)
        largest, found = memory_plan.largest_budget(resolved, size, device=device)
        others = {}
        typer.echo(
            f"largest budget in {find_budget}: {largest:,} LoRA parameters (--budget {largest})"
        )
    shown.show_plan(found, others)
    if output is not None:
        for file in shown.write_plan(found, output):
            typer.echo(str(file))


@app.command()
def methods() -> None:
    """List the allocation methods, each with one line and its source."""
    from adaptive_lora.methods import METHODS, describe
    from adaptive_lora.report.tables import WIDTH

    for name in METHODS:
        summary, source = describe(name)
        typer.secho(name, bold=True)
        for line in (summary, source):
            typer.echo(
                textwrap.fill(line, width=WIDTH, initial_indent="  ", subsequent_indent="    ")
            )


@app.command()
def doctor() -> None:
    """Show versions, devices and optional parts; say what is missing and how to get it."""
    from adaptive_lora.cli.doctor import findings

    broken = False
    for finding in findings():
        broken |= finding.state == "wrong"
        remedy = f"  ->  {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{finding.state:<8}{finding.what}{remedy}")
    if broken:
        raise typer.Exit(InputError.exit_code)


@app.command(name="report")
def report_command(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_OR_STUDY", help="A run directory, or a study's.")
    ],
) -> None:
    """Print a run's result and ranks, or a study's table, and draw figures; a study gets
    report.html, .md and .csv."""
    from adaptive_lora.report import report

    for path in report(folder):
        typer.echo(f"{'figure' if path.suffix == '.png' else 'file'}: {path}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs and figures.")] = Path(
        "demo-output"
    ),
) -> None:
    """Fine-tune a real encoder on the shipped data with several methods at one parameter budget,
    and compare."""
    from adaptive_lora.demo.run import demo as run_demo

    quiet()
    run_demo(output)


def main() -> NoReturn:
    """Run the command line: messages on standard error, exit codes 0, 2, 3, 4 and 130, no
    tracebacks for bad input."""
    # Else tokenizers warn whenever a data loader forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except AdaptiveLoraError as error:
        typer.secho(f"error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # typer makes this of Ctrl-C
            typer.echo("interrupted; go on with --resume", err=True)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
