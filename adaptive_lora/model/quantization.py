"""Base weights in 4 or 8 bits, by bitsandbytes: what is quantised, in which type it computes, and
who can do it.

Quantised are the linear modules outside the head and the output embeddings. Embeddings, norms and
biases stay in the compute type, the adapters and the head in float32. One code path for CPU and
CUDA.

Two things of bitsandbytes depend on the processor, and neither may decide what is trained. On a CPU
with AVX512-BF16 a 4-bit layer packs its weight anew in the first evaluation, for a kernel without a
backward pass: `keep_trainable` turns that off. And some kernels compute with other weights than the
layer stands for, at some widths: `kernel_is_exact` finds out.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.errors import InputError
from adaptive_lora.model.targets import head_modules
from adaptive_lora.naming import inside

logger = logging.getLogger(__name__)
Quantization = Literal["none", "nf4", "int8"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
MINIMUM = "0.48"  # the first bitsandbytes whose 4-bit and 8-bit layers run on a CPU


def compute_dtype(precision: Precision, *, device: str | None = None) -> torch.dtype:
    """Return the type in which a quantised base computes: float32 on a CPU, bfloat16 (or float16)
    on CUDA.

    Args:
        precision: a type by name, or "auto".
        device: "cpu" or "cuda"; None means the one a `Trainer` would use here.

    Raises `InputError` for float16 on a CPU, and for bfloat16 on one that only emulates it.

    >>> compute_dtype("auto", device="cpu")
    torch.float32
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        # Without instructions for it bfloat16 is tens of times slower: never a default.
        if device == "cpu":
            return torch.float32
        here = torch.cuda.is_available()
        return (
            torch.bfloat16
            if not here or torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if device == "cpu" and precision == "float16":
        raise InputError(
            "dtype is float16 and there is no GPU: its losses overflow; use float32, or auto"
        )
    if (
        device == "cpu"
        and precision == "bfloat16"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        raise InputError(
            "dtype is bfloat16 and this CPU has no instructions for it (tens of times slower); use "
            "float32"
        )
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def check_available() -> None:
    """Raise `InputError`, saying what to install, unless bitsandbytes can quantise here."""
    install = "pip install 'adaptive-lora[quant]'"
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        raise InputError(
            f"quantization needs bitsandbytes, which is not installed: {install}"
        ) from None
    if Version(found) < Version(MINIMUM):
        raise InputError(f"quantization needs bitsandbytes >= {MINIMUM}, found {found}: {install}")
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    try:
        import bitsandbytes

        usable = validate_bnb_backend_availability(raise_exception=True)
        usable = usable and (
            torch.cuda.is_available() or "cpu" in bitsandbytes.supported_torch_devices
        )
    except (RuntimeError, ImportError, OSError) as error:
        raise InputError(
            f"bitsandbytes {found} cannot run here: {error}. Use quantization: none"
        ) from error
    if not usable:
        raise InputError(
            f"bitsandbytes {found} does not support this CPU; use quantization: none, or a CUDA "
            "device"
        )
    # One line for every layer and step that its 8-bit layers compute in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_plain(model_config: Any, name: str) -> None:
    """Raise `InputError` when the weights of the model `name` are quantised as they lie on disk."""
    saved = getattr(model_config, "quantization_config", None)
    if saved is not None:
        saved = saved if isinstance(saved, dict) else saved.to_dict()
        raise InputError(
            f"{name!r} is quantised already ({saved.get('quant_method', 'unknown method')}): set "
            "quantization: none to train on it as it is, or give the model in full precision"
        )


def quantizable(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return {full name: (in_features, out_features)} of the linear modules that could be
    quantised: all but those of the head, the output embeddings, and modules whose weight another
    module shares. Those that are quantised are none of them.
    """
    output, heads = model.get_output_embeddings(), head_modules(model)
    # A tied weight stays as it is: its other owner reads it unpacked.
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        # Exact types, as transformers has it: a subclass may use its weight in ways of its own.
        if (
            type(module) not in (nn.Linear, Conv1D)
            or module is output
            or inside(name, heads)
            or owners[id(module.weight)] > 1
        ):
            continue
        out_features, in_features = module.weight.shape
        found[name] = (
            (out_features, in_features)
            if isinstance(module, Conv1D)
            else (in_features, out_features)
        )
    return found


def to_quantize(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: str | None = None,
) -> dict[str, tuple[int, int]]:
    """Return {full name: (in_features, out_features)} of the modules that will be quantised: of the
    `quantizable` ones those whose kernel computes what it should on `device` (None: the one a
    `Trainer` would use here). It may be that none is: `left_out` says so.

    Raises `InputError` when there is no `quantizable` one.
    """
    found = quantizable(model)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear module that can be quantised (its layers are of "
            "types of their own); use quantization: none"
        )
    inexact = _inexact(found, quantization, dtype, device)
    return {name: shape for name, shape in found.items() if name not in inexact}


def left_out(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: str | None = None,
) -> list[str]:
    """Return what to say of the `quantizable` modules that are left as they are because of their
    kernel; [] without any."""
    inexact = _inexact(quantizable(model), quantization, dtype, device)
    if not inexact:
        return []
    widths = ", ".join(map(str, sorted({inputs for inputs, _ in inexact.values()})))
    return [
        f"{len(inexact)} linear modules are not quantised: on this processor bitsandbytes' 4-bit "
        f"kernel computes with wrong weights for modules of {widths} inputs"
    ]


def _inexact(
    shapes: dict[str, tuple[int, int]],
    quantization: Quantization,
    dtype: torch.dtype,
    device: str | None,
) -> dict[str, tuple[int, int]]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # planned for another machine
    if quantization != "nf4" or (device == "cuda" and not torch.cuda.is_available()):
        return {}
    return {
        name: shape for name, shape in shapes.items() if not kernel_is_exact(*shape, dtype, device)
    }


@functools.cache
def kernel_is_exact(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: str = "cpu",
    quant_type: str = "nf4",
    nested: bool = True,
    block: int = 64,
) -> bool:
    """Return whether a 4-bit layer of these features gives y = x Wᵀ and g_x = g W for W =
    code[nibble] · absmax, here.

    Some of bitsandbytes' kernels do not: on CPUs with AVX512 those of version 0.50 take the scales
    of other blocks where `in_features` is a multiple of 16 but not of 64, an error of half the
    largest weight. Tried on random weights, up to 256 rows of them (kernels go by rows), once in a
    process for each shape.

    Args:
        in_features, out_features: of the layer.
        dtype: in which it computes.
        device: "cpu" or "cuda".
        quant_type: "nf4" or "fp4".
        nested: whether the scales are quantised too (double quantisation).
        block: weights to a scale.
    """
    from bitsandbytes import functional, matmul_4bit  # type: ignore[attr-defined]

    rows = min(out_features, 256)
    generator = torch.Generator().manual_seed(0)  # no random number of the training's is drawn
    true = torch.randn(rows, in_features, generator=generator).to(device, dtype)
    # Wants a gradient, as in training: without one bitsandbytes takes another kernel.
    x = torch.randn(4, in_features, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(4, rows, generator=generator).to(device, dtype)
    packed, state = functional.quantize_4bit(
        true, blocksize=block, compress_statistics=nested, quant_type=quant_type
    )
    weight = dequantized_by_definition(packed, state).to(dtype)
    y = matmul_4bit(x, packed.t(), quant_state=state)
    (g_x,) = torch.autograd.grad(y, x, gradient)
    # Rounding errs by a few eps, a wrong scale by half the largest weight: anything between tells.
    return all(
        torch.allclose(
            mine,
            theirs,
            rtol=0,
            atol=max(8 * torch.finfo(dtype).eps, 1e-5) * float(mine.abs().max()),
        )
        for mine, theirs in (
            (weight, functional.dequantize_4bit(packed, state).to(dtype)),
            (x.detach() @ weight.T, y.detach()),
            (gradient @ weight, g_x),
        )
    )


def dequantized_by_definition(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weights that 4-bit storage stands for, (O, I) in float32: code[nibble] · absmax,
    the high nibble first.

    With nested scales absmax = code₂[byte] · absmax₂ + offset.

    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
    """
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    nibbles = torch.stack(
        [packed.view(torch.uint8).flatten() >> 4, packed.view(torch.uint8).flatten() & 15], dim=1
    )
    values = state.code[nibbles.flatten().int()][: state.shape.numel()]
    return (values * absmax.repeat_interleave(state.blocksize)[: values.numel()]).reshape(
        state.shape
    )


def keep_trainable(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` as they are in evaluations, on every processor; nothing
    happens to other models.

    A layer whose kernel computes with other weights than it holds (`kernel_is_exact`) becomes a
    `Dequantized` one, which is said in a warning.

    Raises `InputError` for a layer that was packed for inference before, which rounded its scales
    for good, and for such a kernel under an adapter that is there already.
    """
    wrong: dict[str, Any] = {}
    for name, module in model.named_modules():
        if "support_avx512bf16_for_cpu" not in vars(module):
            continue
        module.support_avx512bf16_for_cpu = False
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type == "meta":
            continue
        if getattr(state, "packing_format_for_cpu", False):
            raise InputError(
                f"the 4-bit weights of {name!r} were packed for inference when the base model was "
                "evaluated, which rounds them and leaves no gradient through them: load the base "
                "model again, and attach before it is evaluated"
            )
        out_features, in_features = state.shape
        dtype, device = module.compute_dtype or state.dtype, weight.device.type
        kind = (state.quant_type, state.nested, state.blocksize)
        if not kernel_is_exact(in_features, out_features, dtype, device, *kind):
            wrong[name] = module
    if not wrong:
        return
    widths = ", ".join(map(str, sorted({module.in_features for module in wrong.values()})))
    fault = (
        "on this processor bitsandbytes' 4-bit kernel computes with wrong weights for modules of "
        f"{widths} inputs"
    )
    if any(f".{name}".endswith(".base_layer") for name in wrong):
        raise InputError(
            f"{fault}, such as {next(iter(wrong))!r}, and they carry adapters already: put the "
            "adapters on with adaptive_lora.attach or load, which leave such modules unquantised"
        )
    for name, module in wrong.items():
        model.set_submodule(name, Dequantized(module))
    logger.warning("%d linear modules are used unquantised: %s", len(wrong), fault)


class Dequantized(nn.Linear):
    """A linear module with the weights that a 4-bit one stands for, in the type it computes in."""

    def __init__(self, layer: Any) -> None:
        state = layer.weight.quant_state
        nn.Module.__init__(self)
        self.out_features, self.in_features = state.shape
        weight = dequantized_by_definition(layer.weight.data, state)
        dtype = layer.compute_dtype or state.dtype
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)


def bitsandbytes_config(
    quantization: Quantization, dtype: torch.dtype, skip: list[str]
) -> BitsAndBytesConfig:
    """Return transformers' config: NF4 blocks of 64 with double quantisation, or LLM.int8(), of all
    linear modules but `skip`.

    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3; Dettmers et al. 2022,
    LLM.int8(), arXiv 2208.07339.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The head among them: a head that the files lack would come out half converted.
        llm_int8_skip_modules=skip,
    )


def skipped(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype, also: Iterable[str] = ()
) -> list[str]:
    """Return the linear modules that stay as they are, anchored: transformers takes a plain name
    for every module whose name begins or ends so."""
    exact = to_quantize(model, quantization, dtype).keys()
    chosen = exact - set(also)
    if exact and not chosen:
        raise InputError(
            f"every linear module of {type(model).__name__} lacks weights in its files; nothing to "
            "quantise"
        )
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    return [f"^{re.escape(name)}$" for name in linear if name not in chosen]


def quantize_in_place(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype
) -> None:
    """Quantise the linear modules of a model that is in memory; for models whose weights come from
    no file."""
    from bitsandbytes.nn import modules as bnb

    chosen = to_quantize(model, quantization, dtype)
    for name in chosen:
        old: Any = model.get_submodule(name)
        weight = old.weight.detach().T if isinstance(old, Conv1D) else old.weight.detach()
        out_features, in_features = weight.shape
        new: Any
        if quantization == "nf4":
            new = bnb.Linear4bit(
                in_features, out_features, old.bias is not None, dtype, quant_type="nf4"
            )
            new.weight = bnb.Params4bit(
                weight.contiguous(), requires_grad=False, quant_type="nf4", module=new
            )
        else:
            # 6: the outliers of the paper, and what transformers takes.
            new = bnb.Linear8bitLt(
                in_features, out_features, old.bias is not None, False, threshold=6.0
            )
            new.weight = bnb.Int8Params(weight.contiguous(), requires_grad=False)
        if old.bias is not None:
            new.bias = old.bias
        model.set_submodule(name, new.to(weight.device))
    if chosen:
        kind = "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit"
        setattr(model, kind, True)  # where PEFT looks
