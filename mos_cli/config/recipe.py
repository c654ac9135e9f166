"""The recipe of a picture: everything needed to make it again, and the record that travels inside the PNG.

One pydantic model writes and reads it, so that the two can never drift apart.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mos_cli import __version__
from mos_cli.errors import UsageError
from mos_cli.utils.migration import Migrated
from mos_cli.utils.validation import Frozen, Interval, RouteRules, Sha256, Solver, first_problem

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_THREADS = 1024
"""No picture asks for more: libraries end the whole process where so many threads cannot be started."""


class SourcePicture(Frozen):
    """A picture that was edited or drawn after: the sha256 of its pixels (see `pixels_hash`) and its size."""

    sha256: Sha256
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class MaskRecipe(Frozen):
    """Where an edit may change: the sha256 of the mask's pixels as it was used, and how its file was read."""

    sha256: Sha256
    invert: bool = False
    feather: float = Field(default=0.0, ge=0)


class EditRecipe(Frozen):
    """What an edit needs beside the rest of its recipe.

    `sources` are the picture that is edited and those it is to be drawn after. `canvas` is the size the model works at,
    `strength` the time it begins at (1 = from noise alone). `composite` says that what the mask, or else the change
    itself, leaves out is taken from the source, bit for bit.
    """

    sources: tuple[SourcePicture, ...] = Field(min_length=1)
    canvas: tuple[int, int]
    image_cfg: float = Field(ge=0, le=100)
    strength: float = Field(gt=0, le=1)
    mask: MaskRecipe | None = None
    composite: bool = False


class RouteSource(Frozen):
    """The run whose choices of layers are taken over: their sha256, and for what part of the steps."""

    sha256: Sha256
    until: float = Field(default=1.0, gt=0, le=1)


class Recipe(Frozen):
    """What decides a picture. Sizes are in pixels; `model` is the bundle's name, or its hub id.

    `solver` is "euler" where it is missing: pictures made before it was recorded were drawn so.
    `quant` says how the towers were quantised on load, where they were: "nf4" or, for each of the two, "nf4,none".
    `feature_cache` is the distance of the steps at which the blocks are computed; None computes them at every step.
    `routes` are the rules that steer the routes, as they are written; `route_from` is the run they are taken from.
    """

    prompt: str = Field(min_length=1)
    negative: str = ""
    model: str
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=MAX_STEPS)
    solver: Solver = "euler"
    cfg: float = Field(ge=0, le=100)
    cfg_interval: Interval
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    precision: Literal["bf16", "fp32"]
    quant: str | None = None
    feature_cache: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    routes: RouteRules | None = None
    route_from: RouteSource | None = None
    edit: EditRecipe | None = None

    @property
    def working_size(self) -> tuple[int, int]:
        """Width and height at which the model draws."""
        return (self.width, self.height) if self.edit is None else self.edit.canvas

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
    def _edits_keep_their_size(self) -> Self:
        if self.edit is not None:
            source = self.edit.sources[0]
            if (self.width, self.height) not in (self.edit.canvas, (source.width, source.height)):
                raise ValueError("an edit is as large as the picture it is made from, or as its canvas")
        return self


class Provenance(Migrated):
    """What made a picture: the bundle's hash, the versions and the device. Nothing of it depends on the day.

    `threads` is the number of CPU threads, which decides in what order products are summed, and so their rounding in
    bf16; None on a GPU, and in pictures made before it was recorded. Pillow, which reads and scales, counts for edits.
    `tiled`: it was decoded tile by tile. `batched_guidance`: guidance's branches were computed in one pass. `compiled`:
    the blocks were compiled, which rounds otherwise.
    """

    bundle_hash: str
    mos: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    attention: str
    pillow: str | None = None
    threads: int | None = Field(default=None, ge=1, le=MAX_THREADS)
    tiled: bool = False
    batched_guidance: bool = False
    compiled: bool = False


class EarlierPicture(Frozen):
    """A picture of ours that an edit goes back to: the sha256 of its pixels and how it was made."""

    sha256: Sha256
    recipe: Recipe
    made: Provenance


class PictureRecord(Frozen):
    """The `mos` chunk of a PNG.

    `sha256` is that of the picture's own pixels, by which changes by others show. `earlier` are the pictures of ours
    that an edit goes back to, through however many steps, the first first.
    """

    schema_id: Literal["mos-picture/1"] = Field("mos-picture/1", alias="schema")
    recipe: Recipe
    made: Provenance
    sha256: Sha256 | None = None
    earlier: tuple[EarlierPicture, ...] = ()

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)

    def parameters(self) -> str:
        """The same in the text form that other image tools read from the `parameters` chunk."""
        recipe = self.recipe
        negative = f"Negative prompt: {recipe.negative}\n" if recipe.negative else ""
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
        return f"{recipe.prompt}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in settings.items())


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
        raise UsageError(first_problem(error)) from None


def check_guidance(cfg: float, options: Mapping[str, Any], image_cfg: float = 1.0) -> None:
    """Raises UsageError if one of the options, all of them guidance's, has a value while cfg 1 turns guidance off."""
    idle = [name for name, value in options.items() if value]
    if cfg == image_cfg == 1 and idle:
        raise UsageError(f"{idle[0]} has no effect at cfg 1, without guidance: raise cfg or leave {idle[0]} out")


def check_blocks(recipe: Recipe, *, compiled: bool, regions: bool) -> None:
    """Raises UsageError where blocks are to be looked into, compiled or left out, and this does not go together."""
    if compiled and regions:
        raise UsageError("compiled blocks cannot be looked into: drop --regions, or draw with --no-compile")
    if recipe.feature_cache is not None and (compiled or regions):
        other = "--compile" if compiled else "--regions"
        raise UsageError(f"{other} does not go with --feature-cache, which leaves blocks out: drop one of the two")


def provenance(**how: Any) -> Provenance:
    """Describes what is about to draw, the fields of `Provenance`; versions are those installed."""
    versions = {package: version(package) for package in ("torch", "diffusers", "transformers", "pillow")}
    return Provenance(mos=__version__, **versions, **how)
