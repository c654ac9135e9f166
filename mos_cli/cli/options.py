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
        help="Routing trace beside the picture: off, summary, or topk (every decision).",
        show_default="topk",
    ),
]
ArtFile = Annotated[
    Path | None, typer.Option("--art", help="Art file or its folder.", show_default="where `mos data build` writes it")
]
