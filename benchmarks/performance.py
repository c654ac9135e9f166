"""MoS-L on a GPU, with random weights, and the default model in one part: cells of the table in docs/performance.md.

caps       28 steps with guidance at 1024 px under hard memory caps, in the setting `mos plan` chooses for each
router     the router's time in a forward, beside that of its arithmetic
rivals     a forward beside those of Qwen-Image, FLUX.1-dev and SANA-1.5, one after the other in the same run
share      operations per second of a forward, as a share of those of one large product
nf4        a forward with quantised blocks beside bf16
attention  a forward with xformers' attention beside PyTorch's
batched_guidance   a step with guidance, both branches as one batch, compared with one after the other
compile    a step with blocks compiled, and as one CUDA graph, beside an eager one: what it costs and when it has paid
graphs     pictures with passes replayed as CUDA graphs, beside eager ones: the first, the next, another prompt's
sync       whether the host waits for the device within the steps of a picture

Forwards are eager, and replayed as CUDA graphs, which is what `mos` does by itself.

Prints a markdown table and one JSON object per row. Networks are made on the device from configs alone. `--tiny` runs
the same code with small networks on any machine: it shows that the script works, its figures mean nothing.

python benchmarks/performance.py PART ... [--rounds N] [--gib CAP] [--outside GIB] [--tiny]
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

import performance_networks as networks
import torch
from performance_caps import draw_under
from performance_model import MoSL, Row, Run, difference, matmul_rate, seconds
from performance_steps import batched_guidance, compiled, graphs, sync
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mos_cli.errors import DeviceError, MemoryLimitError
from mos_cli.planning.candidates import GPU_SIZES
from mos_cli.planning.memory import GIB
from mos_cli.towers.attention import choose_attention
from mos_cli.towers.router import Route
from mos_cli.utils.devices import device_name
from mos_cli.utils.quiet import quieten


def caps(run: Run) -> list[Row]:
    """A row for each cap, the largest first."""
    plan, network = networks.mos_l(tiny=False), networks.mos_l(tiny=run.tiny)
    return [draw_under(cap, plan, network, run.device, run.outside) for cap in reversed(run.caps)]


def router(run: Run) -> list[Row]:
    """The router and its choice: a forward less one with the same route given, and their products at the best rate."""
    model = MoSL(run)
    _, route = model.forward()
    whole, given = model.times(), model.times(route)
    operations, rate = _operations(model) - _operations(model, route), matmul_rate(run)
    rows: list[Row] = []
    for way in _ways(whole, given):
        routed = (took := whole[way]) - given[way]
        row = {"way": way.removesuffix("_seconds"), "forward_seconds": took, "router_seconds": routed}
        row |= {"share": routed / took, "arithmetic_seconds": operations / rate}
        rows.append(row | {"ratio": routed * rate / operations, "attention": model.attention})
    return rows


def rivals(run: Run) -> list[Row]:
    """MoS-L with 1,024 tokens, as its autoencoder makes them, and with the 4,096 that the first two rivals have.

    The rivals' forwards are eager, as diffusers computes them.
    """
    times: dict[str, Row] = {}
    rows: list[Row] = []
    narrow, wide = "MoS-L, 1,024 tokens", "MoS-L, 4,096 tokens"
    for name, scale in ((narrow, 1), (wide, 2)):
        model = MoSL(run, scale=scale)
        times[name] = model.times()
        rows.append({"model": name, **times[name], "matmul_tflops": matmul_rate(run) / 1e12})
        del model
        networks.free(run.device)
    for rival in (networks.QWEN_IMAGE, networks.FLUX, networks.SANA):
        alike = narrow if rival is networks.SANA else wide
        try:
            took = _rival_seconds(rival, run)
        except torch.OutOfMemoryError:
            rows.append({"model": rival.name, "why": "does not fit this GPU"})
            networks.free(run.device)
            continue
        networks.free(run.device)
        rate = matmul_rate(run) / 1e12
        ratios = {way.replace("seconds", "ratio"): times[alike][way] / took for way in _ways(times[alike])}
        rows.append({"model": rival.name, "eager_seconds": took, "matmul_tflops": rate, "beside": alike, **ratios})
    return rows


def _rival_seconds(rival: networks.Rival, run: Run) -> float:
    model, inputs = rival.make(run.device, tiny=run.tiny)
    with torch.inference_mode():
        return seconds(lambda: model(**inputs, return_dict=False), run)


def share(run: Run) -> list[Row]:
    """The generation tower's rate beside that of one large product, measured before and after it."""
    rows = []
    for name, scale in (("1,024 tokens", 1), ("4,096 tokens", 2)):
        model = MoSL(run, scale=scale)
        operations = _operations(model)
        before, times, after = matmul_rate(run), model.times(), matmul_rate(run)
        ceiling = (before + after) / 2
        shares = {way.replace("seconds", "share"): operations / times[way] / ceiling for way in _ways(times)}
        rows.append({"tokens": name, "tflop": operations / 1e12, "matmul_tflops": ceiling / 1e12, **times, **shares})
        del model
        networks.free(run.device)
    return rows


