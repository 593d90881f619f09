"""What an adapter file holds, read without a model and without torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from adaptive_lora.errors import IntegrityError

PREFIX, LORA_A = "base_model.model.", ".lora_A.weight"


def tensor_ranks(file: Path) -> dict[str, int]:
    """Return {full target name: rank}, from the shapes of the tensors. Raises `IntegrityError` on a damaged file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {
                name.removeprefix(PREFIX).removesuffix(LORA_A): tensors.get_slice(name).get_shape()[0]
                for name in tensors.keys()  # noqa: SIM118
                if name.endswith(LORA_A)
            }
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is missing or damaged: {error}") from error
