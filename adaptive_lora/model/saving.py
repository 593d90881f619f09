"""An adapter's folder: written so that stock PEFT reads the same function, and read with checks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import PeftType, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from adaptive_lora.errors import DivergedError, InputError, IntegrityError
from adaptive_lora.files import move, read_file
from adaptive_lora.model.adapter_file import CONFIG_NAME, WEIGHTS_NAME, check_files, tensor_shapes
from adaptive_lora.model.adapters import is_described, is_masked, non_finite, sync_config
from adaptive_lora.model.attach import check_base, undone_on_failure
from adaptive_lora.model.base_model import BASE_FILE, write_base
from adaptive_lora.model.condition import Need, peft_model
from adaptive_lora.model.fingerprint import (
    FINGERPRINT_FILE,
    check_fingerprint,
    keep_fingerprint,
    tokens_of,
    write_fingerprint,
)
from adaptive_lora.model.following import follow
from adaptive_lora.model.quantization import keep_trainable

logger = logging.getLogger(__name__)


def save(model: nn.Module, path: str | Path) -> Path:
    """Write the adapter (and the trained head) as a standard PEFT LoRA checkpoint and return its
    folder.

    Saved as r = max rank, lora_alpha = scale · r, rank_pattern and alpha_pattern with full names; a
    target of rank 0 is left out. Beside it lies what the base model is, for `export`, and its
    fingerprint, which `load` compares; where these cannot be had that is a warning, and the adapter
    is written all the same. Files are written beside and moved into place one by one, the config
    last; other files stay.

    Args:
        model: a `PeftModel`, or a module that holds one.
        path: the folder; made if it is not there.

    Raises `InputError` for adapters that are no LoRA or not told apart, `DivergedError` on a NaN or
    an infinity, before anything is written.
    """
    model = peft_model(model, Need.SAVE)
    if is_masked(model):
        raise InputError(
            "the adapters are still PEFT's AdaLoRA, which cannot be saved as LoRA: call "
            "RankController.finish() at the end of the training (AdaptiveRankCallback does), which "
            "turns them into plain LoRA"
        )
    # PEFT would save a NaN, and load it, without a word.
    bad = non_finite(model)
    if bad:
        raise DivergedError(
            f"not saved: {len(bad)} parameters are not finite, first {bad[0]}", where=bad
        )
    if not is_described(model):
        sync_config(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        model.save_pretrained(staging, selected_adapters=[model.active_adapter])
        _write_about_base(model, Path(staging), folder)
        files = [file for file in Path(staging).rglob("*") if file.is_file()]
        # A folder without the config is no adapter: who reads in between is refused, not misled.
        for file in sorted(files, key=lambda file: file.name == CONFIG_NAME):
            # PEFT's model card is made anew at every save; one that somebody has filled in stays.
            if file.name != "README.md" or not (folder / file.name).exists():
                move(file, folder / file.name)
    return folder


def _write_about_base(model: PeftModel, staging: Path, folder: Path) -> None:
    """Write into `staging` what the base model is. Nobody needs it to use the adapter, so nothing
    that goes wrong with it may cost the adapter."""
    for name, write in ((FINGERPRINT_FILE, write_fingerprint), (BASE_FILE, write_base)):
        try:
            write(model, staging)
        except Exception as error:  # of many kinds, in code of many models; see above
            (staging / name).unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)  # of another adapter that was there before
            logger.warning("the adapter is saved without %s: %s", name, error)


def load(model: nn.Module, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put the adapter in the folder `path` on the base `model` and return the `PeftModel`.

    The same as `PeftModel.from_pretrained`, with checks: safetensors only, every tensor expected
    and present, all finite, and the base model the one of the training where the folder says which
    that was.

    Raises `InputError` when `path` is no adapter folder, `model` already has adapters or another
    vocabulary, `IntegrityError` when the files are damaged, do not fit, or belong to another base
    model.
    """
    check_base(model)
    keep_trainable(model)
    folder = Path(path)
    check_kind(folder, read_config(folder))
    found = tensor_shapes(folder / WEIGHTS_NAME)
    tokens = other_vocabulary(model, folder, found)
    if tokens is not None:
        raise InputError(
            f"the adapter in {folder} was trained with a vocabulary of {tokens:,} tokens, the base "
            f"model another: call model.resize_token_embeddings({tokens}) first"
        )
    with undone_on_failure(model):
        return _loaded(model, folder, found, trainable=trainable)


