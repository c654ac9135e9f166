"""The one place where a prompt becomes a picture.

prompt -> understanding tower -> state bank -> (router + generation tower) x steps -> autoencoder -> picture and trace
pictures to edit -> eyes, autoencoder ----^

Shapes: B = 1 picture, T context tokens, S steps, J generation blocks, K kept layers, M layers, C channels, H x W.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mos_cli.bundles.blueprints import network_of
from mos_cli.bundles.bundle import Bundle, verify_bundle
from mos_cli.config.recipe import PictureRecord, Recipe, check_blocks, pixels_hash, provenance
from mos_cli.config.settings import TraceLevel, smaller
from mos_cli.errors import DeviceError, MemoryLimitError, ModelError, UsageError
from mos_cli.images.inputs import Inputs
from mos_cli.images.outputs import animation, companions, png
from mos_cli.inference.edit_canvas import EditConditioning, prepare_edit, restore_size
from mos_cli.inference.loading import load_parts
from mos_cli.inference.offload import OffloadedTower, Offloader, card
from mos_cli.inference.prompt_encoding import PromptEncoder, PromptEncoding
from mos_cli.planning.memory import Setting
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.rules import BaselineRule, parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.routing.trace import Recording, RecordOptions, Routes, Trace, make_branch, trace_files
from mos_cli.routing.transfer import check_model, choices_hash, transfer_routes
from mos_cli.sampling.branches import Predictor
from mos_cli.sampling.feature_cache import caching
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, WITHOUT_IMAGE, Guidance, Observer, make_sigmas, sample
from mos_cli.towers.attention import AttentionBackend
from mos_cli.towers.autoencoder import Autoencoder, to_image
from mos_cli.utils.devices import device_name, device_threads
from mos_cli.utils.files import refuse_existing, write_together


@dataclass(frozen=True)
class Drawing:
    """A finished picture, its record (recipe and versions), and its trace: a head, and the routes of each branch."""

    image: Image.Image
    record: PictureRecord
    trace: Trace
    routes: dict[str, Routes]
    previews: tuple[Image.Image, ...] = ()
    """What the tower expected the picture to be, step by step, where it was requested."""

    def save(self, path: str | Path, *, trace: TraceLevel = "topk", overwrite: bool = False) -> list[Path]:
        """Writes the PNG with its recipe, and its trace and previews beside it: all of them or none.

        Args:
            trace: "off" for none, "summary" for the head alone; otherwise also all arrays that were recorded.

        Returns:
            The files written, the PNG first.

        Raises:
            UsageError: the name does not end in .png.
            InputError: a file is there already and may not be overwritten, or the folder cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"{path}: pictures are written as PNG, choose a name that ends in .png")
        for file in (path, *companions(path)):
            refuse_existing(file, overwrite)
        files = {path: png(self.image, self.record)}
        if trace != "off":
            files |= trace_files(self.trace, None if trace == "summary" else self.routes, path)
        if self.previews:
            files[companions(path).previews] = animation(self.previews)
        replaced = path.is_file()
        write_together(files, overwrite)
        for other in companions(path):
            if replaced and other not in files:
                # What a replaced picture had beside it would describe the new one wrongly.
                other.unlink(missing_ok=True)
        return list(files)


def encode_branches(
    prompt_encoder: PromptEncoder,
    prompt: str,
    negative: str,
    guidance: Guidance,
    conditioning: EditConditioning | None = None,
) -> dict[str, PromptEncoding]:
    """What each of guidance's branches reads, by branch; of an edit also what is seen of its pictures."""
    encodings = {POSITIVE: prompt_encoder.encode(prompt), NEGATIVE: prompt_encoder.encode(negative)}
    if conditioning is not None:
        unseen = encodings[NEGATIVE]
        encodings = prompt_encoder.encode_with_images(encodings, conditioning.pictures, conditioning.references) | {
            WITHOUT_IMAGE: unseen
        }
    return {branch: encodings[branch] for branch in guidance.branches(guidance.interval[0])}


