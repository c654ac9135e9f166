"""Drawing with a base model: the same interface as `MoSPipeline`, with diffusers' pipeline in the place of the sampler.

prompt -> language model, once -> bank -> (router + hooks + transformer) x steps, by diffusers -> picture and trace
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mos_cli.adapters.bank import TextBank, make_bank
from mos_cli.adapters.facts import BASE_MODELS, Prompts, replaced
from mos_cli.adapters.loading import load_base_model, load_router
from mos_cli.adapters.loras import add_loras
from mos_cli.adapters.routing import TextRouting
from mos_cli.adapters.text import EncodedText, encode_text, read_template
from mos_cli.bundles.adapters import AdapterBundle, verify_adapter
from mos_cli.bundles.loras import LoraFile
from mos_cli.config.recipe import PictureRecord, Recipe, pixels_hash, provenance
from mos_cli.errors import InputError, MemoryLimitError, MosError
from mos_cli.images.companions import TRACE_SCHEMA
from mos_cli.images.inputs import Inputs
from mos_cli.images.pictures import Fit
from mos_cli.inference.drawing import Drawing
from mos_cli.inference.edit_canvas import restore_size
from mos_cli.inference.loading import DTYPES
from mos_cli.inference.offload import Offloader
from mos_cli.planning.memory import Setting
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.rules import parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.routing.trace import AdapterTrace, Recording, RecordOptions, Routes, Trace, make_branch
from mos_cli.routing.transfer import routes_of_run
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, SteeringInput
from mos_cli.sampling.sampler import Observer, Step
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.layers import TokenGrid
from mos_cli.towers.router import Router
from mos_cli.utils.devices import device_name
from mos_cli.utils.threads import ThreadRecorder, device_threads

PATCH = 16
"""Pixels along a patch of all base models: the autoencoder's factor of 8, and patches of 2 x 2 latents."""
_PROMPTS = 4
"""Prompts whose encodings are kept, but for those that are read ahead."""


