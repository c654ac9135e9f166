"""A training run from recipe to bundle: loads the parts, trains, draws samples, and exports the result.

Shapes: B batch, C channels, H x W a picture's size.
"""

import copy
import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.bundles.bundle import Bundle, find_bundle, write_index
from mos_cli.bundles.loras import SUFFIX as LORA_SUFFIX
from mos_cli.bundles.loras import LoraFile, record_lora
from mos_cli.bundles.shapes import GenerationShape
from mos_cli.config.recipe import make_recipe
from mos_cli.config.settings import available_memory
from mos_cli.datasets.art.file import load_art
from mos_cli.datasets.captioned import Captioned, collate, to_device
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.description import MOST_OBJECTS
from mos_cli.datasets.scenes.edits import Edit, EditWriter
from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.packed import pack_scenes
from mos_cli.datasets.scenes.vocabulary import Vocabulary, load_vocabulary
from mos_cli.datasets.scenes.writer import SceneWriter
from mos_cli.datasets.tables import CaptionedTable, DataTable
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.planning.memory import GIB
from mos_cli.planning.training import check_memory
from mos_cli.towers.autoencoder import Autoencoder, Pixels
from mos_cli.towers.generation import GenerationTower, empty_tower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.lora import add_lora, save_lora
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.towers.vision_language import VisionLanguageTower
from mos_cli.training.batches import Batches, Kind, Mixture, Share, Source
from mos_cli.training.checkpoint import load_averages
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import RECIPE, Metrics, Trainer, read_recipe
from mos_cli.training.pictures import ShapeOf, read_pictures, shape_in
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.references import Parts, find_parts, understanding_of
from mos_cli.training.samples import draw_samples
from mos_cli.training.stages import Stage, curriculum
from mos_cli.training.start import start_tower
from mos_cli.utils.devices import choose_device, choose_precision
from mos_cli.utils.durations import as_clock
from mos_cli.utils.files import atomic_write, link_or_copy, make_folder, sha256_of
from mos_cli.utils.threads import AdaptiveThreads

THREADS_INTERVAL = 60.0
"""Seconds between two changes of the number of CPU threads: for each number the network is compiled anew."""
DATA = "data.csv"
"""The file in a run's folder that lists every file of the data, and why it is not used."""
CARD = "card.md"


@dataclass(frozen=True)
class Reports:
    """What a run says before its first step.

    `say` takes lines for the user, `progress` the number of pictures that are checked, and of all, `unused` the files
    that are not used, with their reasons.
    """

    say: Callable[[str], None] = lambda _: None
    progress: Callable[[int, int], None] = lambda done, total: None
    unused: Callable[[list[tuple[str, str]]], None] = lambda _: None


@dataclass(frozen=True)
class ScenePicker:
    """Picks scenes, which do not depend on the canvas."""

    writer: SceneWriter

    def __call__(self, random: Random, canvas: int) -> tuple[Scene, str]:
        return self.writer.write(random)


