"""Tensors that FSDP may have sharded over the processes."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another tensor as it is, without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered, which all processes call; another tensor as it is, without gradients."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
