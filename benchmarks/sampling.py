"""Seconds per picture after loading, by part, compared with the peak rate of this machine.

The floor is the time that the matrix products of router and generation tower would take at the rate of one large
product. The rate is measured between the pictures, so that whatever else the machine does slows both alike.

With `--against` every picture is drawn both ways, one right after the other: as `mos` does it, and with guidance's
branches in passes of their own ("sequential") or the blocks compiled ("compiled"), which begins with empty caches.

python benchmarks/sampling.py [PICTURES] [--against sequential|compiled]
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mos_cli.bundles.bundle import Bundle, find_bundle
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.config.settings import RunSettings
from mos_cli.images.differences import psnr
from mos_cli.inference.loading import DTYPES
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.planning.memory import Setting
from mos_cli.utils.devices import choose_device, choose_precision, device_name
from mos_cli.utils.quiet import quieten
from mos_cli.utils.validation import DEFAULT_SOLVER

PROMPTS = ("a dog", "a rocket, flat style", "a cat and a dog", "a rose on a sky blue background")
SIDE = 1024
"""Rows and columns of the large product."""


class Stopwatch:
    """Adds up the seconds spent in watched modules."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, name: str, module: nn.Module) -> None:
        def begin(*_: Any) -> None:
            self.seconds[name] -= self.now()

        def end(*_: Any) -> None:
            self.seconds[name] += self.now()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def time(self, action: Callable[[], object]) -> dict[str, float]:
        """Seconds of an action: of each watched module, and "all"."""
        self.seconds.clear()
        started = self.now()
        action()
        return {**self.seconds, "all": self.now() - started}


def matmul_rate(dtype: torch.dtype, watch: Stopwatch, repeats: int = 20) -> float:
    """Operations per second of a product of two square matrices, over about as long as a picture takes."""
    a, b = (torch.randn(SIDE, SIDE, device=watch.device).to(dtype) for _ in range(2))
    return repeats * 2 * SIDE**3 / watch.time(lambda: [a @ b for _ in range(repeats)])["all"]


def count_operations(pipeline: MoSPipeline, recipe: Recipe) -> dict[str, int]:
    """Operations (two per multiply-add) of all matrix products of one picture, by part; steps and branches included."""
    # The counter does not know the attention operator of a CPU.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        pipeline.draw(recipe)
    counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    tower = type(pipeline.tower).__name__
    return {"tower and router": counts[tower], "router": counts.get(f"{tower}.router", 0)}


def recipe_of(bundle: Bundle, precision: str, number: int) -> Recipe:
    """The bundle's own size and settings; every picture another prompt and seed."""
    width, height = bundle.index.canvas.native
    return make_recipe(
        prompt=PROMPTS[number % len(PROMPTS)],
        model=bundle.ref,
        seed=number,
        width=width,
        height=height,
        precision=precision,
        solver=DEFAULT_SOLVER,
        **bundle.index.defaults.model_dump(),
    )


def where_time_goes(pipeline: MoSPipeline, precision: str, pictures: int) -> None:
    """Prints the seconds of a picture's parts, and how far that is from the floor."""
    operations = count_operations(pipeline, recipe_of(pipeline.bundle, precision, 0))

    watch = Stopwatch(pipeline.device)
    watch.watch("understanding", pipeline.understanding.model)
    if pipeline.tower.router is not None:
        watch.watch("router", pipeline.tower.router)
    for block in pipeline.tower.blocks:
        watch.watch("blocks", block)
    drawn: list[dict[str, float]] = []
    rates: list[dict[str, float]] = []
    for number in range(pictures + 1):
        # A picture drawn alone encodes both of its prompts.
        pipeline.prompt_encoder.clear_cache()
        recipe = recipe_of(pipeline.bundle, precision, number)
        drawn.append(watch.time(lambda recipe=recipe: pipeline.draw(recipe)))
        rates.append({name: matmul_rate(dtype, watch) for name, dtype in DTYPES.items()})
    # The first is the warm-up.
    drawn, rates = drawn[1:], rates[1:]

    seconds = {name: statistics.median(times[name] for times in drawn) for name in drawn[0]}
    seconds["rest"] = statistics.median(2 * times["all"] - sum(times.values()) for times in drawn)
    floors = [operations["tower and router"] / rate[precision] for rate in rates]
    ratio = statistics.median(times["all"] / floor for times, floor in zip(drawn, floors, strict=True))

    print(f"\n| of {pictures} pictures | median |\n| --- | --- |")
    print(f"| seconds per picture | {seconds.pop('all'):.3f} |")
    for name, value in seconds.items():
        print(f"|   {name} | {value:.3f} |")
    for name, count in operations.items():
        print(f"| GFLOP, {name} | {count / 1e9:.2f} |")
    for name in DTYPES:
        print(f"| GFLOP/s of a large product, {name} | {statistics.median(rate[name] for rate in rates) / 1e9:.0f} |")
    print(f"| floor, seconds | {statistics.median(floors):.3f} |")
    print(f"| seconds / floor | {ratio:.1f} |")


