"""One line of a jobs file, as `mos run` reads it."""

from pydantic import Field

from mos_cli.utils.validation import Frozen, Interval, RouteRules, Size, Solver


class JobLine(Frozen):
    """One line of a jobs file: a prompt, or with `picture` an instruction, and options named as on the command line."""

    prompt: str = Field(min_length=1)
    negative: str | None = None
    seed: int | None = Field(default=None, ge=0)
    count: int | None = Field(default=None, ge=1, le=10_000)
    steps: int | None = Field(default=None, ge=1)
    solver: Solver | None = None
    cfg: float | None = Field(default=None, ge=0)
    cfg_interval: Interval | None = None
    size: Size | None = None
    feature_cache: int | None = Field(default=None, ge=1)
    routes: RouteRules | None = None
    output: str | None = Field(default=None, min_length=1)
    picture: str | None = Field(default=None, min_length=1)
    references: tuple[str, ...] | None = None
    mask: str | None = Field(default=None, min_length=1)
    invert_mask: bool | None = None
    feather: float | None = Field(default=None, ge=0)
    composite: bool | None = None
    keep_alpha: bool | None = None
    strength: float | None = None
    image_cfg: float | None = Field(default=None, ge=0)
    max_pixels: int | None = Field(default=None, ge=1)
    expand: str | None = None


SETTINGS = {"negative", "seed", "steps", "solver", "cfg", "cfg_interval", "feature_cache", "routes", "image_cfg"}
OF_EDITS = {"invert_mask", "feather", "composite", "keep_alpha", "strength", "max_pixels"}
