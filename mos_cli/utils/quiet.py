"""Silences warnings and progress bars of the libraries; errors are still shown."""

import logging
import os
import warnings


def quieten() -> None:
    """Call before the first heavy import: some libraries warn while they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # bf16 networks with fp32 norms (training under autocast) take the slower of two equal paths.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # Inductor warns of this for int8 layers.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
