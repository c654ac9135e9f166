"""From the settings of a run to recipes, checked before a model is loaded.

The command line and the Python interface share these functions. None loads weights, and torch is imported only to look
at the device.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.blueprints import network_of
from mos_cli.bundles.bundle import Bundle, edit_defaults
from mos_cli.bundles.loras import LoraFile, find_lora, parse_lora
from mos_cli.bundles.shapes import read_generation
from mos_cli.bundles.sources import tower_folder
from mos_cli.bundles.specs import Canvas, Defaults
from mos_cli.config.recipe import (
    Expansion,
    LoraRecipe,
    MaskRecipe,
    Recipe,
    RouteSource,
    check_blocks,
    check_guidance,
    make_recipe,
    pixels_hash,
)
from mos_cli.config.settings import RunSettings, available_memory, fitted, parse_size
from mos_cli.errors import MosError, UsageError
from mos_cli.images.inputs import Inputs, describe_edit
from mos_cli.images.masks import read_mask
from mos_cli.images.pictures import Picture, PictureFile, read_picture, working_size
from mos_cli.planning.candidates import parse_quant
from mos_cli.planning.memory import Setting, largest_batch
from mos_cli.routing.prompt_weights import branch_weights, check_weights, parse_weights
from mos_cli.routing.rules import Rule, check_numbers, no_such_word, parse_rules, tokens_of
from mos_cli.routing.trace import Recording, RecordOptions, load_recording
from mos_cli.routing.transfer import check_model, choices_hash
from mos_cli.utils.devices import choose_device, choose_precision
from mos_cli.utils.files import sha256_of

if TYPE_CHECKING:
    import torch


def random_seed() -> int:
    """A seed where none is requested, 0 to 2**32 - 1."""
    return int.from_bytes(os.urandom(4))


def recipe_fields(settings: RunSettings, bundle: Bundle, defaults: Defaults) -> dict[str, Any]:
    """The fields of a recipe that settings decide, without its size; what is not set comes from the bundle's defaults.

    Raises:
        UsageError: a quantisation, a route rule or a weight in the negative prompt is not understood.
        DeviceError: the device is not there.
    """
    precision, solver = settings.precision, settings.solver
    if precision == "auto":
        precision = choose_precision(choose_device(settings.device))
    if isinstance(bundle, AdapterBundle):
        _check_base_model(settings, bundle)
        solver = "euler"
    negative, negative_weights = parse_weights(settings.negative)
    return {
        "model": bundle.ref,
        "negative": negative,
        "negative_weights": negative_weights,
        "steps": settings.steps or defaults.steps,
        "solver": solver,
        "cfg": defaults.cfg if settings.cfg is None else settings.cfg,
        "cfg_interval": settings.cfg_interval or defaults.cfg_interval,
        "precision": precision,
        "quant": None if settings.quant == "none" else ",".join(parse_quant(settings.quant)),
        "feature_cache": settings.feature_cache,
        "routes": tuple(map(str, parse_rules(settings.routes))) if settings.routes else None,
        "loras": lora_recipes(settings),
    }


def _check_base_model(settings: RunSettings, bundle: AdapterBundle) -> None:
    """Raises UsageError for a setting that a base model's pipeline does not have, or that has no effect there."""
    name, cfg = bundle.index.name, settings.cfg
    idle = {
        "--solver ab2": settings.solver == "ab2" and "solver" in settings.model_fields_set,
        "--feature-cache": settings.feature_cache not in (None, 1),
        "--compile": settings.compile,
        "--attention xformers": settings.attention == "xformers",
        "--offload blocks": settings.offload == "blocks",
        "--cfg-interval": settings.cfg_interval is not None,
    }
    for option, wanted in idle.items():
        if wanted:
            raise UsageError(f"{name} is drawn by its pipeline in diffusers, which has no {option}: leave it out")
    if cfg is not None and cfg < 1:
        raise UsageError(f"--cfg {cfg:g}: {name} takes 1, which turns guidance off, or more")
    if cfg is not None and cfg != 1 and bundle.index.distilled and bundle.index.pipeline == "Flux2KleinPipeline":
        raise UsageError(f"{name} is distilled, and guidance has no effect on it: leave --cfg at 1")


