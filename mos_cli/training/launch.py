"""Setting up a run: one process or many, with or without sharding, as `accelerate launch` configures it."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, LoggerType
from torch.distributed.fsdp import MixedPrecisionPolicy

from mos_cli.errors import UsageError
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.metrics import TENSORBOARD
from mos_cli.training.recipe import TrainTable
from mos_cli.utils.devices import unsupported_gpu


def check_tracker(name: str) -> None:
    """Raises UsageError for a tracker that accelerate does not have, or whose package is not installed."""
    known = sorted({*LOGGER_TYPE_TO_CLASS} - {TENSORBOARD})
    if name == TENSORBOARD:
        raise UsageError(f"--tracker {name}: it is always written, in the run's folder")
    if name not in known:
        raise UsageError(f"--tracker {name}: accelerate has no tracker {name}, but {', '.join(known)}")
    if name in LoggerType.list() and name not in map(str, get_available_trackers()):
        raise UsageError(f"--tracker {name}: its package is not installed: pip install {name.replace('_', '-')}")


def start_accelerator(
    train: TrainTable, folder: Path, *, unused_parts: bool = False, trackers: Sequence[str | GeneralTracker] = ()
) -> Accelerator:
    """The accelerator of this process; `--use_fsdp` shards the network (FSDP2).

    Args:
        unused_parts: some steps do not use all parameters: those that do not train edits.
        trackers: those of accelerate that get the metrics, beside TensorBoard.
    """
    sharding = None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Inputs (times and pictures) stay fp32; weights and activations are bf16.
        computing = torch.bfloat16 if train.precision == "bf16" else None
        sharding = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(GenerationTower._no_split_modules),
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=computing, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        cpu=unsupported_gpu() is not None,
        mixed_precision="bf16" if train.precision == "bf16" and sharding is None else "no",
        log_with=list(trackers) or None,  # type: ignore[arg-type]
        project_dir=folder,
        fsdp_plugin=sharding,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parts)],
    )
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate supports sharding on GPUs only, PyTorch also on CPUs.
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = sharding
    if accelerator.device.type == "cpu":
        _use_math_attention()
    return accelerator


def _use_math_attention() -> None:
    """Uses plain matrix products for attention: on a CPU the backward pass of the fused kernel is three times slower.

    PyTorch's switches are named after CUDA but also apply to CPUs, for the whole process.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
