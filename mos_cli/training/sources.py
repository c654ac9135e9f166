"""The sources of pictures and edits of a run: scenes that are composed, captioned pictures of a user's own, or both.

Shapes: B examples, N pictures of each, H x W a picture's size; V sprites.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch

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
from mos_cli.errors import InputError
from mos_cli.planning.memory import GIB
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.picks import Mixture, Source
from mos_cli.training.pictures import ShapeOf, read_pictures, shape_in
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.stages import Stage
from mos_cli.utils.counts import counted
from mos_cli.utils.files import atomic_write, make_folder

DATA = "data.csv"
"""The file in a run's folder that lists every file of the data, and why it is not used."""


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


@dataclass(frozen=True)
class SourceBuilder:
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
            files = counted(len(captioned.unused), "file")
            raise InputError(f"{files} of {data.path} cannot be used; the first is {first.name}: {first.reason}")
        make_folder(self.folder)
        atomic_write(path, text.getvalue().encode(), overwrite=True)
        self.reports.unused([(unused.name, unused.reason) for unused in captioned.unused])
        left_out = f", {counted(len(captioned.unused), 'file')} left out (see {path})" if captioned.unused else ""
        captions = len({example.caption for example in used})
        edits = sum(example.before is not None for example in used)
        self.reports.say(
            f"{data.path}: {counted(len(sizes) - edits, 'picture')}"
            + (f" and {counted(edits, 'edit')}" if edits else "")
            + f" with {counted(captions, 'different caption')}"
            + (f", {len(held_out)} of them held out" if held_out else "")
            + left_out
        )
        changed = {name for name, size in sizes.items() if before.get(name, str(size)) != str(size)}
        added, gone = sizes.keys() - before.keys(), before.keys() - sizes.keys()
        if before and (changed or added or gone):
            self.reports.say(
                f"the data is not what it was when the run began: {counted(len(added), 'file')} added, "
                f"{len(gone)} gone, {len(changed)} changed; the run goes on with those that are there"
            )


def captioned_source(
    captioned: Captioned, device: torch.device, shape_of: ShapeOf | None = None, *, edits: bool = False
) -> Source:
    """The source of captioned pictures or edits, with `shape_of` in shapes of their own, one for all of a step."""

    def draw(pictures_BNHW3: torch.Tensor, _canvas: int) -> torch.Tensor:
        # All at once: a part of pinned memory would be copied to other memory first, and the host wait for it.
        there_BNHW3 = pictures_BNHW3.to(device, non_blocking=True)
        return torch.stack([to_device(there_BNHW3, device, which) for which in range(1 + edits)], dim=1)

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
    # Who picks needs no sprites; in this process and in the workers they would be a second copy.
    words = replace(vocabulary, sprites_VHW4=torch.empty(0))
    scenes = scene_source(ScenePicker(SceneWriter(words)), compositor, device)
    return scenes, edit_source(words, compositor, device)


def scene_source(
    pick: Callable[[Random, int], tuple[Scene, str]], compositor: Compositor, device: torch.device
) -> Source:
    """The source of scenes, drawn by a compositor, for a device."""

    def draw(packed_BN: torch.Tensor, canvas: int) -> torch.Tensor:
        drawn = compositor.draw_packed(packed_BN.to(compositor.device, non_blocking=True), canvas)
        return drawn.to(device, non_blocking=True)[:, None]

    return Source(pick, partial(pack_scenes, objects=MOST_OBJECTS), draw, static=_draws_on(device, compositor))


def edit_source(vocabulary: Vocabulary, compositor: Compositor, device: torch.device) -> Source:
    """The source of edits of scenes with the words of a vocabulary, drawn by a compositor, for a device."""

    def draw(packed_B2N: torch.Tensor, canvas: int) -> torch.Tensor:
        drawn = compositor.draw_packed(packed_B2N.flatten(0, 1).to(compositor.device, non_blocking=True), canvas)
        return drawn.to(device, non_blocking=True).unflatten(0, (-1, 2))

    static = _draws_on(device, compositor)
    return Source(EditPicker(EditWriter(vocabulary)), _pack_edits, draw, edits=True, static=static)


def _draws_on(device: torch.device, compositor: Compositor) -> bool:
    return compositor.device.type == device.type


def _pack_edits(edits: list[Edit]) -> torch.Tensor:
    """The scenes after and before the edits, [B, 2, N]."""
    sides = ([edit.after for edit in edits], [edit.before for edit in edits])
    return torch.stack([pack_scenes(scenes, objects=MOST_OBJECTS) for scenes in sides], dim=1)
