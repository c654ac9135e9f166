"""The settings of a run: from a flag or the environment, else the preset, the config file or the bundle."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mos_cli.bundles.specs import Canvas
from mos_cli.config.recipe import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.planning.memory import Offload
from mos_cli.utils.files import expand
from mos_cli.utils.folders import presets_folder
from mos_cli.utils.validation import (
    DEFAULT_SOLVER,
    MAX_BATCH,
    Interval,
    Loras,
    RouteRules,
    Size,
    Solver,
    did_you_mean,
    first_problem,
    read_toml,
)

if TYPE_CHECKING:
    import torch

    from mos_cli.bundles.blueprints import Network
    from mos_cli.planning.candidates import Candidate
    from mos_cli.planning.memory import Setting

TraceLevel = Literal["off", "summary", "topk", "full"]
Metadata = Literal["full", "recipe", "none"]
"""What a picture says of itself: its recipe, and with "full" also what it was edited from, and text for other tools."""
PictureSuffix = Literal["png", "jpg", "webp"]
"""The format of pictures whose names are made: those in a folder that is named, or in the default one."""
PrecisionSetting = Literal["auto", "bf16", "fp32"]


def _gib_or_auto(value: object) -> object:
    if value == "auto":
        return value
    try:
        gib = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise ValueError(f"write GiB as a number above 0, or auto, not {value}")
    return gib


MaxVram = Annotated[float | Literal["auto"], BeforeValidator(_gib_or_auto)]
"""GiB that may be used of a device; "auto": all that are available."""


BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)] | Literal["auto"]
"""How many pictures are drawn at once; "auto": as many as are faster and fit."""


class Settings(BaseModel):
    """The settings of a preset; None leaves a value to the next source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    solver: Solver | None = None
    cfg: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    image_cfg: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    cfg_interval: Interval | None = None
    negative: str | None = None
    size: Size | None = None
    precision: PrecisionSetting | None = None
    quant: str | None = None
    feature_cache: int | None = Field(default=None, ge=1)
    batch_size: BatchSize | None = None
    max_vram: MaxVram | None = None
    offload: Offload | None = None
    device: str | None = None
    attention: Literal["auto", "xformers", "sdpa"] | None = None
    compile: bool | None = None
    server: str | None = None
    trace: TraceLevel | None = None
    metadata: Metadata | None = None
    routes: RouteRules | None = None
    loras: Loras | None = None
    output: str | None = None
    format: PictureSuffix | None = None
    log: bool | None = None
    preview: bool | None = None

    def over(self, other: "Settings") -> "Settings":
        """These settings, with the gaps filled from `other`."""
        return Settings(**{**other.model_dump(), **self.model_dump(exclude_none=True)})


class UserSettings(Settings):
    """The settings of a config file: those of a preset, and the name of one."""

    preset: str | None = None


class RunSettings(Settings):
    """Settings of a run; None leaves a value to the bundle.

    `tiled` (decode tile by tile) and `batched_guidance` (compute the guidance branches as one batch) follow from
    `max_vram`.
    """

    model: str = "emoji"
    solver: Solver = DEFAULT_SOLVER
    negative: str = ""
    precision: PrecisionSetting = "auto"
    quant: str = "none"
    batch_size: BatchSize = 1
    offload: Offload = "none"
    tiled: bool = False
    batched_guidance: bool = True
    device: str = "auto"
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    compile: bool = False
    server: str = "off"
    trace: TraceLevel = "topk"
    metadata: Metadata = "full"
    output: str = "outputs/{date}/"
    format: PictureSuffix = "png"
    log: bool = True
    preview: bool = False


OF_LOADED = (
    *("device", "precision", "quant", "max_vram", "offload", "attention", "compile", "loras"),
    *("tiled", "batched_guidance"),
)
"""The settings of a loaded model: all pictures of a run share them."""


@dataclass(frozen=True)
class Preset:
    """Named settings for drawing."""

    name: str
    description: str
    settings: Settings


class _PresetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: str = ""
    generate: Settings


class _ConfigFile(_PresetFile):
    generate: UserSettings


_File = TypeVar("_File", bound=_PresetFile)


def config_path() -> Path | None:
    """The user's config file: $MOS_CONFIG, or config.toml in the user's config folder; None if there is none.

    Raises:
        InputError: $MOS_CONFIG names a file that is not there.
    """
    from platformdirs import user_config_path

    if named := os.environ.get("MOS_CONFIG"):
        if not (path := expand(named)).is_file():
            raise InputError(f"MOS_CONFIG names {named}, which is not a file: correct it or unset it")
        return path
    path = user_config_path("mos") / "config.toml"
    return path if path.is_file() else None


def list_presets() -> list[Preset]:
    """The presets for drawing, without the training recipes (train-*.toml) in the same folder."""
    files = sorted(presets_folder().glob("*.toml"))
    return [load_preset(file.stem) for file in files if not file.stem.startswith("train-")]


def load_preset(name: str) -> Preset:
    """Loads a preset by name, or from a TOML file of the user's.

    Raises:
        UsageError: there is no preset of that name, or it is wrong.
        InputError: the file cannot be read, or is not TOML.
    """
    if name.endswith(".toml"):
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for unknown users
        file = _read(path, _PresetFile)
        return Preset(path.stem, file.description, file.generate)
    known = [file.stem for file in sorted(presets_folder().glob("*.toml")) if not file.stem.startswith("train-")]
    if name not in known:
        guess = did_you_mean(name, known)
        raise UsageError(f"no preset '{name}'{guess} (there are: {', '.join(known)}, or name a .toml file)")
    file = _read(presets_folder() / f"{name}.toml", _PresetFile)
    return Preset(name, file.description, file.generate)


