"""A base model by its names: where it is, of which class, with which head. And the record of it
beside an adapter, so that an adapter says what it is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from adaptive_lora.errors import InputError, IntegrityError
from adaptive_lora.files import read_file, write_json
from adaptive_lora.hub import locate_model
from adaptive_lora.model.targets import head_modules
from adaptive_lora.naming import inside

BASE_FILE, VERSION = "base_model.json", 1
# What shapes a head, of a configuration; nothing else in the record reaches `from_pretrained`.
HEAD = ("num_labels", "id2label", "label2id", "problem_type")


class Loaded(NamedTuple):
    """A model, and which of its weights are not those of its files, but drawn at random just now.

    Args:
        missing: names of weights that the files lack.
        resized: {name of a weight of the head: (its shape in the files, its shape)}.
    """

    model: Any
    missing: list[str]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Base:
    """A base model that can be made again and again.

    Args:
        name: a folder, or a name on the hub.
        kind: a class of transformers, or one of its Auto classes.
        head: arguments that shape the head, such as `num_labels`.
        trust_remote_code: whether code that comes with the model may run.
    """

    name: str
    kind: Any
    head: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def config(self) -> Any:
        """Return the model's configuration, with this head. Raises `InputError` without one."""
        return read_config(self.name, self.head, trust_remote_code=self.trust_remote_code)

    def load(self, **arguments: Any) -> Loaded:
        """Return the model with its weights, and what of it was drawn: a head may be missing, or be
        of another size.

        Args:
            arguments: further ones of `from_pretrained`, such as `dtype`.

        Raises `InputError` when it cannot be had, or a weight outside the head has another size,
        `IntegrityError` when the weights are damaged.
        """
        where = access(self.name, trust_remote_code=self.trust_remote_code)
        if issubclass(self.kind, PreTrainedModel):
            wanted, found = self.kind.config_class.model_type, self.config().model_type
            if wanted != found:  # transformers would make a full-size model of another architecture
                raise InputError(
                    f"the model {self.name!r} is a {found!r} model; expected {wanted!r} "
                    f"({self.kind.__name__}): wrong base model?"
                )
        try:
            model, info = self.kind.from_pretrained(
                self.name,
                **where,
                **self.head,
                **arguments,
                output_loading_info=True,
                # For the head alone; whatever else would be drawn anew is refused below.
                ignore_mismatched_sizes=True,
            )
        except SafetensorError as error:
            raise IntegrityError(f"the weights of {self.name!r} are damaged: {error}") from error
        # transformers and what it calls raise many kinds; all mean the same to the caller
        except Exception as error:
            raise InputError(
                f"cannot load the model {self.name!r} as {self.kind.__name__}: {error}"
            ) from error
        sizes = sorted(info["mismatched_keys"])
        resized = {name: (tuple(found), tuple(made)) for name, found, made in sizes}
        heads = head_modules(model)
        for name, (found, made) in resized.items():
            if not inside(name, heads):
                raise InputError(
                    f"cannot load the model {self.name!r} as {self.kind.__name__}: its files have "
                    f"{name!r} of shape {found}, its configuration makes it {made}; only a head "
                    "may differ. Give the configuration that belongs to these weights"
                )
        return Loaded(model, list(info["missing_keys"]), resized)

    def draw(self, config: Any = None, *, device: str = "cpu", dtype: Any = None) -> Any:
        """Return the model with all its weights drawn at random, without storage on the device
        "meta". Raises `InputError` when there is no such model.

        Args:
            config: its configuration, if not the one in its folder.
            dtype: of the weights; None is what the configuration says.
        """
        config = self.config() if config is None else config
        arguments = {} if dtype is None else {"dtype": dtype}
        try:
            with torch.device(device):
                return self.kind.from_config(
                    config, trust_remote_code=self.trust_remote_code, **arguments
                )
        except Exception as error:  # as above
            raise InputError(
                f"cannot make the model {self.name!r} as {self.kind.__name__}: {error}"
            ) from error


def access(name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments for any `from_pretrained`; first makes sure that the model is there."""
    # Settled beforehand: offline, each file asked for would wait for a time-out of its own.
    return {"trust_remote_code": trust_remote_code, "local_files_only": locate_model(name)}


def read_config(
    name: str, head: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Return the configuration of the model `name`, with what `head` changes. Raises `InputError`
    when it cannot be read."""
    where = access(name, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(name, **where, **(head or {}))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"cannot load the configuration of {name!r}: {error}") from error


def architectures(config: Any) -> list[str]:
    """Return the classes that a configuration says its weights were saved from."""
    return [str(name) for name in getattr(config, "architectures", None) or []]


def class_names(config: Any) -> list[str] | None:
    """Return the names a configuration has for the outputs of its head, in their order; None where
    they are transformers' default, LABEL_0 and so on."""
    by_place, by_name = (getattr(config, key, None) or {} for key in ("id2label", "label2id"))
    # A default of either says nothing, and hides nothing: some have only one of them.
    for places in (by_place, {place: name for name, place in by_name.items()}):
        names = [str(places[place]) for place in range(len(places)) if place in places]
        default = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
        if names and len(names) == len(places) and not default:
            return names
    return None


def model_class(name: str | None) -> Any:
    """Return the model class of transformers, or Auto class of models, of that name; None where
    there is none."""
    kind = getattr(transformers, name or "", None)
    if not isinstance(kind, type) or not name:
        return None
    return kind if name.startswith("AutoModel") or issubclass(kind, PreTrainedModel) else None


def write_base(model: nn.Module, folder: Path) -> None:
    """Write what the base of `model` is into an adapter's folder; nothing for a base that is no
    model of transformers.

    Of a model whose code is not in transformers the Auto class is recorded by which it is had, and
    that its code ran. Who reads that decides anew whether it may.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return
    config: Any = base.config
    kind = type(base)
    remote = kind.__module__.startswith("transformers_modules.")
    by_auto = getattr(config, "auto_map", None) or {}
    autos = [auto for auto, place in by_auto.items() if str(place).endswith(f".{kind.__name__}")]
    head = {key: getattr(config, key, None) for key in HEAD} if head_modules(base) else {}
    record = {
        "version": VERSION,
        # transformers does not have a class of the model's own code by its name.
        "class": autos[0] if remote and autos else kind.__name__,
        "head": {key: value for key, value in head.items() if value is not None},
        "dtype": str(base.dtype).removeprefix("torch."),
        "remote_code": remote,
    }
    write_json(folder / BASE_FILE, record)


def read_base(folder: Path) -> dict[str, Any] | None:
    """Return the record of the base in an adapter's folder, None without one (of PEFT alone, or of
    version 0.1 at first). Raises `IntegrityError` when it is damaged or of a later version."""
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    try:
        record = read_file(file, "record of the base model")
        if record["version"] != VERSION:
            raise IntegrityError(
                f"{file} is of format {record['version']!r}; this version reads format {VERSION}"
            )
        head = dict(record["head"])
        if not set(head) <= set(HEAD) or not isinstance(record["remote_code"], bool):
            raise ValueError(f"head has {', '.join(head)}; expected some of {', '.join(HEAD)}")
        if "id2label" in head:  # JSON has no key but text
            head["id2label"] = {int(index): name for index, name in head["id2label"].items()}
        return {**record, "class": str(record["class"]), "head": head}
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}") from error