class AdapterPipeline:
    """A loaded base model with its adapter.

    Args:
        bundle: every file is checked against its hash.
        setting: quantisation of language model and transformer, and whether the language model leaves the device.
        loras: LoRA files that change the transformer, with their scales.

    Raises:
        ModelError: the base model is not there, or damaged.
        MosError: as `add_loras` does.
        MemoryLimitError: the device has too little memory.
    """

    attention = "sdpa"
    compiled = False
    graphs = None

    def __init__(
        self,
        bundle: AdapterBundle,
        *,
        device: torch.device,
        precision: str,
        setting: Setting = Setting(),
        loras: Sequence[LoraFile] = (),
    ) -> None:
        verify_adapter(bundle)
        self.bundle, self.bundle_hash, self.device = bundle, bundle.hash, device
        self.precision, self.setting = precision, setting
        self.base, index = BASE_MODELS[bundle.index.pipeline], bundle.index
        self.own_layers, self.layers, self.blocks = index.own_layers, index.layers, index.blocks
        self.offloader = Offloader(device, setting.offload)
        try:
            self.pipe = load_base_model(
                bundle,
                self.offloader,
                dtype=DTYPES[precision],
                text_encoder=setting.understanding,
                transformer=setting.generation,
            )
            self.adapter = load_router(bundle, self.pipe, device)
            add_loras(self.pipe, loras, bundle.index.name, quantised=setting.generation != "none")
        except (torch.OutOfMemoryError, MemoryError):
            raise self._out_of_memory(index.canvas.native) from None
        if setting.tiled:
            self.pipe.vae.enable_tiling()
        self.template = read_template(self.base, self.pipe)
        self._ahead: dict[str, EncodedText] = {}
        self._last = lru_cache(maxsize=_PROMPTS)(self._encode)

    @property
    def router(self) -> Router | None:
        """The router; None for an adapter without one."""
        return None if self.adapter is None else self.adapter.router

    @property
    def tower(self) -> nn.Module:
        """The transformer, which is called once or twice a step."""
        return self.pipe.transformer

    @property
    def autoencoder(self) -> Any:
        """The autoencoder of diffusers."""
        return self.pipe.vae

    @property
    def prompt_encoder(self) -> "AdapterPipeline":
        """What keeps encoded prompts."""
        return self

    def encode_ahead(self, recipes: Sequence[Recipe]) -> None:
        """Reads the prompts of a run at once where the language model is offloaded; else does nothing.

        A prompt that cannot be read is left to `draw`, which raises its error.
        """
        if self.setting.offload == "none":
            return
        prompts = dict.fromkeys(
            prompt for recipe in recipes for prompt in (recipe.prompt, *([recipe.negative] if recipe.cfg != 1 else []))
        )
        with self.offloader.understanding_onloaded():
            for prompt in prompts:
                try:
                    self._ahead[prompt] = self._read(prompt)
                except MosError:
                    continue
                except (torch.OutOfMemoryError, MemoryError):
                    raise self._out_of_memory(recipes[0].working_size) from None

    def clear_cache(self) -> None:
        """Forgets the prompts that were read."""
        self._ahead.clear()
        self._last.cache_clear()

    def encode(self, prompt: str) -> EncodedText:
        """A prompt as the base model reads it; the last ones are cached. Raises InputError."""
        encoded = self._ahead.get(prompt) or self._last(prompt, device_threads(self.device))
        return encoded.to(self.device)

    def _encode(self, prompt: str, _threads: int | None) -> EncodedText:
        """The number of threads is a part of the cache's key, since the rounding of the states depends on it."""
        with self.offloader.understanding_onloaded():
            return self._read(prompt)

    def _read(self, prompt: str) -> EncodedText:
        with torch.no_grad():
            encoded = encode_text(self.base, self.pipe, prompt, self.own_layers, self.template)
        # Of a run of many prompts all are read at once, and wait in main memory.
        return encoded if self.setting.offload == "none" else encoded.to(torch.device("cpu"))

    def bank(self, encoded: EncodedText) -> TextBank:
        """The bank of a prompt."""
        with torch.no_grad():
            return make_bank(self.base, self.pipe.transformer, encoded, self.own_layers)

    def draw(
        self,
        recipe: Recipe,
        observers: Sequence[Observer] = (),
        inputs: Inputs | None = None,
        *,
        record_options: RecordOptions = RecordOptions(),
        route_from: Recording | None = None,
    ) -> Drawing:
        """Draws one picture, as `MoSPipeline.draw` does and with the same errors."""
        recorder, threads = Recorder(record_options), ThreadRecorder(self.device)
        try:
            image, routing = self._draw(recipe, [recorder, *observers, threads], inputs, route_from)
        except (torch.OutOfMemoryError, MemoryError):
            raise self._out_of_memory(recipe.working_size) from None
        if inputs is not None:
            image = restore_size(image, inputs, recipe)
        made = provenance(
            bundle_hash=self.bundle_hash,
            device=device_name(self.device),
            attention=self.attention,
            threads=threads.start,
            thread_changes=tuple(threads.changes) or None,
            tiled=self.setting.tiled,
            batched_guidance=recipe.cfg != 1 and bool(self.base.rows),
            compiled=False,
        )
        record = PictureRecord(
            schema="mos-picture/1",
            recipe=recipe,
            made=made,
            sha256=pixels_hash(image),
            earlier=() if inputs is None else inputs.earlier,
        )
        routes, previews = recorder.routes(), self._previews(recorder)
        return Drawing(image, record, self._trace(record, recorder, routes, routing), routes, previews)

    def _draw(
        self, recipe: Recipe, observers: Sequence[Observer], inputs: Inputs | None, route_from: Recording | None
    ) -> tuple[Image, "_Run"]:
        branches = {POSITIVE: recipe.prompt} | ({NEGATIVE: recipe.negative} if recipe.cfg != 1 else {})
        encoded = {name: self.encode(prompt) for name, prompt in branches.items()}
        if not encoded[POSITIVE].tokens:
            raise InputError(f"the base model leaves nothing of the prompt {recipe.prompt!r}")
        width, height = recipe.working_size
        grid = TokenGrid(height // PATCH, width // PATCH)
        run = _Run(self, recipe, encoded, route_from)
        routing = TextRouting(
            self.base,
            self.adapter,
            {name: self.bank(text) for name, text in encoded.items()},
            grid,
            self.layers,
            self.blocks,
            steer=run.steer,
            begun=run.begin,
        )

        def end_step(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            x_hat_1CHW = self.base.unpack(x_hats.pop(), grid)
            step = Step(index, len(run.times), routing.t, x_hat_1CHW, routing.end_step())
            for observe in observers:
                observe(step)
            return tensors

        prompts = Prompts(
            {name: text.embeds_TE for name, text in encoded.items()},
            {name: text.mask_T for name, text in encoded.items()},
        )
        pipe, arguments = self.pipe, {}
        if inputs is not None:
            pipe, arguments = self._edit(recipe, inputs)
        with routing.attached(self.pipe.transformer), _predicted(self.pipe.scheduler) as x_hats:
            image = pipe(
                **self.base.draw_arguments(recipe, prompts),
                **arguments,
                width=width,
                height=height,
                num_inference_steps=recipe.steps,
                # On the CPU, so that the noise does not depend on the device.
                generator=torch.Generator().manual_seed(recipe.seed),
                callback_on_step_end=end_step,
                output_type="pil",
            ).images[0]
        return image, run

    def _edit(self, recipe: Recipe, inputs: Inputs) -> tuple[Any, dict[str, Any]]:
        """The pipeline of an edit and its arguments: the picture on the canvas, further ones as they are."""
        first, *further = inputs.pictures
        fit = Fit(first.image.size, recipe.working_size)
        mask = None if inputs.mask is None else fit.forward(inputs.mask)
        pictures = [fit.forward(first.rgb), *(picture.rgb for picture in further)]
        pipe, arguments = self.base.edit(self.pipe, recipe, pictures, mask)
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments

    def _previews(self, recorder: Recorder) -> tuple[Image, ...]:
        with torch.no_grad():
            return tuple(to_image(self.base.decode(self.pipe, x_hat_1CHW)) for x_hat_1CHW in recorder.x_hats)

    def _trace(self, record: PictureRecord, recorder: Recorder, routes: dict[str, Routes], run: "_Run") -> Trace:
        branches = {}
        assert run.steerer is not None
        for name, branch in routes.items():
            text = run.encoded[name]
            summed = make_branch(text.prompt, text.tokens, recorder.steps[name], branch, self.layers)
            branches[name] = summed.model_copy(
                update={"steered": run.steerer.done(name), "changed": recorder.changed(name)}
            )
        return Trace(
            schema=TRACE_SCHEMA,
            picture=record.sha256,
            recipe=record.recipe,
            made=record.made,
            layers=("embeddings", *(f"layer {index}" for index in range(1, self.layers))),
            blocks=self.blocks,
            top_k=next(iter(routes.values())).ids_SJTK.shape[-1],
            times=tuple(recorder.times),
            branches=branches,
            adapter=AdapterTrace(own_layers=self.own_layers, trained=self.adapter is not None),
        )

    def _out_of_memory(self, size: tuple[int, int]) -> MemoryLimitError:
        name = self.bundle.index.name
        return MemoryLimitError(
            f"out of memory at {size[0]}x{size[1]} on {self.device}: mos plan {name} shows settings that fit, "
            "or take a smaller --size"
        )


class _Run:
    """One drawing: its prompts, and what is known once diffusers has chosen its times: these, and its steering."""

    def __init__(
        self, pipeline: AdapterPipeline, recipe: Recipe, encoded: dict[str, EncodedText], route_from: Recording | None
    ) -> None:
        self.pipeline, self.recipe, self.encoded, self.route_from = pipeline, recipe, encoded, route_from
        self.times: list[float] = []
        self.steerer: Steerer | None = None

    def steer(self, step: int, branch: str) -> SteeringInput:
        """The steering of a branch at a step."""
        assert self.steerer is not None
        return self.steerer(step, branch)

    def begin(self, t: float) -> None:
        """Resolves the rules for the times of the run, of which `t` is the first.

        Raises:
            UsageError: they do not go with the prompt, the model or the run.
        """
        recipe, pipeline = self.recipe, self.pipeline
        train = pipeline.pipe.scheduler.config.num_train_timesteps
        times = [float(time) / train for time in pipeline.pipe.scheduler.timesteps]
        # An edit may begin later than the scheduler; bf16 rounds the time of a pass.
        first = min(range(len(times)), key=lambda step: abs(times[step] - t))
        self.times = times[first:]
        worded = {name: text for name, text in self.encoded.items() if text.tokens}
        self.steerer = Steerer(
            parse_rules(recipe.routes or ()),
            worded,
            {name: range(len(self.times)) for name in worded},
            steps=recipe.steps,
            blocks=pipeline.blocks,
            layers=pipeline.layers,
            device=pipeline.device,
            transferred=routes_of_run(recipe, self.route_from, pipeline.bundle_hash, worded, self.times),
            own_layers=pipeline.own_layers,
        )


@contextmanager
def _predicted(scheduler: Any) -> Iterator[list[Tensor]]:
    """Within the context, every step of a scheduler appends the clean latents that it predicts, x_t - sigma v."""
    x_hats: list[Tensor] = []
    take_step = scheduler.step

    # With the signature of `step`: pipelines read it.
    @wraps(take_step)
    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken = take_step(model_output, timestep, sample, *args, **kwargs)
        x_hats.append(sample.float() - scheduler.sigmas[scheduler.step_index - 1] * model_output.float())
        return taken

    with replaced(scheduler, "step", step):
        yield x_hats
