"""Quantising the generation tower: error, pictures, routes, size and time, per policy.

Two tables. The first rounds one group of layers at a time to the values quantisation leaves, everything else in bf16:
which layers are sensitive. The second quantises for good, under several policies, and draws. The error is that of the
predicted picture, |x - x_0| / |x_0| over all inputs, where x_0 is what the tower says in bf16; the inputs are noised
pictures of its own at four times, in the first table also with themselves as references. "same layers" is the
share of the layers read that are the same in bf16: in the first table for the same input, in the second for the same
step of two runs. Seconds are those of the quickest picture; on a CPU seconds of its time, summed over threads, which
others on the machine hardly disturb.

python benchmarks/quantisation.py [--prompts N] [--steps N]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.config.settings import RunSettings
from mos_cli.images.differences import psnr
from mos_cli.inference.drawing import Drawing
from mos_cli.inference.latents import make_noise
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.quantization.layers import assembled, bitsandbytes, quantised_parts
from mos_cli.quantization.method import METHODS, Method, Quantisation
from mos_cli.routing.diff import compare
from mos_cli.routing.trace import RecordOptions
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import GENERATION_KEPT, quantise, survey
from mos_cli.towers.router import Route
from mos_cli.utils.devices import choose_device, device_name
from mos_cli.utils.quiet import quieten
from mos_cli.utils.validation import DEFAULT_SOLVER

PROMPTS = ("a dog", "a rocket, flat style", "a cat and a dog", "a rose on a sky blue background")
TIMES = (1.0, 0.7, 0.4, 0.1)
CONDITIONING = ("time_in", "modulation", "modulation_out")
POLICIES = {
    "everything": (),
    "router kept": ("router",),
    "conditioning, modulation kept": CONDITIONING,
    "router, conditioning, modulation kept": ("router", *CONDITIONING),
    "as documented": GENERATION_KEPT,
}
GROUPS = {
    "blocks: attention, to_qkv": lambda name: name.startswith("blocks.") and name.endswith("to_qkv"),
    "blocks: attention, to_out": lambda name: name.startswith("blocks.") and name.endswith("to_out"),
    "blocks: context_kv": lambda name: name.endswith("context_kv"),
    "blocks: feed-forward, gate_up": lambda name: name.startswith("blocks.") and name.endswith("gate_up"),
    "blocks: feed-forward, down": lambda name: name.startswith("blocks.") and name.endswith("down"),
    **{name: (lambda layer, name=name: layer.split(".")[0] == name) for name in GENERATION_KEPT},
}
TYPE_SOURCES = ("patches_in", "states_in", "time_in.mlp.linear_1", "router.time_in.mlp.linear_1")
"""Layers whose weight sets the type of the computation: they are rounded instead of quantised."""


@dataclass(frozen=True)
class Input:
    """z_t, t, a prompt's states; and the clean latent and the image tokens of the picture that is edited, if one is."""

    z_BCHW: Tensor
    t_B: Tensor
    states_BTMS: Tensor
    edited: tuple[Tensor, Tensor] | None = None

    def to_tower(self, tower: GenerationTower) -> tuple[Tensor, Route]:
        bank = tower.project_states(self.states_BTMS)
        if self.edited is not None:
            latent_BCHW, image_states_BVMZ = self.edited
            bank = tower.add_image_tokens(bank, image_states_BVMZ, tower.cache_references([latent_BCHW]))
        return tower(self.z_BCHW, self.t_B, bank)


@dataclass(frozen=True)
class Outcome:
    drawings: list[Drawing]
    seconds: float