def _operations(model: MoSL, route: Route | None = None) -> int:
    """Of the products of one forward. The counter knows PyTorch's attention alone, and not by its name on a CPU."""
    choose_attention(model.tower, "sdpa")
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(
        display=False, custom_mapping={on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    ) as counter:
        model.forward(route)
    choose_attention(model.tower, "auto")
    return counter.get_total_flops()


def nf4(run: Run) -> list[Row]:
    """A forward with quantised blocks beside one in bf16."""
    rows: list[Row] = []
    for method in (None, "nf4", "int8"):
        model = MoSL(run, method)
        times = model.times()
        size = sum(tensor.nbytes for tensor in model.tower.state_dict().values()) / GIB
        first = rows[0] if rows else times
        rows.append({"blocks": method or "bf16", "weights_gib": size, **times, **_ratios(times, first)})
        del model
        networks.free(run.device)
    return rows


def attention(run: Run) -> list[Row]:
    """A forward with either attention, and how far the two differ, as a part of what the forward says."""
    rows: list[Row] = []
    for scale in (1, 2):
        model = MoSL(run, scale=scale)
        tokens = model.patches
        choose_attention(model.tower, "sdpa")
        said, times = model.forward()[0], model.times()
        rows.append({"attention": "sdpa", "tokens": tokens, **times})
        try:
            choose_attention(model.tower, "xformers")
        except DeviceError as error:
            rows.append({"attention": "xformers", "tokens": tokens, "why": str(error).split(":")[0]})
            continue
        differs, other = difference(model.forward()[0], said), model.times()
        rows.append(
            {"attention": "xformers", "tokens": tokens, **other, **_ratios(other, times), "difference": differs}
        )
    return rows


def _ratios(times: Row, beside: Row) -> Row:
    """Of the times of a row to those of another."""
    return {way.replace("seconds", "ratio"): times[way] / beside[way] for way in _ways(times, beside)}


def _ways(*times: Row) -> list[str]:
    """The names of the times that all rows have."""
    return [way for way in ("eager_seconds", "graph_seconds") if all(way in row for row in times)]


PARTS = {part.__name__: part for part in (caps, router, rivals, share, nf4, attention, batched_guidance, sync, graphs)}
PARTS["compile"] = compiled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--rounds", type=int, default=20, help="forwards that are timed (20)")
    parser.add_argument("--tiny", action="store_true", help="small networks, on any machine: does the script work?")
    parser.add_argument("--gib", type=int, choices=GPU_SIZES, help="one memory cap alone")
    parser.add_argument("--outside", type=float, help="GiB of a cap that the driver has, where others use the GPU too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        print("error: there is no CUDA device here: --tiny shows that the script works", file=sys.stderr)
        return DeviceError.exit_code
    quieten()
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.rounds, options.tiny)
    run = replace(run, caps=GPU_SIZES if options.gib is None else (options.gib,), outside=options.outside)
    for part in options.parts:
        try:
            rows = PARTS[part](run)
        except torch.OutOfMemoryError:
            print(f"error: {part} needs MoS-L in bf16, and {device_name(run.device)} has too little", file=sys.stderr)
            return MemoryLimitError.exit_code
        _print(rows)
        about = {"part": part, **asdict(run), "device": device_name(run.device), "torch": torch.__version__}
        for row in rows:
            print(json.dumps({**about, **row}), flush=True)
        networks.free(run.device)
    return 0


def _print(rows: list[Row]) -> None:
    """The rows as a markdown table; what is nested is in the JSON alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if not any(isinstance(row.get(name), dict | list) for row in rows)]
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(_shown(row.get(name, '-')) for name in names)} |")
    print()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
