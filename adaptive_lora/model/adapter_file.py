"""An adapter's folder, as far as names and shapes tell: no model, no PEFT and no torch, so that
reports can read ranks."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from adaptive_lora.errors import InputError, IntegrityError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def check_files(folder: Path) -> None:
    """Raise `InputError` unless `folder` has the files of an adapter, none of them a pickle."""
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"{folder} is no adapter: it has no {CONFIG_NAME}. Give the folder that save() wrote"
        )
    if (folder / WEIGHTS_NAME).is_file():
        return
    if (folder / PICKLE_NAME).is_file():
        raise InputError(
            f"{folder} holds its weights as a pickle ({PICKLE_NAME}), which can run any code when "
            f"it is read; expected {WEIGHTS_NAME}. If you trust it, convert it once: "
            f"PeftModel.from_pretrained(base, {str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    raise InputError(f"{folder} has no {WEIGHTS_NAME}; expected the weights of the adapter there")


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return {name in the file: shape}. Raises `IntegrityError` on a damaged file."""
    try:
        # numpy: shapes are all that is wanted, and torch takes seconds to import.
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            return {name: tensors.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is missing or damaged: {error}") from error


def tensor_ranks(file: Path) -> dict[str, int]:
    """Return {full target name: rank}, from the shapes of the tensors. Raises `IntegrityError` on a
    damaged file."""
    return {name: shape[0] for name, shape in _shapes(file, LORA_A).items()}


def component_costs(file: Path) -> dict[str, int]:
    """Return {full target name: I + O}, the cost of one component. Raises as `tensor_ranks`."""
    inputs, outputs = _shapes(file, LORA_A), _shapes(file, LORA_B)
    return {name: inputs[name][1] + outputs[name][0] for name in inputs.keys() & outputs.keys()}


def _shapes(file: Path, kind: str) -> dict[str, list[int]]:
    return {
        name.removeprefix(PREFIX).removesuffix(kind): shape
        for name, shape in tensor_shapes(file).items()
        if name.endswith(kind)
    }
