"""`mos train` with the recipe of a router: from captioned pictures to an adapter of a base model."""

from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli.output import print_warning, stderr, stdout
from mos_cli.cli.progress import stop_between_steps
from mos_cli.errors import InputError, ModelError


def train_router(
    recipe: Path, *, data: Path | None, base: str | None, run: Path | None, export: Path | None, steps: int | None
) -> None:
    """Trains a router and its gates, and keeps them if they are better than every baseline on held-out pictures.

    Raises:
        MosError: the recipe, the base model or the data cannot be used.
        typer.Exit: the router is not better, and was not kept (exit code 1).
    """
    from mos_cli.adapters.recipe import load_router_recipe
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.datasets.captioned import load_captioned
    from mos_cli.utils.files import check_folder, check_writable, expand, sole_user

    overrides = {"steps": steps, "base": base, "data": None if data is None else str(data)}
    loaded = load_router_recipe(recipe, {name: value for name, value in overrides.items() if value is not None})
    if loaded.data is None:
        raise InputError("name a folder of captioned pictures: --data FOLDER")
    folder = run or Path("runs") / loaded.name
    target = export or folder / "adapter"
    check_writable(target.parent)
    check_folder(target, "adapter.json")
    bundle = find_bundle(loaded.base)
    if not isinstance(bundle, AdapterBundle):
        raise ModelError(f"{loaded.base} is a model of mos, not a base model: see mos models ls")
    if bundle.index.router is not None:
        raise ModelError(f"{loaded.base} has a router already: train one for its base model")
    pictures = load_captioned(expand(loaded.data))

    from mos_cli.adapters.model import load_pipeline
    from mos_cli.config.settings import RunSettings
    from mos_cli.training.router import RouterTrainer
    from mos_cli.training.router import export as export_adapter
    from mos_cli.utils.devices import choose_device, choose_precision

    precision = choose_precision(choose_device("auto"))
    pipeline = load_pipeline(bundle, RunSettings(), precision=precision, quant=loaded.quant)
    trainer = RouterTrainer(pipeline, loaded, pictures)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    ]
    with (
        sole_user(folder, "another training"),
        Progress(*columns, console=stderr) as bars,
        stop_between_steps() as check_interrupt,
    ):
        tasks: dict[str, Any] = {}

        def log(what: str, step: int, loss: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=loaded.steps, loss=loss)
            bars.update(tasks[what], completed=step, loss=loss)
            check_interrupt()

        adapter, result = trainer.train(folder, log, print_warning)
    stdout.print(f"held-out loss on {loaded.held_out} pictures", markup=False)
    for name, loss in {"router and gates": result.router, **result.baselines}.items():
        stdout.print(f"  {name:<28} {loss:.6f}", markup=False)
    if not result.better:
        print_warning("the router is not better than every baseline: it was not kept")
        raise typer.Exit(1)
    export_adapter(adapter, loaded, bundle, target)
    stdout.print(f"{target}", soft_wrap=True, markup=False)
