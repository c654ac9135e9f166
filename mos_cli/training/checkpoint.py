"""Checkpoints of a run: one folder each, switched by rename, checked on reading, readable by any number of processes.

They are PyTorch's distributed checkpoints: each process writes its part, and another number of processes can read them.
`checkpoint.json` in each has the sha256 of its files and the plan under which it was trained.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write

from mos_cli.errors import InputError
from mos_cli.training.ema import PowerEMA
from mos_cli.training.timer import TimeUsed
from mos_cli.utils.files import sha256_of
from mos_cli.utils.migration import current_weight, earlier_weight
from mos_cli.utils.validation import Frozen, Sha256

CHECKPOINTS = "checkpoints"
DESCRIPTION = "checkpoint.json"
KEPT = 2
"""Checkpoints that are kept, beside the last one from before the learning rates fall."""
# PyTorch warns even where a single process is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Plan(Frozen):
    """The steps of a run, and the number of steps after which its learning rates fall; or its time.

    A run with a time has `steps` and `decay_from` 0: they are not known before its end.
    """

    steps: int
    decay_from: int
    time: TimeUsed | None = None


class Description(Frozen):
    """What `checkpoint.json` says."""

    plan: Plan
    files: dict[str, Sha256]


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first; the name of each is the number of steps done."""
    paths = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
    return sorted(paths, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(iter(found(folder)), None)


def step_of(path: Path) -> int:
    """The number of steps done in a checkpoint."""
    return int(path.name)


def plan_of(path: Path) -> Plan | None:
    """The plan under which a checkpoint was trained; None where it does not say. Raises ValueError if it is damaged."""
    description = _description(path)
    return None if description is None else description.plan


def plans(folder: Path) -> dict[Path, Plan | None]:
    """The checkpoints of a run's folder with their plans, as `found` and `plan_of`; none whose plan is damaged."""
    described = {}
    for path in found(folder):
        with suppress(ValueError):
            described[path] = plan_of(path)
    return described


def save(folder: Path, step: int, state: dict[str, Any], plan: Plan, accelerator: Accelerator) -> None:
    """Writes a checkpoint, then removes the older ones but `KEPT` and the last from before the learning rates fall.

    All processes call it. Raises InputError if it cannot be written; those before it are as they were.
    """
    target = folder / CHECKPOINTS / f"{step:08d}"
    unfinished = target.with_name(f"{target.name}.unfinished")
    if accelerator.is_main_process:
        _remove(unfinished)
        unfinished.parent.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    try:
        write(state, checkpoint_id=unfinished, no_dist=accelerator.num_processes == 1)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _describe(unfinished, plan)
            _switch(unfinished, target)
    except (CheckpointException, OSError, RuntimeError) as error:
        _remove(unfinished)
        raise InputError(
            f"cannot save the checkpoint {target}: {_reason(error)}; those before it are whole: "
            "make room, and the same command goes on from the last one"
        ) from None
    if accelerator.is_main_process:
        _remove_old(folder, step)
    accelerator.wait_for_everyone()


def load_averages(folder: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The moving averages of `weights` in the newest checkpoint of a run that may go on meanwhile, and its step.

    Raises:
        InputError: there is no checkpoint yet, or the newest is damaged.
    """
    while (path := newest(folder)) is not None:
        try:
            return load(path, {"ema": PowerEMA(weights).averages}, processes=1)["ema"], step_of(path)
        except InputError:
            # The run may have written a newer one and removed this.
            if path == newest(folder):
                raise
    raise InputError(f"{folder} has no checkpoint yet: wait for the first, every save_every steps")


def load(path: Path, state: dict[str, Any], processes: int) -> dict[str, Any]:
    """Reads a checkpoint: fills the tensors of `state` in place and returns it, its other values replaced.

    Weights may have the names of earlier versions. Raises InputError if the checkpoint is damaged.
    """
    try:
        verify(path)
        if any(current_weight(name) != name for name in FileSystemReader(path).read_metadata().state_dict_metadata):
            state = renamed(state, earlier_weight)
        read(state, checkpoint_id=path, no_dist=processes == 1)
    except (CheckpointException, Exception) as error:  # damage shows as anything; the first is no Exception
        raise InputError(f"the checkpoint {path} is damaged ({_reason(error)}): delete it to start anew") from None
    return renamed(state, current_weight)


def load_newest(paths: list[Path], load: Callable[[Path], None], say: Callable[[str], None]) -> Path | None:
    """Loads the first of some checkpoints that is whole, and returns its path; None if there are none.

    Args:
        load: reads one; raises InputError if it is damaged.
        say: called with a line for each damaged one.

    Raises:
        InputError: all are damaged.
    """
    for path, older in zip(paths, [*paths[1:], None], strict=False):
        try:
            load(path)
        except InputError as error:
            if older is None:
                raise
            say(f"{error}".split(": delete")[0] + f": going on from step {step_of(older)}")
        else:
            return path
    return None


def renamed(state: Any, rename: Callable[[str], str]) -> Any:
    """A state with the names of its weights changed, wherever they stand; tensors are not copied."""
    if isinstance(state, dict):
        return {rename(name): renamed(value, rename) for name, value in state.items()}
    if isinstance(state, list):
        return [renamed(value, rename) for value in state]
    return rename(state) if isinstance(state, str) else state


def _describe(folder: Path, plan: Plan) -> None:
    """Writes the hashes of a checkpoint's files beside them, and brings all to the disk."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    description = Description(plan=plan, files={path.name: sha256_of(path) for path in files})
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1), encoding="utf-8")
    for path in (*files, folder / DESCRIPTION):
        # Windows refuses fsync on a file that is open for reading alone.
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _description(path: Path) -> Description | None:
    """None for a checkpoint of an earlier version, which has none; raises ValueError if it is damaged."""
    file = path / DESCRIPTION
    return Description.model_validate_json(file.read_bytes()) if file.is_file() else None


def verify(path: Path) -> None:
    """Compares the files of a checkpoint with their hashes; raises ValueError or OSError if one differs."""
    try:
        description = _description(path)
    except ValidationError:
        raise ValueError(f"{DESCRIPTION} is damaged") from None
    for name, sha256 in {} if description is None else description.files.items():
        if sha256_of(path / name) != sha256:
            raise ValueError(f"{name} has changed")


def _switch(unfinished: Path, target: Path) -> None:
    """Gives a complete checkpoint its name; one of the same step, which was damaged or left behind, makes way."""
    if target.exists():
        _remove(target)
    unfinished.rename(target)


def _remove_old(folder: Path, step: int) -> None:
    """Removes what is not kept: older and damaged checkpoints, those of a future given up, and unfinished ones."""
    past = {path: plan for path, plan in plans(folder).items() if step_of(path) <= step}
    before_decay = [path for path, plan in past.items() if plan is not None and step_of(path) <= plan.decay_from]
    kept = {*list(past)[:KEPT], *before_decay[:1]}
    for other in (folder / CHECKPOINTS).iterdir():
        if other not in kept:
            _remove(other)


def _remove(folder: Path) -> None:
    """Removes a checkpoint. It loses its name first: a process that is killed leaves no half of one under a name."""
    doomed = folder
    if folder.name.isdigit():
        doomed = folder.with_name(f"{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(OSError):
            folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What went wrong in a line; of what processes report together, the first."""
    failures = list(getattr(error, "failures", {}).values())
    if failures and isinstance(first := failures[0][0], BaseException):
        error = first
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "enforce fail" in str(error) or "PytorchStreamWriter" in str(error):
        # PyTorch's writer does not pass on the system's error.
        return "the file could not be written, which a full disk causes"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:120]