@dataclass(frozen=True)
class EditPicker:
    """Picks edits of scenes, with instructions."""

    writer: EditWriter

    def __call__(self, random: Random, canvas: int) -> tuple[Edit, str]:
        edit = self.writer.write(random)
        return edit, edit.instruction


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
                loader = _DataLoader(recipe, parts.understanding, folder, device, available - needed, reports, strict)
                found[key] = loader.sources(stage, art)
        sources |= {(stage.name, index == 1): source for index, source in enumerate(found[key])}
    batches = Batches(
        plan, recipe.train, sources, parts.understanding, parts.autoencoder, device, share, parts.image_encoder
    )
    if accelerator.is_main_process:
        make_folder(folder)
        with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as temporary:
            made = write_bundle(recipe, start_tower(recipe), parts, Path(temporary) / "bundle")
            check_drawing(made, parts, recipe, device)
    accelerator.wait_for_everyone()
    origin = "random weights" if recipe.start_from is None else recipe.start_from
    length = f"{plan.steps} steps" if plan.time is None else f"{as_clock(plan.time)} of steps"
    memory = f"about {needed:.1f} of {available:.1f} GiB of memory"
    reports.say(f"{learned:,} parameters learn, from {origin}; {length} of {plan.stages[0].batch} pictures; {memory}")
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
        needed = max(needed, check_memory(shape, learned // sharded, batch, patches, context, available, edits=edits))
    return learned, needed, available


def _local_processes() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class _DataLoader:
    """Makes the sources of stages, and reports on the data in files; `spare` is the memory left for sprites, in GiB."""

    recipe: TrainRecipe
    understanding: UnderstandingTower
    folder: Path
    device: torch.device
    spare: float
    reports: Reports
    strict: bool

    def sources(self, stage: Stage, art: Path) -> tuple[Source, ...]:
        """The sources of pictures and of edits of a stage; raises InputError if data is missing or invalid."""
        data = stage.data
        if isinstance(data, DataTable):
            return self._scenes(data, art)
        own = self._captioned(data, stage)
        if data.scenes is None:
            return own
        scenes = self._scenes(data.scenes, art)
        pictures = Mixture(own[0], scenes[0], data.scenes.share).source() if data.edits < 1 else scenes[0]
        if not data.edits:
            return pictures, scenes[1]
        share = data.scenes.edits / (data.edits + data.scenes.edits)
        return pictures, Mixture(own[1], scenes[1], share).source()

    def _scenes(self, data: DataTable, art: Path) -> tuple[Source, ...]:
        compiled = self.recipe.train.compile
        return find_sources(data, art, self.device, compiled=compiled, spare=self.spare, say=self.reports.say)

    def _captioned(self, data: CaptionedTable, stage: Stage) -> tuple[Source, ...]:
        tokenizer = self.understanding.prompt_tokenizer
        captioned = read_pictures(self.recipe, data, stage, tokenizer, self.reports.progress)
        self._report(captioned, data)
        for examples, what, needed in (
            (captioned.pictures, "pictures that are no edits", data.edits < 1),
            (captioned.edits, "edits, pictures with a .before beside them", data.edits > 0),
        ):
            if needed and not examples.examples:
                raise InputError(f"{data.path} has no {what}: change [data] edits, now {data.edits:g}")
        shape_of = shape_in(self.recipe, stage) if data.buckets else None
        pictures = captioned_source(captioned.pictures, self.device, shape_of)
        return (
            replace(pictures, captions=_captions(captioned)),
            captioned_source(captioned.edits, self.device, shape_of, edits=True),
        )

    def _report(self, captioned: Captioned, data: CaptionedTable) -> None:
        """Writes the list of all files into the run's folder, and says how it differs from that of an earlier start."""
        path, before = self.folder / DATA, {}
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                before = {row["file"]: row["bytes"] for row in csv.DictReader(file) if row.get("used") == "yes"}
        held_out = {example.picture.name for example in captioned.held_out}
        used = (*captioned.examples, *captioned.held_out)
        sizes = {one.picture.name: one.picture.path.stat().st_size for one in used}
        held = "held out, for the validation loss"
        rows = [(name, "yes", held if name in held_out else "", size) for name, size in sizes.items()]
        rows += [(unused.name, "no", unused.reason, "") for unused in captioned.unused]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("file", "used", "reason", "bytes"), *rows])
        if self.strict and captioned.unused:
            first = captioned.unused[0]
            count = len(captioned.unused)
            raise InputError(f"{count} files of {data.path} cannot be used; the first is {first.name}: {first.reason}")
        make_folder(self.folder)
        atomic_write(path, text.getvalue().encode(), overwrite=True)
        self.reports.unused([(unused.name, unused.reason) for unused in captioned.unused])
        other = f", {len(captioned.unused)} files are not used (see {path})" if captioned.unused else ""
        captions = len({example.caption for example in used})
        edits = sum(example.before is not None for example in used)
        self.reports.say(
            f"{data.path}: {len(sizes) - edits} pictures"
            + (f" and {edits} edits" if edits else "")
            + f" with {captions} different captions"
            + (f", of which {len(held_out)} are held out" if held_out else "")
            + other
        )
        changed = {name for name, size in sizes.items() if before.get(name, str(size)) != str(size)}
        added, gone = sizes.keys() - before.keys(), before.keys() - sizes.keys()
        if before and (changed or added or gone):
            self.reports.say(
                f"the data is not what it was when the run began: {len(added)} files are new, {len(gone)} are gone, "
                f"{len(changed)} have changed; the run goes on with those that are there"
            )


def captioned_source(
    captioned: Captioned, device: torch.device, shape_of: ShapeOf | None = None, *, edits: bool = False
) -> Source:
    """The source of captioned pictures or edits, with `shape_of` in shapes of their own, one for all of a step."""

    def draw(pictures_BNHW3: torch.Tensor, _canvas: int) -> torch.Tensor:
        return torch.stack([to_device(pictures_BNHW3, device, which) for which in range(1 + edits)], dim=1)

    source = Source(captioned.pick, collate, draw, edits, name=_names(captioned), held_out=captioned.load_held_out)
    shapes = () if shape_of is None else captioned.buckets(shape_of)
    if all(bucket.shape == bucket.shape[::-1] for bucket in shapes if bucket.shape):
        return source
    buckets = tuple(captioned_source(bucket, device, edits=edits) for bucket in shapes)
    weights = [bucket.weights[-1] if bucket.examples else 0 for bucket in shapes]

    def bucket(random: Random) -> Source:
        return random.choices(buckets, weights)[0]

    return replace(source, bucket=bucket, buckets=buckets)


