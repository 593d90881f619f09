"""adaptive-lora: every layer gets the LoRA rank it earns; what comes out is an ordinary LoRA
adapter."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# PEFT imports bitsandbytes, quantised or not, which on some processors then misses an inference
# kernel in a warning. That kernel is never used here: see `model.quantization.keep_trainable`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from adaptive_lora import methods as methods
    from adaptive_lora.adapter_tools.compress import compress as compress
    from adaptive_lora.adapter_tools.convert import convert as convert
    from adaptive_lora.adapter_tools.inspect import inspect as inspect
    from adaptive_lora.allocation.allocate import Resize as Resize
    from adaptive_lora.errors import AdaptiveLoraError as AdaptiveLoraError
    from adaptive_lora.errors import DivergedError as DivergedError
    from adaptive_lora.errors import InputError as InputError
    from adaptive_lora.errors import IntegrityError as IntegrityError
    from adaptive_lora.methods import METHODS as METHODS
    from adaptive_lora.methods import Method as Method
    from adaptive_lora.model.adapters import lora_parameters as lora_parameters
    from adaptive_lora.model.adapters import ranks as ranks
    from adaptive_lora.model.attach import attach as attach
    from adaptive_lora.model.resize import resize as resize
    from adaptive_lora.model.saving import load as load
    from adaptive_lora.model.saving import save as save
    from adaptive_lora.training.callback import AdaptiveRankCallback as AdaptiveRankCallback
    from adaptive_lora.training.controller import RankController as RankController
    from adaptive_lora.training.drop_in import AdaptiveLoRA as AdaptiveLoRA
    from adaptive_lora.training.trainer import AdaptiveTrainer as AdaptiveTrainer
    from adaptive_lora.training.trainer import AdaptiveTrainerMixin as AdaptiveTrainerMixin

# transformers' Trainer takes seconds to import; `adaptive-lora --help` should not wait for it.
_HOME = {
    "methods": "methods",
    **dict.fromkeys(("METHODS", "Method"), "methods"),
    **dict.fromkeys(
        ("AdaptiveLoraError", "DivergedError", "InputError", "IntegrityError"), "errors"
    ),
    "Resize": "allocation.allocate",
    "attach": "model.attach",
    **dict.fromkeys(("load", "save"), "model.saving"),
    **dict.fromkeys(("lora_parameters", "ranks"), "model.adapters"),
    "resize": "model.resize",
    "RankController": "training.controller",
    "AdaptiveRankCallback": "training.callback",
    **dict.fromkeys(("AdaptiveTrainer", "AdaptiveTrainerMixin"), "training.trainer"),
    "AdaptiveLoRA": "training.drop_in",
    "compress": "adapter_tools.compress",
    "convert": "adapter_tools.convert",
    "inspect": "adapter_tools.inspect",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptive_lora' has no attribute {name!r}")
    module = import_module(f"adaptive_lora.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
