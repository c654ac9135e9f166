"""A training recipe: everything that determines a run, read from one TOML file."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mos_cli.bundles.bundle import Bundle, find_bundle
from mos_cli.bundles.shapes import GenerationShape, read_config
from mos_cli.bundles.specs import Canvas, Defaults, EditDefaults
from mos_cli.bundles.taught import taught_scenes
from mos_cli.datasets.tables import Data, edit_share, with_words
from mos_cli.errors import InputError, UsageError
from mos_cli.utils.durations import parse_duration
from mos_cli.utils.files import expand
from mos_cli.utils.folders import presets_folder
from mos_cli.utils.migration import GenerationConfig, Migrated
from mos_cli.utils.validation import Frozen, PlainName, first_problem, read_toml


def _seconds(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


class BundleTable(Frozen):
    """The fields of the exported bundle's index."""

    name: PlainName
    description: str
    license: str
    canvas: Canvas
    defaults: Defaults
    edits: EditDefaults | None = None

    @model_validator(mode="after")
    def _square(self) -> Self:
        if self.canvas.native[0] != self.canvas.native[1]:
            raise ValueError("training pictures are square")
        return self


class StageTable(Frozen):
    """A part of a run with a canvas of its own, in pixels; omitted fields are as in [train] and [data]."""

    name: PlainName
    steps: int = Field(ge=1, strict=True)
    canvas: int = Field(ge=1, strict=True)
    batch: int | None = Field(default=None, ge=1, strict=True)
    muon_lr: float | None = Field(default=None, gt=0)
    adamw_lr: float | None = Field(default=None, gt=0)
    time_mean: float | None = None
    patch_spacing: float = Field(default=1.0, gt=0)
    """Distance of neighbouring patches in the rotary positions: 2 on half the canvas spans what the whole spans."""
    data: Data | None = None


