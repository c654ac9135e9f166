"""The solvers of mos and diffusers' multistep schedulers: the error of few steps compared with very many.

Every prompt is drawn by every solver with every number of steps, from the same noise; all of them evaluate the network
once a step. PSNR is that of the picture against the one of `REFERENCE` steps, the mean over prompts.

With `--times N` it prints instead how long a picture takes with the default solver and steps, and as mos 0.1.0 drew it
(Euler, 24 steps): N pairs, one right after the other, prompts read anew for each.

python benchmarks/solvers.py [--model NAME] [--prompts N] [--steps 6 8 10 12 16 24] [--precision fp32] [--times N]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.config.settings import RunSettings
from mos_cli.images.differences import psnr
from mos_cli.inference.latents import make_noise
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.sampling.flow import velocity
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Branches, Guidance
from mos_cli.towers.autoencoder import to_image
from mos_cli.utils.devices import choose_device, choose_precision, device_name
from mos_cli.utils.quiet import quieten
from mos_cli.utils.validation import DEFAULT_SOLVER, Solver

PROMPTS = Path(__file__).parent.parent / "docs" / "prompts.txt"
REFERENCE, BEFORE_STEPS = 200, 24
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DPM-Solver++ (2M)": partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2, **FLOW),
    "DPM-Solver++ (3M)": partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=3, **FLOW),
    "UniPC, order 2": partial(UniPCMultistepScheduler, solver_order=2, **FLOW),
    "DEIS, order 2": partial(DEISMultistepScheduler, solver_order=2, **FLOW),
}
"""diffusers' multistep schedulers in flow form; a fresh one for every picture."""


def integrate(scheduler: Any, steps: int, z: Tensor, predict: Callable[[Tensor, float], Tensor]) -> Tensor:
    """From noise to a latent, by one of diffusers' multistep schedulers.

    Args:
        predict: (z_t, t) -> the clean latent.
    """
    scheduler.set_timesteps(steps)
    for index, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[index].item()
        z = scheduler.step(velocity(z, predict(z, t), t), timestep, z, return_dict=False)[0]
    return z


class Bench:
    """A loaded bundle that draws with any solver."""

    def __init__(self, model: str | None, precision: str | None) -> None:
        bundle, self.device = find_bundle(model or RunSettings().model), choose_device("auto")
        self.precision = precision or choose_precision(self.device)
        tower = fetch_with_progress(bundle.index.understanding)
        self.pipeline = MoSPipeline(bundle, tower, device=self.device, precision=self.precision)
        self.bundle = bundle

    def recipe(self, prompt: str, seed: int, steps: int, solver: Solver) -> Recipe:
        width, height = self.bundle.index.canvas.native
        settings = self.bundle.index.defaults.model_dump() | {"steps": steps, "solver": solver}
        size = {"width": width, "height": height, "precision": self.precision}
        return make_recipe(prompt=prompt, model=self.bundle.ref, seed=seed, **size, **settings)

    def draw(self, prompt: str, seed: int, steps: int, solver: Solver) -> Image.Image:
        return self.pipeline.draw(self.recipe(prompt, seed, steps, solver)).image

    @torch.inference_mode()
    def draw_with(self, scheduler: Any, prompt: str, seed: int, steps: int) -> Image.Image:
        recipe, pipeline = self.recipe(prompt, seed, steps, DEFAULT_SOLVER), self.pipeline
        maximum = pipeline.tower.guidance_max
        guidance = Guidance.with_network(maximum, recipe.cfg, recipe.cfg_interval, negative=recipe.negative)
        texts = {POSITIVE: recipe.prompt, NEGATIVE: recipe.negative}
        banks = {name: pipeline.prompt_encoder.encode(text).bank for name, text in texts.items()}
        branches = Branches(pipeline.tower, [banks], batched_guidance=pipeline.setting.batched_guidance)

        def predict(z: Tensor, t: float) -> Tensor:
            names, scale = guidance.branches(t), guidance.network_scale(t)
            return guidance.guided(branches(names, z, t, lambda picture, branch: None, scale)[0])

        z = integrate(
            scheduler, steps, make_noise(pipeline.autoencoder, recipe.working_size, recipe.seed, self.device), predict
        )
        return to_image(pipeline.autoencoder.decode(z))


def compare_times(bench: Bench, prompts: list[str], pairs: int) -> None:
    """Prints the seconds of pictures drawn in the present and the former way, and the median ratio of the pairs."""
    ways: dict[str, tuple[int, Solver]] = {
        "now": (bench.bundle.index.defaults.steps, DEFAULT_SOLVER),
        "before": (BEFORE_STEPS, "euler"),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(pairs + 1):
        for name in ways if number % 2 else reversed(ways):
            bench.pipeline.prompt_encoder.clear_cache()
            started = time.perf_counter()
            bench.draw(prompts[number % len(prompts)], number, *ways[name])
            took[name].append(time.perf_counter() - started)
    # The first pair is the warm-up.
    now, before = (seconds[1:] for seconds in took.values())
    print(f"\n| {pairs} pairs, seconds a picture | least | median |\n| --- | ---: | ---: |")
    for name, seconds in (("now", now), ("before", before)):
        steps, solver = ways[name]
        print(f"| {solver}, {steps} steps | {min(seconds):.3f} | {statistics.median(seconds):.3f} |")
    ratios = [a / b for a, b in zip(now, before, strict=True)]
    print(f"\nnow / before: {statistics.median(ratios):.3f}, the median of pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 8, 10, 12, 16, 24])
    parser.add_argument("--precision", choices=["bf16", "fp32"])
    parser.add_argument("--times", type=int, help="The number of pairs of pictures to time instead.")
    arguments = parser.parse_args()
    quieten()
    bench = Bench(arguments.model, arguments.precision)
    draws: dict[str, Callable[[str, int, int], Image.Image]] = {
        solver: lambda prompt, seed, count, solver=solver: bench.draw(prompt, seed, count, solver)
        for solver in get_args(Solver)
    }
    for name, make in SCHEDULERS.items():
        draws[name] = lambda prompt, seed, count, make=make: bench.draw_with(make(), prompt, seed, count)
    lines = PROMPTS.read_text().splitlines()
    if arguments.times is not None:
        threads = torch.get_num_threads()
        print(f"{bench.bundle.ref}, {bench.precision}, {device_name(bench.device)}, {threads} threads")
        compare_times(bench, lines, arguments.times)
        return
    prompts = lines[:: max(1, len(lines) // arguments.prompts)][: arguments.prompts]
    found: dict[tuple[str, int], list[float]] = {(name, count): [] for name in draws for count in arguments.steps}
    for seed, prompt in enumerate(prompts):
        reference = bench.draw(prompt, seed, REFERENCE, DEFAULT_SOLVER)
        for (name, count), psnrs in found.items():
            psnrs.append(psnr(reference, draws[name](prompt, seed, count)))
    print(f"{bench.bundle.ref}, {len(prompts)} prompts, {bench.precision}, {device_name(bench.device)}")
    print(f"\n| PSNR, dB | {' | '.join(map(str, arguments.steps))} |")
    print("| --- |" + " ---: |" * len(arguments.steps))
    for name in draws:
        print(f"| {name} | {' | '.join(f'{statistics.mean(found[name, n]):.1f}' for n in arguments.steps)} |")


if __name__ == "__main__":
    main()
