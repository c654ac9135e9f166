"""A training run: checks everything before the first step, loads the parts, trains, and draws samples."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mos_cli.bundles.shapes import GenerationShape
from mos_cli.config.settings import available_memory
from mos_cli.datasets.art.file import load_art
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import CaptionedTable, DataTable
from mos_cli.errors import InputError, UsageError
from mos_cli.planning.training import check_memory
from mos_cli.towers.generation import empty_tower
from mos_cli.towers.vision_language import VisionLanguageTower
from mos_cli.training.batches import Batches
from mos_cli.training.export import check_drawing, write_bundle
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Metrics, Trainer
from mos_cli.training.picks import Kind, Share, Source
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.references import Parts, find_parts
from mos_cli.training.samples import draw_samples
from mos_cli.training.sources import Reports, SourceBuilder
from mos_cli.training.stages import Stage, curriculum
from mos_cli.training.start import start_tower
from mos_cli.utils.counts import counted
from mos_cli.utils.devices import choose_device, choose_precision
from mos_cli.utils.durations import as_clock
from mos_cli.utils.files import make_folder
from mos_cli.utils.threads import AdaptiveThreads

THREADS_INTERVAL = 60.0
"""Seconds between two changes of the number of CPU threads: for each number the network is compiled anew."""


def prepare(
    recipe: TrainRecipe,
    art: Path,
    folder: Path,
    *,
    extend: bool = False,
    strict: bool = False,
    trackers: Sequence[str] = (),
    reports: Reports = Reports(),
) -> Trainer:
    """Prepares a run in `folder`, from its checkpoint if there is one.

    Everything is checked before the first step: the data is read, and a bundle is written and drawn with.

    Args:
        extend: see `Trainer`.
        strict: refuse data with files that cannot be used.
        trackers: see `start_accelerator`.

    Raises:
        InputError: the data or the checkpoint is missing, damaged, or does not fit the recipe.
        ModelError: the understanding tower or the autoencoder cannot be fetched or loaded, or the result could not be
            drawn with.
        UsageError: the recipe does not fit the models, or cannot be run here.
    """
    recipe = _with_precision(_with_scenes_that_are_here(recipe, art, reports))
    plan = curriculum(recipe)
    edits = recipe.bundle.edits is not None
    accelerator = start_accelerator(recipe.train, folder, unused_parts=edits, trackers=trackers)
    device = accelerator.device
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    with accelerator.local_main_process_first():
        parts = find_parts(recipe, device, dtype)
    _check_parts(recipe, parts, plan.stages)
    learned, needed, available = _check_memory(recipe, parts, plan.stages, device, accelerator.num_processes)
    share = Share(accelerator.process_index, accelerator.num_processes)
    found: dict[str, tuple[Source, ...]] = {}
    sources: dict[Kind, Source] = {}
    for stage in plan.stages:
        key = stage.data.model_dump_json()
        if key not in found:
            with accelerator.main_process_first():
                spare = available - needed
                builder = SourceBuilder(recipe, parts.understanding, folder, device, spare, reports, strict)
                found[key] = builder.sources(stage, art)
        sources |= {(stage.name, index == 1): source for index, source in enumerate(found[key])}
    batches = Batches(
        plan,
        recipe.train,
        sources,
        parts.understanding,
        parts.autoencoder,
        device,
        share,
        parts.image_encoder,
        None if recipe.distil is None else recipe.distil.guidance_max,
    )
    if accelerator.is_main_process:
        make_folder(folder)
        with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as temporary:
            made = write_bundle(recipe, start_tower(recipe), parts, Path(temporary) / "bundle")
            check_drawing(made, parts, recipe, device)
    accelerator.wait_for_everyone()
    origin = "random weights" if recipe.start_from is None else recipe.start_from
    length = counted(plan.steps, "step") if plan.time is None else f"{as_clock(plan.time)} of steps"
    memory = f"about {needed:.1f} of {available:.1f} GiB of memory"
    batch = counted(plan.stages[0].batch, "picture")
    reports.say(f"{learned:,} parameters learn, from {origin}; {length} of {batch}; {memory}")
    trainer = Trainer(recipe, batches, folder, accelerator, extend=extend, say=reports.say)
    if trainer.step:
        of = f"of {plan.steps}" if trainer.timer is None else f"with {as_clock(trainer.timer.seconds_left)} left"
        reports.say(f"going on from step {trainer.step} {of}, the state in {folder}")
    return trainer


def _with_precision(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with the precision that "auto" means on this device."""
    if recipe.train.precision != "auto":
        return recipe
    precision = choose_precision(choose_device("auto"))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def _with_scenes_that_are_here(recipe: TrainRecipe, art: Path, reports: Reports) -> TrainRecipe:
    """The recipe without the scenes that it mixes in where there is no art file to draw them from; that is said."""

    def kept(data: DataTable | CaptionedTable | None) -> DataTable | CaptionedTable | None:
        if not isinstance(data, CaptionedTable) or data.scenes is None:
            return data
        try:
            load_vocabulary(load_art(art), data.scenes)
        except InputError as error:
            reports.say(f"no scenes of the model's training are mixed in, it may forget what it knew: {error}")
            return data.model_copy(update={"scenes": None})
        return data

    stages = tuple(stage.model_copy(update={"data": kept(stage.data)}) for stage in recipe.stages)
    return recipe.model_copy(update={"data": kept(recipe.data), "stages": stages})


