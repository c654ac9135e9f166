"""Checkpoints of a run: one folder each, written atomically, readable by any number of processes.

They are PyTorch's distributed checkpoints: each process writes its part, and another number of processes can read them.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write

from mos_cli.errors import InputError
from mos_cli.utils.migration import current_weight, earlier_weight

CHECKPOINTS = "checkpoints"
# PyTorch warns even where a single process is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder; its name is the number of steps done."""
    return max(_all(folder), default=None)


def save(folder: Path, step: int, state: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes a checkpoint, then removes the older ones, so that there always is one. All processes call it."""
    target = folder / CHECKPOINTS / f"{step:08d}"
    unfinished = target.with_name(f"{target.name}.unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    write(state, checkpoint_id=unfinished, no_dist=accelerator.num_processes == 1)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not target.exists():
            unfinished.rename(target)
        for other in (folder / CHECKPOINTS).iterdir():
            if other != target:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def load(path: Path, state: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Reads a checkpoint: fills the tensors of `state` in place and returns it, its other values replaced.

    Weights may have the names of earlier versions. Raises InputError if the checkpoint is damaged.
    """
    try:
        if any(current_weight(name) != name for name in FileSystemReader(path).read_metadata().state_dict_metadata):
            state = renamed(state, earlier_weight)
        read(state, checkpoint_id=path, no_dist=accelerator.num_processes == 1)
    except (CheckpointException, Exception) as error:  # damage shows as anything; the first is no Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the checkpoint {path} is damaged ({reason[-1][:120]}): delete it to start anew") from None
    return renamed(state, current_weight)


def renamed(state: Any, rename: Callable[[str], str]) -> Any:
    """A state with the names of its weights changed, wherever they stand; tensors are not copied."""
    if isinstance(state, dict):
        return {rename(name): renamed(value, rename) for name, value in state.items()}
    if isinstance(state, list):
        return [renamed(value, rename) for value in state]
    return rename(state) if isinstance(state, str) else state


def _all(folder: Path) -> list[Path]:
    return [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
