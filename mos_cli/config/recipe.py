"""The recipe of a picture, with everything needed to draw it again, and the record in its file.

One pydantic model writes and reads it.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, ValidationError, field_validator, model_validator

from mos_cli import __version__
from mos_cli.errors import UsageError
from mos_cli.utils.migration import Migrated
from mos_cli.utils.validation import MAX_BATCH, Frozen, Interval, RouteRules, Sha256, Solver, first_problem

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100
MAX_THREADS = 1024
"""The limit for a record's threads: libraries end the process if they cannot start as many as requested."""
MAX_EXPANSION = 16_384
"""The most pixels that are added on a side of a picture."""
MAX_TOKENS = 4096
"""The most tokens of a prompt of a batch."""
MAX_WEIGHT = 10.0
"""The largest weight of a word in a prompt."""
Threads = Annotated[int, Field(ge=1, le=MAX_THREADS)]
ThreadChanges = tuple[tuple[NonNegativeInt, Threads], ...]
"""Changes of the number of CPU threads while a picture is drawn: (number of the step, threads from it on)."""


class SourcePicture(Frozen):
    """A picture that was edited or used as a reference: the sha256 of its pixels (see `pixels_hash`) and its size."""

    sha256: Sha256
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class MaskRecipe(Frozen):
    """The mask of an edit: the sha256 of its pixels as it was used, and how its file was read."""

    sha256: Sha256
    invert: bool = False
    feather: float = Field(default=0.0, ge=0)


