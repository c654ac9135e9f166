"""Where a run happens: one process or many, whole or sharded, as `accelerate launch` set it up."""

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from mos_cli.errors import UsageError
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.recipe import TrainTable


def start_accelerator(train: TrainTable, folder: Path, *, parts_rest: bool = False) -> Accelerator:
    """The accelerator of this process, logging to TensorBoard in `folder`; `--use_fsdp` shards the network (FSDP2).

    Args:
        parts_rest: some steps leave parts of the network out, as those that do not edit do.

    Raises:
        UsageError: what training needs beyond the product is not installed.
    """
    for module in ("tensorboard", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"training needs {module}: pip install 'mos-cli[train]'")
    sharding = None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # What goes in stays as it is (times and pictures are fp32); only weights and what they compute are bf16.
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
        mixed_precision="bf16" if train.precision == "bf16" and sharding is None else "no",
        log_with="tensorboard",
        project_dir=folder,
        fsdp_plugin=sharding,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=parts_rest)],
    )
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate offers sharding on accelerators only, though PyTorch shards on CPUs just as well.
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = sharding
    if accelerator.device.type == "cpu":
        _attend_by_products()
    return accelerator


def _attend_by_products() -> None:
    """Attention as plain matrix products: on a CPU the backward pass of the fused kernel takes three times as long.

    The switches are PyTorch's, named after CUDA and obeyed on CPUs too. They hold for the process.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
