"""One training step without storage: what forward and backward hold at their peak.

Fake tensors go through the model's own code on the operations a CPU takes; every storage they would
have is counted from the moment it is made until nothing refers to it any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.model.quantization import Quantization, to_quantize

BatchShapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
BLOCK, NESTED = 64, 256  # weights to a scale of NF4, scales to a scale of theirs


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and their peak.

    Args:
        model: its weights do not count, though operations return views of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        weights = (*model.parameters(), *model.buffers())
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outcome = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outcome):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return outcome

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and key not in self._weights:
            self._alive[key] = weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def step_bytes(
    model: nn.Module,
    inputs: BatchShapes,
    *,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> int:
    """Return the peak bytes of activations, temporaries and gradients, forward and backward.

    Args:
        model: on the device "meta", with adapters; its parameters lose their device by this.
        inputs: {argument: (type, shape)} of one batch, taken to hold padding; without labels the
            loss is a stand-in over the logits.
        checkpointing: whether the layers' activations are computed anew in the backward pass.
        autocast: the type of mixed precision, None for none.
    """
    model.train()
    if checkpointing:
        enable_checkpointing(model, preserve_rng_state=False)  # fake tensors have no generator
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(
                        fake, requires_grad=parameter.requires_grad
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        live = stack.enter_context(LiveBytes(model))
        batch = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in inputs.items()}
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", autocast))
        # Without a name for the output: it would keep the logits alive, which the Trainer does not.
        _loss(model(**batch)).backward()
        return live.peak


def _loss(output: Any) -> torch.Tensor:
    loss: torch.Tensor = (
        output.logits.float().logsumexp(-1).mean() if output.loss is None else output.loss
    )
    return loss


def enable_checkpointing(model: Any, **arguments: Any) -> None:
    """Have the layers' activations computed anew in the backward pass; transformers 5.23 gave this
    another name."""
    arguments = {"use_reentrant": False, **arguments}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


class _Unpacked(torch.autograd.Function):
    """x Wᵀ with W made for the product and thrown away, either way, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed, dtype: torch.dtype) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.input_dtype = layer, dtype, x.dtype
        weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
        return F.linear(x.to(dtype), weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        layer, (gradient,) = ctx.layer, gradients
        weight = torch.empty(layer.out_features, layer.in_features, dtype=ctx.dtype)
        return (gradient.to(ctx.dtype) @ weight).to(ctx.input_dtype), None, None


class Packed(nn.Linear):
    """Stands in for a quantised linear module where there are no weights: the same bytes, the same
    temporaries.

    NF4: N / 2 bytes, a scale of one byte for each 64 weights, of 4 bytes for each 256 scales, and
    1,092 bytes of tables. int8: N bytes and a scale of 4 bytes for each output.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: Any, kind: Quantization, dtype: torch.dtype
    ) -> None:
        # Not Linear's, which would make a weight of full size.
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, dtype
        self.bias = bias
        count = in_features * out_features

        def room(size: int, of: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=of, device="meta")

        weight: Any
        if kind == "nf4":
            weight = nn.Parameter(room(-(-count // 2), torch.uint8), requires_grad=False)
            blocks = -(-count // BLOCK)
            nested = SimpleNamespace(
                absmax=room(-(-blocks // NESTED), torch.float32), code=room(256, torch.float32)
            )
            tables = {"absmax": room(blocks, torch.uint8), "code": room(16, torch.float32)}
            weight.quant_state = SimpleNamespace(
                **tables, offset=room(1, torch.float32), state2=nested
            )
        else:
            weight = nn.Parameter(room(count, torch.int8), requires_grad=False)
            weight.SCB = room(out_features, torch.float32)
            # bitsandbytes' 8-bit layers do, whatever they are given.
            self.compute_dtype = torch.float16
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        output: torch.Tensor = _Unpacked.apply(input, self, self.compute_dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def pack(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype, device: str
) -> None:
    """Put stand-ins for what would be quantised on `device` into a model on "meta"."""
    for name, (in_features, out_features) in to_quantize(
        model, quantization, dtype, device
    ).items():
        old: Any = model.get_submodule(name)
        bias = None if isinstance(old, Conv1D | nn.Linear) and old.bias is None else old.bias
        model.set_submodule(name, Packed(in_features, out_features, bias, quantization, dtype))
