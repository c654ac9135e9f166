"""A step of MoS-L with guidance: its branches in one pass, compiled, as one CUDA graph; and whether the host waits.

Shapes: B branches, T context tokens, J generation blocks, M understanding layers.
"""

import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import performance_networks as networks
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from performance_model import MoSL, Row, Run, difference, seconds
from torch import Tensor
from torch._inductor.utils import fresh_cache

from mos_cli.inference.offload import StreamedBlocks
from mos_cli.planning.memory import TOKENS
from mos_cli.quantization.method import Method
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.guidance import POSITIVE, Guidance
from mos_cli.sampling.sampler import make_sigmas, sample
from mos_cli.towers.router import Steering
from mos_cli.utils.validation import DEFAULT_SOLVER

LENGTHS = (32, 64, TOKENS)
"""Lengths of the prompts, one after the other: a new length may be compiled again."""
NO_CUDA, NEVER = "no CUDA", "never waits"


def batched_guidance(run: Run) -> list[Row]:
    """Both branches as one batch and as two passes, with bf16, unpacked and offloaded weights."""
    rows: list[Row] = []
    kinds: list[tuple[str, Method | None]] = [("bf16", None), ("nf4", "nf4"), ("bf16, fetched", None)]
    for blocks, method in kinds:
        for scale in (1, 2):
            model = MoSL(run, method, scale=scale)
            batched, sequential = model.step(), model.step(batched_guidance=False)
            if blocks.endswith("fetched"):
                model.tower.blocks = StreamedBlocks(list(model.tower.blocks), run.device)
            differs = difference(batched(), sequential())
            times = {
                "sequential_seconds": (two := seconds(sequential, run)),
                "batched_seconds": (one := seconds(batched, run)),
            }
            rows.append({"blocks": blocks, "tokens": model.patches, **times, "ratio": one / two, "difference": differs})
            del model, batched, sequential
            networks.free(run.device)
    return rows


def compiled(run: Run) -> list[Row]:
    """A step eagerly, with its blocks compiled, and either as one CUDA graph, which holds for one length of prompt.

    What a row costs is its first calls for prompts of three lengths, from empty caches, less three steady ones.
    """
    model, rows = MoSL(run), []
    steps, expected = model.network.defaults.steps, model.step()()
    torch._dynamo.reset()
    with fresh_cache():
        for blocks in ("eager", "compiled"):
            if blocks == "compiled":
                model.tower.compile_repeated_blocks(dynamic=True)
            for graph in (False, True):
                name = {"blocks": blocks, "cuda_graph": graph}
                if graph and run.device.type != "cuda":
                    rows.append({**name, "why": NO_CUDA})
                    continue
                rows.append({**name, **_costs(model, expected, graph=graph)})
    torch._dynamo.reset()
    eager, compiling = rows[0], rows[2]["cost_seconds"]
    for row in rows:
        if row is eager or "why" in row:
            continue
        # A graph of compiled blocks is made of what has been compiled before.
        cost = row["cost_seconds"] + (compiling if row["cuda_graph"] and row["blocks"] == "compiled" else 0)
        saved = steps * (eager["step_seconds"] - row["step_seconds"])
        row["ratio"] = row["step_seconds"] / eager["step_seconds"]
        row["paid_after_pictures"] = math.ceil(cost / saved) if saved > 0 else "never"
    return rows


def _costs(model: MoSL, expected: Tensor, *, graph: bool) -> Row:
    """The time of the first calls, the steady time of the last, and its difference from the expected result."""
    steps, began = [model.step(tokens) for tokens in LENGTHS], time.perf_counter()
    for number, step in enumerate(steps):
        steps[number] = _captured(step, model.run.device) if graph else step
        _finished(steps[number], model.run.device)
    first, step = time.perf_counter() - began, steps[-1]
    steady = seconds(step, model.run)
    times = {"step_seconds": steady, "cost_seconds": max(0.0, first - len(LENGTHS) * steady)}
    return {**times, "difference": difference(step(), expected)}


def _finished(action: Callable[[], object], device: torch.device) -> None:
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph, which runs on the same memory; its result is overwritten by the next."""
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = step()

    def replayed(_read: object = step) -> Tensor:
        # The graph reads memory that the step holds, and does not hold it itself.
        graph.replay()
        return said

    return replayed


def sync(run: Run) -> list[Row]:
    """Steps as the sampler takes them, recorded: PyTorch raises where the host would wait for the device."""
    model, rows = MoSL(run), []
    layers, depth = model.tower.states_shape[0], model.tower.depth
    allowed_BTJM = torch.ones(1, TOKENS, depth, layers, dtype=torch.bool, device=run.device)
    allowed_BTJM[:, 1, :, 0] = False
    steering = Steering(allowed_BTJM, torch.zeros(allowed_BTJM.shape, device=run.device))
    for steered in (False, True):
        rules = {POSITIVE: steering} if steered else {}
        draw = partial(
            sample,
            model.tower,
            model.z_BCHW,
            model.banks(TOKENS),
            sigmas=make_sigmas(FlowMatchEulerDiscreteScheduler(), 2),
            solver=DEFAULT_SOLVER,
            guidance=Guidance(model.network.defaults.cfg),
            batched_guidance=True,
            steer=lambda step, branch, rules=rules: rules.get(branch),
        )
        rows.append(
            {"steering": steered, "host": _waits(lambda draw=draw: draw(observers=[Recorder(RecordOptions())]), run)}
        )
    return rows


def _waits(action: Callable[[], object], run: Run) -> str:
    """Runs an action twice, the second time looking for the first place where the host waits."""
    _finished(action, run.device)
    if run.device.type != "cuda":
        return NO_CUDA
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return place(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return NEVER


def place(error: Exception) -> str:
    """The innermost line of ours that an error came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "mos_cli" in Path(frame.filename).parts]
    return f"waits in {Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}"
