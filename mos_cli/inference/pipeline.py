"""The pipeline: from a prompt, and the pictures of an edit, to a picture and its trace.

prompt -> understanding tower -> state bank -> (router + generation tower) x steps -> autoencoder -> picture and trace
pictures to edit -> image encoder, autoencoder ----^

Shapes: P pictures of a batch, B = 1 picture, T context tokens, S steps, J generation blocks, K kept layers, M layers,
C channels, H x W.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mos_cli.bundles.blueprints import network_of
from mos_cli.bundles.bundle import Bundle, verify_bundle
from mos_cli.bundles.loras import LoraFile
from mos_cli.config.recipe import PictureRecord, Recipe, check_blocks, pixels_hash, provenance
from mos_cli.config.settings import smaller
from mos_cli.errors import DeviceError, InputError, MemoryLimitError, ModelError, MosError, UsageError
from mos_cli.images.companions import TRACE_SCHEMA
from mos_cli.images.inputs import Inputs
from mos_cli.inference.drawing import Drawing
from mos_cli.inference.edit_canvas import EditConditioning, prepare_edit, restore_size
from mos_cli.inference.latents import encode_branches, generate_latents
from mos_cli.inference.loading import load_parts
from mos_cli.inference.offload import OffloadedTower, Offloader, memory_limit
from mos_cli.inference.prompt_encoding import PromptEncoder, PromptEncoding, filler, weigh
from mos_cli.planning.memory import Setting
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.rules import BaselineRule, parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.routing.trace import Recording, RecordOptions, Routes, Trace, make_branch
from mos_cli.routing.transfer import routes_of_run
from mos_cli.sampling.feature_cache import caching
from mos_cli.sampling.graphs import CudaCapture, StepGraphs, prompt_bucket
from mos_cli.sampling.guidance import Guidance
from mos_cli.sampling.sampler import Observer, make_sigmas
from mos_cli.towers.attention import AttentionBackend
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.lora import LoraSet
from mos_cli.towers.router import Router
from mos_cli.utils.devices import device_name
from mos_cli.utils.threads import ThreadRecorder


@dataclass(frozen=True)
class _Row:
    """A picture that is drawn: its encoded branches, its steering, and what records it."""

    recipe: Recipe
    encodings: dict[str, PromptEncoding]
    steerer: Steerer
    recorder: Recorder


class MoSPipeline:
    """A loaded bundle.

    Args:
        bundle: the bundle; every file is checked against its hash.
        understanding: folder of the understanding tower, as `fetch_tower` returns it.
        attention: the attention backend; see `choose_attention`.
        setting: quantisation, offload and tiling; a tower is quantised while it is loaded.
        compiled: compile the generation tower's blocks at their first use, which takes up to a minute.
        loras: LoRA files that change the generation tower, with their scales.

    Raises:
        ModelError: the bundle is damaged, or its parts or a LoRA do not fit together.
        InputError: a LoRA cannot be read.
        MemoryLimitError: the device has too little memory for them.
        DeviceError: the device does not support the attention backend, or the blocks cannot be compiled.
    """

    def __init__(
        self,
        bundle: Bundle,
        understanding: Path,
        *,
        device: torch.device,
        precision: str,
        attention: AttentionBackend = "auto",
        setting: Setting = Setting(),
        compiled: bool = False,
        loras: Sequence[LoraFile] = (),
    ) -> None:
        verify_bundle(bundle)
        self.bundle, self.bundle_hash, self.device = bundle, bundle.hash, device
        self.precision, self.setting, self.compiled = precision, setting, compiled
        self.offloader = Offloader(device, setting.offload)
        try:
            parts = load_parts(
                bundle,
                understanding,
                self.offloader,
                precision=precision,
                attention=attention,
                setting=setting,
                loras=LoraSet.of(loras),
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise self._out_of_memory(bundle.index.canvas.native, "take a smaller model") from None
        self.understanding, self.tower, self.attention = parts.understanding, parts.tower, parts.attention
        self.scheduler, self.autoencoder, self.image_encoder = parts.scheduler, parts.autoencoder, parts.image_encoder
        if compiled:
            self._compile()
        self.graphs = self._make_graphs()
        self._offloaded_tower = OffloadedTower(self.understanding, self.offloader)
        self.prompt_encoder = PromptEncoder(
            self.understanding, self.image_encoder, self.tower, bundle.index.name, encode=self._offloaded_tower.encode
        )

    @property
    def router(self) -> Router | None:
        """The router; None where the routes are fixed."""
        return self.tower.router

    def _compile(self) -> None:
        if self.device.type == "cpu" and any(hasattr(weight, "quant_state") for weight in self.tower.parameters()):
            # bitsandbytes packs them at their first use, into another shape than the compiled one.
            raise DeviceError("NF4 weights cannot be compiled on a CPU: draw with --no-compile")
        # With dynamic lengths of prompts, so that a picture does not depend on those drawn before it.
        self.tower.compile_repeated_blocks(dynamic=True)

    def _make_graphs(self) -> StepGraphs:
        """What replays the passes of the generation tower as CUDA graphs, where they can be captured."""
        reasons = {
            "there is no CUDA device": self.device.type != "cuda",
            "offloaded weights have no fixed place": self.setting.offload != "none",
            "the branches of guidance are computed one by one to save memory": not self.setting.batched_guidance,
            "bitsandbytes reads values of int8 products": any(hasattr(w, "SCB") for w in self.tower.parameters()),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is not None:
            return StepGraphs(None, reason)
        return StepGraphs(CudaCapture(self.device)).add_to(self.tower)

    def _bucket(self, recipe: Recipe) -> int | None:
        """The bucket of the prompts of a picture."""
        width, height = (side // (self.autoencoder.factor * self.tower.patch) for side in recipe.working_size)
        bucket = prompt_bucket(self.device, self.attention, width * height)
        return bucket if self.setting.batched_guidance else None

    def encode_ahead(self, recipes: Sequence[Recipe]) -> None:
        """Encodes the prompts of a run at once where the understanding tower is offloaded; else does nothing.

        Raises:
            MemoryLimitError: the device ran out of memory.
        """
        if self.setting.offload == "none":
            return
        try:
            self._offloaded_tower.encode_ahead(
                [prompt for recipe in recipes for prompt in (recipe.prompt, recipe.negative)]
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise self._out_of_memory(recipes[0].working_size, "shorten the prompts") from None

    def draw(
        self,
        recipe: Recipe,
        observers: Sequence[Observer] = (),
        inputs: Inputs | None = None,
        *,
        record_options: RecordOptions = RecordOptions(),
        route_from: Recording | None = None,
    ) -> Drawing:
        """Draws one picture. Its noise depends only on its seed.

        Args:
            inputs: the pictures of an edit, as its recipe describes them; the bundle must support editing.
            record_options: what is recorded in addition to the routes.
            route_from: the run that the recipe takes routes from.

        Raises:
            InputError: a prompt is too long for the understanding tower.
            MemoryLimitError: the device ran out of memory.
            DeviceError: the blocks cannot be compiled.
            UsageError: the recipe, the options and the model do not go together.
        """
        if (batch := recipe.batch) is not None:
            recipes = [recipe if place == batch.place else None for place in range(batch.size)]
            (drawing,) = self.draw_batch(recipes, observers, record_options=record_options, route_from=route_from)
            if isinstance(drawing, MosError):
                raise drawing
            return drawing
        with self._errors(recipe, "--size" if inputs is None else "--max-pixels", inputs):
            with self.offloader.others_onloaded() if inputs is not None else nullcontext():
                conditioning = None if inputs is None else prepare_edit(inputs, recipe, self.autoencoder, self.device)
                row = self._row(recipe, Recorder(record_options), conditioning, route_from)
            z_BCHW, threads = self._sample([row], [row.encodings], observers, conditioning)
            return self._finish(row, z_BCHW, threads, inputs)

    def draw_batch(
        self,
        recipes: Sequence[Recipe | None],
        observers: Sequence[Observer] = (),
        *,
        record_options: RecordOptions = RecordOptions(),
        route_from: Recording | None = None,
    ) -> list[Drawing | MosError]:
        """Draws the pictures of a batch at once. They have one size and one setting, see `BatchRecipe`.

        Args:
            recipes: those of the batch, in their places; None in the place of a picture that is not drawn.
            observers: called once a step, for the last picture.
            record_options, route_from: as `draw`.

        Returns:
            For each recipe its picture, or what is wrong with it; the others are drawn then.

        Raises:
            MosError: as `draw`, for what concerns all of them.
        """
        results: dict[int, Drawing | MosError] = {}
        rows: dict[int, _Row] = {}
        drawn = {place: recipe for place, recipe in enumerate(recipes) if recipe is not None}
        first = next(iter(drawn.values()))
        with self._errors(first, "--batch-size or --size", None):
            for place, recipe in drawn.items():
                recorder = Recorder(record_options, place, len(recipes))
                try:
                    rows[place] = self._row(recipe, recorder, None, route_from)
                except MosError as error:
                    results[place] = error
            if rows:
                encodings = _with_fillers(rows, len(recipes), self.prompt_encoder.max_tokens)
                z_PCHW, threads = self._sample(rows.values(), encodings, observers, None, len(recipes))
                tokens = tuple(tuple(one.bank.bank_BTMD.shape[1] for one in each.values()) for each in encodings)
                for place, row in rows.items():
                    assert row.recipe.batch is not None
                    batch = row.recipe.batch.model_copy(update={"tokens": tokens})
                    recorded = replace(row, recipe=row.recipe.model_copy(update={"batch": batch}))
                    results[place] = self._finish(recorded, z_PCHW[place : place + 1], threads, None)
        return [results[place] for place in drawn]

    def _row(
        self,
        recipe: Recipe,
        recorder: Recorder,
        conditioning: EditConditioning | None,
        route_from: Recording | None,
    ) -> _Row:
        check_blocks(recipe, compiled=self.compiled, regions=recorder.record_options.regions)
        guidance = _guidance(recipe, self.tower)
        encodings = encode_branches(self.prompt_encoder, recipe.prompt, recipe.negative, guidance, conditioning)
        encodings = weigh(encodings, recipe)
        times = self._sigmas(recipe)[:-1].tolist()
        steerer = self._steerer(recipe, times, guidance, encodings, recorder.record_options, route_from)
        return _Row(recipe, encodings, steerer, recorder)

    def _sigmas(self, recipe: Recipe) -> Tensor:
        return make_sigmas(self.scheduler, recipe.steps, 1.0 if recipe.edit is None else recipe.edit.strength)

    def _sample(
        self,
        rows: Collection[_Row],
        encodings: Sequence[Mapping[str, PromptEncoding]],
        observers: Sequence[Observer],
        conditioning: EditConditioning | None,
        pictures: int = 1,
    ) -> tuple[Tensor, ThreadRecorder]:
        """The latents of a batch of pictures, of which `rows` are drawn."""
        by_place = {row.recorder.place: row for row in rows}
        recipe, threads = next(iter(rows)).recipe, ThreadRecorder(self.device)
        observing: list[list[Observer]] = [
            [by_place[place].recorder] if place in by_place else [] for place in range(pictures)
        ]
        observing[-1] += [*observers, threads]
        with ExitStack() as stack:
            for row in rows:
                stack.enter_context(row.recorder.attached(self.tower))
            tower, reset_cache = stack.enter_context(caching(self.tower, recipe.feature_cache, recipe.steps))
            self.graphs.begin(recipe.steps)
            z_PCHW = generate_latents(
                tower,
                encodings,
                self.autoencoder,
                self.device,
                size=recipe.working_size,
                # The noise of a picture that is not drawn makes no difference.
                seeds=[by_place[place].recipe.seed if place in by_place else 0 for place in range(pictures)],
                sigmas=self._sigmas(recipe),
                solver=recipe.solver,
                guidance=_guidance(recipe, self.tower),
                batched_guidance=self.setting.batched_guidance,
                bucket=self._bucket(recipe),
                observers=observing,
                initial=None if conditioning is None else conditioning.initial,
                steer=[by_place[place].steerer if place in by_place else None for place in range(pictures)],
                reset_cache=reset_cache,
            )
        return z_PCHW, threads

    def _finish(self, row: _Row, z_BCHW: Tensor, threads: ThreadRecorder, inputs: Inputs | None) -> Drawing:
        """Decodes a picture, and describes it."""
        recipe, recorder = row.recipe, row.recorder
        with self.offloader.others_onloaded():
            image = to_image(self.autoencoder.decode(z_BCHW))
            previews = tuple(to_image(self.autoencoder.decode(x_hat)) for x_hat in recorder.x_hats)
        if inputs is not None:
            image = restore_size(image, inputs, recipe)
        made = provenance(
            bundle_hash=self.bundle_hash,
            device=device_name(self.device),
            attention=self.attention,
            threads=threads.start,
            thread_changes=tuple(threads.changes) or None,
            tiled=self.setting.tiled,
            batched_guidance=self.setting.batched_guidance,
            compiled=self.compiled,
        )
        record = PictureRecord(
            schema="mos-picture/1",
            recipe=recipe,
            made=made,
            sha256=pixels_hash(image),
            earlier=() if inputs is None else inputs.earlier,
        )
        routes = recorder.routes()
        trace = self._trace(record, row.encodings, recorder, routes, row.steerer)
        return Drawing(image, record, trace, routes, previews)

    @contextmanager
    def _errors(self, recipe: Recipe, smaller_option: str, inputs: Inputs | None) -> Iterator[None]:
        """Errors of torch as those of mos."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError):
            shown = 0 if inputs is None else len(inputs.pictures)
            raise self._out_of_memory(recipe.working_size, f"take a smaller {smaller_option}", shown) from None
        except RuntimeError as error:
            raise _not_compiled(error) if self.compiled else error from None

    def _out_of_memory(self, size: tuple[int, int], otherwise: str, references: int = 0) -> MemoryLimitError:
        """The error for too little memory, with a setting that should fit, if there is one, or other advice."""
        available = memory_limit(self.device) if self.device.type == "cuda" else None
        try:
            network = network_of(self.bundle, precision=self.precision, references=references)
        except ModelError:
            network = None  # It cannot be planned.
        found = None if network is None else smaller(network, size, self.setting, available)
        advice = otherwise
        if found is not None:
            # Tiling has no option of its own: it follows from --max-vram.
            limit = f"--max-vram {available:.4g} " if available else ""
            advice = f"{limit}{found.options} should fit, or {otherwise}"
        return MemoryLimitError(f"out of memory at {size[0]}x{size[1]} on {self.device}: {advice}")

    def _steerer(
        self,
        recipe: Recipe,
        times: list[float],
        guidance: Guidance,
        encodings: dict[str, PromptEncoding],
        record_options: RecordOptions,
        route_from: Recording | None,
    ) -> Steerer:
        rules = parse_rules(recipe.routes or ())
        computed = {name: [step for step, t in enumerate(times) if name in guidance.branches(t)] for name in encodings}
        baseline = any(isinstance(rule, BaselineRule) and rule.name != "shuffle" for rule in rules)
        transferred = routes_of_run(recipe, route_from, self.bundle_hash, encodings, times)
        if self.tower.router is None and (rules or transferred):
            raise UsageError(f"the routes of {recipe.model} are fixed: there is nothing that a rule could steer")
        if record_options.probabilities and (self.tower.router is None or baseline):
            raise UsageError("--trace full records the router's probabilities, and no router is used here")
        return Steerer(
            rules,
            encodings,
            computed,
            steps=recipe.steps,
            blocks=self.tower.depth,
            layers=self.understanding.layers,
            device=self.device,
            transferred=transferred,
        )

    def _trace(
        self,
        record: PictureRecord,
        encodings: dict[str, PromptEncoding],
        recorder: Recorder,
        routes: dict[str, Routes],
        steerer: Steerer,
    ) -> Trace:
        layers = self.understanding.layers
        branches = {}
        for name, branch in routes.items():
            encoding = encodings[name]
            summed = make_branch(encoding.prompt, encoding.tokens, recorder.steps[name], branch, layers)
            branches[name] = summed.model_copy(
                update={"steered": steerer.done(name), "changed": recorder.changed(name)}
            )
        return Trace(
            schema=TRACE_SCHEMA,
            picture=record.sha256,
            recipe=record.recipe,
            made=record.made,
            layers=("embeddings", *(f"layer {index}" for index in range(1, layers))),
            blocks=self.tower.depth,
            top_k=next(iter(routes.values())).ids_SJTK.shape[-1],
            times=tuple(recorder.times),
            branches=branches,
            probabilities=recorder.record_options.probabilities or None,
            regions=recorder.grid,
        )


