"""`mos models`: the bundles and understanding towers there are, fetching them, and checking them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import model_and_tower_names, tower_names
from mos_cli.cli.models_export import export
from mos_cli.cli.models_init import init
from mos_cli.cli.models_quantize import quantize
from mos_cli.cli.output import print_json, print_view, print_warning, size_text, stdout
from mos_cli.cli.paths import App
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from mos_cli.bundles.adapters import AdapterBundle
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
            rows.append(_model_row(bundle))
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
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import Bundle, find_model
    from mos_cli.bundles.taught import taught_scenes

    model = find_model(name)
    if isinstance(model, AdapterBundle):
        _show_base_model(model, as_json=as_json)
        return
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
            "defaults": f"{counted(defaults.steps, 'step')}, cfg {defaults.cfg:g}, t in {list(defaults.cfg_interval)}",
            "tower": row["tower"],
        }
    lines |= {"pulled": "yes" if row["pulled"] else "no", "size": size_text(row["size"])}
    lines["files"] = ", ".join(index.files)
    for heading, text in lines.items():
        stdout.print(f"{heading:<9} {text}", markup=False, soft_wrap=True)
    if isinstance(model, Bundle):
        _print_card(model)
        if (taught := taught_scenes(model)) is not None:
            stdout.print(f"\nobjects: {', '.join(taught.objects)}", markup=False)


@models_app.command("pull")
def pull(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a base model is downloaded.")] = False,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use that a base model has beside its licence.")
    ] = False,
) -> None:
    """Fetch an understanding tower, the one a model needs, or a base model, into the cache and check it.

    Of a base model the licence, terms and size are shown before it is downloaded; its revision and the sha256 of every
    file are locked.
    """
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import find_model
    from mos_cli.errors import UsageError

    model = find_model(name)
    if isinstance(model, AdapterBundle):
        _pull_base_model(model, yes=yes, accept_terms=accept_terms)
        return
    if accept_terms:
        raise UsageError(f"{name} has no terms to accept: leave --accept-terms out")
    stdout.print(fetch_with_progress(_tower_of(model)), soft_wrap=True)


@models_app.command("verify")
def verify(name: Name) -> None:
    """Check every file of a model and of its understanding tower against the known hashes."""
    from mos_cli.bundles.adapters import AdapterBundle, verify_adapter
    from mos_cli.bundles.bundle import Bundle, find_model, verify_bundle
    from mos_cli.bundles.sources import tower_files, verify_tower

    model = find_model(name)
    if isinstance(model, AdapterBundle):
        verify_adapter(model)
        _print_ok(model.index.name, [*model.base_files, *model.index.files])
        return
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


def _pull_base_model(bundle: "AdapterBundle", *, yes: bool, accept_terms: bool) -> None:
    import sys

    from mos_cli.bundles.adapters import lock_path, verify_adapter
    from mos_cli.bundles.pulling import look_up
    from mos_cli.bundles.pulling import pull as pull_base_model
    from mos_cli.errors import ModelError, UsageError

    index = bundle.index
    if index.source is None:
        raise ModelError(f"{index.name} is a folder on this disk: there is nothing to pull")
    if bundle.pulled and not accept_terms:
        verify_adapter(bundle)
        stdout.print(f"{bundle.base}", soft_wrap=True, markup=False)
        return
    offer = look_up(index, bundle.lock)
    facts = {
        "what": index.description,
        "from": f"https://huggingface.co/{offer.repo_id}",
        "revision": offer.revision,
        "size": size_text(offer.size),
        "licence": index.license,
    }
    if index.terms is not None:
        facts["terms"] = f"{index.terms.name}, {index.terms.url}, for {index.terms.part}"
    for heading, text in facts.items():
        stdout.print(f"{heading:<9} {text}", markup=False, soft_wrap=True)
    asked = sys.stdin is not None and sys.stdin.isatty()
    if not yes:
        if not asked:
            raise UsageError(f"{index.name} ({facts['size']}) is downloaded only if you say so: pass --yes")
        typer.confirm(f"download {facts['size']}?", abort=True)
    if index.terms is not None and not accept_terms and asked:
        accept_terms = typer.confirm(f"do you accept the {index.terms.name}?")
    lock = pull_base_model(index, offer, bundle.lock, accept_terms=accept_terms)
    stdout.print(f"locked    {counted(len(lock.files), 'file')} in {lock_path(index)}", markup=False, soft_wrap=True)


def _show_base_model(bundle: "AdapterBundle", *, as_json: bool) -> None:
    row, index = _base_model_row(bundle), bundle.index
    if as_json:
        print_json([{**row, "index": index.model_dump(mode="json", by_alias=True)}])
        return
    canvas, defaults, lock = index.canvas, index.defaults, bundle.lock
    own = ", ".join(map(str, index.own_layers))
    lines = {
        "name": index.name,
        "what": index.description,
        "licence": index.license,
        "terms": "none beside the licence" if index.terms is None else f"{index.terms.name}, {index.terms.url}",
        "pipeline": f"{index.pipeline} of diffusers",
        "layers": f"{index.layers}, of which it reads {own} itself, in {index.blocks} blocks",
        "router": "none: untrained" if index.router is None else f"trained, width {index.router.width}",
        "native": f"{canvas.native[0]} x {canvas.native[1]} pixels",
        "sides": f"{canvas.min} to {canvas.max} pixels, multiples of {canvas.multiple}",
        "defaults": f"{counted(defaults.steps, 'step')}, cfg {defaults.cfg:g}",
        "pulled": "yes" if row["pulled"] else "no",
        "locked": "no" if lock is None else f"{lock.repo_id} at {lock.revision}",
    }
    for heading, text in lines.items():
        stdout.print(f"{heading:<9} {text}", markup=False, soft_wrap=True)


def _model_row(bundle: "Bundle") -> dict[str, Any]:
    from mos_cli.bundles.adapters import AdapterBundle

    return _base_model_row(bundle) if isinstance(bundle, AdapterBundle) else _bundle_row(bundle)


def _base_model_row(bundle: "AdapterBundle") -> dict[str, Any]:
    from mos_cli.utils.files import folder_size

    index = bundle.index
    return {
        "name": index.name,
        "kind": "base model",
        "description": index.description,
        "license": index.license,
        "tower": "",
        "pulled": bundle.pulled,
        "size": folder_size(bundle.folder) if index.source is None else index.source.size,
        "folder": str(bundle.folder),
    }


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


models_app.command("export")(export)
models_app.command("quantize")(quantize)
models_app.command("init")(init)
