"""MoS-L on a GPU, with random weights, and the default model in one part: cells of the table in docs/performance.md.

caps       28 steps with guidance at 1024 px under hard memory caps, in the setting `mos plan` chooses for each
router     the router's time in a step
rivals     a forward beside those of Qwen-Image, FLUX.1-dev and SANA-1.5, one after the other in the same run
share      operations per second of a forward, as a share of those of one large product
nf4        a forward with quantised blocks beside bf16
attention  a forward with xformers' attention beside PyTorch's
batched_guidance   a step with guidance, both branches as one batch, compared with one after the other
compile    a step with blocks compiled, and as one CUDA graph, beside an eager one: what it costs and when it has paid
graphs     pictures with passes replayed as CUDA graphs, beside eager ones: the first, the next, another prompt's
sync       whether the host waits for the device within the steps of a picture

Prints a markdown table and one JSON object per row. Networks are made on the device from configs alone. `--tiny` runs
the same code with small networks on any machine: it shows that the script works, its figures mean nothing.

python benchmarks/performance.py PART [--rounds N] [--gib CAP] [--tiny]
"""

import argparse
import json
import statistics
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
from mos_cli.inference.profiling import Clock
from mos_cli.planning.candidates import GPU_SIZES
from mos_cli.planning.memory import GIB
from mos_cli.towers.attention import choose_attention
from mos_cli.utils.devices import device_name
from mos_cli.utils.quiet import quieten


def caps(run: Run) -> list[Row]:
    """A row for each cap, the largest first."""
    plan, network = networks.mos_l(tiny=False), networks.mos_l(tiny=run.tiny)
    return [draw_under(cap, plan, network, run.device) for cap in reversed(run.caps)]


def router(run: Run) -> list[Row]:
    """The router and its choice, per forward: from its first operation to the blocks' first."""
    model, clock = MoSL(run), Clock(run.device)
    marks: list[Any] = []
    assert model.tower.router is not None
    for module in (model.tower.router, model.tower.patches_in):
        module.register_forward_pre_hook(lambda *_: marks.append(clock.now()))
    whole = model.seconds()
    routed = [clock.between(*marks[n : n + 2]) for n in range(4, len(marks), 2)]
    took = statistics.median(routed)
    return [{"router_seconds": took, "forward_seconds": whole, "share": took / whole, "attention": model.attention}]


def rivals(run: Run) -> list[Row]:
    """MoS-L with 1,024 tokens, as its autoencoder makes them, and with the 4,096 that the first two rivals have."""
    times: dict[str, float] = {}
    rows: list[Row] = []
    narrow, wide = "MoS-L, 1,024 tokens", "MoS-L, 4,096 tokens"
    for name, scale in ((narrow, 1), (wide, 2)):
        model = MoSL(run, scale=scale)
        times[name] = model.seconds()
        rows.append({"model": name, "forward_seconds": times[name], "matmul_tflops": matmul_rate(run) / 1e12})
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
        ratio = {"beside": alike, "ratio": times[alike] / took}
        rows.append({"model": rival.name, "forward_seconds": took, "matmul_tflops": rate, **ratio})
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
        before, took, after = matmul_rate(run), model.seconds(), matmul_rate(run)
        rate, ceiling = operations / took, (before + after) / 2
        rates = {"tflops": rate / 1e12, "matmul_tflops": ceiling / 1e12}
        times = {"tflop": operations / 1e12, "forward_seconds": took}
        rows.append({"tokens": name, **times, **rates, "share": rate / ceiling})
        del model
        networks.free(run.device)
    return rows


def _operations(model: MoSL) -> int:
    """Of the products of one forward. The counter knows PyTorch's attention alone, and not by its name on a CPU."""
    choose_attention(model.tower, "sdpa")
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(
        display=False, custom_mapping={on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    ) as counter:
        model.forward()
    choose_attention(model.tower, "auto")
    return counter.get_total_flops()


def nf4(run: Run) -> list[Row]:
    """A forward with quantised blocks beside one in bf16."""
    rows: list[Row] = []
    for method in (None, "nf4", "int8"):
        model = MoSL(run, method)
        took = model.seconds()
        size = sum(tensor.nbytes for tensor in model.tower.state_dict().values()) / GIB
        first = rows[0]["forward_seconds"] if rows else took
        rows.append({"blocks": method or "bf16", "forward_seconds": took, "ratio": took / first, "weights_gib": size})
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
        said, took = model.forward(), model.seconds()
        rows.append({"attention": "sdpa", "tokens": tokens, "forward_seconds": took})
        try:
            choose_attention(model.tower, "xformers")
        except DeviceError as error:
            rows.append({"attention": "xformers", "tokens": tokens, "why": str(error).split(":")[0]})
            continue
        differs = difference(model.forward(), said)
        times = {"forward_seconds": (other := model.seconds()), "ratio": other / took}
        rows.append({"attention": "xformers", "tokens": tokens, **times, "difference": differs})
    return rows


PARTS = {part.__name__: part for part in (caps, router, rivals, share, nf4, attention, batched_guidance, sync, graphs)}
PARTS["compile"] = compiled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=20, help="forwards that are timed (20)")
    parser.add_argument("--tiny", action="store_true", help="small networks, on any machine: does the script work?")
    parser.add_argument("--gib", type=int, choices=GPU_SIZES, help="one memory cap alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        print("error: there is no CUDA device here: --tiny shows that the script works", file=sys.stderr)
        return DeviceError.exit_code
    quieten()
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.rounds, options.tiny)
    run = run if options.gib is None else replace(run, caps=(options.gib,))
    try:
        rows = PARTS[options.part](run)
    except torch.OutOfMemoryError:
        print(
            f"error: {options.part} needs MoS-L in bf16, and {device_name(run.device)} has too little",
            file=sys.stderr,
        )
        return MemoryLimitError.exit_code
    _print(rows)
    about = {"part": options.part, **asdict(run), "device": device_name(run.device), "torch": torch.__version__}
    for row in rows:
        print(json.dumps({**about, **row}))
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
