"""`mos generate`: from prompts to pictures and routing traces."""

from typing import Annotated

import typer

from mos_cli.cli.batches import draw_requests
from mos_cli.cli.jobs import shortened
from mos_cli.cli.options import DrawOptions, as_text, with_draw_options
from mos_cli.cli.output import Report
from mos_cli.cli.prompts import read_prompts
from mos_cli.cli.requests import Request


@with_draw_options
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            callback=as_text,
            help="What to draw; {red|blue} is one of both and __animals__ a line of a word file, (cat:1.3) "
            "weighs a word, see docs/batches.md; "
            "- reads prompts from stdin, @FILE from a file, a line each.",
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            "--size", envvar="MOS_SIZE", metavar="SIZE", help="256, 384x256 or 3:2.", show_default="the model's"
        ),
    ] = None,
    *,
    options: DrawOptions,
) -> None:
    """Draw pictures from a prompt, each with its recipe inside and its routing trace beside it."""
    report = Report(json=options.json, quiet=options.quiet, verbose=options.verbose)
    prompts = read_prompts(prompt, 'what to draw, for example: mos generate "a red apple"')
    flags = options.settings(size=size)
    requests = [Request(text, repr(shortened(text)), flags, options.count) for text in prompts]
    draw_requests(requests, flags, options, report)
