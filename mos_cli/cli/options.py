"""The options that several commands share, each declared once, and the set that `generate` and `edit` have in common.

Options are named explicitly everywhere: typer 0.27 makes the metavar the name of an option that has no other.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import choices, model_names, preset_names, trace_paths

if TYPE_CHECKING:
    from mos_cli.config.settings import Settings


def as_text(value: Any) -> Any:
    """An argument that is text, not a path, or a list of them: read as UTF-8 whatever the encoding of the system is.

    Raises:
        typer.BadParameter: it is not UTF-8.
    """
    if isinstance(value, list):
        return [as_text(one) for one in value]
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeEncodeError:
        return value
    except UnicodeDecodeError:
        # In a locale of another encoding it was typed in that.
        if all(not "\ud800" <= character <= "\udfff" for character in value):
            return value
        raise typer.BadParameter("it is not UTF-8 text") from None


SAMPLING, SEVERAL, OUTPUT = "Sampling", "Several pictures", "Output"
ROUTING, DEVICE = "Routing", "Device and memory"
"""Headings of the help of commands that draw."""
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the paths of pictures.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say how long each stage took.")]
Json = Annotated[bool, typer.Option("--json", help="Print newline-delimited JSON events on stdout.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files that are named.", rich_help_panel=OUTPUT)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        envvar="MOS_DEVICE",
        autocompletion=choices("auto", "cpu", "cuda"),
        help="auto, cpu or cuda.",
        show_default="auto",
        metavar="DEVICE",
        rich_help_panel=DEVICE,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        envvar="MOS_ATTENTION",
        autocompletion=choices("auto", "sdpa", "xformers"),
        metavar="NAME",
        help="What computes attention: xformers, sdpa (PyTorch's), or auto: xformers where it can.",
        show_default="auto",
        rich_help_panel=DEVICE,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        envvar="MOS_OUTPUT",
        metavar="PATH",
        help="File (.png, .jpg or .webp), folder, or template with {date} {number} {prompt} {seed} {model}, "
        "in edits {source}; no suffix: "
        "a folder. - writes one PNG, and nothing beside it, to standard output.",
        show_default="outputs/{date}/{number}_{prompt}_s{seed}.png",
        rich_help_panel=OUTPUT,
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        envvar="MOS_TRACE",
        autocompletion=choices("off", "summary", "topk", "full"),
        metavar="LEVEL",
        help="Routing trace beside the picture: off, summary, topk (every decision), or full (and all probabilities).",
        show_default="topk",
        rich_help_panel=ROUTING,
    ),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        envvar="MOS_METADATA",
        autocompletion=choices("full", "recipe", "none"),
        metavar="WHAT",
        help="What the picture holds: full, recipe (without what it was edited from, and the text for other tools), or "
        "none (it cannot be replayed).",
        show_default="full",
        rich_help_panel=OUTPUT,
    ),
]
ArtFile = Annotated[
    Path | None, typer.Option("--art", help="Art file or its folder.", show_default="where `mos data build` writes it")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="MOS_MODEL",
        autocompletion=model_names,
        help="Bundle: name, path or hub id.",
        show_default="emoji",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=model_names,
        help="Where the model that drew it is, if it is not found by its hash; repeatable for a chain of edits.",
    ),
]
EditedPictures = Annotated[
    list[Path] | None,
    typer.Option("--input", "-i", metavar="FILE", help="A picture that was edited; repeatable."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        envvar="MOS_PRESET",
        autocompletion=preset_names,
        help="Named settings, see `mos presets ls`, or a TOML file of your own.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        envvar="MOS_SEED",
        help="Seed of the first picture.",
        show_default="random",
        rich_help_panel=SAMPLING,
    ),
]
Count = Annotated[
    int,
    typer.Option(
        "--count", "-n", min=1, max=10_000, help="Pictures per prompt; seeds count up.", rich_help_panel=SEVERAL
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", envvar="MOS_STEPS", help="Denoising steps.", show_default="the model's", rich_help_panel=SAMPLING
    ),
]
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver",
        envvar="MOS_SOLVER",
        autocompletion=choices("ab2", "euler"),
        metavar="NAME",
        help="What integrates the steps: ab2 (Adams-Bashforth, second order) or euler.",
        show_default="ab2",
        rich_help_panel=SAMPLING,
    ),
]
Cfg = Annotated[
    float | None,
    typer.Option(
        "--cfg",
        envvar="MOS_CFG",
        help="Guidance scale; 1 turns it off.",
        show_default="the model's",
        rich_help_panel=SAMPLING,
    ),
]
CfgInterval = Annotated[
    str | None,
    typer.Option(
        "--cfg-interval",
        envvar="MOS_CFG_INTERVAL",
        metavar="LOW,HIGH",
        help="Times at which guidance acts; 1 is noise, 0 the picture.",
        show_default="the model's",
        rich_help_panel=SAMPLING,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative",
        envvar="MOS_NEGATIVE",
        metavar="TEXT",
        callback=as_text,
        help="What guidance leads away from.",
        rich_help_panel=SAMPLING,
    ),
]
Routes = Annotated[
    list[str] | None,
    typer.Option(
        "--route",
        metavar="RULE",
        callback=as_text,
        help="Steer the routes: red=5,6 pins a word to layers, cat!=0-2 bans, dog+=0.5@4 adds a bias, last and others "
        "stand for every word; repeatable, see docs/routing.md.",
        rich_help_panel=ROUTING,
    ),
]
RouteFrom = Annotated[
    Path | None,
    typer.Option(
        "--route-from",
        metavar="TRACE",
        autocompletion=trace_paths,
        help="Take the layers that every word read in another run; the weights stay the router's.",
        rich_help_panel=ROUTING,
    ),
]
RouteSource = Annotated[
    Path | None,
    typer.Option(
        "--route-from", metavar="TRACE", help="The run that the picture took its routes from.", rich_help_panel=ROUTING
    ),
]
RouteUntil = Annotated[
    str | None,
    typer.Option(
        "--route-until",
        metavar="PERCENT",
        help="Take them for this share of the steps, the first ones, rounded up to whole steps.",
        show_default="100%",
        rich_help_panel=ROUTING,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        callback=as_text,
        help="Change the model by a LoRA: a file of `mos train finetune-lora`, or for a base model any that diffusers "
        "reads; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE",
        callback=as_text,
        help="Where a LoRA it was drawn with is, if it is not found by its hash; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
Regions = Annotated[
    bool,
    typer.Option(
        "--regions", help="Also record which parts of the picture attended to which word.", rich_help_panel=ROUTING
    ),
]
PreviewSteps = Annotated[
    bool,
    typer.Option(
        "--preview-steps", help="Also write what the picture looked like at every step (WebP).", rich_help_panel=OUTPUT
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        envvar="MOS_PRECISION",
        autocompletion=choices("auto", "bf16", "fp32"),
        help="auto, bf16 or fp32.",
        show_default="auto",
        metavar="PRECISION",
        rich_help_panel=DEVICE,
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant",
        envvar="MOS_QUANT",
        autocompletion=choices("none", "int8", "nf4"),
        metavar="KIND",
        help="Quantise on load: int8 or nf4; nf4,none for the understanding and the generation tower apart.",
        show_default="none",
        rich_help_panel=DEVICE,
    ),
]
FeatureCache = Annotated[
    int | None,
    typer.Option(
        "--feature-cache",
        envvar="MOS_FEATURE_CACHE",
        metavar="N",
        help="Compute the blocks at every N-th step only, after the first quarter of the steps: faster, and the "
        "picture changes a little; 1 turns it off, see docs/caching.md.",
        show_default="1",
        rich_help_panel=SAMPLING,
    ),
]
MaxVram = Annotated[
    str | None,
    typer.Option(
        "--max-vram",
        envvar="MOS_MAX_VRAM",
        metavar="GIB",
        help="GPU memory to use at most; the fastest setting that fits is chosen, see `mos plan`. auto: all there "
        "is; without a GPU, of main memory.",
        show_default="no limit",
        rich_help_panel=DEVICE,
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        envvar="MOS_OFFLOAD",
        autocompletion=choices("none", "understanding", "blocks"),
        metavar="WHAT",
        help="What waits in main memory until the GPU needs it: none, understanding (the understanding tower), or "
        "blocks (also the blocks of the generation tower, fetched one by one).",
        show_default="none",
        rich_help_panel=DEVICE,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        envvar="MOS_COMPILE",
        help="Compile the generation tower when it is first used; docs/performance.md says where that pays.",
        show_default="no",
        rich_help_panel=DEVICE,
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        envvar="MOS_BATCH_SIZE",
        metavar="N",
        help="Draw N pictures of one size at once, or auto, what fits a GPU: not equal in the last bits to pictures "
        "drawn alone, see docs/batches.md; edits are drawn alone.",
        show_default="1",
        rich_help_panel=SEVERAL,
    ),
]
Log = Annotated[
    bool | None,
    typer.Option(
        "--log/--no-log",
        envvar="MOS_LOG",
        help="List the pictures in the log of `mos logs`.",
        show_default="yes",
        rich_help_panel=OUTPUT,
    ),
]
Preview = Annotated[
    bool | None,
    typer.Option(
        "--preview/--no-preview",
        envvar="MOS_PREVIEW",
        help="Show the pictures in the terminal, if it has kitty's graphics or sixels; not with --quiet or --json.",
        show_default="no",
        rich_help_panel=OUTPUT,
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="MOS_SERVER",
        metavar="WHERE",
        help="Draw with a server that keeps the model loaded: auto (that of `mos serve`, if it has the same model "
        "and settings), http://ADDRESS:PORT, or off.",
        show_default="off",
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet",
        metavar="PNG",
        help="Also write one sheet of all pictures with their prompts.",
        rich_help_panel=SEVERAL,
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="NAME=A,B",
        help="Draw every picture with each value of a setting (seed, steps, cfg, solver, feature_cache, size, "
        "image_cfg, strength); repeatable: all combinations, which --sheet shows with axes.",
        rich_help_panel=SEVERAL,
    ),
]
ManifestFile = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        metavar="FILE",
        help="Record what becomes of every picture in FILE (JSON lines).",
        rich_help_panel=SEVERAL,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Draw what the manifest does not record as done, with the same seeds.", rich_help_panel=SEVERAL
    ),
]
SkipExisting = Annotated[
    bool,
    typer.Option(
        "--skip-existing",
        help="Draw no picture whose name is there already; without {number} in it.",
        rich_help_panel=SEVERAL,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be drawn and where; load no weights, write nothing.", rich_help_panel=SEVERAL
    ),
]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """The options that `generate` and `edit` share; see `with_draw_options`."""

    model: Model = None
    preset: Preset = None
    seed: Seed = None
    count: Count = 1
    steps: Steps = None
    solver: Solver = None
    cfg: Cfg = None
    cfg_interval: CfgInterval = None
    negative: Negative = None
    output: Output = None
    overwrite: Overwrite = False
    trace: Trace = None
    metadata: Metadata = None
    log: Log = None
    preview: Preview = None
    routes: Routes = None
    route_from: RouteFrom = None
    route_until: RouteUntil = None
    lora: Lora = None
    regions: Regions = False
    preview_steps: PreviewSteps = False
    device: Device = None
    precision: Precision = None
    quant: Quant = None
    feature_cache: FeatureCache = None
    batch_size: BatchSize = None
    max_vram: MaxVram = None
    offload: Offload = None
    attention: Attention = None
    compile: Compile = None
    server: Server = None
    sheet: Sheet = None
    vary: Vary = None
    manifest: ManifestFile = None
    resume: Resume = False
    skip_existing: SkipExisting = False
    dry_run: DryRun = False
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False

    def check_output(self, output: str) -> None:
        """Raises UsageError if the picture would go to standard output and cannot."""
        from mos_cli.cli.standard_files import check_output

        if not self.dry_run:
            check_output(output, json=self.json, trace=self.trace, regions=self.regions, previews=self.preview_steps)

    def settings(self, **more: Any) -> "Settings":
        """The settings among the options, and `more` that only one command has.

        Raises:
            UsageError: a value is out of range or of the wrong kind.
        """
        from mos_cli.config.settings import Settings, make_settings

        values = {option.name: getattr(self, option.name) for option in fields(self)}
        values = {name: value for name, value in values.items() if name in Settings.model_fields}
        return make_settings(**values | {"routes": self.routes or None, "loras": self.lora or None} | more)


def with_draw_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `DrawOptions`, after its own: they arrive as its parameter `options`."""
    own = [parameter for name, parameter in signature(command).parameters.items() if name != "options"]
    shared = signature(DrawOptions).parameters.values()
    # typer reads the signature. It calls with keywords, so own parameters without a default may follow others.
    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (*own, *shared)]

    @wraps(command)
    def call(**values: Any) -> None:
        options = DrawOptions(**{option.name: values.pop(option.name) for option in fields(DrawOptions)})
        command(**values, options=options)

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
