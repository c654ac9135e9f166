"""Pictures a minute by the size of a batch: --batch-size 1, 2, 4, 8 and 16.

python benchmarks/batching.py [--model emoji] [--device auto] [--steps 10] [--rounds 3]

Every round draws 16 pictures with each size, in an order that changes, so that other work on the machine is shared.
The model is loaded, and every size has drawn once before. Writing files is not counted. The CPU seconds are less
affected by other work on the machine than the rate.
"""

import argparse
import statistics
from dataclasses import dataclass
from time import perf_counter, process_time

import torch

from mos_cli.bundles.bundle import find_bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.recipe import BatchRecipe, Recipe, make_recipe
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.utils.devices import choose_device, choose_precision, device_name

PROMPTS = ("a cat", "a red rose on a sky blue background", "a cat and a dog", "three stars in a row")
SIZES, PICTURES = (1, 2, 4, 8, 16), 16


@dataclass(frozen=True)
class Setup:
    """A loaded model and the recipe of all pictures."""

    pipeline: MoSPipeline
    recipe: Recipe

    def seconds(self, size: int) -> tuple[float, float]:
        """The time to draw all pictures in batches of a size, and the time of the process on all its cores."""
        recipes = [
            self.recipe.model_copy(update={"prompt": PROMPTS[number % len(PROMPTS)], "seed": number})
            for number in range(PICTURES)
        ]
        self._wait()
        started, worked = perf_counter(), process_time()
        for first in range(0, PICTURES, size):
            if size == 1:
                self.pipeline.draw(recipes[first])
            else:
                batch = [
                    recipe.model_copy(update={"batch": BatchRecipe(size=size, place=place)})
                    for place, recipe in enumerate(recipes[first : first + size])
                ]
                self.pipeline.draw_batch(batch)
        self._wait()
        return perf_counter() - started, process_time() - worked

    def _wait(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bundle, device = find_bundle(arguments.model), choose_device(arguments.device)
    precision, defaults = choose_precision(device), bundle.index.defaults
    pipeline = MoSPipeline(bundle, fetch_tower(bundle.index.understanding), device=device, precision=precision)
    width, height = bundle.index.canvas.native
    recipe = make_recipe(
        prompt="a cat",
        model=bundle.ref,
        seed=0,
        steps=arguments.steps or defaults.steps,
        solver="ab2",
        cfg=defaults.cfg,
        cfg_interval=defaults.cfg_interval,
        width=width,
        height=height,
        precision=precision,
    )
    setup, times = Setup(pipeline, recipe), {size: [] for size in SIZES}
    for size in SIZES:
        setup.seconds(size)
    for number in range(arguments.rounds):
        for size in SIZES[number % len(SIZES) :] + SIZES[: number % len(SIZES)]:
            times[size].append(setup.seconds(size))
    print(f"{bundle.ref}, {width}x{height}, {recipe.steps} steps, {precision}, {device_name(device)}, ", end="")
    print(f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.__version__)
    print("| pictures at once | pictures a minute | slowest and fastest round | CPU seconds a picture |")
    print("| ---: | ---: | ---: | ---: |")
    for size, rounds in times.items():
        taken, worked = ([each[kind] for each in rounds] for kind in (0, 1))
        median, most, least = (60 * PICTURES / pick(taken) for pick in (statistics.median, min, max))
        print(f"| {size} | {median:.1f} | {least:.1f} to {most:.1f} | {statistics.median(worked) / PICTURES:.2f} |")


if __name__ == "__main__":
    main()
