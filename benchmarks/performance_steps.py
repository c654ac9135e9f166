"""Steps with guidance: branches in one pass, compiled, replayed as CUDA graphs; and whether the host waits.

Shapes: B branches, T context tokens, J generation blocks, M understanding layers.
"""

import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import performance_networks as networks
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from performance_model import SHORT, MoSL, Row, Run, difference, replayed, seconds
from torch import Tensor
from torch._inductor.utils import fresh_cache

from mos_cli.bundles.bundle import find_bundle
from mos_cli.inference.offload import StreamedBlocks
from mos_cli.planning.memory import TOKENS
from mos_cli.quantization.method import Method
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.graphs import BUCKET
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Guidance
from mos_cli.sampling.sampler import make_sigmas, sample
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import load_generation
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
    """A step eagerly, with its blocks compiled, and either replayed as a CUDA graph, of which each length has its own.

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
                with replayed(model.tower, run.device, graph) as passes:
                    rows.append({**name, **_costs(model, expected, graph=graph)})
                    rows[-1]["passes"] = "eager" if passes is None else passes.note
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
    steps = [model.step(tokens) for tokens in LENGTHS]
    # The second call of a kind is captured.
    calls, began = 2 if graph else 1, time.perf_counter()
    for step in steps:
        for _ in range(calls):
            _finished(step, model.run.device)
    first, step = time.perf_counter() - began, steps[-1]
    steady = seconds(step, model.run)
    times = {"step_seconds": steady, "cost_seconds": max(0.0, first - calls * len(LENGTHS) * steady)}
    return {**times, "difference": difference(step(), expected)}


def _finished(action: Callable[[], object], device: torch.device) -> None:
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphs(run: Run) -> list[Row]:
    """Whole pictures of the default model and of MoS-L, eagerly and with replayed passes, with and without buckets.

    Of each way the first picture, the next, and the first of a prompt of another length.
    """
    rows: list[Row] = []
    for name, make in (("default", _default_model), ("MoS-L", _mos_l)):
        draw, tower, steps = make(run)
        draw(TOKENS, None)
        expected: Tensor | None = None
        for graph, bucket in product((False, True), (None, BUCKET)):
            row: Row = {"model": name, "cuda_graph": graph, "bucket": bucket or "none"}
            if graph and run.device.type != "cuda":
                rows.append({**row, "why": NO_CUDA})
                continue
            with replayed(tower, run.device, graph) as passes:
                for kind, tokens in (("first", TOKENS), ("next", TOKENS), ("other_prompt", TOKENS - 2)):
                    began = time.perf_counter()
                    if passes is not None:
                        passes.begin(steps)
                    z = draw(tokens, bucket)
                    row[f"{kind}_seconds"] = time.perf_counter() - began
                    if kind == "next":
                        expected = z if expected is None else expected
                        row["difference"] = difference(z, expected)
            rows.append({**row, "passes": "eager" if passes is None else passes.note})
        del draw, tower
        networks.free(run.device)
    return rows


def _default_model(run: Run) -> "Picture":
    """The default model's weights, its prompts of noise."""
    bundle = find_bundle("emoji")
    tower = load_generation(bundle.folder / "generation", device=run.device, dtype=torch.bfloat16)
    z_1CHW = torch.randn(1, tower.config["channels"], 128, 128, device=run.device)

    def banks(tokens: int) -> dict[str, StateBank]:
        counts = {POSITIVE: tokens, NEGATIVE: SHORT}
        states = {name: torch.randn(1, count, *tower.states_shape, device=run.device) for name, count in counts.items()}
        return {name: tower.project_states(each) for name, each in states.items()}

    return _picture(tower, z_1CHW, banks, 2 if run.tiny else bundle.index.defaults.steps, run.device)


def _mos_l(run: Run) -> "Picture":
    model = MoSL(run)
    return _picture(model.tower, model.z_BCHW, model.banks, model.network.defaults.steps, run.device)


Picture = tuple[Callable[[int, int | None], Tensor], GenerationTower, int]
"""What draws a picture of a prompt of so many tokens, in a bucket; its tower, and its steps."""


def _picture(
    tower: GenerationTower,
    z_1CHW: Tensor,
    banks: Callable[[int], dict[str, StateBank]],
    steps: int,
    device: torch.device,
) -> Picture:
    @torch.inference_mode()
    def draw(tokens: int, bucket: int | None) -> Tensor:
        torch.manual_seed(tokens)
        z = sample(
            tower,
            z_1CHW,
            banks(tokens),
            sigmas=make_sigmas(FlowMatchEulerDiscreteScheduler(), steps),
            solver=DEFAULT_SOLVER,
            guidance=Guidance(3.0),
            batched_guidance=True,
            bucket=bucket,
            observers=[Recorder(RecordOptions())],
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return z

    return draw, tower, steps


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
