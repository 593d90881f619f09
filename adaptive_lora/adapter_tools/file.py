"""What an adapter file holds, read without a model and without torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from adaptive_lora.errors import IntegrityError

PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def tensor_ranks(file: Path) -> dict[str, int]:
    """Return {full target name: rank}, from the shapes of the tensors. Raises `IntegrityError` on a
    damaged file."""
    return {name: shape[0] for name, shape in _shapes(file, LORA_A).items()}


def component_costs(file: Path) -> dict[str, int]:
    """Return {full target name: I + O}, the parameters of one component. Raises as
    `tensor_ranks`."""
    inputs, outputs = _shapes(file, LORA_A), _shapes(file, LORA_B)
    return {name: inputs[name][1] + outputs[name][0] for name in inputs.keys() & outputs.keys()}


def _shapes(file: Path, kind: str) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {
                name.removeprefix(PREFIX).removesuffix(kind): tensors.get_slice(name).get_shape()
                for name in tensors.keys()  # noqa: SIM118
                if name.endswith(kind)
            }
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is missing or damaged: {error}") from error
