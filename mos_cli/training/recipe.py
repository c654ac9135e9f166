"""A training recipe: everything that decides what a run learns, read from one TOML file."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mos_cli.errors import InputError, UsageError
from mos_cli.runtime.folders import presets_folder
from mos_cli.runtime.specs import Canvas, Defaults, Frozen, PlainName, first_problem


class BundleTable(Frozen):
    """What the exported bundle says of itself."""

    name: PlainName
    description: str
    license: str
    canvas: Canvas
    defaults: Defaults

    @model_validator(mode="after")
    def _square(self) -> Self:
        if self.canvas.native[0] != self.canvas.native[1]:
            raise ValueError("scenes are drawn on a square canvas")
        return self


class DataTable(Frozen):
    """Which pictures are learned and how scenes are made of them."""

    styles: tuple[str, ...] = Field(min_length=1)
    pairs: float = Field(ge=0, le=1)
    words: dict[str, tuple[str, ...]]
    """Names in the art file to the names captions use."""

    @model_validator(mode="after")
    def _enough_words(self) -> Self:
        if len(self.words) < 2:
            raise ValueError("a pair takes two words at least")
        return self


class TrainTable(Frozen):
    """The optimisation. Steps after `1 - decay` of the run lower the learning rates linearly to 0."""

    seed: int
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    context_tokens: int = Field(ge=2)
    """Captions are padded to this length; the padding is masked."""
    drop_caption: float = Field(ge=0, lt=1)
    epsilon: float = Field(ge=0, lt=1)
    time_mean: float
    time_std: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    adamw_lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    decay: float = Field(gt=0, le=1)
    clip: float = Field(gt=0)
    ema: float = Field(gt=0, lt=1)
    precision: Literal["bf16", "fp32"]
    compile: bool
    save_every: int = Field(ge=1)
    sample_every: int = Field(ge=1)
    sample_prompts: tuple[str, ...] = Field(min_length=1)


class TrainRecipe(Frozen):
    """A whole recipe: bundle, data, network (arguments of GenerationTower) and optimisation."""

    understanding: str
    bundle: BundleTable
    data: DataTable
    generation: dict[str, Any]
    train: TrainTable


def load_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> TrainRecipe:
    """Reads a recipe by path, or by name from the presets (`train-NAME.toml`).

    Args:
        overrides: values for the [train] table that replace the file's.

    Raises:
        InputError: there is no such recipe, or it is not TOML.
        UsageError: a value is missing, unknown or out of range.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = presets_folder() / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in presets_folder().glob("train-*.toml")))
        raise InputError(f"no recipe '{name_or_path}': give a TOML file or one of {known}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    try:
        return TrainRecipe.model_validate({**table, "train": {**table.get("train", {}), **(overrides or {})}})
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error)}") from None
