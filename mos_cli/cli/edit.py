"""`mos edit`: from pictures and an instruction to other pictures, and their routing traces."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.batches import draw_requests
from mos_cli.cli.jobs import shortened
from mos_cli.cli.options import DrawOptions, as_text, with_draw_options
from mos_cli.cli.output import Report
from mos_cli.cli.prompts import READ_SUFFIXES, read_pictures, read_prompts
from mos_cli.cli.requests import Request
from mos_cli.cli.standard_files import check_one_input, picture_file
from mos_cli.errors import UsageError

ADVICE = 'what to change, for example: mos edit cat.png "make it blue"'


@with_draw_options
def edit(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            metavar="PICTURE...",
            help="The pictures to edit, of any size: PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP; a folder stands for the "
            "pictures in it, @FILE for a list of them, a line each; - reads one from stdin.",
        ),
    ],
    instruction: Annotated[
        str,
        typer.Argument(
            callback=as_text,
            # Read before the pictures: where one argument is given, the parser takes it for this one.
            is_eager=True,
            help="What to change; - reads instructions from stdin, @FILE from a file, a line each.",
        ),
    ],
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", metavar="FILE", help="A further picture to draw from; repeatable."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="White may change; what is black stays bit for bit."),
    ] = None,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black may change instead.")] = False,
    feather: Annotated[float, typer.Option("--feather", min=0, help="Pixels over which the mask fades inwards.")] = 0.0,
    composite: Annotated[
        bool,
        typer.Option("--composite", help="Without a mask: keep bit for bit what the edit did not visibly change."),
    ] = False,
    keep_alpha: Annotated[
        bool, typer.Option("--keep-alpha", help="Make the result as transparent as the picture; else it is opaque.")
    ] = False,
    strength: Annotated[
        float,
        typer.Option(
            "--strength", min=0, max=1, help="How far to go back to noise: 1 redraws everything, 0.5 keeps the layout."
        ),
    ] = 1.0,
    image_cfg: Annotated[
        float | None,
        typer.Option(
            "--image-cfg", envvar="MOS_IMAGE_CFG", help="Guidance towards the picture.", show_default="the model's"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Size of the result, the picture in its middle: 256, 384x256 or 3:2.",
            show_default="the picture's own",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            help="Most pixels that the model works on.",
            show_default="the model's own size",
        ),
    ] = None,
    expand: Annotated[
        str | None,
        typer.Option(
            "--expand",
            metavar="SIDES",
            help="Draw beyond the picture, which stays bit for bit: left=64,top=32 with the pixels to add.",
        ),
    ] = None,
    strip: Annotated[
        Path | None,
        typer.Option("--strip", metavar="PNG", help="Also write before, after and their difference side by side."),
    ] = None,
    *,
    options: DrawOptions,
) -> None:
    """Change a picture as an instruction says. The result is as large as the picture, and holds its recipe.

    Editing a picture that mos made keeps its history: mos replay can draw the whole chain again.
    """
    from mos_cli.images.expansion import parse_expansion
    from mos_cli.inference.requests import EditRequest

    report = Report(json=options.json, quiet=options.quiet, verbose=options.verbose)
    check_one_input(*pictures, instruction, mask, *(reference or []))
    if Path(instruction).is_file() and (len(pictures) > 1 or Path(instruction).suffix.lower() in READ_SUFFIXES):
        raise UsageError(f"{instruction} is a file: the last argument says what to change, or is @FILE")
    instructions = read_prompts(instruction, ADVICE)
    flags = options.settings(image_cfg=image_cfg)
    edit = EditRequest(
        size=size,
        max_pixels=max_pixels,
        mask=None if mask is None else picture_file(mask),
        invert_mask=invert_mask,
        feather=feather,
        composite=composite,
        keep_alpha=keep_alpha,
        strength=strength,
        expand=None if expand is None else parse_expansion(expand),
    )
    references = tuple(picture_file(path) for path in reference or [])
    files = read_pictures(pictures)
    requests = [
        Request(text, subject, flags, options.count, (file, *references), edit)
        for file, name in files
        for text in instructions
        for subject in [repr(shortened(text)) if len(files) == 1 else name]
    ]
    draw_requests(requests, flags, options, report, strip=strip)