class Expansion(Frozen):
    """The pixels that are added to the sides of a picture before it is edited."""

    left: int = Field(default=0, ge=0, le=MAX_EXPANSION)
    top: int = Field(default=0, ge=0, le=MAX_EXPANSION)
    right: int = Field(default=0, ge=0, le=MAX_EXPANSION)
    bottom: int = Field(default=0, ge=0, le=MAX_EXPANSION)

    @model_validator(mode="after")
    def _adds_something(self) -> Self:
        if not any((self.left, self.top, self.right, self.bottom)):
            raise ValueError("at least one side grows")
        return self

    def grown(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a picture with them."""
        return size[0] + self.left + self.right, size[1] + self.top + self.bottom


class EditRecipe(Frozen):
    """The part of a recipe that only edits have.

    `sources` are the edited picture and further references. `canvas` is the size at which the model draws, `strength`
    the time at which it begins (1 = from noise alone). With `composite`, pixels outside the mask, or without one
    outside the estimated change, are copied from the source. With `keep_alpha`, the result is as transparent as the
    source. With `expand`, the edited picture is grown first, and only what is new may change.
    """

    sources: tuple[SourcePicture, ...] = Field(min_length=1)
    canvas: tuple[int, int]
    image_cfg: float = Field(ge=0, le=MAX_GUIDANCE)
    strength: float = Field(gt=0, le=1)
    mask: MaskRecipe | None = None
    composite: bool = False
    keep_alpha: bool = False
    expand: Expansion | None = None

    @property
    def source_size(self) -> tuple[int, int]:
        """Width and height of the edited picture, grown."""
        size = (self.sources[0].width, self.sources[0].height)
        return size if self.expand is None else self.expand.grown(size)

    @model_validator(mode="after")
    def _what_is_new_is_the_mask(self) -> Self:
        if self.expand is not None and (self.mask is not None or self.keep_alpha or not self.composite):
            raise ValueError("expand: the mask of an expanded picture is what is new, and the picture is kept")
        return self


class RouteSource(Frozen):
    """The run whose routes are taken over: their sha256, and for which first part of the steps."""

    sha256: Sha256
    until: float = Field(default=1.0, gt=0, le=1)


class LoraRecipe(Frozen):
    """A LoRA that changed the model: the name and sha256 of its file, and its scale."""

    name: str
    sha256: Sha256
    scale: float = 1.0


class PromptWeight(Frozen):
    """A scale of the routed context of the tokens of the characters `start` to `end` of a prompt, `end` excluded."""

    start: int = Field(ge=0)
    end: int = Field(ge=1)
    weight: float = Field(ge=0, le=MAX_WEIGHT)


PromptWeights = Annotated[tuple[PromptWeight, ...], Field(min_length=1)]


class BatchRecipe(Frozen):
    """The batch that a picture was drawn in: its number of pictures, and the place of this one, from 0.

    `tokens` are the tokens of the prompts of each picture, those of the branches in their order. They decide how rows
    are padded, which affects the rounding. They are known once the prompts are encoded; until then None.
    """

    size: int = Field(ge=2, le=MAX_BATCH)
    place: int = Field(ge=0)
    tokens: tuple[tuple[Annotated[int, Field(ge=1, le=MAX_TOKENS)], ...], ...] | None = None

    @model_validator(mode="after")
    def _place_is_in_the_batch(self) -> Self:
        if self.place >= self.size:
            raise ValueError(f"place {self.place} is not in a batch of {self.size}, from 0 on")
        tokens = self.tokens
        if tokens is not None and (len(tokens) != self.size or {len(each) for each in tokens} not in ({1}, {2})):
            raise ValueError("tokens are those of one or two branches of each picture of the batch")
        return self


class PromptTemplate(Frozen):
    """The text with alternatives that a prompt came from, and what was chosen, in order; a replay chooses nothing."""

    text: str
    choices: tuple[str, ...]


class Recipe(Frozen):
    """Everything that determines a picture. Sizes are in pixels; `model` is the bundle's name, or its hub id.

    `solver` is "euler" where it is missing, as in pictures of version 0.1.0. `quant` is the quantisation of the towers
    on load: "nf4" for both or, for each of them, "nf4,none". `feature_cache` is the distance of the steps at which the
    blocks are computed; None computes them at every step. `routes` are the route rules as text, `route_from` is the
    run that routes are taken from. `loras` are the LoRAs that changed the model, in the order of their changes.
    `template` is what the prompt was chosen from, if it was. `weights` are those of words of the prompt, in their
    order, `negative_weights` those of the negative prompt. `batch` is the batch that it was drawn in; None: alone.
    """

    prompt: str = Field(min_length=1)
    negative: str = ""
    model: str
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=MAX_STEPS)
    solver: Solver = "euler"
    cfg: float = Field(ge=0, le=MAX_GUIDANCE)
    cfg_interval: Interval
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    precision: Literal["bf16", "fp32"]
    quant: str | None = None
    feature_cache: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    routes: RouteRules | None = None
    route_from: RouteSource | None = None
    loras: tuple[LoraRecipe, ...] | None = Field(default=None, min_length=1)
    template: PromptTemplate | None = None
    weights: PromptWeights | None = None
    negative_weights: PromptWeights | None = None
    batch: BatchRecipe | None = None
    edit: EditRecipe | None = None

    @property
    def working_size(self) -> tuple[int, int]:
        """Width and height at which the model draws."""
        return (self.width, self.height) if self.edit is None else self.edit.canvas

    @property
    def weighted_prompt(self) -> str:
        """The prompt with its weights, as (cat:1.3)."""
        return with_weights(self.prompt, self.weights)

    @field_validator("feature_cache")
    @classmethod
    def _one_is_none(cls, every: int | None) -> int | None:
        return None if every == 1 else every

    @model_validator(mode="after")
    def _feature_cache_has_something_to_take(self) -> Self:
        every = self.feature_cache
        if every is not None and every > max(1, self.steps - 1):
            raise ValueError(f"feature_cache {every} needs more than {every} steps, and there are {self.steps}")
        return self

    @model_validator(mode="after")
    def _weights_lie_in_their_prompts(self) -> Self:
        for name, prompt in {"weights": self.prompt, "negative_weights": self.negative}.items():
            end = 0
            for weight in getattr(self, name) or ():
                if not end <= weight.start < weight.end <= len(prompt):
                    raise ValueError(f"{name} are of characters of the prompt, one after the other")
                end = weight.end
        return self

    @model_validator(mode="after")
    def _edits_are_drawn_alone(self) -> Self:
        if self.batch is not None and self.edit is not None:
            raise ValueError("batch: an edit is drawn alone")
        return self

    @model_validator(mode="after")
    def _edits_keep_their_size(self) -> Self:
        if self.edit is not None and (self.width, self.height) not in (self.edit.canvas, self.edit.source_size):
            raise ValueError("an edit is as large as the picture it is made from, or as its canvas")
        return self


class Provenance(Migrated):
    """What drew a picture: the bundle's hash, the versions and the device. It contains no date.

    `threads` is the number of CPU threads, on which the rounding depends; None on a GPU and in the oldest pictures.
    `thread_changes` are its changes while the picture was drawn, (number of the step, threads from it on); None: none.
    `pillow`, the library that reads and scales pictures, matters for edits. `tiled`: the picture was decoded tile by
    tile. `batched_guidance`: the guidance branches were computed as one batch. `compiled`: the blocks were compiled.
    The last three affect the rounding.
    """

    bundle_hash: str
    mos: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    attention: str
    pillow: str | None = None
    threads: Threads | None = None
    thread_changes: ThreadChanges | None = None
    tiled: bool = False
    batched_guidance: bool = False
    compiled: bool = False


StoredFormat = Literal["JPEG", "WEBP"]
"""A format that may change the pixels."""


class StoredPixels(Frozen):
    """The sha256 of the pixels that a file of a format holds, which are not quite those that were drawn."""

    format: StoredFormat
    sha256: Sha256


class EarlierPicture(Frozen):
    """A picture made by mos that an edit was made from: the sha256 of its pixels, its recipe and provenance.

    `stored` is the format of the file that was edited, if that changed the pixels: they are those of the file.
    """

    sha256: Sha256
    recipe: Recipe
    made: Provenance
    stored: StoredFormat | None = None


class PictureRecord(Frozen):
    """The record in the file of a picture.

    `sha256` is that of the pixels as they were drawn, by which changes by other programs are found; `stored` that of
    the pixels in the file, where its format changed them. `earlier` are all pictures made by mos that an edit was made
    from, over all steps of a chain, in their order.
    """

    schema_id: Literal["mos-picture/1"] = Field("mos-picture/1", alias="schema")
    recipe: Recipe
    made: Provenance
    sha256: Sha256 | None = None
    stored: StoredPixels | None = None
    earlier: tuple[EarlierPicture, ...] = ()

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)

    def parameters(self) -> str:
        """The recipe in the text form that other image tools read from the `parameters` chunk."""
        recipe = self.recipe
        shown = with_weights(recipe.negative, recipe.negative_weights)
        negative = f"Negative prompt: {shown}\n" if recipe.negative else ""
        edit = {} if recipe.edit is None else {"Image CFG scale": recipe.edit.image_cfg}
        settings = {
            "Steps": recipe.steps,
            "Sampler": {"euler": "Euler", "ab2": "Adams-Bashforth 2"}[recipe.solver],
            "CFG scale": recipe.cfg,
            **edit,
            "Seed": recipe.seed,
            "Size": f"{recipe.width}x{recipe.height}",
            "Model hash": self.made.bundle_hash[:10],
            "Model": recipe.model,
            "Version": f"mos {self.made.mos}",
        }
        return f"{recipe.weighted_prompt}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in settings.items())


def with_weights(prompt: str, weights: tuple[PromptWeight, ...] | None) -> str:
    """A prompt as it is typed, with its weights; without weights, as it is."""
    if not weights:
        return prompt

    def typed(text: str) -> str:
        return text.replace("(", r"\(").replace(")", r"\)")

    parts, end = [], 0
    for weight in weights:
        parts += [typed(prompt[end : weight.start]), f"({typed(prompt[weight.start : weight.end])}:{weight.weight:g})"]
        end = weight.end
    return "".join((*parts, typed(prompt[end:])))


def pixels_hash(image: "Image") -> str:
    """The sha256 of a picture's mode, size and pixels: the same for every file that holds them."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def make_recipe(**values: Any) -> Recipe:
    """Builds a recipe from settings; strings are parsed.

    Raises:
        UsageError: a value is missing, unknown or out of range.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(first_problem(error, Recipe)) from None


def check_guidance(cfg: float, options: Mapping[str, Any], image_cfg: float = 1.0) -> None:
    """Raises UsageError if one of the options, which only affect guidance, is set while cfg 1 turns guidance off."""
    idle = [name for name, value in options.items() if value]
    if cfg == image_cfg == 1 and idle:
        raise UsageError(f"{idle[0]} has no effect at cfg 1, without guidance: raise cfg or leave {idle[0]} out")


def check_blocks(recipe: Recipe, *, compiled: bool, regions: bool) -> None:
    """Raises UsageError for combinations of compiled blocks, regions and feature caching that exclude each other."""
    if compiled and regions:
        raise UsageError("compiled blocks cannot be looked into: drop --regions, or draw with --no-compile")
    if recipe.feature_cache is not None and (compiled or regions):
        other = "--compile" if compiled else "--regions"
        raise UsageError(f"{other} does not go with --feature-cache, which leaves blocks out: drop one of the two")


def provenance(**how: Any) -> Provenance:
    """The provenance with the installed versions; `how` has the other fields."""
    versions = {package: version(package) for package in ("torch", "diffusers", "transformers", "pillow")}
    return Provenance(mos=__version__, **versions, **how)
