"""With this folder on PYTHONPATH, HAS_AVX512BF16=0 or 1 answers for the processor, in every process
that starts.

bitsandbytes asks `functional.has_avx512bf16()` once, at import, and again for every 4-bit layer.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Forced:
    """Finds `bitsandbytes.functional` as it is, and has it give the answer."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            answer = int(os.environ["HAS_AVX512BF16"])
            module.has_avx512bf16 = lambda: answer  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("HAS_AVX512BF16"):
    sys.meta_path.insert(0, Forced())  # type: ignore[arg-type]