class Bench:
    """A bundle in bf16, fixed inputs, and its outputs for them."""

    def __init__(self, prompts: int, steps: int) -> None:
        bundle, self.device = find_bundle(RunSettings().model), choose_device("auto")
        tower = fetch_with_progress(bundle.index.understanding)
        self.pipeline = MoSPipeline(bundle, tower, device=self.device, precision="bf16")
        self.tower = self.pipeline.tower
        width, height = bundle.index.canvas.native
        settings = {**bundle.index.defaults.model_dump(), "steps": steps, "solver": DEFAULT_SOLVER}
        self.recipes = [
            make_recipe(
                prompt=PROMPTS[i], model=bundle.ref, seed=i, width=width, height=height, precision="bf16", **settings
            )
            for i in range(prompts)
        ]
        self.draw(self.tower)
        self.drawn = self.draw(self.tower)
        self.draws, self.edits = [], []
        for recipe in self.recipes:
            self._add_inputs(recipe)
        with torch.inference_mode():
            self.expected = [input.to_tower(self.tower) for input in (*self.draws, *self.edits)]

    def _add_inputs(self, recipe: Recipe) -> None:
        """The drawn latents with the noise that they were drawn from, at all times."""
        kept: list[Tensor] = []
        self.pipeline.draw(recipe, [lambda step: kept.append(step.x_hat_BCHW)])
        clean, noise = kept[-1], make_noise(self.pipeline.autoencoder, recipe.working_size, recipe.seed, self.device)
        states = self.pipeline.understanding.encode([recipe.prompt]).states_BTMS
        for t in TIMES:
            z, t_B = (1 - t) * clean + t * noise, torch.tensor([t], device=self.device)
            self.draws.append(Input(z, t_B, states))
            if self.pipeline.image_encoder is not None:
                image_states = self.pipeline.image_encoder.encode_images(self.pipeline.autoencoder.decode(clean))
                self.edits.append(Input(z, t_B, states, (clean, image_states)))

    @torch.inference_mode()
    def compare(self, tower: GenerationTower, *, edits: bool) -> tuple[float, float]:
        """Relative error over all inputs, and the share of layers read that are the same."""
        inputs = [*self.draws, *self.edits] if edits else self.draws
        made = [input.to_tower(tower) for input in inputs]
        pairs = list(zip(made, self.expected, strict=False))
        x, x_0 = (torch.cat([pair[side][0].flatten() for pair in pairs]) for side in (0, 1))
        routes = [(pair[0][1].ids_BTJK, pair[1][1].ids_BTJK) for pair in pairs]
        same = torch.cat([(a[..., None] == b[..., None, :]).any(dim=-1).flatten() for a, b in routes])
        return ((x - x_0).norm() / x_0.norm()).item(), same.float().mean().item()

    def draw(self, tower: GenerationTower) -> Outcome:
        self._take(tower)
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        drawings, seconds = [], []
        for recipe in self.recipes:
            # The cached encodings have banks that another tower projected.
            self.pipeline.prompt_encoder.clear_cache()
            started = clock()
            drawings.append(self.pipeline.draw(recipe, record_options=RecordOptions(probabilities=True)))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(clock() - started)
        self._take(self.tower)
        return Outcome(drawings, min(seconds))

    def _take(self, tower: GenerationTower) -> None:
        self.pipeline.tower = self.pipeline.prompt_encoder.tower = tower
        # The cached encodings have banks that another tower projected.
        self.pipeline.prompt_encoder.clear_cache()

    def row(self, tower: GenerationTower, size: int) -> str:
        """A line of the second table."""
        error, outcome = self.compare(tower, edits=False)[0], self.draw(tower)
        pairs = list(zip(self.drawn.drawings, outcome.drawings, strict=True))
        tallies = [compare(a.trace, a.routes, b.trace, b.routes).tally for a, b in pairs]
        choices = sum(tally.choices for tally in tallies)
        agree = sum(tally.agree for tally in tallies) / choices
        near = sum(tally.near_ties for tally in tallies) / choices
        decibels = [psnr(a.image, b.image) for a, b in pairs]
        return (
            f"{error:.4f} | {statistics.mean(decibels):.1f} | {min(decibels):.1f} | {agree:.3f} | {near:.3f} | "
            f"{size / 1e6:.2f} | {outcome.seconds:.2f}"
        )


@torch.no_grad()
def round_layers(tower: GenerationTower, method: Method, chosen: Callable[[str], bool]) -> int:
    """Rounds the weights of layers to the values that quantisation leaves; returns how many weights that were."""
    functional, weights = bitsandbytes().functional, 0
    for name, layer in tower.named_modules():
        if isinstance(layer, nn.Linear) and chosen(name):
            parts = quantised_parts(layer.weight, method)
            if method == "int8":
                rounded = parts["weight"] * (parts["SCB"][:, None] / 127)
            else:
                weight: Any = assembled(layer, method, parts, layer.weight.device).weight
                rounded = functional.dequantize_4bit(weight.data, weight.quant_state)
            weights += layer.weight.numel()
            layer.weight.copy_(rounded)
    return weights


def under_policy(tower: GenerationTower, method: Method, kept: tuple[str, ...]) -> tuple[GenerationTower, int]:
    """A copy of the tower, quantised, and the bytes of its weights."""
    quantisation, made = Quantisation(method=method, kept=kept), copy.deepcopy(tower)
    type_sources = tuple(name for name in TYPE_SOURCES if not quantisation.keeps(name))
    round_layers(made, method, type_sources.__contains__)
    quantise(made, Quantisation(method=method, kept=(*kept, *type_sources)))
    return made.eval().requires_grad_(False), survey(tower, quantisation).bytes_after


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    quieten()
    bench = Bench(options.prompts, options.steps)
    recipe, full = bench.recipes[0], survey(bench.tower, Quantisation(method="int8", kept=()))
    print(
        f"{recipe.model} {recipe.width}x{recipe.height}, {len(bench.recipes)} prompts, {recipe.steps} steps, ", end=""
    )
    print(f"cfg {recipe.cfg:g}, {device_name(bench.device)}, {torch.get_num_threads()} threads\n")

    print(
        "| one group rounded | weights, thousands | " + " | ".join(f"{m}: error | same layers" for m in METHODS) + " |"
    )
    print("| --- |" + " ---: |" * 5)
    for group, record_options in GROUPS.items():
        cells, weights = [], 0
        for method in METHODS:
            tower = copy.deepcopy(bench.tower)
            weights = round_layers(tower, method, record_options)
            error, same = bench.compare(tower, edits=True)
            cells.append(f"{error:.4f} | {same:.3f}")
        print(f"| {group} | {weights / 1e3:.0f} | {' | '.join(cells)} |", flush=True)

    print("\n| tower | error | PSNR, dB | worst | same layers | near-ties | MB | s per picture |")
    print("| --- |" + " ---: |" * 7)
    fp32 = copy.deepcopy(bench.tower).float()
    print(f"| fp32 | {bench.row(fp32, 2 * full.bytes_before)} |")
    print(f"| bf16 | {bench.row(bench.tower, full.bytes_before)} |", flush=True)
    for method in METHODS:
        for policy, kept in POLICIES.items():
            tower, size = under_policy(bench.tower, method, kept)
            print(f"| {method}, {policy} | {bench.row(tower, size)} |", flush=True)


if __name__ == "__main__":
    main()
