"""`mos models init`: a bundle with random weights, made of a blueprint."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli import console


def init(
    name: Annotated[str, typer.Argument(help="A blueprint: name, or a .json file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; it must not be there yet.")],
    understanding: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Understanding tower to build for.", show_default="the blueprint's first"),
    ] = None,
    tower: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where that tower lies; without it the bundle has no index.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of a file: 500MB, 2GB.")] = "2GB",
) -> None:
    """Make a bundle with random weights: for planning, benchmarks and as the start of training."""
    from mos_cli.runtime.blueprints import find_blueprint

    blueprint = find_blueprint(name)
    chosen, shape = blueprint.tower(understanding)
    from mos_cli.runtime.quiet import quieten

    quieten()
    from mos_cli.towers.fresh import Start, write_fresh_bundle

    with console.err.status(f"making {name}") as status:
        write_fresh_bundle(Start(blueprint, chosen, tower, seed, shard_size), out, status.update)
    console.out.print(out, soft_wrap=True)
    if tower is None:
        again = "once it is here, init with --tower DIR makes a bundle that draws"
        console.err.print(f"without its understanding tower ({shape.hub_id or chosen}): {again}", soft_wrap=True)
