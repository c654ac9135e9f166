"""The recipe of a picture: everything needed to make it again, and the record that travels inside the PNG.

One pydantic model writes and reads it, so that the two can never drift apart.
"""

from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mos_cli.errors import UsageError
from mos_cli.runtime.specs import first_problem

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(_Frozen):
    """What decides a picture. Sizes are in pixels; `cfg_interval` is in t, where 1 is pure noise."""

    prompt: str = Field(min_length=1)
    negative: str = ""
    model: str
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1, le=MAX_STEPS)
    cfg: float = Field(ge=0, le=100)
    cfg_interval: tuple[float, float]
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    precision: Literal["bf16", "fp32"]

    @model_validator(mode="after")
    def _ordered_interval(self) -> "Recipe":
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval {low},{high} must be two times in 0..1, the smaller first")
        return self


class Provenance(_Frozen):
    """What made a picture: the bundle's hash, the versions and the device. Nothing of it depends on the day."""

    bundle_hash: str
    mos: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    attention: str


class PictureRecord(_Frozen):
    """The `mos` chunk of a PNG."""

    schema_id: Literal["mos-picture/1"] = Field("mos-picture/1", alias="schema")
    recipe: Recipe
    made: Provenance

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)

    def parameters(self) -> str:
        """The same in the text form that other image tools read from the `parameters` chunk."""
        recipe = self.recipe
        negative = f"Negative prompt: {recipe.negative}\n" if recipe.negative else ""
        settings = {
            "Steps": recipe.steps,
            "Sampler": "Euler",
            "CFG scale": recipe.cfg,
            "Seed": recipe.seed,
            "Size": f"{recipe.width}x{recipe.height}",
            "Model hash": self.made.bundle_hash[:10],
            "Model": recipe.model,
            "Version": f"mos {self.made.mos}",
        }
        return f"{recipe.prompt}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in settings.items())


def make_recipe(**values: Any) -> Recipe:
    """Builds a recipe from settings; strings are parsed ("0.1,0.9" for an interval).

    Raises:
        UsageError: a value is missing, unknown or out of range.
    """
    interval = values.get("cfg_interval")
    if isinstance(interval, str):
        values["cfg_interval"] = interval.split(",")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None


def provenance(bundle_hash: str, device: str, attention: str) -> Provenance:
    """Describes what is about to draw; versions are those installed."""
    packages = {"mos": "mos-cli", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers"}
    versions = {field: version(package) for field, package in packages.items()}
    return Provenance(bundle_hash=bundle_hash, device=device, attention=attention, **versions)
