"""Less talk from other libraries, for the command line."""

from __future__ import annotations

import sys
import warnings


def quiet() -> None:
    """Silence libraries' advice, and their progress bars where there is no terminal."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data")
    # PEFT asks for it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