def _names(captioned: Captioned) -> Callable[[Random], str]:
    return lambda random: captioned.choose(random).picture.name


def _captions(captioned: Captioned) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(example.caption) for example in captioned.pictures.examples))


def find_sources(
    data: DataTable,
    art: Path,
    device: torch.device,
    *,
    compiled: bool = False,
    spare: float = math.inf,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Source, ...]:
    """The sources of scenes and of their edits, which are drawn on the device, or on the CPU if that is said.

    Args:
        compiled: fuse operations on a GPU.
        spare: the memory of the device that the sprites may take, in GiB.

    Raises:
        InputError: the art is missing or invalid.
    """
    vocabulary, place = load_vocabulary(load_art(art), data), device
    size = vocabulary.sprites_VHW4.nbytes / GIB
    if device.type != "cpu" and size > spare:
        place = torch.device("cpu")
        say(f"the sprites, {size:.1f} GiB, do not fit into the GPU beside the network: scenes are drawn on the CPU")
    compositor = Compositor(vocabulary.sprites_VHW4.to(place), compiled=compiled and place.type == "cuda")
    scenes = scene_source(ScenePicker(SceneWriter(vocabulary)), compositor, device)
    return scenes, edit_source(vocabulary, compositor, device)


def scene_source(
    pick: Callable[[Random, int], tuple[Scene, str]], compositor: Compositor, device: torch.device
) -> Source:
    """The source of scenes, drawn by a compositor, for a device."""

    def draw(packed_BN: torch.Tensor, canvas: int) -> torch.Tensor:
        drawn = compositor.draw_packed(packed_BN.to(compositor.device, non_blocking=True), canvas)
        return drawn.to(device, non_blocking=True)[:, None]

    return Source(pick, partial(pack_scenes, objects=MOST_OBJECTS), draw)


def edit_source(vocabulary: Vocabulary, compositor: Compositor, device: torch.device) -> Source:
    """The source of edits of scenes with the words of a vocabulary, drawn by a compositor, for a device."""

    def draw(packed_B2N: torch.Tensor, canvas: int) -> torch.Tensor:
        drawn = compositor.draw_packed(packed_B2N.flatten(0, 1).to(compositor.device, non_blocking=True), canvas)
        return drawn.to(device, non_blocking=True).unflatten(0, (-1, 2))

    return Source(EditPicker(EditWriter(vocabulary)), _pack_edits, draw, edits=True)


def _pack_edits(edits: list[Edit]) -> torch.Tensor:
    """The scenes after and before the edits, [B, 2, N]."""
    sides = ([edit.after for edit in edits], [edit.before for edit in edits])
    return torch.stack([pack_scenes(scenes, objects=MOST_OBJECTS) for scenes in sides], dim=1)


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


def export(trainer: Trainer, folder: Path) -> Path | None:
    """Writes the averaged weights as a bundle in bfloat16, or as a LoRA file, and draws a picture with it.

    A bundle that is there is replaced when the new one is whole; its card.md is kept and listed. All processes call it;
    the main one writes and returns the path.

    Raises:
        InputError: it cannot be written; an earlier one is as it was.
        ModelError: what was written cannot be drawn with.
    """
    recipe = trainer.recipe
    learned = trainer.averaged_tower() if recipe.lora is None else trainer.averaged_weights()
    if not trainer.accelerator.is_main_process:
        return None
    return _write(recipe, _parts_of(trainer), learned, folder, trainer.device)


