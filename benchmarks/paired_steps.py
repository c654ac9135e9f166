"""A step of the default model by this checkout and by another one, in turn, so that other work slows both alike.

Prints for both: ATen operations of a step, CPU and wall seconds, the floor (the operations of its products at the rate
of one large product, measured between the steps), and the share of each kind of operation. Both branches of guidance
are one batch, 256 x 256 pixels.

git worktree add --detach /tmp/before COMMIT
OMP_NUM_THREADS=1 python benchmarks/paired_steps.py /tmp/before [--precision fp32] [--steps 20]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "joins, copies, casts": ("aten::cat", "aten::copy_", "aten::clone", "aten::_to_copy"),
    "silu": ("aten::silu",),
    "the rest": (),
}
"""ATen operations by kind, by the time that they take themselves; norms are elementwise operations on a CPU."""
SIDE = 1024
"""Rows and columns of the large product."""


class Operations(TorchDispatchMode):
    """Counts the ATen operations within the context by name.

    Attributes:
        counts: all of them.
        computing: without those whose results are the memory of their inputs, unchanged: views, and casts to the type
            that a tensor has. They start no kernel on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.computing: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        self.counts[str(operation)] += 1
        before = set(_memory((arguments, named)))
        if operation._schema.is_mutable or not before.issuperset(_memory(result)):
            self.computing[str(operation)] += 1
        return result


def _memory(values: Any) -> Iterator[int]:
    return (x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor))


def default_step(dtype: torch.dtype) -> Callable[[], Any]:
    """A step of the default model with prompts of 5 and 2 tokens, computed once: what all steps share is there."""
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Branches
    from mos_cli.towers.quantized import load_generation

    folder, noise = find_bundle("emoji").folder / "generation", torch.Generator().manual_seed(0)
    tower = load_generation(folder, device=torch.device("cpu"), dtype=dtype)
    states = {
        name: torch.randn(1, tokens, *tower.states_shape, generator=noise)
        for name, tokens in ((POSITIVE, 5), (NEGATIVE, 2))
    }
    banks = {name: tower.project_states(each) for name, each in states.items()}
    z = torch.randn(1, 3, 128, 128, generator=noise)

    def step_of(predict: Any) -> Callable[[], Any]:
        def step() -> Any:
            return predict((POSITIVE, NEGATIVE), z, 0.8, lambda *_: None)[0]

        step()
        return step

    try:
        return step_of(Branches(tower, [banks], batched_guidance=True))
    except TypeError:
        # An earlier checkout, which draws one picture at a time.
        return step_of(Branches(tower, banks, batched_guidance=True))  # type: ignore[arg-type]


@torch.inference_mode()
def serve(precision: str) -> None:
    """Answers the lines of standard input, each with a line of JSON; the code is that of PYTHONPATH."""
    try:
        from mos_cli.utils.heap import keep_freed_memory

        keep_freed_memory()
    except ImportError:
        pass  # An earlier checkout.
    step = default_step({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    large = torch.randn(SIDE, SIDE)
    for line in sys.stdin:
        answer = {
            "step": lambda: _timed(step),
            "product": lambda: _timed(lambda: large @ large),
            "facts": lambda: _facts(step),
        }[line.strip()]()
        print(json.dumps(answer), flush=True)


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    action()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def _facts(step: Callable[[], Any]) -> dict[str, Any]:
    with Operations() as operations:
        result = step()
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attention) as flops:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[next((kind for kind, names in KINDS.items() if event.key in names), "the rest")] += (
            event.self_cpu_time_total
        )
    return {
        "operations": operations.counts.total(),
        "computing": operations.computing.total(),
        "flop": flops.get_total_flops(),
        "shares": {kind: spent[kind] / spent.total() for kind in KINDS},
        "sample": torch.cat([x.flatten() for x in result.values()])[::97].tolist(),
    }


class Checkout:
    """A process that runs the code of a checkout."""

    def __init__(self, folder: Path, precision: str) -> None:
        command = [sys.executable, __file__, "--serve", "--precision", precision]
        environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.steps: list[tuple[float, float]] = []
        self.products: list[tuple[float, float]] = []

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(before: Checkout, after: Checkout, steps: int) -> None:
    facts = [checkout.ask("facts") for checkout in (before, after)]
    for number in range(steps):
        for checkout in (before, after) if number % 2 else (after, before):
            checkout.steps.append(checkout.ask("step"))
            checkout.products.append(checkout.ask("product"))
    print("| a step | before | now |\n| --- | ---: | ---: |")
    for name in ("operations", "computing"):
        print(f"| {'ATen operations' if name == 'operations' else 'of them not views'} | ", end="")
        print(" | ".join(str(each[name]) for each in facts), "|")
    for index, clock in enumerate(("CPU", "wall")):
        for name, middle in (("least", min), ("median", statistics.median)):
            times = [1000 * middle(times[index] for times in checkout.steps) for checkout in (before, after)]
            print(f"| {clock} milliseconds, {name} | {times[0]:.1f} | {times[1]:.1f} |")
    rates = [2 * SIDE**3 / min(cpu for cpu, _ in checkout.products) for checkout in (before, after)]
    floors = [1000 * each["flop"] / rate for each, rate in zip(facts, rates, strict=True)]
    print(f"| CPU milliseconds at the rate of a large product | {floors[0]:.1f} | {floors[1]:.1f} |")
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(format(each['shares'][kind], '.0%') for each in facts)} |")
    ratios = [
        statistics.median(a[clock] / b[clock] for a, b in zip(before.steps, after.steps, strict=True))
        for clock in (0, 1)
    ]
    print(f"\nbefore / now, medians of pairs: {ratios[0]:.3f} of CPU time, {ratios[1]:.3f} of wall time")
    print(f"{facts[1]['flop'] / 1e9:.1f} GFLOP, a large product {rates[1] / 1e9:.0f} GFLOP/s of CPU time; ", end="")
    apart = max(abs(a - b) for a, b in zip(*(each["sample"] for each in facts), strict=True))
    print(f"the latents differ by at most {apart:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.precision)
        return
    if arguments.before is None:
        parser.error("name the other checkout")
    here = Path(__file__).parents[1]
    before, after = (Checkout(folder.resolve(), arguments.precision) for folder in (arguments.before, here))
    compare(before, after, arguments.steps)


if __name__ == "__main__":
    main()