def lora_recipes(settings: RunSettings) -> tuple[LoraRecipe, ...] | None:
    """What a recipe says of the LoRAs of a run.

    Raises:
        UsageError: the scale of one is no number.
        InputError: there is no such file.
    """
    files = [parse_lora(text) for text in settings.loras or ()]
    return tuple(LoraRecipe(name=f.path.name, sha256=sha256_of(f.path), scale=f.scale) for f in files) or None


def with_loras(settings: RunSettings, recipe: Recipe, given: Sequence[str]) -> RunSettings:
    """The settings with the LoRAs that a recipe was drawn with, found by their hashes.

    Args:
        given: files named by the user, where they are not found otherwise.

    Raises:
        InputError: one is not found.
    """
    files = [parse_lora(text) for text in given]
    found = [LoraFile(find_lora(lora.name, lora.sha256, files), lora.scale) for lora in recipe.loras or ()]
    return settings.model_copy(update={"loras": tuple(map(str, found)) or None})


def generation_fields(
    settings: RunSettings, bundle: Bundle, size: tuple[int, int], *, cfg_interval: Any
) -> dict[str, Any]:
    """The fields of the recipe of a generated picture, all but prompt, seed and `route_from`.

    Args:
        size: width and height in pixels, checked against the bundle's canvas.
        cfg_interval: the interval that this run sets itself; one from a preset may have no effect.

    Raises:
        UsageError, DeviceError: as `recipe_fields`; or a setting of guidance has no effect.
    """
    fields = recipe_fields(settings, bundle, bundle.index.defaults)
    check_guidance(fields["cfg"], {"--negative": settings.negative, "--cfg-interval": cfg_interval})
    return fields | {"width": size[0], "height": size[1]}


@dataclass(frozen=True)
class EditRequest:
    """What an edit needs beside its pictures and the settings of every run; the fields are the options of `mos edit`.

    Raises:
        UsageError: two of them exclude each other.
    """

    size: str | None = None
    max_pixels: int | None = None
    mask: PictureFile | Picture | None = None
    invert_mask: bool = False
    feather: float = 0.0
    composite: bool = False
    keep_alpha: bool = False
    strength: float = 1.0
    image_cfg: float | None = None
    expand: Expansion | None = None

    def __post_init__(self) -> None:
        if self.expand is not None:
            excluded = {"--size": self.size, "--mask": self.mask, "--composite": self.composite}
            for option, value in (excluded | {"--keep-alpha": self.keep_alpha}).items():
                if value:
                    raise UsageError(f"--expand keeps the picture and draws around it: leave {option} out")
        if self.size is not None and self.max_pixels is not None:
            raise UsageError("--size and --max-pixels exclude each other: choose one")
        if self.mask is None and (self.invert_mask or self.feather):
            raise UsageError("--invert-mask and --feather say what to do with a --mask: name one")
        if self.mask is not None and self.composite:
            raise UsageError(
                "--composite is for edits without a mask: with one, what it leaves out is kept in any case"
            )

    def with_mask(self, inputs: Inputs) -> Inputs:
        """The pictures of the edit with its mask, at the size of the first, or the first expanded.

        Raises:
            InputError, UsageError: the mask cannot be read or does not fit, or the picture would be too large.
        """
        if self.expand is not None:
            return inputs.expanded(self.expand)
        if self.mask is None:
            return inputs
        size = inputs.pictures[0].image.size
        mask = self.mask if isinstance(self.mask, Picture) else read_picture(self.mask)
        read = read_mask(mask, size, invert=self.invert_mask, feather=self.feather)
        return replace(inputs, mask=read, mask_notes=mask.notes)

    def lost(self, inputs: Inputs, size: tuple[int, int]) -> str | None:
        """A line about transparency that a result of `size` does not have; None if it keeps all it can."""
        source = inputs.pictures[0].image
        composited = (self.composite or self.mask is not None or self.expand is not None) and size == source.size
        if self.keep_alpha or composited or source.mode != "RGBA":
            return None
        return "the picture is partly transparent and the result is opaque: --keep-alpha keeps the transparency"

    def working_size(self, inputs: Inputs, canvas: Canvas) -> tuple[int, int]:
        """Width and height at which the model draws; raises UsageError."""
        if self.size is not None:
            return parse_size(self.size, canvas)
        return working_size(inputs.pictures[0].image.size, canvas, self.max_pixels)