def _loaded(
    model: nn.Module, folder: Path, found: Mapping[str, list[int]], *, trainable: bool
) -> PeftModel:
    """Have PEFT load the adapter in `folder`, whose tensors have the shapes `found`, and check what
    came of it."""
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # of many kinds; all mean the same to the caller
        reason = " ".join(str(error).split())
        raise IntegrityError(
            f"the adapter in {folder} does not fit this model or is damaged: {reason}"
        ) from error
    tensors = get_peft_model_state_dict(loaded)
    expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
    # Compared by name: PEFT takes tensors that it did not expect without a word.
    odd = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if odd:
        raise IntegrityError(
            f"the adapter in {folder} does not fit this model: {len(odd)} tensors differ, first "
            f"{odd[0]} (in the file: {found.get(odd[0])}, expected: {expected.get(odd[0])})"
        )
    check_finite(folder, tensors)
    check_fingerprint(loaded, folder)
    keep_fingerprint(loaded)
    follow(loaded)
    return loaded


def other_vocabulary(model: Any, folder: Path, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return how many tokens the adapter in `folder` was trained with; None where it does not say,
    or `model` has as many.

    A vocabulary that has grown since is not told from a padded one, where the adapter holds none of
    its tokens.

    Args:
        model: a base model.
        folder: of the adapter.
        shapes: {name in its file: shape}.
    """
    weights = dict(model.named_parameters())
    for name, tokens in tokens_of(folder).items():
        if name in weights and len(weights[name]) < tokens:
            return tokens
    ends = {f"{name}.weight": embedding for name, embedding in _embeddings(model).items()}
    for key, shape in shapes.items():
        plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        for end, embedding in ends.items():
            own = embedding.weight.shape
            if plain.endswith(f".{end}") and len(shape) == 2 and shape[1] == own[1]:
                return None if shape[0] == own[0] else shape[0]
            # A (R, V) of an adapter on the embedding
            if plain.endswith(f".{end.removesuffix('.weight')}.lora_embedding_A"):
                return None if shape[1] == own[0] else shape[1]
    return None


def _embeddings(model: Any) -> dict[str, Any]:
    """Return {full name: module} of the input and output embeddings of a model that has some."""
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # a model of images
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if any(module is table for table in tables) and hasattr(module, "weight")
    }


def kind_of(config: PeftConfig) -> str:
    """Return the kind of adapter, such as "LORA"."""
    return str(PeftType(config.peft_type).value)


def read_config(folder: Path) -> PeftConfig:
    """Return PEFT's config of the adapter in `folder`, of any kind. Raises `InputError` for what is
    no adapter folder or is pickled, `IntegrityError` for a damaged config."""
    check_files(folder)
    where = folder / CONFIG_NAME
    try:
        kind = read_file(where, "adapter's config")["peft_type"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice for training
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # JSON and PEFT raise many kinds; all mean the same to the caller
        raise IntegrityError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if kind_of(config) != kind:
        raise IntegrityError(
            f"{where} has the peft_type {kind!r}, which PEFT reads as {kind_of(config)}"
        )
    return config


def check_kind(folder: Path, config: PeftConfig) -> None:
    """Raise `InputError` unless `config` is that of a LoRA adapter."""
    kind = kind_of(config)
    if kind == "ADALORA":
        raise InputError(
            f"{folder} holds an AdaLoRA adapter; expected LoRA. Convert it first: adaptive-lora "
            f"convert {folder} --output NEW"
        )
    if kind != "LORA":
        raise InputError(f"{folder} holds a {kind} adapter; expected LORA")


def check_finite(folder: Path | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `IntegrityError` when a tensor holds a NaN or an infinity."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise IntegrityError(
            f"the adapter in {folder} holds NaN or infinite values in {len(bad)} tensors, first "
            f"{bad[0]!r}"
        )
