"""Do two models answer alike? Seeded random inputs for any transformers model, and the largest
relative difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.errors import InputError

LENGTH, RECORDS = 16, 2
Inputs = list[dict[str, torch.Tensor]]


def probe_inputs(model: Any, *, seed: int = 0) -> Inputs:
    """Return `RECORDS` random inputs of one record each: token ids, pixels, or what the model
    itself offers as a dummy.

    No special token is drawn but the end of sequence, last; so classifiers that look for it, or for
    padding, work too. Raises `InputError` for a model whose inputs cannot be derived from its
    configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_record(model, generator) for _ in range(RECORDS)]


def _record(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        ids = _token_ids(config, generator)
        return {name: ids} | (
            {"decoder_input_ids": _token_ids(config, generator)}
            if config.is_encoder_decoder
            else {}
        )
    if name == "pixel_values" and not config.is_encoder_decoder:
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", None)
        if isinstance(side, int | list | tuple):
            height, width = (side, side) if isinstance(side, int) else side
            channels = getattr(vision, "num_channels", 3)
            record = {name: torch.randn(1, channels, height, width, generator=generator)}
            return record | (
                {"input_ids": _token_ids(config, generator)} if vision is not config else {}
            )
    try:
        return {
            key: value
            for key, value in model.dummy_inputs.items()
            if isinstance(value, torch.Tensor)
        }
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"no inputs can be made up for {type(model).__name__} (its main input is {name!r}), so "
            "that nothing can be compared; --no-check writes the files all the same"
        ) from error


def _token_ids(config: Any, generator: torch.Generator) -> torch.Tensor:
    text = config.get_text_config()
    length = min(LENGTH, (getattr(text, "max_position_embeddings", None) or 2 * LENGTH) // 2)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    special = {i for name in names for i in _as_list(getattr(text, name, None))}
    plain = torch.tensor(
        [i for i in range(min(text.vocab_size, 10_000)) if i not in special] or [0]
    )
    ids = plain[torch.randint(len(plain), (1, length), generator=generator)]
    end = [i for i in _as_list(getattr(text, "eos_token_id", None)) if 0 <= i < text.vocab_size]
    if end:
        ids[0, -1] = end[0]
    return ids


def _as_list(value: Any) -> Sequence[int]:
    return [] if value is None else value if isinstance(value, list | tuple) else [value]


@torch.no_grad()
def answers(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return every floating-point tensor the model gives for each input (logits, hidden states), in
    float32."""
    mode = model.training
    model.eval()
    try:
        outputs: list[Any] = [model(**record) for record in inputs]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{type(model).__name__} does not take the inputs made up for it ({error}), so that "
            "nothing can be compared; --no-check writes the files all the same"
        ) from error
    finally:
        model.train(mode)
    flat = [
        tensor
        for output in outputs
        for tensor in output.to_tuple()
        if isinstance(tensor, torch.Tensor)
    ]
    return [tensor.float() for tensor in flat if tensor.is_floating_point()]


def difference(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return max |one − two| / max |two| over the tensors; infinity when they do not fit or one is
    not finite.

    >>> difference([torch.tensor([1.0, 1.5])], [torch.tensor([1.0, 2.0])])
    0.25
    """
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for one, two in zip(mine, theirs, strict=True):
        if not (bool(torch.isfinite(one).all()) and bool(torch.isfinite(two).all())):
            return float("inf")
        worst = max(worst, float((one - two).abs().max() / two.abs().max().clamp_min(1e-30)))
    return worst
