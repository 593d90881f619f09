"""Base weights in 4 or 8 bits, by bitsandbytes: what is quantised, in which type it computes, and who can do it.

Quantised are the linear modules outside the head and the output embeddings. Embeddings, norms and biases stay in the
compute type, the adapters and the head in float32. One code path for CPU and CUDA.
"""

from __future__ import annotations

import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.errors import InputError
from adaptive_lora.targets import head_modules

Quantization = Literal["none", "nf4", "int8"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
MINIMUM = "0.48"  # the first bitsandbytes whose 4-bit and 8-bit layers run on a CPU
KINDS = ("Linear4bit", "Linear8bitLt")


def compute_dtype(precision: Precision, *, device: str | None = None) -> torch.dtype:
    """Return the type in which a quantised base computes: float32 on a CPU, bfloat16 (or float16) on CUDA.

    Args:
        precision: a type by name, or "auto".
        device: "cpu" or "cuda"; None means the one a `Trainer` would use here.

    Raises `InputError` for float16 on a CPU, and for bfloat16 on one that only emulates it.

    >>> compute_dtype("auto", device="cpu")
    torch.float32
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        if device == "cpu":
            return torch.float32
        here = torch.cuda.is_available()
        return torch.bfloat16 if not here or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "cpu" and precision == "float16":
        raise InputError("dtype is float16 and there is no GPU: its losses overflow; use float32, or auto")
    if device == "cpu" and precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError(
            "dtype is bfloat16 and this CPU has no instructions for it (tens of times slower); use float32"
        )
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def check_available() -> None:
    """Raise `InputError`, saying what to install, unless bitsandbytes can quantise on this machine."""
    install = "pip install 'adaptive-lora[quant]'"
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        raise InputError(f"quantization needs bitsandbytes, which is not installed: {install}") from None
    if Version(found) < Version(MINIMUM):
        raise InputError(f"quantization needs bitsandbytes >= {MINIMUM}, found {found}: {install}")
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    try:
        import bitsandbytes

        usable = validate_bnb_backend_availability(raise_exception=True)
        usable = usable and (torch.cuda.is_available() or "cpu" in bitsandbytes.supported_torch_devices)
    except (RuntimeError, ImportError, OSError) as error:
        raise InputError(f"bitsandbytes {found} cannot run here: {error}. Use quantization: none") from error
    if not usable:
        raise InputError(f"bitsandbytes {found} does not support this CPU; use quantization: none, or a CUDA device")
    # One line for every layer and step that its 8-bit layers compute in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_plain(model_config: Any, name: str) -> None:
    """Raise `InputError` when the weights of the model `name` are quantised as they lie on disk."""
    saved = getattr(model_config, "quantization_config", None)
    if saved is not None:
        saved = saved if isinstance(saved, dict) else saved.to_dict()
        raise InputError(
            f"{name!r} is quantised already ({saved.get('quant_method', 'unknown method')}): set quantization: none to "
            "train on it as it is, or give the model in full precision"
        )


def quantizable(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return {full name: (in_features, out_features)} of the linear modules that are quantised.

    All but those of the head, the output embeddings, and modules whose weight another module shares.

    Raises `InputError` when there is none.
    """
    output, heads = model.get_output_embeddings(), head_modules(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        inside_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        # Exact types, as transformers has it: what derives from Linear may use its weight in ways of its own.
        if type(module) not in (nn.Linear, Conv1D) or module is output or inside_head or owners[id(module.weight)] > 1:
            continue
        out_features, in_features = module.weight.shape
        found[name] = (out_features, in_features) if isinstance(module, Conv1D) else (in_features, out_features)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear module that can be quantised (its layers are of types of their own); "
            "use quantization: none"
        )
    return found


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
    """Return transformers' config: NF4 blocks of 64 with double quantisation, or LLM.int8(), of all linear modules but
    `skip`.

    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3; Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def skipped(model: PreTrainedModel, also: list[str]) -> list[str]:
    """Return the linear modules that stay as they are, anchored: transformers takes a plain name for every module whose
    name begins or ends so."""
    chosen = quantizable(model).keys() - set(also)
    if not chosen:
        raise InputError(
            f"every linear module of {type(model).__name__} lacks weights in its files; nothing to quantise"
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [f"^{re.escape(name)}$" for name in linear if name not in chosen]


def quantize_in_place(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Quantise the linear modules of a model that is in memory; for models whose weights come from no file."""
    from bitsandbytes.nn import modules as bnb

    for name in quantizable(model):
        old: Any = model.get_submodule(name)
        weight = old.weight.detach().T if isinstance(old, Conv1D) else old.weight.detach()
        out_features, in_features = weight.shape
        new: Any
        if quantization == "nf4":
            new = bnb.Linear4bit(in_features, out_features, old.bias is not None, dtype, quant_type="nf4")
            new.weight = bnb.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bnb.Linear8bitLt(in_features, out_features, old.bias is not None, False, threshold=6.0)
            new.weight = bnb.Int8Params(weight.contiguous(), requires_grad=False)
        if old.bias is not None:
            new.bias = old.bias
        model.set_submodule(name, new.to(weight.device))
    kind = "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit"
    setattr(model, kind, True)  # where PEFT looks


def is_quantized(model: nn.Module) -> bool:
    """True when a linear module of `model` holds bitsandbytes' 4-bit or 8-bit weights."""
    return any(type(module).__name__ in KINDS for module in model.modules())
