"""Options that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say how long each stage took.")]
Json = Annotated[bool, typer.Option("--json", help="Print newline-delimited JSON events on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over files that are there.")]
Device = Annotated[
    str | None,
    typer.Option(envvar="MOS_DEVICE", help="auto, cpu or cuda.", show_default="auto", metavar="DEVICE"),
]
Attention = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_ATTENTION",
        metavar="NAME",
        help="What computes attention: xformers, sdpa (PyTorch's), or auto: xformers where it can.",
        show_default="auto",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        envvar="MOS_OUTPUT",
        metavar="PATH",
        help="File, folder (with a slash at its end) or template with {date} {number} {prompt} {seed} {model}.",
        show_default="outputs/{date}/{number}_{prompt}_s{seed}.png",
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_TRACE",
        metavar="LEVEL",
        help="Routing trace beside the picture: off, summary, topk (every decision), or full (and all probabilities).",
        show_default="topk",
    ),
]
ArtFile = Annotated[
    Path | None, typer.Option("--art", help="Art file or its folder.", show_default="where `mos data build` writes it")
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", envvar="MOS_MODEL", help="Bundle: name, path or hub id.", show_default="emoji"),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Where the model that drew it is, if it is not found by its hash; repeatable for a chain of edits.",
    ),
]
Preset = Annotated[
    str | None, typer.Option("--preset", "-p", envvar="MOS_PRESET", help="Named settings; see `mos presets ls`.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", "-s", envvar="MOS_SEED", help="Seed of the first picture.", show_default="random"),
]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Pictures per prompt; seeds count up.")]
Steps = Annotated[int | None, typer.Option(envvar="MOS_STEPS", help="Denoising steps.", show_default="the model's")]
Solver = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_SOLVER",
        metavar="NAME",
        help="What integrates the steps: ab2 (Adams-Bashforth, second order) or euler.",
        show_default="ab2",
    ),
]
Cfg = Annotated[
    float | None,
    typer.Option(envvar="MOS_CFG", help="Guidance scale; 1 turns it off.", show_default="the model's"),
]
CfgInterval = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_CFG_INTERVAL",
        metavar="LOW,HIGH",
        help="Times at which guidance acts; 1 is noise, 0 the picture.",
        show_default="the model's",
    ),
]
Negative = Annotated[
    str | None, typer.Option(envvar="MOS_NEGATIVE", metavar="TEXT", help="What guidance leads away from.")
]
Route = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RULE",
        help="Steer the routes: red=5,6 pins a word to layers, cat!=0-2 bans, dog+=0.5@4 leans, last and others stand "
        "for every word; repeatable, see docs/routing.md.",
    ),
]
RouteFrom = Annotated[
    Path | None,
    typer.Option(metavar="TRACE", help="Let every word read the layers that it read in another run, weights anew."),
]
RouteUntil = Annotated[
    str | None,
    typer.Option(metavar="PERCENT", help="Take them for the first steps only.", show_default="100%"),
]
Regions = Annotated[
    bool, typer.Option("--regions", help="Also record which parts of the picture attended to which word.")
]
PreviewSteps = Annotated[
    bool, typer.Option("--preview-steps", help="Also write what the picture looked like at every step (WebP).")
]
Precision = Annotated[
    str | None,
    typer.Option(envvar="MOS_PRECISION", help="auto, bf16 or fp32.", show_default="auto", metavar="PRECISION"),
]
Quant = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_QUANT",
        metavar="KIND",
        help="Quantise on load: int8 or nf4; nf4,none for the understanding and the generation tower apart.",
        show_default="none",
    ),
]
FeatureCache = Annotated[
    int | None,
    typer.Option(
        envvar="MOS_FEATURE_CACHE",
        metavar="N",
        help="Compute the blocks at every N-th step only, once the first quarter of the steps is done: faster, and the "
        "picture changes a little; 1 turns it off, see docs/caching.md.",
        show_default="1",
    ),
]
MaxVram = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_MAX_VRAM",
        metavar="GIB",
        help="Use so much of the GPU's memory at most, with the fastest setting that fits; see `mos plan`. auto: all "
        "there is; without a GPU, of main memory.",
        show_default="no limit",
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        envvar="MOS_OFFLOAD",
        metavar="WHAT",
        help="What waits in main memory until the GPU needs it: none, understanding (the tower that reads), or blocks "
        "(also those of the tower that draws, fetched one by one).",
        show_default="none",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        envvar="MOS_COMPILE",
        help="Compile the tower that draws when it is first used; where that pays is in docs/performance.md.",
        show_default="no",
    ),
]
Sheet = Annotated[
    Path | None, typer.Option(metavar="PNG", help="Also write one sheet of all pictures with their prompts.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be drawn and where; load no weights, write nothing.")
]
