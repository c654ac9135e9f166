"""The pictures of an edit: reading them, describing them in a recipe, and finding them for a replay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from pydantic import ValidationError

from mos_cli.config.recipe import (
    EarlierPicture,
    EditRecipe,
    Expansion,
    MaskRecipe,
    Recipe,
    SourcePicture,
    pixels_hash,
)
from mos_cli.errors import InputError, UsageError
from mos_cli.images.expansion import grown, new_area
from mos_cli.images.masks import read_mask
from mos_cli.images.outputs import as_stored
from mos_cli.images.pictures import Picture, PictureFile, name_of, read_picture
from mos_cli.utils.validation import first_problem


@dataclass(frozen=True)
class Inputs:
    """The pictures of an edit, the edited one first, and its mask: L, 255 may change, of its size.

    `earlier` are those made by mos, and all pictures that these were made from. `mask_notes` are those of the mask.
    `before` is the edited picture as it was read, where it was grown since.
    """

    pictures: tuple[Picture, ...]
    mask: Image.Image | None = None
    earlier: tuple[EarlierPicture, ...] = ()
    mask_notes: tuple[str, ...] = ()
    before: Image.Image | None = None

    @property
    def sources(self) -> tuple[Image.Image, ...]:
        """The pictures as they were read."""
        first, *further = (picture.image for picture in self.pictures)
        return (first if self.before is None else self.before, *further)

    def expanded(self, expansion: Expansion) -> "Inputs":
        """With the edited picture grown, and a mask of what is new; raises UsageError."""
        first, *further = self.pictures
        picture = replace(first, image=grown(first.image, expansion))
        mask = new_area(first.image.size, expansion)
        return replace(self, pictures=(picture, *further), mask=mask, before=first.image)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*(note for picture in self.pictures for note in picture.notes), *self.mask_notes)


def read_inputs(files: Sequence[PictureFile]) -> Inputs:
    """Reads pictures for an edit, without a mask; raises InputError."""
    return make_inputs([read_picture(file) for file in files])


def make_inputs(pictures: Sequence[Picture]) -> Inputs:
    """The inputs of an edit from pictures, with what their records say if they are valid."""
    earlier: dict[str, EarlierPicture] = {}
    for picture in pictures:
        if (record := picture.record) is None:
            continue
        # A chain goes on from the pixels of the file. The record is not valid if another program has changed them.
        sha256, stored = pixels_hash(picture.image), record.stored
        if sha256 == (record.sha256 if stored is None else stored.sha256):
            kind = None if stored is None else stored.format
            this = EarlierPicture(sha256=sha256, recipe=record.recipe, made=record.made, stored=kind)
            for one in (*record.earlier, this):
                earlier.setdefault(one.sha256, one)
    return Inputs(tuple(pictures), earlier=tuple(earlier.values()))


def describe_edit(inputs: Inputs, **settings: Any) -> EditRecipe:
    """The recipe of an edit, from its pictures and the other fields of `EditRecipe`.

    Raises:
        UsageError: a setting is out of range.
    """
    sources = tuple(
        SourcePicture(sha256=pixels_hash(image), width=image.width, height=image.height) for image in inputs.sources
    )
    try:
        return EditRecipe(sources=sources, **settings)
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None


Redraw = Callable[[EarlierPicture, "Inputs | None"], Image.Image]
"""Draws a picture made by mos again, from its inputs."""


class Finder:
    """Finds the inputs of an edit: among given files, or by drawing pictures made by mos again from their records.

    Args:
        pictures, masks: the given files, in any order; they are identified by their pixels.
    """

    def __init__(self, pictures: Sequence[PictureFile], masks: Sequence[PictureFile], redraw: Redraw) -> None:
        self.files = {file: read_picture(file) for file in pictures}
        self.masks = {file: read_picture(file) for file in masks}
        self.redraw = redraw
        self.used: set[PictureFile] = set()
        self._redrawn: dict[str, Picture] = {}

    def check_given(self, recipe: Recipe, earlier: tuple[EarlierPicture, ...]) -> None:
        """Checks, before anything is drawn, that no picture is missing that cannot be drawn again, and no mask.

        Whether a mask is the right one is only known with the picture that it belongs to.

        Raises:
            InputError: one is missing.
        """
        # Each picture once: a chain may use one many times.
        known = {pixels_hash(picture.image) for picture in self.files.values()}
        drawable, waiting = {one.sha256: one.recipe for one in earlier}, [recipe]
        while waiting:
            if (edit := waiting.pop().edit) is None:
                continue
            if edit.mask is not None and not self.masks:
                raise _missing("a mask that this was made with", "--mask")
            for source in edit.sources:
                if source.sha256 not in known:
                    if source.sha256 not in drawable:
                        raise _missing_picture(source)
                    known.add(source.sha256)
                    waiting.append(drawable[source.sha256])

    def inputs_of(self, recipe: Recipe, earlier: tuple[EarlierPicture, ...]) -> Inputs | None:
        """The inputs of a recipe that was made from `earlier` pictures; None if it is not an edit.

        Raises:
            InputError: a picture or a mask is missing.
        """
        if recipe.edit is None:
            return None
        pictures = tuple(self._picture(source, earlier) for source in recipe.edit.sources)
        if recipe.edit.expand is not None:
            return Inputs(pictures, None, earlier).expanded(recipe.edit.expand)
        mask = None if recipe.edit.mask is None else self._mask(recipe.edit.mask, pictures[0].image.size)
        return Inputs(pictures, mask, earlier)

    def check_all_used(self) -> None:
        """Raises InputError for a given file that is not an input of the chain."""
        for file in (*self.files, *self.masks):
            if file not in self.used:
                raise InputError(f"{name_of(file)} is not what this picture was made from: its pixels are others")

    def _picture(self, source: SourcePicture, earlier: tuple[EarlierPicture, ...]) -> Picture:
        for file, picture in self.files.items():
            if pixels_hash(picture.image) == source.sha256:
                self.used.add(file)
                return picture
        for index, one in enumerate(earlier):
            if one.sha256 == source.sha256:
                if source.sha256 not in self._redrawn:
                    # A picture can only be made from those before it, so that a forged record cannot be circular.
                    redrawn = self.redraw(one, self.inputs_of(one.recipe, earlier[:index]))
                    redrawn = redrawn if one.stored is None else as_stored(redrawn, one.stored)
                    note = f"{one.recipe.prompt!r} did not come out exactly as it was: give the picture with --input"
                    same = pixels_hash(redrawn) == source.sha256
                    self._redrawn[source.sha256] = Picture(redrawn, () if same else (note,))
                return self._redrawn[source.sha256]
        raise _missing_picture(source)

    def _mask(self, mask: MaskRecipe, size: tuple[int, int]) -> Image.Image:
        for file, picture in self.masks.items():
            try:
                read = read_mask(picture, size, invert=mask.invert, feather=mask.feather)
            except InputError:
                # The mask of another step of the chain may have another shape.
                continue
            if pixels_hash(read) == mask.sha256:
                self.used.add(file)
                return read
        raise _missing("a mask that this was made with", "--mask")


def _missing_picture(source: SourcePicture) -> InputError:
    return _missing(f"a picture ({source.width}x{source.height}) that this was made from", "--input")


def _missing(what: str, option: str) -> InputError:
    return InputError(f"{what} is not in the file: give it with {option} FILE")