class LoraTable(Frozen):
    """A LoRA is trained in place of the network: changes of rank `rank` to the linear layers of its blocks."""

    rank: int = Field(ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    """The changes are multiplied by alpha / rank; by default alpha is the rank."""

    @property
    def scaling(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class DistilTable(Frozen):
    """The network learns what the model that it starts from predicts with guidance, the scale being an input of it.

    Pictures then need one branch of guidance instead of two.
    """

    guidance_max: float = Field(gt=1)
    """The largest scale; in one of five pictures of a step it is 1, in the others evenly distributed from 1 on."""


class TrainTable(Frozen):
    """The optimisation. After `1 - decay` of the run the learning rates fall linearly to 0."""

    model_config = ConfigDict(strict=True)

    seed: int = Field(ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1)
    """Omitted with [[stages]], which have steps of their own, and with `time`."""
    time: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    """Seconds, or "12m", after which the run ends, instead of steps. [[stages]] have its parts in proportion to their
    steps."""
    batch: int = Field(ge=1)
    """Pictures of a step, over all processes."""
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
    ema: Literal["0.05", "0.10"] = "0.05"
    """The moving average that is used for samples and export, by its width as a share of the run."""
    precision: Literal["auto", "bf16", "fp32"]
    """auto: what is faster on the device."""
    compile: bool
    log_every: int = Field(default=1, ge=1)
    """Steps between two logs; each log synchronises with the GPU."""
    save_every: int = Field(ge=1)
    sample_every: int = Field(ge=1)
    sample_prompts: tuple[str, ...] = Field(default=(), strict=False)
    """What samples show; by default captions of the captioned pictures."""


class TrainRecipe(Migrated):
    """A whole recipe: towers, bundle, data, network (arguments of GenerationTower), optimisation and its stages.

    With `start_from`, what is left out of the towers, `generation` and `bundle` is that of the model it names.
    """

    understanding: str | None = None
    """A tower's name, its .json file, or a hub id: `owner/name`."""
    autoencoder: str | None = None
    """One of the package, or any of diffusers', as a folder or hub id; without one the latents are pixels."""
    image_encoder: Literal["efficientnet-lite0"] | None = None
    """What makes image tokens of the pictures to edit, if the understanding tower has no vision part."""
    start_from: str | None = None
    """The bundle whose weights the run starts with; see `training.start`."""
    lora: LoraTable | None = None
    distil: DistilTable | None = None
    bundle: BundleTable
    data: Data
    generation: GenerationConfig
    train: TrainTable
    stages: tuple[StageTable, ...] = ()

    @field_validator("generation")
    @classmethod
    def _can_be_built(cls, generation: dict[str, Any]) -> dict[str, Any]:
        from mos_cli.towers.generation import empty_tower

        try:
            GenerationShape.model_validate(generation, strict=False)
            empty_tower(generation)
        except ValidationError as error:
            raise ValueError(first_problem(error, GenerationShape)) from None
        return generation

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        steps = sum(stage.steps for stage in self.stages) or self.train.steps
        if steps is not None and self.train.time is None and self.train.warmup >= steps > 1:
            raise ValueError(f"[train] warmup = {self.train.warmup} is no less than the steps of the run, {steps}")
        datas = [data for data in (self.data, *(stage.data for stage in self.stages)) if data]
        edits = any(edit_share(data) for data in datas)
        if self.understanding is None and self.start_from is None:
            raise ValueError("understanding is missing: the language model that reads the captions")
        if self.lora is not None and self.start_from is None:
            raise ValueError("[lora] changes a model: name it with start_from")
        if self.distil is not None and self.start_from is None:
            raise ValueError("[distil] learns from a model: name it with start_from")
        if self.distil is not None and self.lora is not None:
            raise ValueError("[distil] changes the inputs of the network, and a LoRA cannot: leave out one of them")
        has_images = self.image_encoder or self.generation.get("has_vision")
        if self.start_from is not None:
            has_images = has_images or self.generation.get("image_state_widths")
            if edits and self.bundle.edits is None:
                raise ValueError(f"{self.start_from} only draws: leave out the steps that edit, or give [bundle] edits")
        if edits and not has_images:
            raise ValueError(
                'steps that edit need image_encoder = "efficientnet-lite0", or an understanding tower with vision: '
                "has_vision = true in [generation]"
            )
        if edits != (self.bundle.edits is not None) and self.start_from is None:
            raise ValueError("[bundle] edits, the settings to edit with, go with [data] edits, the steps that edit")
        if (self.train.steps is not None) == (bool(self.stages) or self.train.time is not None):
            raise ValueError("give the number of steps either in [train] steps or in [[stages]], or give [train] time")
        for stage in self.stages:
            if stage.canvas % self.bundle.canvas.multiple:
                raise ValueError(f"stage {stage.name}: the canvas must be a multiple of {self.bundle.canvas.multiple}")
        return self


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe: a path, or the name of one of the presets, with `train-` or without; raises InputError."""
    path = expand(name_or_path)
    if not path.is_file():
        path = presets_folder() / f"train-{name_or_path.removeprefix('train-')}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in presets_folder().glob("train-*.toml")))
        raise InputError(f"no recipe '{name_or_path}': give a TOML file or one of {known}")
    return path


def load_recipe(
    name_or_path: str,
    overrides: dict[str, Any] | None = None,
    *,
    start_from: str | None = None,
    data: str | None = None,
    caption: str | None = None,
    name: str | None = None,
) -> TrainRecipe:
    """Reads a recipe by path, or by name from the presets.

    Args:
        overrides: values for the [train] table that replace the file's. With [[stages]], `steps` lengthens or
            shortens the last one. `steps` and `time` replace each other.
        start_from, name: the model to continue and the new bundle's name, instead of the file's.
        data, caption: the folder of captioned pictures and the caption of those without one, instead of the file's.

    Raises:
        InputError: there is no such recipe, or it is not TOML.
        ModelError: the model that it continues is not found.
        UsageError: a value is missing, unknown or out of range.
    """
    path = recipe_path(name_or_path)
    table = read_toml(path)
    if start_from is not None:
        table["start_from"] = start_from
    given = {"path": None if data is None else str(expand(data)), "caption": caption}
    if given := {key: value for key, value in given.items() if value is not None}:
        if not isinstance(table.get("data"), dict) or table["data"].get("kind") != "captioned":
            raise UsageError(f"{path}: --data and --caption are for recipes with captioned pictures, such as finetune")
        table["data"] |= given
    if name is not None and isinstance(table.get("bundle", {}), dict):
        table["bundle"] = {**table.get("bundle", {}), "name": name}
    if isinstance(table.get("start_from"), str) and isinstance(table.get("bundle", {}), dict):
        table = continued(table, find_bundle(table["start_from"]))
    stages = table.get("stages")
    for part in (table, *(stages if isinstance(stages, list) else ())):
        if isinstance(part, dict) and isinstance(part.get("data"), dict):
            part["data"] = with_words(part["data"], path.parent)
    overrides = dict(overrides or {})
    length = overrides.keys() & {"steps", "time"}
    if stages and (steps := overrides.pop("steps", None)):
        before = sum(stage.steps for stage in _validated(table, path).stages[:-1])
        if steps <= before:
            raise UsageError(f"the stages before the last take {before} steps: ask for more than that")
        table["stages"][-1]["steps"] = steps - before
    if isinstance(train := table.get("train", {}), dict):
        kept = {key: value for key, value in train.items() if not (length and key in ("steps", "time"))}
        table["train"] = kept | overrides
    return _validated(table, path)


def continued(table: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """A recipe's table with what it leaves out taken from the model that it continues.

    The words and styles of mixed scenes are those that the model was trained on; without any, no scenes are mixed in.
    """
    index, config = bundle.index, read_config(bundle.folder / "generation")
    shape = {name: value for name, value in config.items() if not name.startswith("_")}
    if isinstance(distil := table.get("distil"), dict):
        shape["guidance_max"] = distil.get("guidance_max")
    whole = index.model_dump(mode="json", include={"license", "canvas", "defaults", "edits"}, exclude_none=True)
    table = {"generation": shape, **table, "bundle": {**whole, **table.get("bundle", {})}}
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("scenes"), dict) and "words" not in data["scenes"]:
        taught = taught_scenes(bundle)
        mixed = None if taught is None else {"words": taught.words, "styles": taught.styles, **data["scenes"]}
        if mixed is not None and "edits" not in whole:
            mixed["edits"] = 0.0
        table["data"] = {name: value for name, value in data.items() if name != "scenes"}
        if mixed is not None:
            table["data"]["scenes"] = mixed
    return table


def _validated(table: dict[str, Any], path: Path) -> TrainRecipe:
    try:
        return TrainRecipe.model_validate(table)
    except ValidationError as error:
        # The kind of data is a part of the place, and of no name in the file.
        problem = re.sub(r"^(.*?\bdata)\.(captioned|scenes)\.", r"\1.", first_problem(error, TrainRecipe))
        raise UsageError(f"{path}: {problem}") from None