def edit_fields(
    settings: RunSettings, bundle: Bundle, request: EditRequest, inputs: Inputs, *, cfg_interval: Any
) -> dict[str, Any]:
    """The fields of the recipe of an edit, as `generation_fields`; `inputs` include the mask."""
    defaults, canvas = edit_defaults(bundle), request.working_size(inputs, bundle.index.canvas)
    fields = recipe_fields(settings, bundle, defaults)
    image_cfg = defaults.image_cfg if request.image_cfg is None else request.image_cfg
    options = {"--negative": settings.negative, "--cfg-interval": cfg_interval}
    check_guidance(fields["cfg"], options, image_cfg)
    mask = None
    if inputs.mask is not None and request.expand is None:
        mask = MaskRecipe(sha256=pixels_hash(inputs.mask), invert=request.invert_mask, feather=request.feather)
    edit = describe_edit(
        inputs,
        canvas=canvas,
        image_cfg=image_cfg,
        strength=request.strength,
        mask=mask,
        composite=request.composite or inputs.mask is not None,
        keep_alpha=request.keep_alpha and inputs.pictures[0].image.mode == "RGBA",
        expand=request.expand,
    )
    width, height = inputs.pictures[0].image.size if request.size is None else canvas
    return fields | {"width": width, "height": height, "edit": edit}


def route_source(
    route_from: Path | None, until: float | None, bundle: Bundle
) -> tuple[Recording | None, RouteSource | None]:
    """The run whose choices of layers are taken over, and what a recipe says of it.

    Args:
        until: for what part of the steps, above 0 to 1; None for all of them.

    Raises:
        UsageError: there is a part but no run, or it is out of range.
        InputError: it is no run of this model.
    """
    if route_from is None:
        if until is not None:
            raise UsageError("--route-until says how far to follow another run: name it with --route-from")
        return None, None
    until = 1.0 if until is None else until
    if not 0 < until <= 1:
        raise UsageError(f"--route-until {until:.4g}: write a share of the steps above 0 and up to 1")
    recording = load_recording(route_from)
    check_model(recording, bundle.index.name, bundle.hash)
    return recording, RouteSource(sha256=choices_hash(recording), until=until)


def check_recipe(
    recipe: Recipe, bundle: Bundle, *, compiled: bool, regions: bool, options: RecordOptions = RecordOptions()
) -> None:
    """Raises UsageError for what the bundle cannot draw, as far as its configs tell, before it is loaded."""
    check_blocks(recipe, compiled=compiled, regions=regions)
    if isinstance(bundle, AdapterBundle):
        _check_adapter_recipe(recipe, bundle, options, regions=regions)
        return
    if recipe.routes is not None:
        tower = read_generation(bundle.folder / "generation")
        numbers = {"layers": tower.states_layers, "blocks": tower.depth, "steps": recipe.steps}
        check_numbers(parse_rules(recipe.routes), **numbers)


