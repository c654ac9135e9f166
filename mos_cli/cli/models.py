"""`mos models`: the bundles and understanding towers there are, fetching them, and checking them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import model_and_tower_names, tower_names
from mos_cli.cli.models_init import init
from mos_cli.cli.models_quantize import quantize
from mos_cli.cli.output import print_json, print_view, print_warning, size_text, stdout
from mos_cli.cli.paths import App
from mos_cli.cli.progress import fetch_with_progress

if TYPE_CHECKING:
    from mos_cli.bundles.blueprints import Blueprint
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.bundles.specs import TowerSpec

models_app = App(name="models", no_args_is_help=True, help="List, fetch and check models.")

Name = Annotated[
    str,
    typer.Argument(
        autocompletion=model_and_tower_names,
        help="A model (name, folder or hub id) or an understanding tower (name).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


@models_app.command("ls")
def list_all(as_json: AsJson = False) -> None:
    """List the models, blueprints (models without weights), and the understanding towers that can read prompts."""
    from mos_cli.bundles.blueprints import find_blueprint
    from mos_cli.bundles.bundle import list_bundles, list_tower_specs
    from mos_cli.errors import ModelError
    from mos_cli.utils.folders import list_blueprints

    rows = []
    for name, bundle in list_bundles().items():
        if isinstance(bundle, ModelError):
            print_warning(f"{name} is left out: {bundle}")
        else:
            rows.append(_bundle_row(bundle))
    rows += [_blueprint_row(find_blueprint(name), file) for name, file in list_blueprints().items()]
    rows += [_tower_row(spec) for spec in list_tower_specs()]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "tower", "pulled", "size", "licence"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "size" else "left")
    for row in rows:
        pulled = {True: "[green]yes[/]", False: "no", None: "-"}[row["pulled"]]
        size = "-" if row["size"] is None else size_text(row["size"])
        table.add_row(row["name"], row["kind"], row["tower"], pulled, size, row["license"])
    print_view(table, wide=True)
    if any(row["kind"] == "blueprint" for row in rows):
        stdout.print("A blueprint is a model without weights: see mos plan NAME.", style="dim")


@models_app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show what a model is: what it needs, what it can draw, where it comes from."""
    from mos_cli.bundles.bundle import Bundle, find_model

    model = find_model(name)
    if isinstance(model, Bundle):
        row, index = _bundle_row(model), model.index
    else:
        row, index = _tower_row(model), model
    if as_json:
        print_json([{**row, "index": index.model_dump(mode="json", by_alias=True)}])
        return
    lines = {
        "name": row["name"],
        "what": row["description"],
        "licence": row["license"],
        "folder": row["folder"],
    }
    if isinstance(model, Bundle):
        canvas, defaults = model.index.canvas, model.index.defaults
        lines |= {
            "hash": model.hash,
            "native": f"{canvas.native[0]} x {canvas.native[1]} pixels",
            "sides": f"{canvas.min} to {canvas.max} pixels, multiples of {canvas.multiple}",
            "defaults": f"{defaults.steps} steps, cfg {defaults.cfg:g}, t in {list(defaults.cfg_interval)}",
            "tower": row["tower"],
        }
    lines |= {"pulled": "yes" if row["pulled"] else "no", "size": size_text(row["size"])}
    lines["files"] = ", ".join(index.files)
    for heading, text in lines.items():
        stdout.print(f"{heading:<9} {text}", markup=False, soft_wrap=True)
    if isinstance(model, Bundle):
        _print_card(model)


@models_app.command("pull")
def pull(name: Name) -> None:
    """Fetch an understanding tower, or the one a model needs, into the cache and check it."""
    from mos_cli.bundles.bundle import find_model

    spec = _tower_of(find_model(name))
    stdout.print(fetch_with_progress(spec), soft_wrap=True)


@models_app.command("verify")
def verify(name: Name) -> None:
    """Check every file of a model and of its understanding tower against the known hashes."""
    from mos_cli.bundles.bundle import Bundle, find_model, verify_bundle
    from mos_cli.bundles.sources import tower_files, verify_tower

    model = find_model(name)
    if isinstance(model, Bundle):
        verify_bundle(model)
        _print_ok(model.index.name, model.index.files)
    spec = _tower_of(model)
    verify_tower(spec)
    _print_ok(spec.name, tower_files(spec))


@models_app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(autocompletion=tower_names, help="An understanding tower in the cache.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove an understanding tower from the cache; what mos did not put there itself is never removed."""
    import shutil
    import sys

    from mos_cli.bundles.bundle import bundle_folders
    from mos_cli.bundles.sources import cached_towers
    from mos_cli.errors import ModelError, UsageError
    from mos_cli.utils.files import folder_size
    from mos_cli.utils.folders import models_folder

    folders = cached_towers(name)
    if not folders:
        if (bundle := bundle_folders().get(name)) is not None:
            shipped = bundle.parent == models_folder()
            reason = "comes with mos and stays" if shipped else f"is a folder of yours: delete {bundle} yourself"
            raise ModelError(f"{name} {reason}")
        raise ModelError(f"there is no understanding tower {name} in the cache: see mos models ls")
    size = size_text(sum(map(folder_size, folders)))
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"{name} ({size}) is removed only if you say so: pass --yes")
        typer.confirm(f"remove {name} ({size})?", abort=True)
    for folder in folders:
        # Renamed first: an interruption leaves no half of a tower under its name.
        doomed = folder.rename(folder.with_name(f".{folder.name}"))
        shutil.rmtree(doomed)
        stdout.print(f"removed {folder}", markup=False)


def _tower_of(model: "Bundle | TowerSpec") -> "TowerSpec":
    from mos_cli.bundles.bundle import Bundle

    return model.index.understanding if isinstance(model, Bundle) else model


def _bundle_row(bundle: "Bundle") -> dict[str, Any]:
    from mos_cli.bundles.sources import tower_folder
    from mos_cli.utils.files import folder_size

    index = bundle.index
    return {
        "name": index.name,
        "kind": "bundle",
        "description": index.description,
        "license": index.license,
        "tower": index.understanding.name,
        "pulled": tower_folder(index.understanding).is_dir(),
        "size": folder_size(bundle.folder),
        "folder": str(bundle.folder),
        "hash": bundle.hash,
    }


def _blueprint_row(blueprint: "Blueprint", file: Path) -> dict[str, Any]:
    return {
        "name": blueprint.name,
        "kind": "blueprint",
        "description": blueprint.description,
        "license": blueprint.license,
        "tower": blueprint.tower(None)[0],
        "pulled": None,
        "size": None,
        "folder": str(file.parent),
    }


def _tower_row(spec: "TowerSpec") -> dict[str, Any]:
    from mos_cli.bundles.sources import tower_folder
    from mos_cli.utils.files import folder_size

    folder = tower_folder(spec)
    pulled = folder.is_dir()
    return {
        "name": spec.name,
        "kind": "tower",
        "description": spec.description,
        "license": spec.license,
        "tower": "",
        "pulled": pulled,
        "size": folder_size(folder) if pulled else spec.size,
        "folder": str(folder),
    }


def _print_card(bundle: "Bundle") -> None:
    card = bundle.folder / "card.md"
    if card.is_file():
        # The part before the first section is the summary.
        summary = card.read_text(encoding="utf-8").split("\n## ")[0].strip()
        stdout.print(f"\n{summary}", markup=False)


def _print_ok(name: str, files: Iterable[str]) -> None:
    for file in files:
        stdout.print(f"[green]ok[/] {name}/{file}", soft_wrap=True)


models_app.command("quantize")(quantize)
models_app.command("init")(init)