def _guidance(recipe: Recipe, tower: GenerationTower) -> Guidance:
    image_scale = 1.0 if recipe.edit is None else recipe.edit.image_cfg
    return Guidance.with_network(tower.guidance_max, recipe.cfg, recipe.cfg_interval, image_scale, recipe.negative)


def _with_fillers(rows: Mapping[int, _Row], pictures: int, max_tokens: int) -> list[dict[str, PromptEncoding]]:
    """The encodings of all pictures of a batch, with fillers of the recorded lengths for those that are not drawn.

    Args:
        max_tokens: the most that the understanding tower reads of a prompt.

    Raises:
        InputError: the record of a batch does not fit the model.
    """
    first = next(iter(rows.values()))
    assert first.recipe.batch is not None
    tokens, counts = first.recipe.batch.tokens, [one.bank.bank_BTMD.shape[1] for one in first.encodings.values()]
    if tokens is not None and len(tokens[0]) != len(counts):
        raise InputError("the batch in this recipe has other branches of guidance than the recipe: it is damaged")
    if tokens is not None and (most := max(map(max, tokens))) > max_tokens:
        raise InputError(f"the batch in this recipe has {most} tokens, the model reads {max_tokens}: it is damaged")
    return [
        rows[place].encodings if place in rows else filler(first.encodings, counts if tokens is None else tokens[place])
        for place in range(pictures)
    ]


def _not_compiled(error: RuntimeError) -> Exception:
    """The DeviceError for an error of the compiler; other errors are returned as they are."""
    from torch._dynamo.exc import ShortenTraceback, Unsupported

    # ShortenTraceback is the base of errors of a backend, for example on a GPU that is too old for Triton.
    if not isinstance(error, ShortenTraceback | Unsupported):
        return error
    reason = str(error).strip().splitlines()[0]
    return DeviceError(f"the blocks cannot be compiled here ({reason}): install a C++ compiler, or drop --compile")
