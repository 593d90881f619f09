"""What a model will see of the data, before anything is trained. Needs the tokenizer, not the
weights."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from datasets import Dataset

from adaptive_lora.recipe.config import RunConfig
from adaptive_lora.runs.loading import load_task
from adaptive_lora.tasks.guess import with_task
from adaptive_lora.tasks.streaming import splits_of

SHOWN, LONGEST_SHOWN = 3, 600  # records; characters of one


def check(config: RunConfig, width: int = 100) -> Iterator[str]:
    """Yield lines: the records, classes, lengths and cuts of every split, repeated inputs, and the
    first records as the model reads them. Raises what training would: `InputError` on data that
    cannot be trained on."""
    config, guessed = with_task(config)
    task = load_task(config)
    splits = splits_of(config.data)
    task.learn(splits.train)
    features = {split.part: task.features(split) for split in splits.all}
    for note in [*guessed, *splits.notes, *task.notes, *_repeats(features)]:
        yield textwrap.fill(note, width, subsequent_indent="    ")
    train = features[splits.train.part]
    for number in range(min(SHOWN, len(train))):
        yield f"\n--- training record {number + 1} as the model reads it"
        shown = task.show(train[number])
        if len(shown) > LONGEST_SHOWN:
            half = LONGEST_SHOWN // 2
            left_out = len(shown) - LONGEST_SHOWN
            shown = f"{shown[:half]} [... {left_out:,} characters ...] {shown[-half:]}"
        yield "\n".join(
            textwrap.fill(line, width, drop_whitespace=False) for line in shown.split("\n")
        )


def _repeats(features: dict[str, Dataset]) -> Iterator[str]:
    """Yield a line for every split with inputs it shares with the training records, or repeats."""
    if any("input_ids" not in table.column_names for table in features.values()):
        return
    inputs = {part: [str(ids) for ids in table["input_ids"]] for part, table in features.items()}
    train_part, *others = inputs
    train = set(inputs[train_part])
    if len(train) < len(inputs[train_part]):
        yield f"{train_part}: {len(inputs[train_part]) - len(train):,} inputs occur more than once"
    for part in others:
        shared = sum(ids in train for ids in inputs[part])
        if shared:
            yield f"{part}: {shared:,} of {len(inputs[part]):,} inputs are also training inputs"
