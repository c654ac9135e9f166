"""`mos presets`: the named ways to draw."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import preset_names
from mos_cli.cli.output import print_json, print_view, stdout
from mos_cli.cli.paths import App

if TYPE_CHECKING:
    from mos_cli.config.settings import Preset

presets_app = App(name="presets", help="Named settings for drawing.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


@presets_app.command("ls")
def ls(json: Json = False) -> None:
    """List the presets."""
    from rich.table import Table

    from mos_cli.config.settings import list_presets

    presets = list_presets()
    if json:
        print_json(_row(preset) for preset in presets)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "settings", "description"):
        table.add_column(column)
    for preset in presets:
        settings = ", ".join(f"{key} {value}" for key, value in preset.settings.model_dump(exclude_none=True).items())
        table.add_row(preset.name, settings, preset.description)
    print_view(table, wide=True)


@presets_app.command("show")
def show(
    name: Annotated[str, typer.Argument(autocompletion=preset_names, help="A preset.")], json: Json = False
) -> None:
    """Show one preset."""
    from mos_cli.config.settings import load_preset

    preset = load_preset(name)
    if json:
        print_json([_row(preset)])
        return
    stdout.print(preset.description, markup=False)
    for key, value in preset.settings.model_dump(exclude_none=True).items():
        stdout.print(f"  {key} = {value}", markup=False)


def _row(preset: "Preset") -> dict[str, Any]:
    return {
        "name": preset.name,
        "description": preset.description,
        **preset.settings.model_dump(exclude_none=True),
    }