def make_settings(**values: Any) -> Settings:
    """Builds settings from flags; strings are parsed.

    Raises:
        UsageError: a value is out of range or of the wrong kind.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        place, _, problem = first_problem(error).partition(": ")
        option = place.partition(".")[0].replace("_", "-")
        raise UsageError(f"--{option}: {problem}") from None


def resolve(flags: Settings, preset: str | None) -> RunSettings:
    """Merges flags, preset and config file, in this order of precedence; None is left to the bundle.

    Without a preset, that of the config file is taken.

    Raises:
        UsageError, InputError: a preset or the config file is missing or wrong.
    """
    path = config_path()
    config = UserSettings() if path is None else _read(path, _ConfigFile).generate
    settings = flags
    if name := preset or config.preset:
        settings = settings.over(load_preset(name).settings)
    settings = settings.over(Settings(**config.model_dump(exclude={"preset"})))
    return RunSettings(**settings.model_dump(exclude_none=True))


def available_memory(device: "torch.device") -> float:
    """The GiB available for a model: all memory of a GPU, or the free main memory."""
    import psutil
    import torch

    from mos_cli.planning.memory import GIB

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().available / GIB


def fitted(
    settings: RunSettings,
    network: "Network",
    size: tuple[int, int],
    quant: str | None,
    *,
    on_cpu: bool = False,
) -> RunSettings:
    """The settings with the fastest quantisation, offloading, tiling and batching that fit `max_vram` (a number here).

    Args:
        quant: the quantisation of the towers; None leaves it open. `offload` is kept if it is set.
        on_cpu: `max_vram` is main memory, and nothing is offloaded.

    Raises:
        MemoryLimitError: nothing fits.
    """
    from mos_cli.planning.candidates import candidates, fastest, fastest_on_cpu, parse_quant

    assert isinstance(settings.max_vram, float)
    changed = settings.model_dump(include={"steps", "cfg", "cfg_interval"}, exclude_none=True)
    network = replace(network, defaults=network.defaults.model_copy(update=changed))
    found = candidates(network, size, quant=None if quant is None else parse_quant(quant))
    if on_cpu:
        best = fastest_on_cpu(found, settings.max_vram)
    else:
        if "offload" in settings.model_fields_set:
            found = [one for one in found if one.setting.offload == settings.offload]
        best = fastest(found, settings.max_vram)
    chosen = {name: getattr(best.setting, name) for name in ("offload", "tiled", "batched_guidance")}
    return settings.model_copy(update={"quant": best.quant, **chosen})


def smaller(network: "Network", size: tuple[int, int], failed: "Setting", gpu: float | None) -> "Candidate | None":
    """The fastest setting that needs clearly less memory than the one that failed; None where there is none.

    Args:
        gpu: GiB of the GPU; None for a CPU, where nothing can be offloaded.
    """
    from mos_cli.planning.candidates import candidates, fastest
    from mos_cli.planning.memory import stages

    try:
        found = candidates(network, size)
        kept = replace(failed, generation=network.method or failed.generation)
        peak = max(stage.peak for stage in stages(network, kept, size))
        # The plan has an error of up to a tenth.
        less = [one for one in found if one.peak < 0.9 * peak]
        if gpu is None:
            # On a CPU there is no option for tiling or for sequential guidance.
            less = [one for one in less if not one.setting.tiled and one.setting.batched_guidance]
            less = [one for one in less if one.setting.offload == "none"]
        return fastest(less, float("inf") if gpu is None else gpu) if less else None
    except MosError:
        # The model cannot be planned, or nothing fits.
        return None


def parse_size(text: str | None, canvas: Canvas) -> tuple[int, int]:
    """Width and height in pixels from "96", "96x64" or "3:2" (the native area in that shape).

    Raises:
        UsageError: the text is not a size, or the model cannot draw it.
    """
    if text is None:
        return canvas.native
    if match := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text):
        width, height = int(match[1]), int(match[2] or match[1])
    elif match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
        across, down = int(match[1]), int(match[2])
        if not across or not down:
            raise UsageError(f"size '{text}' is empty")
        side = (canvas.native[0] * canvas.native[1] / (across * down)) ** 0.5
        width, height = (max(1, round(part * side / canvas.multiple)) * canvas.multiple for part in (across, down))
    else:
        raise UsageError(f"size '{text}' is not understood: write 256, 384x256 or 3:2")
    check_size(width, height, canvas)
    return width, height


def check_size(width: int, height: int, canvas: Canvas) -> None:
    """Raises UsageError if a model with this canvas cannot draw the size, in pixels."""
    if not all(canvas.min <= side <= canvas.max and side % canvas.multiple == 0 for side in (width, height)):
        native = "{}x{}".format(*canvas.native)
        raise UsageError(
            f"size {width}x{height} cannot be drawn by this model: both sides must be multiples of "
            f"{canvas.multiple} from {canvas.min} to {canvas.max} (it was trained at {native})"
        )


def _read(path: Path, model: type[_File]) -> _File:
    table = read_toml(path)
    if "generate" not in table or table.keys() - model.model_fields:
        raise UsageError(f"{path}: all settings stand under [generate]: write that line above them")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error, model)}") from None
