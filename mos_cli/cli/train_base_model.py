"""`mos train` on a base model: from captioned pictures to a router's adapter or to a LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli.output import print_warning, stderr, stdout
from mos_cli.cli.progress import stop_between_steps
from mos_cli.errors import InputError, ModelError
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from mos_cli.adapters.pipeline import AdapterPipeline
    from mos_cli.adapters.recipe import BaseLoraRecipe, BaseModelRecipe, RouterRecipe
    from mos_cli.datasets.captioned import Captioned
    from mos_cli.training.base_models import Log


def train_on_base_model(
    recipe: Path, overrides: dict[str, Any], *, run: Path | None, export: Path | None, strict: bool
) -> None:
    """Trains a router with its gates, or a LoRA.

    Args:
        overrides: fields that replace the recipe's.
        strict: refuse a folder with pictures that cannot be used.

    Raises:
        MosError: the recipe, the base model or the data cannot be used.
        typer.Exit: the router is not better than every baseline, and was not kept (exit code 1).
    """
    from mos_cli.adapters.recipe import BaseLoraRecipe, RouterRecipe, load_base_model_recipe
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.bundles.loras import check_lora_name
    from mos_cli.cli.unused import print_unused
    from mos_cli.datasets.captioned_folders import load_captioned
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_folder, check_writable, expand

    loaded = load_base_model_recipe(recipe, overrides)
    if loaded.data is None:
        raise InputError("name a folder of captioned pictures: --data FOLDER")
    folder = run or Path("runs") / loaded.name
    if isinstance(loaded, RouterRecipe):
        target = export or folder / "adapter"
        check_folder(target, "adapter.json")
    else:
        require("a LoRA", "train", "peft")
        target = export or folder / f"{loaded.name}.safetensors"
        check_lora_name(target)
    check_writable(target.parent)
    bundle = find_bundle(loaded.base)
    if not isinstance(bundle, AdapterBundle):
        raise ModelError(f"{loaded.base} is a model of mos, not a base model: see mos models ls")
    if bundle.index.router is not None:
        raise ModelError(f"{loaded.base} has a router already: train one for its base model")
    pictures = load_captioned(expand(loaded.data), caption=loaded.caption)
    unused = [(unused.name, unused.reason) for unused in pictures.unused]
    print_unused(unused)
    if strict and unused:
        name, reason = unused[0]
        files = counted(len(unused), "file")
        raise InputError(f"{files} of {loaded.data} cannot be used; the first is {name}: {reason}")

    from mos_cli.adapters.model import load_pipeline
    from mos_cli.config.settings import RunSettings
    from mos_cli.utils.devices import choose_device, choose_precision

    precision = choose_precision(choose_device("auto"))
    pipeline = load_pipeline(bundle, RunSettings(), precision=precision, quant=loaded.quant)
    if isinstance(loaded, RouterRecipe):
        _train_router(pipeline, loaded, pictures, folder, target)
    elif isinstance(loaded, BaseLoraRecipe):
        _train_lora(pipeline, loaded, pictures, folder, target)
    stdout.print(f"{target}", soft_wrap=True, markup=False)


def _train_router(
    pipeline: "AdapterPipeline", recipe: "RouterRecipe", pictures: "Captioned", folder: Path, target: Path
) -> None:
    from mos_cli.training.router import RouterTrainer, export

    trainer = RouterTrainer(pipeline, recipe, pictures)
    with _logged(folder, recipe) as log:
        adapter, result = trainer.train(folder, log, print_warning)
    _print_losses(recipe, {"router and gates": result.router, **result.baselines})
    if not result.better:
        print_warning("the router is not better than every baseline: it was not kept")
        raise typer.Exit(1)
    export(adapter, recipe, pipeline.bundle, target)


def _train_lora(
    pipeline: "AdapterPipeline", recipe: "BaseLoraRecipe", pictures: "Captioned", folder: Path, target: Path
) -> None:
    from mos_cli.training.base_loras import LoraTrainer

    trainer = LoraTrainer(pipeline, recipe, pictures)
    with _logged(folder, recipe) as log:
        result = trainer.train(folder, log, print_warning)
    _print_losses(recipe, {"with the LoRA": result.lora, "without it": result.without})
    if result.lora >= result.without:
        print_warning("the LoRA does not predict the held-out pictures better than the base model alone")
    trainer.export(target)


def _print_losses(recipe: "BaseModelRecipe", losses: dict[str, float]) -> None:
    stdout.print(f"held-out loss on {counted(recipe.held_out, 'picture')}", markup=False)
    for name, loss in losses.items():
        stdout.print(f"  {name:<28} {loss:.6f}", markup=False)


@contextmanager
def _logged(folder: Path, recipe: "BaseModelRecipe") -> Iterator["Log"]:
    """Shows the progress of a training in the folder, which no other may use meanwhile."""
    from mos_cli.utils.files import sole_user

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
                tasks[what] = bars.add_task(what, total=recipe.steps, loss=loss)
            bars.update(tasks[what], completed=step, loss=loss)
            check_interrupt()

        yield log
