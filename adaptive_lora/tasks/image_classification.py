"""Image classification: a folder with one folder of images for each class, or a table of images (or
paths) and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageClassification

from adaptive_lora.errors import InputError
from adaptive_lora.tasks.base import LENGTH, ROW
from adaptive_lora.tasks.classification import ClassTask
from adaptive_lora.tasks.data import RECORD, Split


class ImageClassification(ClassTask):
    """Accuracy, F1 and Matthews' correlation. Images are read when their batch is made, and checked
    before training.

    Args: as `Task`; `tokenizer` is the model's image processor, which resizes and normalises.
    """

    auto_class = AutoModelForImageClassification
    # The collator turns the path of an image into its pixels.
    training: ClassVar[dict[str, Any]] = {"remove_unused_columns": False}

    def _longest(self, usual: int) -> int:
        return usual  # an image has no length

    def learn(self, split: Split) -> None:
        split.require(self.column)
        super().learn(split)
        self.notes.append(f"classification of images into {self._listed()}")

    @property
    def column(self) -> str:
        return self.data.text if isinstance(self.data.text, str) else "image"

    def features(self, split: Split, *, labelled: bool = True) -> Dataset:
        split.require(self.column, *([self.label] if labelled else []))
        rows = range(len(split.records))
        columns: dict[str, Any] = {ROW: list(rows), LENGTH: [1] * len(rows)}
        # a hub data set holds the images themselves
        if isinstance(split.records.features[self.column], datasets.Image):
            images = split.records.select_columns([self.column])
        else:
            images = Dataset.from_dict({self.column: self._paths(split)})
        if labelled:
            columns["labels"] = self.labels(split)
        return concatenate_datasets([images, Dataset.from_dict(columns)], axis=1)

    def _paths(self, split: Split) -> list[str]:
        """Return the paths of the images, each of which can be opened."""
        paths = split.texts(self.column)
        if not Path(split.source).is_dir():  # a table: paths as they are seen from it
            paths = [str(Path(split.source).parent / path) for path in paths]
        for record, path in zip(split.records[RECORD], paths, strict=True):
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, UnidentifiedImageError, SyntaxError) as error:
                raise InputError(
                    f"{split.at(record)}: cannot read the image {path}: {error}"
                ) from None
        return paths

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        processor: Any = self.tokenizer

        def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
            images = [_pixels(item[self.column]) for item in items]
            batch = dict(processor(images=images, return_tensors="pt"))
            if "labels" in items[0]:
                batch["labels"] = torch.tensor([item["labels"] for item in items])
            return batch

        return collate

    def show(self, item: dict[str, Any]) -> str:
        value = item[self.column]
        return (
            str(value)
            if isinstance(value, str)
            else f"an image of {value.width} x {value.height}, {value.mode}"
        )


def _pixels(value: str | Image.Image) -> Image.Image:
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    try:
        with Image.open(value) as image:
            return image.convert("RGB")
    except OSError as error:  # a cut JPEG has a sound header
        raise InputError(f"cannot read the image {value}: {error}") from None
