"""`mos models init`: a bundle with random weights, made of a blueprint."""

import re
from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.completion import blueprint_names
from mos_cli.cli.output import stderr, stdout
from mos_cli.errors import UsageError

_UNITS = {"MB": 10**6, "GB": 10**9}


def init(
    name: Annotated[str, typer.Argument(autocompletion=blueprint_names, help="A blueprint: name, or a .json file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; it must not be there yet.")],
    understanding: Annotated[
        str | None,
        typer.Option(
            "--understanding",
            metavar="NAME",
            help="Understanding tower to build for.",
            show_default="the blueprint's first",
        ),
    ] = None,
    tower: Annotated[
        Path | None,
        typer.Option("--tower", metavar="DIR", help="Where that tower lies; without it the bundle cannot draw."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights.")] = 0,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Largest size of a file: 500MB, 2GB.")
    ] = "2GB",
) -> None:
    """Make a bundle with random weights: for planning, benchmarks and as the start of training."""
    from mos_cli.bundles.blueprints import find_blueprint
    from mos_cli.bundles.bundle import check_new_folder, check_tower_folder

    blueprint = find_blueprint(name)
    chosen, shape = blueprint.tower(understanding)
    shard = _bytes(shard_size)
    check_new_folder(out.absolute())
    if tower is not None:
        check_tower_folder(tower.absolute(), chosen, shape)
    from mos_cli.utils.quiet import quieten

    quieten()
    from mos_cli.towers.random_weights import Start, write_fresh_bundle

    with stderr.status(f"making {name}") as status:
        write_fresh_bundle(Start(blueprint, chosen, tower, seed, shard), out, status.update)
    stdout.print(out, soft_wrap=True)
    if tower is None:
        again = "once it is here, init with --tower DIR makes a bundle that draws"
        stderr.print(f"without its understanding tower ({shape.hub_id or chosen}): {again}", soft_wrap=True)


def _bytes(size: str) -> int:
    """The bytes that a text such as 500MB stands for; raises UsageError."""
    match = re.fullmatch(r"([1-9]\d{0,5})(MB|GB)", size.upper())
    if match is None:
        raise UsageError(f"--shard-size {size} is not understood: write 500MB or 2GB")
    return int(match[1]) * _UNITS[match[2]]
