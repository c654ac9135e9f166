"""The one place where a prompt becomes a picture.

prompt -> understanding tower -> state bank -> (router + generation tower) x steps -> autoencoder -> picture and trace

Shapes: B = 1 picture, T context tokens, S steps, J generation blocks, K kept layers, M layers, C channels, H x W.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from mos_cli.errors import InputError
from mos_cli.routing.trace import Routes, Trace, TraceToken, make_branch
from mos_cli.runtime.bundles import Bundle, verify_bundle
from mos_cli.runtime.devices import device_name
from mos_cli.runtime.recipe import PictureRecord, Recipe, provenance
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, Guidance, Observer, Step, sample
from mos_cli.towers.autoencoder import Autoencoder, Latents, Pixels
from mos_cli.towers.generation import GenerationTower, StateBank
from mos_cli.towers.understanding import Token, UnderstandingTower

if TYPE_CHECKING:
    from mos_cli.towers.router import Route

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Drawing:
    """A finished picture with its record, and what it takes to write its trace."""

    image: Image.Image
    record: PictureRecord
    trace: Trace
    routes: dict[str, Routes]


class MoSPipeline:
    """A bundle, loaded and ready to draw.

    Args:
        bundle: where the weights are; every file is checked against its hash.
        understanding: folder of the understanding tower, as `fetch_tower` returns it.

    Raises:
        ModelError: the bundle is damaged.
    """

    def __init__(self, bundle: Bundle, understanding: Path, *, device: torch.device, precision: str) -> None:
        verify_bundle(bundle)
        dtype = DTYPES[precision]
        self.bundle, self.device = bundle, device
        # The states are few and computed once: full precision costs nothing that can be felt.
        self.understanding = UnderstandingTower(understanding, dtype=torch.float32, device=str(device))
        self.tower = GenerationTower.from_pretrained(
            bundle.folder / "generation", torch_dtype=dtype, use_safetensors=True
        )
        self.tower.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]
        self.autoencoder: Autoencoder = Pixels()
        if (bundle.folder / "autoencoder").is_dir():
            self.autoencoder = Latents(bundle.folder / "autoencoder", dtype=dtype, device=str(device))
        self.scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(  # type: ignore[assignment]
            bundle.folder / "scheduler"
        )
        self._read: dict[str, tuple[StateBank, tuple[Token, ...]]] = {}

    def draw(self, recipe: Recipe, observers: Sequence[Observer] = ()) -> Drawing:
        """Draws one picture. Its noise depends on its own seed alone, made on the CPU whatever the device.

        Raises:
            InputError: a prompt is longer than the understanding tower reads.
        """
        guidance = Guidance(recipe.cfg, recipe.cfg_interval)
        recorder = RouteRecorder()
        z = sample(
            self.tower,
            self._noise(recipe),
            {POSITIVE: self._bank(recipe.prompt), NEGATIVE: self._bank(recipe.negative)},
            steps=recipe.steps,
            guidance=guidance,
            scheduler=self.scheduler,
            observers=[recorder, *observers],
        )
        image = to_image(self.autoencoder.decode(z))
        made = provenance(self.bundle.hash, device_name(self.device), attention="sdpa")
        record = PictureRecord(schema="mos-picture/1", recipe=recipe, made=made)
        routes = recorder.routes()
        return Drawing(image, record, self._trace(record, recorder, routes), routes)

    def _noise(self, recipe: Recipe) -> Tensor:
        factor = self.autoencoder.factor
        shape = (1, self.autoencoder.channels, recipe.height // factor, recipe.width // factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(recipe.seed)).to(self.device)

    def _bank(self, prompt: str) -> StateBank:
        """The prompt's state bank; the understanding tower runs once per prompt, however many pictures are drawn."""
        if prompt not in self._read:
            try:
                reading = self.understanding.read([prompt])
            except ValueError as error:
                raise InputError(str(error)) from None
            with torch.inference_mode():
                self._read[prompt] = self.tower.read(reading.states_BTMS), reading.tokens[0]
        return self._read[prompt][0]

    def _trace(self, record: PictureRecord, recorder: "RouteRecorder", routes: dict[str, Routes]) -> Trace:
        layers = self.understanding.layers
        prompts = {POSITIVE: record.recipe.prompt, NEGATIVE: record.recipe.negative}
        branches = {}
        for name, branch in routes.items():
            tokens = [TraceToken(text=t.text, start=t.start, end=t.end) for t in self._read[prompts[name]][1]]
            branches[name] = make_branch(prompts[name], tokens, recorder.steps[name], branch, layers)
        return Trace(
            schema="mos-trace/1",
            recipe=record.recipe,
            made=record.made,
            layers=("embeddings", *(f"layer {index}" for index in range(1, layers))),
            blocks=self.tower.depth,
            top_k=self.tower.top_k,
            times=tuple(recorder.times),
            branches=branches,
        )


@dataclass
class RouteRecorder:
    """An observer that keeps every route where it was made, and copies them all at the end."""

    times: list[float] = field(default_factory=list)
    steps: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list["Route"]] = field(default_factory=dict)

    def __call__(self, step: Step) -> None:
        self.times.append(step.t)
        for name, route in step.routes.items():
            self.steps.setdefault(name, []).append(step.index)
            self.kept.setdefault(name, []).append(route)

    def routes(self) -> dict[str, Routes]:
        """The decisions of the one picture that was drawn, [S, J, T, K] per branch, in the types they are stored in."""
        return {
            name: Routes(
                torch.stack([route.ids_BTJK[0].transpose(0, 1) for route in kept]).to(torch.uint8).cpu().numpy(),
                torch.stack([route.weights_BTJK[0].transpose(0, 1) for route in kept]).half().cpu().numpy(),
            )
            for name, kept in self.kept.items()
        }


def to_image(pictures_B3HW: Tensor) -> Image.Image:
    """The first picture of a batch in -1..1, as 8-bit RGB."""
    levels = (pictures_B3HW[0].float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
