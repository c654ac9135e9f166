"""What a device without memory does."""

import torch


def no_memory(*_: object, **__: object) -> None:
    """Stands in for a function that runs out of GPU memory."""
    raise torch.OutOfMemoryError("CUDA out of memory")