def check_prompts(recipes: Sequence[Recipe], bundle: Bundle) -> list[MosError | None] | None:
    """What drawing would refuse of the prompts and of the words of rules, without loading weights.

    Pictures of an edit are not counted as tokens.

    Returns:
        An error or None for each recipe; None if the understanding tower is not in the cache, and for base models,
        whose pipelines encode prompts in ways of their own.
    """
    from mos_cli.utils.quiet import quieten

    if isinstance(bundle, AdapterBundle) or not (folder := tower_folder(bundle.index.understanding)).is_dir():
        return None
    quieten()
    from mos_cli.towers.tokens import PromptTokenizer, Token

    tokenizer = PromptTokenizer(folder)
    tokens_of_prompt = lru_cache(tokenizer.tokens)

    def problem(recipe: Recipe) -> MosError | None:
        try:
            number = 0 if recipe.edit is None else len(recipe.edit.sources)
            pictures = tuple(Token(f"picture {n + 1}", 0, 0, (n, 0, 0)) for n in range(number))
            prompts = {prompt: tokens_of_prompt(prompt) + pictures for prompt in (recipe.prompt, recipe.negative)}
            for branch, prompt in {"positive": recipe.prompt, "negative": recipe.negative}.items():
                check_weights(branch_weights(recipe, branch), prompt, prompts[prompt])
            for rule in parse_rules(recipe.routes or ()):
                if isinstance(rule, Rule) and not any(tokens_of(rule, *encoded) for encoded in prompts.items()):
                    raise no_such_word(rule, recipe.prompt, prompts[recipe.prompt])
        except MosError as error:
            return error
        return None

    return [problem(recipe) for recipe in recipes]


def _check_adapter_recipe(recipe: Recipe, bundle: AdapterBundle, options: RecordOptions, *, regions: bool) -> None:
    index, edit = bundle.index, recipe.edit
    unrecorded = {
        "--regions": regions or options.regions,
        "--trace full": options.probabilities,
    }
    for option, wanted in unrecorded.items():
        if wanted:
            raise UsageError(f"{option} is not recorded of a base model such as {index.name}: leave it out")
    if recipe.weights or recipe.negative_weights:
        raise UsageError(
            f"weights in prompts scale the routed context of a word, and {index.name} adds routes to a text that it "
            r"reads itself: leave them out, or write \( for the character"
        )
    numbers = {"layers": index.layers, "blocks": index.blocks, "steps": recipe.steps, "slots": len(index.own_layers)}
    check_numbers(parse_rules(recipe.routes or ()), **numbers)
    if edit is None:
        return
    if edit.image_cfg != 1:
        raise UsageError(f"{index.name} has no guidance towards the picture: leave --image-cfg out")
    if index.pipeline == "ZImagePipeline":
        if len(edit.sources) > 1:
            raise UsageError(f"{index.name} edits one picture and takes no references: leave --reference out")
        if edit.strength == 1 and edit.mask is None and edit.expand is None:
            raise UsageError(
                f"{index.name} draws over the noised picture, of which --strength 1 leaves nothing: "
                "take --strength 0.6, and describe the whole picture"
            )
    masked = edit.mask is not None or edit.expand is not None
    if index.pipeline == "Flux2KleinPipeline" and (masked or edit.strength < 1):
        width, height = edit.canvas
        if width * height > 1024 * 1024:
            raise UsageError(f"{index.name} edits with a mask at 1024 x 1024 pixels at most: take a smaller --size")


def batch_size(
    settings: RunSettings, bundle: Bundle, size: tuple[int, int], *, precision: str, quant: str | None
) -> int:
    """How many pictures of a size are drawn at once; on a CPU, where it is hardly faster, "auto" is 1.

    Raises:
        UsageError: several are asked for, of a base model.
    """
    if settings.batch_size == 1:
        return 1
    if isinstance(bundle, AdapterBundle):
        if settings.batch_size == "auto":
            return 1
        raise UsageError(f"{bundle.index.name} is drawn by its pipeline in diffusers, one by one: drop --batch-size")
    if settings.batch_size != "auto":
        return settings.batch_size
    device = choose_device(settings.device)
    if device.type == "cpu":
        return 1
    gib = settings.max_vram if isinstance(settings.max_vram, float) else available_memory(device)
    setting = Setting(*parse_quant(quant or "none"), settings.offload, settings.tiled, settings.batched_guidance)
    return largest_batch(network_of(bundle, precision=precision), setting, size, gib)


