"""Less talk from other libraries, for the command line."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet_imports() -> None:
    """Silence what libraries say while they are imported. PEFT imports bitsandbytes wherever it is
    installed, which then misses, on some processors, an inference kernel that is never used here
    (`quantization.keep_trainable`)."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet() -> None:
    """Silence libraries' advice, and their progress bars where there is no terminal."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data")
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated"
    )  # PEFT asks for it