def export_run(run: Path, target: Path | None = None) -> Path:
    """Writes what `export` does from the last checkpoint of a run in the folder `run`, which may go on meanwhile.

    Args:
        target: where the bundle or the LoRA file goes; by default into the run's folder, named after the step.

    Raises:
        InputError: there is no run or no checkpoint, or it is damaged; what is written cannot be written.
        ModelError: a part of the run is missing, or what was written cannot be drawn with.
    """
    if not (run / RECIPE).is_file():
        raise InputError(f"{run} has no training run: name the folder with its {RECIPE}")
    kept = read_recipe(run / RECIPE)
    start_hash = kept.pop("start_hash", None)
    recipe = TrainRecipe.model_validate_json(json.dumps(kept))
    if recipe.start_from is not None and start_hash not in (None, find_bundle(recipe.start_from).hash):
        raise ModelError(f"{recipe.start_from} is no longer the model that the run in {run} began with")
    if recipe.lora is not None and target is not None and target.suffix != LORA_SUFFIX:
        raise InputError(f"{target}: a LoRA is one file, choose a name that ends in {LORA_SUFFIX}")
    device = choose_device("cpu")
    parts = find_parts(recipe, device, torch.float32)
    tower = start_tower(recipe)
    if recipe.lora is not None:
        add_lora(tower, recipe.lora.rank, recipe.lora.scaling)
    weights = {name: weight for name, weight in tower.named_parameters() if weight.requires_grad}
    averages, step = load_averages(run, weights)
    learned: GenerationTower | dict[str, torch.Tensor] = averages[recipe.train.ema]
    name = f"{recipe.bundle.name}-{step:08d}"
    if recipe.lora is None:
        tower.load_state_dict(averages[recipe.train.ema])
        learned = tower.eval()
    else:
        name += LORA_SUFFIX
    return _write(recipe, parts, learned, target or run / name, device)


def _write(
    recipe: TrainRecipe,
    parts: Parts,
    learned: GenerationTower | dict[str, torch.Tensor],
    folder: Path,
    device: torch.device,
) -> Path:
    """Writes a network as a bundle, or the weights of a LoRA as a file, and draws a picture; raises as `export`."""
    if isinstance(learned, dict):
        assert recipe.lora is not None
        assert parts.start is not None
        origin = {"model": parts.start.ref, "bundle_hash": parts.start.hash}
        save_lora(folder, learned, recipe.lora.rank, recipe.lora.scaling, **origin)
        check_drawing(parts.start, parts, recipe, device, [LoraFile(folder)])
        record_lora(folder, sha256_of(folder))
        return folder
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "bundle"
        made.mkdir()
        if (folder / CARD).is_file():
            link_or_copy(folder / CARD, made / CARD)
        check_drawing(write_bundle(recipe, learned, parts, made), parts, recipe, device)
        replaced = Path(temporary) / "replaced"
        if folder.exists():
            folder.rename(replaced)
        made.rename(folder)
    return folder


def write_bundle(recipe: TrainRecipe, tower: GenerationTower, parts: Parts, folder: Path) -> Bundle:
    """Writes a network and the other parts of a run as a bundle, in bfloat16.

    Raises:
        InputError: the folder cannot be written.
        ModelError: a weight is not finite.
    """
    for name, weight in tower.state_dict().items():
        if not weight.isfinite().all():
            raise ModelError(f"the bundle is not written: {name} has values that are not finite")
    try:
        tower.bfloat16().save_pretrained(folder / "generation")
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
        _save_frozen(parts.autoencoder, parts.image_encoder, folder)
        text = json.dumps(recipe.model_dump(), indent=2) + "\n"
        (folder / "recipe.json").write_text(text, encoding="utf-8")
    except Exception as error:
        # safetensors has errors of its own for a full disk.
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    return write_index(folder, understanding=parts.spec, **recipe.bundle.model_dump())


def _save_frozen(autoencoder: Autoencoder, image_encoder: ImageEncoder | None, folder: Path) -> None:
    if not isinstance(autoencoder, Pixels):
        autoencoder.save_pretrained(folder / "autoencoder")
        _remove_path(folder / "autoencoder" / "config.json")
    if image_encoder is not None:
        copy.deepcopy(image_encoder).bfloat16().save_pretrained(folder / "image_encoder")
        _remove_path(folder / "image_encoder" / "config.json")


def _remove_path(config: Path) -> None:
    """Removes the path that diffusers stores in a config: a bundle contains no paths of a machine."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _parts_of(trainer: Trainer) -> Parts:
    """The parts that a run has loaded."""
    recipe, batches = trainer.recipe, trainer.batches
    start = None if recipe.start_from is None else find_bundle(recipe.start_from)
    spec, folder = understanding_of(recipe, start)
    return Parts(spec, folder, batches.understanding, batches.autoencoder, batches.image_encoder, start)


def check_drawing(
    bundle: Bundle, parts: Parts, recipe: TrainRecipe, device: torch.device, loras: Sequence[LoraFile] = ()
) -> None:
    """Loads a bundle and draws one picture of one step with it; raises ModelError if that is not possible."""
    precision = recipe.train.precision
    pipeline = MoSPipeline(bundle, parts.folder, device=device, precision=precision, loras=loras)
    width, height = bundle.index.canvas.native
    settings = {"steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0), "precision": precision}
    pipeline.draw(make_recipe(prompt="a picture", model=bundle.ref, seed=0, width=width, height=height, **settings))