def check_device(settings: RunSettings, recipe: Recipe, bundle: Bundle) -> None:
    """Raises DeviceError for what the device cannot do, as far as it is known before weights are loaded."""
    device = choose_device(settings.device)
    if settings.attention == "xformers" and not isinstance(bundle, AdapterBundle):
        from mos_cli.utils.quiet import quieten

        quieten()
        from mos_cli.inference.loading import DTYPES
        from mos_cli.towers.attention import no_operator, xformers_supports

        tower = read_generation(bundle.folder / "generation")
        for width in (tower.width // tower.heads, tower.router_width // tower.router_heads):
            if not xformers_supports(device, DTYPES[recipe.precision], width):
                raise no_operator(device, DTYPES[recipe.precision], width)


def vary_recipe(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """A recipe with some fields changed, those of its edit among them; what is changed is drawn alone.

    Raises:
        UsageError: a field is not there, or its value is out of range.
    """
    fields, changed = recipe.model_dump(), dict(changes)
    if recipe.edit is not None:
        fields["edit"] |= {key: changed.pop(key) for key in ("image_cfg", "strength") if key in changed}
    for name, weights in {"prompt": "weights", "negative": "negative_weights"}.items():
        if name in changed:
            changed[name], fields[weights] = parse_weights(changed[name])
    if "prompt" in changed:
        fields["template"] = None
    if changed:
        # A variation is drawn alone, as its seed is without a batch.
        fields["batch"] = None
    return make_recipe(**fields | changed)


@dataclass(frozen=True)
class FittedSettings:
    """Settings chosen for a memory limit, and what they were chosen for: `gib` on `device`, in `precision`."""

    settings: RunSettings
    device: "torch.device"
    gib: float
    precision: str


def needs_fitting(settings: RunSettings) -> bool:
    """Whether the memory limit leaves settings to be chosen.

    Raises:
        UsageError: a number for `max_vram`, or something to offload, where nothing is drawn on a GPU.
        DeviceError: the device is not there.
    """
    if settings.max_vram is None and settings.offload == "none":
        return False
    auto = settings.max_vram == "auto"
    if choose_device(settings.device).type == "cpu" and (settings.offload != "none" or not auto):
        limited = settings.max_vram is not None and not auto
        name, way_out = ("max_vram", "auto takes what fits this machine") if limited else ("offload", "none")
        option = f"--{name.replace('_', '-')}"
        origins = f"{option}, MOS_{name.upper()}, a preset or the config file"
        raise UsageError(f"{name} ({origins}) needs a GPU, and this run is on a CPU: {option} {way_out}")
    return settings.max_vram is not None


def fit_settings(
    bundle: Bundle,
    settings: RunSettings,
    size: tuple[int, int],
    *,
    quant: str | None = None,
    precision: str | None = None,
    references: int = 0,
) -> FittedSettings:
    """The fastest settings within `max_vram`, as `mos plan` finds them.

    Args:
        settings: those of a run that `needs_fitting`.
        size: width and height at which the model draws, in pixels.
        quant: how the towers are quantised in any case; by default as the settings say, where they do.
        precision: bf16 or fp32; by default as the settings say.
        references: how many pictures are shown.

    Returns:
        Settings whose `max_vram` is a number on a GPU, and None on a CPU.

    Raises:
        MemoryLimitError: nothing fits.
    """
    device = choose_device(settings.device)
    on_cpu = device.type == "cpu"
    if quant is None and "quant" in settings.model_fields_set:
        quant = settings.quant
    if precision is None:
        precision = choose_precision(device) if settings.precision == "auto" else settings.precision
    gib = settings.max_vram if isinstance(settings.max_vram, float) else available_memory(device)
    numbered = settings.model_copy(update={"max_vram": gib})
    network = network_of(bundle, precision=precision, references=references)
    chosen = fitted(numbered, network, size, quant, on_cpu=on_cpu)
    chosen = chosen.model_copy(update={"max_vram": None}) if on_cpu else chosen
    return FittedSettings(chosen, device, gib, precision)
