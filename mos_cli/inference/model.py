"""The Python interface: a loaded model that generates and edits pictures, as the command line does.

Settings are checked and recipes are made by the functions that `mos generate` and `mos edit` use, so the same settings
give the same pixels. Presets, the config file and the environment's settings (`MOS_STEPS`, `MOS_MODEL`, ...) are not
read: what a notebook draws depends on its code alone.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Image

from mos_cli.bundles.bundle import Bundle, edit_defaults, record_location
from mos_cli.bundles.loras import parse_lora, record_lora
from mos_cli.config.recipe import make_recipe
from mos_cli.config.settings import RunSettings, make_settings, parse_size
from mos_cli.errors import InputError
from mos_cli.images.expansion import parse_expansion
from mos_cli.images.inputs import Inputs, make_inputs
from mos_cli.images.pictures import Picture, make_picture, read_picture
from mos_cli.inference.drawing import Drawing
from mos_cli.inference.offload import limit_memory
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.inference.requests import (
    EditRequest,
    check_recipe,
    edit_fields,
    generation_fields,
    random_seed,
    route_source,
)
from mos_cli.planning.candidates import parse_quant
from mos_cli.planning.memory import Setting
from mos_cli.routing.prompt_weights import parse_weights
from mos_cli.routing.trace import RecordOptions
from mos_cli.utils.devices import choose_device
from mos_cli.utils.files import expand, sha256_of

ImageSource = str | Path | Image | Drawing
"""A file (PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP), an image, or a result of `Model.generate` or `Model.edit`."""

_Pipeline = TypeVar("_Pipeline")


def load_pipeline(
    bundle: Bundle, understanding: Path, settings: RunSettings, *, precision: str, quant: str | None
) -> MoSPipeline:
    """Loads a bundle as settings say, and remembers where it lies, for replays.

    Args:
        understanding: folder of the understanding tower, as `fetch_tower` returns it.
        settings: what `needs_fitting` is fitted already.
        precision, quant: as a recipe has them.

    Raises:
        MosError: as `MoSPipeline` and `choose_device` do.
    """
    make = partial(MoSPipeline, understanding=understanding, attention=settings.attention, compiled=settings.compile)
    return make_pipeline(make, bundle, settings, precision=precision, quant=quant)


def make_pipeline(
    make: Callable[..., _Pipeline], bundle: Bundle, settings: RunSettings, *, precision: str, quant: str | None
) -> _Pipeline:
    """Calls `make`, the class of a pipeline, as settings say, and remembers where the bundle lies, for replays."""
    device = choose_device(settings.device)
    if isinstance(settings.max_vram, float) and device.type == "cuda":
        limit_memory(device, settings.max_vram)
    loras = [parse_lora(text) for text in settings.loras or ()]
    setting = Setting(*parse_quant(quant or "none"), settings.offload, settings.tiled, settings.batched_guidance)
    pipeline = make(bundle, device=device, precision=precision, setting=setting, loras=loras)
    for lora in loras:
        record_lora(lora.path, sha256_of(lora.path))
    record_location(bundle)
    return pipeline


class Model:
    """A loaded model; made by `mos_cli.load`.

    Attributes:
        bundle: the bundle it was loaded from: `bundle.index` has its name, canvas and default settings.
        pipeline: the pipeline that draws.
    """

    def __init__(self, pipeline: MoSPipeline, settings: RunSettings) -> None:
        self.pipeline, self.bundle = pipeline, pipeline.bundle
        self._settings = settings

    def __repr__(self) -> str:
        return f"<Model {self.bundle.ref} on {self.pipeline.device}>"

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        cfg: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        negative: str | None = None,
        size: tuple[int, int] | str | None = None,
        feature_cache: int | None = None,
        routes: str | Sequence[str] | None = None,
        route_from: str | Path | None = None,
        route_until: float | None = None,
        probabilities: bool = False,
        regions: bool = False,
        previews: bool = False,
    ) -> Drawing:
        """Draws a picture from a prompt. None leaves a setting to the model's defaults.

        Args:
            seed: seed of the noise; random by default.
            steps: denoising steps.
            solver: "ab2" (Adams-Bashforth, the default) or "euler".
            cfg: guidance scale; 1 turns guidance off.
            cfg_interval: the times between which guidance acts, the smaller first; 1 is noise, 0 the picture.
            negative: what guidance leads away from.
            size: width and height in pixels, or "384x256" or "3:2" as `--size` takes it.
            feature_cache: compute the blocks at every N-th step only; 1 turns it off.
            routes: one or several rules that steer the routes, as `--route` takes them.
            route_from: a trace, or the picture beside it, whose choices of layers are taken over.
            route_until: for what part of the steps they are, above 0 and up to 1.
            probabilities: also record the router's probabilities of all layers.
            regions: also record which parts of the picture attended to which token.
            previews: also keep what the model expected the picture to be at every step.

        Raises:
            UsageError: a setting is out of range, or does not go with another or with the model.
            InputError: the prompt is empty or too long, or a trace cannot be read.
            MemoryLimitError: the device ran out of memory.
        """
        settings = self._with(
            steps=steps,
            solver=solver,
            cfg=cfg,
            cfg_interval=cfg_interval,
            negative=negative,
            feature_cache=feature_cache,
            routes=None if routes is None else several(routes),
        )
        pixels = parse_size(_size_text(size), self.bundle.index.canvas)
        fields = generation_fields(settings, self.bundle, pixels, cfg_interval=cfg_interval)
        options = RecordOptions(probabilities, regions, previews)
        return self._draw(prompt, seed, fields, options, route_from, route_until)

    def edit(
        self,
        image: ImageSource,
        instruction: str,
        *,
        references: ImageSource | Sequence[ImageSource] = (),
        mask: str | Path | Image | None = None,
        invert_mask: bool = False,
        feather: float = 0.0,
        composite: bool = False,
        keep_alpha: bool = False,
        strength: float = 1.0,
        image_cfg: float | None = None,
        size: tuple[int, int] | str | None = None,
        max_pixels: int | None = None,
        expand: str | None = None,
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        cfg: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        negative: str | None = None,
        feature_cache: int | None = None,
        routes: str | Sequence[str] | None = None,
        route_from: str | Path | None = None,
        route_until: float | None = None,
        probabilities: bool = False,
        regions: bool = False,
        previews: bool = False,
    ) -> Drawing:
        """Changes a picture as an instruction says. The further arguments are those of `generate`.

        What is lost, such as further frames or transparency, is a warning.

        Args:
            image: the picture to edit. A result or a file of mos keeps its history: `mos replay` draws the whole chain.
            references: a further picture to draw from, or several.
            mask: white may change, black stays bit for bit; of the shape of the picture.
            invert_mask: black may change instead.
            feather: pixels over which the mask fades inwards.
            composite: without a mask, keep bit for bit what the edit did not visibly change.
            keep_alpha: make the result as transparent as the picture; otherwise it is opaque.
            strength: the time at which the edit begins: 1 redraws everything, 0.5 keeps the layout.
            image_cfg: guidance towards the picture.
            size: width and height of the result, in pixels, or as `--size` takes it; by default the picture's.
            max_pixels: most pixels that the model works on; by default as many as its native size has.
            expand: pixels to draw beyond the picture, which stays: "left=64,top=32".

        Raises:
            ModelError: the model does not edit.
            UsageError, MemoryLimitError: as `generate`.
            InputError: as `generate`, or an image cannot be read.
        """
        settings = self._with(
            steps=steps,
            solver=solver,
            cfg=cfg,
            cfg_interval=cfg_interval,
            negative=negative,
            feature_cache=feature_cache,
            routes=None if routes is None else several(routes),
        )
        request = EditRequest(
            size=_size_text(size),
            max_pixels=max_pixels,
            mask=_mask(mask),
            invert_mask=invert_mask,
            feather=feather,
            composite=composite,
            keep_alpha=keep_alpha,
            strength=strength,
            image_cfg=image_cfg,
            expand=None if expand is None else parse_expansion(expand),
        )
        edit_defaults(self.bundle)
        inputs = make_inputs([_read(source) for source in (image, *several(references))])
        inputs = request.with_mask(inputs)
        for note in inputs.notes:
            warnings.warn(note, stacklevel=2)
        fields = edit_fields(settings, self.bundle, request, inputs, cfg_interval=cfg_interval)
        if lost := request.lost(inputs, (fields["width"], fields["height"])):
            warnings.warn(lost, stacklevel=2)
        options = RecordOptions(probabilities, regions, previews)
        return self._draw(instruction, seed, fields, options, route_from, route_until, inputs)

    def _with(self, **values: Any) -> RunSettings:
        return RunSettings(
            **self._settings.model_dump(exclude_unset=True) | make_settings(**values).model_dump(exclude_none=True)
        )

    def _draw(
        self,
        prompt: str,
        seed: int | None,
        fields: dict[str, Any],
        record_options: RecordOptions,
        route_from: str | Path | None,
        route_until: float | None,
        inputs: Inputs | None = None,
    ) -> Drawing:
        if not prompt.strip():
            raise InputError("the prompt is empty")
        source = None if route_from is None else expand(route_from)
        recording, fields["route_from"] = route_source(source, route_until, self.bundle)
        text, weights = parse_weights(prompt.strip())
        recipe = make_recipe(prompt=text, weights=weights, seed=random_seed() if seed is None else seed, **fields)
        check_recipe(
            recipe,
            self.bundle,
            compiled=self.pipeline.compiled,
            regions=record_options.regions,
            options=record_options,
        )
        return self.pipeline.draw(recipe, inputs=inputs, record_options=record_options, route_from=recording)


def _size_text(size: tuple[int, int] | str | None) -> str | None:
    return size if size is None or isinstance(size, str) else "{}x{}".format(*size)


def several(given: Any) -> tuple[Any, ...]:
    """What may be given alone: text is a sequence too, of letters."""
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)


def _mask(mask: str | Path | Image | None) -> Path | Picture | None:
    if isinstance(mask, Image):
        return make_picture(mask, "the image")
    return None if mask is None else expand(mask)


def _read(source: ImageSource) -> Picture:
    """An image with the record that came with it."""
    if isinstance(source, Drawing):
        return make_picture(source.image, record=source.record)
    if isinstance(source, Image):
        return make_picture(source)
    return read_picture(expand(source))
