"""Feature caching: the time it saves and the error it causes, compared for diffusers' techniques and fewer steps.

Every prompt is drawn with every technique in turn, so that whatever else the machine does slows all alike. "time" is
that of a step as a share of the same without a cache, the median over prompts; on a CPU of the process's own time.
"skipped" is the share of passes through a block that were not computed. PSNR is that of the picture against the one
without a cache. "same layers" is the share of the layers read that are the same, step by step. MagCache's ratios are
calibrated first, on three other prompts, as diffusers does it. Guidance is on at every step: where it ends, a cache
begins anew, and MagCache's calibration would not reach its end.

python benchmarks/caching.py [--model NAME] [--prompts N] [--steps N] [--sheet PNG]
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from PIL import Image

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.config.settings import RunSettings
from mos_cli.images.differences import psnr
from mos_cli.images.sheets import COLUMNS, contact_sheet
from mos_cli.inference.latents import make_noise
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions, Routes
from mos_cli.sampling.feature_cache import CacheConfig, CachedTower
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Guidance
from mos_cli.sampling.sampler import Step, make_sigmas, sample
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.blocks import GenerationBlock
from mos_cli.utils.devices import choose_device, choose_precision, device_name
from mos_cli.utils.quiet import quieten
from mos_cli.utils.validation import DEFAULT_SOLVER

PROMPTS = Path(__file__).parent.parent / "docs" / "prompts.txt"
CALIBRATION = ("a tree", "two cats, flat style", "a boat on a sky blue background")
SHOWN = COLUMNS
"""Pictures in a row of the sheet."""


@dataclass(frozen=True)
class Outcome:
    """A picture, the routes it took, the seconds of its steps, and how often a block was computed."""

    image: Image.Image
    routes: dict[str, Routes]
    seconds: float
    passes: int


@dataclass
class Found:
    """The results of a technique for all prompts."""

    times: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def add(self, one: Outcome, plain: Outcome) -> None:
        self.times.append(one.seconds / plain.seconds)
        self.skipped.append(1 - one.passes / plain.passes)
        self.psnr.append(psnr(one.image, plain.image))
        self.same.append(same_layers(one.routes, plain.routes))
        self.images.append(one.image)

    def line(self, name: str) -> str:
        same = statistics.mean(self.same)
        return (
            f"| {name} | {statistics.median(self.times):.2f} | {statistics.median(self.skipped):.2f} | "
            f"{statistics.mean(self.psnr):.1f} | {min(self.psnr):.1f} | {'-' if np.isnan(same) else f'{same:.3f}'} |"
        )


class Bench:
    """A loaded bundle, with or without a cache."""

    def __init__(self, model: str | None, steps: int) -> None:
        self.steps = steps
        bundle, self.device = find_bundle(model or RunSettings().model), choose_device("auto")
        self.precision = choose_precision(self.device)
        tower = fetch_with_progress(bundle.index.understanding)
        self.pipeline = MoSPipeline(bundle, tower, device=self.device, precision=self.precision)
        self.tower, self.bundle, self.passes = self.pipeline.tower, bundle, 0
        for block in self.tower.blocks:
            # The hooks of a skipped block run, too.
            block.mlp.register_forward_pre_hook(self._count)  # type: ignore[operator, union-attr]
        index = {"hidden_states": 0}
        metadata = TransformerBlockMetadata(return_hidden_states_index=0, _cached_parameter_indices=index)
        TransformerBlockRegistry.register(GenerationBlock, metadata)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def recipe(self, prompt: str, seed: int, steps: int | None = None) -> Recipe:
        width, height = self.bundle.index.canvas.native
        settings = self.bundle.index.defaults.model_dump() | {"steps": steps or self.steps, "cfg_interval": (0.0, 1.0)}
        return make_recipe(
            prompt=prompt,
            model=self.bundle.ref,
            seed=seed,
            width=width,
            height=height,
            precision=self.precision,
            solver=DEFAULT_SOLVER,
            **settings,
        )

    def draw(self, recipe: Recipe, config: CacheConfig | None) -> Outcome:
        """Draws like the pipeline, with any cache."""
        banks = {
            POSITIVE: self.pipeline.prompt_encoder.encode(recipe.prompt),
            NEGATIVE: self.pipeline.prompt_encoder.encode(""),
        }
        recorder, ends, self.passes = Recorder(RecordOptions()), [], 0
        predictor = self.tower if config is None else CachedTower(self.tower, config)
        started = self.now()
        z = sample(
            predictor,
            make_noise(self.pipeline.autoencoder, recipe.working_size, recipe.seed, self.device),
            {name: encoding.bank for name, encoding in banks.items()},
            sigmas=make_sigmas(self.pipeline.scheduler, recipe.steps),
            solver=recipe.solver,
            guidance=Guidance(recipe.cfg, recipe.cfg_interval),
            batched_guidance=self.pipeline.setting.batched_guidance,
            observers=[recorder, lambda step: self._end(step, ends)],
            reset_cache=predictor.reset_cache if isinstance(predictor, CachedTower) else lambda: None,
        )
        if isinstance(predictor, CachedTower):
            predictor.end()
        with torch.inference_mode():
            image = to_image(self.pipeline.autoencoder.decode(z))
        return Outcome(image, recorder.routes(), ends[0] - started, self.passes)

    def _end(self, step: Step, ends: list[float]) -> None:
        if step.index + 1 == step.total:
            ends.append(self.now())

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def calibrate(self) -> list[float]:
        """MagCache's ratios, the mean over the calibration's prompts; diffusers prints them, pass by pass."""
        found = []
        for seed, prompt in enumerate(CALIBRATION, start=1000):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.draw(self.recipe(prompt, seed), MagCacheConfig(calibrate=True, num_inference_steps=self.steps))
            lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
            found += [[float(number) for number in line.strip("[]").split(",")] for line in lines]
        return np.mean(found, axis=0).tolist()


def same_layers(a: dict[str, Routes], b: dict[str, Routes]) -> float:
    """The share of the layers that a reads which b reads too; not a number where the steps are others."""
    shares = []
    for name, routes in a.items():
        ids, others = routes.ids_SJTK, b[name].ids_SJTK
        if ids.shape != others.shape:
            return float("nan")
        shares.append((ids[..., None] == others[..., None, :]).any(axis=-1).mean())
    return float(np.mean(shares))


def techniques(steps: int, blocks: int, ratios: list[float]) -> dict[str, CacheConfig]:
    """TaylorSeer on the output of the last block, the others with diffusers' defaults."""
    made: dict[str, CacheConfig] = {}
    taylor = [(0, 2, 8), (1, 2, 8), (0, 2, 4), (0, 3, 4), (0, 4, 4), (1, 2, 4), (1, 3, 4), (1, 4, 4)]
    for order, every, part in taylor:
        made[f"TaylorSeer, order {order}, every {every}, from 1/{part}"] = TaylorSeerCacheConfig(
            cache_interval=every,
            disable_cache_before_step=max(1, steps // part),
            disable_cache_after_step=steps - 1,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[rf"blocks\.{blocks - 1}"],
            skip_predict_identifiers=[rf"blocks\.(?!{blocks - 1}$)\d+"],
        )
    for threshold in (0.1, 0.15, 0.2, 0.3):
        made[f"FirstBlockCache, {threshold:g}"] = FirstBlockCacheConfig(threshold=threshold)
    for threshold in (0.06, 0.12, 0.24, 0.48):
        made[f"MagCache, {threshold:g}"] = MagCacheConfig(
            threshold=threshold, retention_ratio=0.25, num_inference_steps=steps, mag_ratios=ratios
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="With few steps no cache pays.")
    parser.add_argument("--sheet", type=Path, help="Write the first pictures of every technique side by side.")
    arguments = parser.parse_args()
    quieten()
    bench, steps = Bench(arguments.model, arguments.steps), arguments.steps
    configs = techniques(steps, bench.tower.depth, bench.calibrate())
    draws: dict[str, Callable[[str, int], Outcome]] = {
        name: lambda prompt, seed, config=config: bench.draw(bench.recipe(prompt, seed), config)
        for name, config in configs.items()
    }
    for fewer in (steps * 5 // 6, steps * 2 // 3, steps // 2):
        draws[f"no cache, {fewer} steps"] = lambda prompt, seed, fewer=fewer: bench.draw(
            bench.recipe(prompt, seed, fewer), None
        )
    lines = PROMPTS.read_text().splitlines()
    prompts = lines[:: max(1, len(lines) // arguments.prompts)][: arguments.prompts]
    found, plain = {name: Found() for name in draws}, []
    bench.draw(bench.recipe(prompts[0], 0), None)
    for seed, prompt in enumerate(prompts):
        plain.append(bench.draw(bench.recipe(prompt, seed), None))
        for name, draw in draws.items():
            found[name].add(draw(prompt, seed), plain[-1])
    print(f"{bench.bundle.ref}, {steps} steps, {len(prompts)} prompts, {bench.precision}, {device_name(bench.device)}")
    print("\n| technique | time | skipped | PSNR, mean | lowest | same layers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, one in found.items():
        print(one.line(name))
    if arguments.sheet is not None:
        rows = {"no cache": [one.image for one in plain], **{name: one.images for name, one in found.items()}}
        contact_sheet([(image, name) for name, images in rows.items() for image in images[:SHOWN]]).save(
            arguments.sheet
        )


if __name__ == "__main__":
    main()