def make_noise(autoencoder: Autoencoder, size: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """The noise z_1 of a picture of `size` (width, height) in pixels, [1, C, H, W].

    It is made on the CPU, so that it depends on the seed and not on the device.
    """
    width, height = (side // autoencoder.factor for side in size)
    shape = (1, autoencoder.channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def generate_latents(
    tower: Predictor,
    encodings: Mapping[str, PromptEncoding],
    autoencoder: Autoencoder,
    device: torch.device,
    *,
    size: tuple[int, int],
    seed: int,
    **sampling: Any,
) -> Tensor:
    """The latent of one picture, [1, C, H, W], from its seed and what its branches read.

    Args:
        size: width and height in pixels.
        sampling: the other arguments of `sample`.
    """
    banks = {branch: encoding.bank for branch, encoding in encodings.items()}
    return sample(tower, make_noise(autoencoder, size, seed, device), banks, **sampling)


class MoSPipeline:
    """A bundle, loaded and ready to draw.

    Args:
        bundle: where the weights are; every file is checked against its hash.
        understanding: folder of the understanding tower, as `fetch_tower` returns it.
        attention: what computes it; see `choose_attention`.
        setting: how it is laid out; a tower is quantised while it is loaded.
        compiled: the generation tower's blocks are compiled when they are first used, which takes a while.

    Raises:
        ModelError: the bundle is damaged, or its parts do not fit together.
        MemoryLimitError: the device has too little memory for them.
        DeviceError: what is to compute the attention cannot do so here, or the blocks cannot be compiled.
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
    ) -> None:
        verify_bundle(bundle)
        self.bundle, self.bundle_hash, self.device = bundle, bundle.hash, device
        self.precision, self.setting, self.compiled = precision, setting, compiled
        self.offloader = Offloader(device, setting.offload)
        try:
            parts = load_parts(
                bundle, understanding, self.offloader, precision=precision, attention=attention, setting=setting
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise self._out_of_memory(bundle.index.canvas.native, "take a smaller model") from None
        self.understanding, self.tower, self.attention = parts.understanding, parts.tower, parts.attention
        self.scheduler, self.autoencoder, self.eyes = parts.scheduler, parts.autoencoder, parts.eyes
        if compiled:
            self._compile()
        self._offloaded_tower = OffloadedTower(self.understanding, self.offloader)
        self.prompt_encoder = PromptEncoder(
            self.understanding, self.eyes, self.tower, bundle.index.name, encode=self._offloaded_tower.encode
        )

    def _compile(self) -> None:
        if self.device.type == "cpu" and any(hasattr(weight, "quant_state") for weight in self.tower.parameters()):
            # bitsandbytes packs them at their first use: they are of another shape than those that were compiled.
            raise DeviceError("NF4 weights cannot be compiled on a CPU: draw with --no-compile")
        # For any length of a prompt at once: a picture does not depend on those drawn before it.
        self.tower.compile_repeated_blocks(dynamic=True)

    def encode_ahead(self, recipes: Sequence[Recipe]) -> None:
        """Reads the prompts of a run at once where the understanding tower would have to come back for each.

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
        """Draws one picture. Its noise depends on its own seed alone, made on the CPU whatever the device.

        Args:
            inputs: the pictures of an edit, as its recipe describes them; the bundle must be one that edits.
            record_options: what is recorded beside the routes.
            route_from: the run that the recipe takes choices from.

        Raises:
            InputError: a prompt is longer than the understanding tower reads.
            MemoryLimitError: the device ran out of memory.
            DeviceError: the blocks are to be compiled, and cannot be.
            UsageError: compiled blocks cannot record what is requested.
        """
        check_blocks(recipe, compiled=self.compiled, regions=record_options.regions)
        guidance = Guidance(recipe.cfg, recipe.cfg_interval, 1.0 if recipe.edit is None else recipe.edit.image_cfg)
        recorder, conditioning = Recorder(record_options), None
        try:
            with self.offloader.others_onloaded() if inputs is not None else nullcontext():
                conditioning = None if inputs is None else prepare_edit(inputs, recipe, self.autoencoder, self.device)
                encodings = encode_branches(self.prompt_encoder, recipe.prompt, recipe.negative, guidance, conditioning)
            sigmas = make_sigmas(self.scheduler, recipe.steps, 1.0 if recipe.edit is None else recipe.edit.strength)
            steerer = self._steerer(recipe, sigmas[:-1].tolist(), guidance, encodings, record_options, route_from)
            with recorder.watching(self.tower), caching(self.tower, recipe.feature_cache, recipe.steps) as cached:
                tower, reset_cache = cached
                z = generate_latents(
                    tower,
                    encodings,
                    self.autoencoder,
                    self.device,
                    size=recipe.working_size,
                    seed=recipe.seed,
                    sigmas=sigmas,
                    solver=recipe.solver,
                    guidance=guidance,
                    together=self.setting.together,
                    observers=[recorder, *observers],
                    initial=None if conditioning is None else conditioning.initial,
                    steer=steerer,
                    reset_cache=reset_cache,
                )
            with self.offloader.others_onloaded():
                image = to_image(self.autoencoder.decode(z))
                previews = tuple(to_image(self.autoencoder.decode(x_hat)) for x_hat in recorder.x_hats)
            if inputs is not None:
                image = restore_size(image, inputs, recipe)
        except (torch.OutOfMemoryError, MemoryError):
            option, shown = ("--size", 0) if inputs is None else ("--max-pixels", len(inputs.pictures))
            raise self._out_of_memory(recipe.working_size, f"take a smaller {option}", shown) from None
        except RuntimeError as error:
            raise _not_compiled(error) if self.compiled else error from None
        made = provenance(
            bundle_hash=self.bundle_hash,
            device=device_name(self.device),
            attention=self.attention,
            threads=device_threads(self.device),
            tiled=self.setting.tiled,
            together=self.setting.together,
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
        return Drawing(image, record, self._trace(record, encodings, recorder, routes, steerer), routes, previews)

    def _out_of_memory(self, size: tuple[int, int], otherwise: str, references: int = 0) -> MemoryLimitError:
        """What to do where memory ran out: the setting that should fit, if there is one, or something else."""
        room = card(self.device) if self.device.type == "cuda" else None
        try:
            network = network_of(self.bundle, precision=self.precision, references=references)
        except ModelError:  # it cannot be planned: what else there is to do is said
            network = None
        found = None if network is None else smaller(network, size, self.setting, room)
        advice = otherwise
        if found is not None:
            # Tiles follow from the memory alone.
            limit = f"--max-vram {room:.4g} " if room else ""
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
        rules, given = parse_rules(recipe.routes or ()), None
        computed = {name: [step for step, t in enumerate(times) if name in guidance.branches(t)] for name in encodings}
        baseline = any(isinstance(rule, BaselineRule) and rule.name != "shuffle" for rule in rules)
        if recipe.route_from is not None:
            if route_from is None:
                raise UsageError(f"{recipe.prompt!r} takes its routes from another run: name it with --route-from FILE")
            if choices_hash(route_from) != recipe.route_from.sha256:
                raise UsageError(f"{route_from.path} is not the run that {recipe.prompt!r} takes its routes from")
            check_model(route_from, recipe.model, self.bundle_hash)
            given = transfer_routes(route_from, encodings, times, recipe.route_from.until)
        if self.tower.router is None and (rules or given):
            raise UsageError(f"the routes of {recipe.model} are fixed: there is nothing that a rule could steer")
        if record_options.probabilities and (self.tower.router is None or baseline):
            raise UsageError("--trace full records what the router thinks of every layer, and no router is asked here")
        return Steerer(
            rules,
            encodings,
            computed,
            steps=recipe.steps,
            blocks=self.tower.depth,
            layers=self.understanding.layers,
            device=self.device,
            given=given,
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
            schema="mos-trace/1",
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


def _not_compiled(error: RuntimeError) -> Exception:
    """What to say of an error that compiling may have caused."""
    from torch._dynamo.exc import ShortenTraceback, Unsupported

    # The first are what a backend raises, where a card is too old for Triton, or there is none, too.
    if not isinstance(error, ShortenTraceback | Unsupported):
        return error
    reason = str(error).strip().splitlines()[0]
    return DeviceError(f"the blocks cannot be compiled here ({reason}): install a C++ compiler, or drop --compile")