def compare(pipeline: MoSPipeline, other: MoSPipeline, against: str, precision: str, pictures: int) -> None:
    """Prints the seconds of pictures drawn both ways, and what the first of each prompt cost beyond them."""
    watch = Stopwatch(pipeline.device)
    ways = {"as it is": pipeline, against: other}
    took: dict[str, list[float]] = {name: [] for name in ways}
    alike = []
    for number in range(len(PROMPTS) + pictures):
        recipe, images = recipe_of(pipeline.bundle, precision, number), []
        for name in ways if number % 2 else reversed(ways):
            ways[name].prompt_encoder.clear_cache()
            took[name].append(watch.time(lambda way=ways[name]: images.append(way.draw(recipe).image))["all"])  # noqa: B023
        alike.append(psnr(*images))
    first = {name: seconds[: len(PROMPTS)] for name, seconds in took.items()}
    steady = {name: seconds[len(PROMPTS) :] for name, seconds in took.items()}
    plain, changed = (statistics.median(seconds) for seconds in steady.values())
    cost = sum(first[against]) - len(PROMPTS) * changed
    print(f"\n| of {pictures} pictures, seconds | {' | '.join(ways)} |\n| --- | ---: | ---: |")
    print(f"| median | {plain:.3f} | {changed:.3f} |")
    print(f"| least | {' | '.join(f'{min(seconds):.3f}' for seconds in steady.values())} |")
    for number, prompt in enumerate(PROMPTS):
        print(f"| the first of {prompt!r} | {' | '.join(f'{first[name][number]:.3f}' for name in ways)} |")
    pairs = [b / a for a, b in zip(*steady.values(), strict=True)]
    print(f"\n{against} / as it is: {statistics.median(pairs):.3f}, the median of pairs", end="; ")
    print(f"PSNR between the two {min(alike):.1f} to {max(alike):.1f} dB")
    if against == "compiled":
        paid = f"after {math.ceil(cost / (plain - changed))} pictures" if changed < plain else "never"
        print(f"the first of every prompt took {cost:.1f} s more than later ones; paid {paid}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=int, nargs="?", default=8)
    parser.add_argument("--against", choices=("sequential", "compiled"))
    arguments = parser.parse_args()
    quieten()
    bundle, device = find_bundle(RunSettings().model), choose_device("auto")
    precision = choose_precision(device)
    tower = fetch_with_progress(bundle.index.understanding)
    load = partial(MoSPipeline, bundle, tower, device=device, precision=precision)
    recipe = recipe_of(bundle, precision, 0)
    print(f"{bundle.ref} {recipe.width}x{recipe.height}, {recipe.steps} steps, cfg {recipe.cfg:g} in ", end="")
    print(f"{recipe.cfg_interval}, {precision}, {device_name(device)}, {torch.get_num_threads()} threads")
    if arguments.against is None:
        where_time_goes(load(), precision, arguments.pictures)
        return
    with fresh_cache():
        other = load(
            setting=Setting(batched_guidance=arguments.against != "sequential"),
            compiled=arguments.against == "compiled",
        )
        compare(load(), other, arguments.against, precision, arguments.pictures)


if __name__ == "__main__":
    main()