def _check_parts(recipe: TrainRecipe, parts: Parts, stages: tuple[Stage, ...]) -> None:
    """Raises UsageError if the recipe's network does not fit the other parts."""
    network, understanding, name = recipe.generation, parts.understanding, parts.spec.name
    widths = () if parts.image_encoder is None else parts.image_encoder.widths
    if tuple(network.get("image_state_widths", ())) != widths:
        raise UsageError(f"[generation] image_state_widths must be {list(widths)}, the widths of the image encoder")
    if network.get("has_vision") and not isinstance(understanding, VisionLanguageTower):
        raise UsageError(f"[generation] has_vision = true needs an understanding tower with vision: {name} has none")
    tower = empty_tower(network)
    shape = (understanding.layers, understanding.width)
    if tower.states_shape != shape:
        raise UsageError(
            f"[generation] states_layers = {tower.states_shape[0]}, states_width = {tower.states_shape[1]}: "
            f"{name} has {shape[0]} and {shape[1]}"
        )
    autoencoder = parts.autoencoder
    if network.get("channels", 3) != autoencoder.channels:
        raise UsageError(f"[generation] channels must be {autoencoder.channels}, as the autoencoder has")
    side = tower.patch * autoencoder.factor
    sides = {"canvas.multiple": recipe.bundle.canvas.multiple}
    sides |= {f"the canvas of stage {stage.name}": stage.canvas for stage in stages}
    for what, pixels in sides.items():
        if pixels % side:
            raise UsageError(f"{what} is {pixels}, no multiple of {side} pixels, the side of a patch in the picture")


def _check_memory(
    recipe: TrainRecipe, parts: Parts, stages: tuple[Stage, ...], device: torch.device, processes: int
) -> tuple[int, float, float]:
    """The number of parameters that learn, and the GiB needed and there; raises MemoryLimitError if these are less."""
    shape = GenerationShape.model_validate(recipe.generation)
    learned, sharded = shape.parameters, processes if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    if recipe.lora is not None:
        learned = recipe.lora.rank * sum(inputs + outputs for inputs, outputs in shape.linears)
    # The processes of a machine share its memory, and have a GPU each.
    available = available_memory(device) / (1 if device.type == "cuda" else _local_processes())
    needed = 0.0
    for stage in stages:
        patches = (stage.canvas // (shape.patch * parts.autoencoder.factor)) ** 2
        batch, edits = max(1, stage.batch // processes), stage.edits > 0
        # With sharding, each process has its part of the state.
        context = recipe.train.context_tokens
        sizes = shape, learned // sharded, batch, patches, context, available
        needed = max(needed, check_memory(*sizes, edits=edits, teacher=recipe.distil is not None))
    return learned, needed, available


def _local_processes() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def train(
    recipe: TrainRecipe,
    art: Path,
    folder: Path,
    log: Callable[[Metrics], None],
    *,
    extend: bool = False,
    strict: bool = False,
    trackers: Sequence[str] = (),
    reports: Reports = Reports(),
) -> Trainer:
    """Runs a recipe in `folder`; samples go to `folder`/samples. Raises as `prepare` and `Trainer.run` do."""
    adapt_threads = AdaptiveThreads(THREADS_INTERVAL)
    trainer = prepare(recipe, art, folder, extend=extend, strict=strict, trackers=trackers, reports=reports)
    if trainer.device.type == "cpu":
        trainer.run(log, draw_samples, adapt_threads)
    else:
        trainer.run(log, draw_samples)
    return trainer
