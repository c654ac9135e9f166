"""`mos presets`: the named ways to draw."""

import json as jsonlib
from typing import Annotated

import typer

from mos_cli.cli import console

presets_app = typer.Typer(name="presets", help="Named settings for drawing.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@presets_app.command("ls")
def ls(json: Json = False) -> None:
    """List the presets."""
    from rich.table import Table

    from mos_cli.runtime.settings import list_presets

    presets = list_presets()
    if json:
        values = [
            {"name": p.name, "description": p.description, **p.settings.model_dump(exclude_none=True)} for p in presets
        ]
        typer.echo(jsonlib.dumps(values))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "settings", "description"):
        table.add_column(column)
    for preset in presets:
        settings = ", ".join(f"{key} {value}" for key, value in preset.settings.model_dump(exclude_none=True).items())
        table.add_row(preset.name, settings, preset.description)
    console.out.print(table)


@presets_app.command("show")
def show(name: Annotated[str, typer.Argument(help="A preset.")], json: Json = False) -> None:
    """Show one preset."""
    from mos_cli.runtime.settings import load_preset

    preset = load_preset(name)
    settings = preset.settings.model_dump(exclude_none=True)
    if json:
        typer.echo(jsonlib.dumps({"name": preset.name, "description": preset.description, **settings}))
        return
    console.out.print(preset.description, markup=False)
    for key, value in settings.items():
        console.out.print(f"  {key} = {value}", markup=False)
