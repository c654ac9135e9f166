"""The pictures of an edit: read, described in its recipe, and found again when it is replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from mos_cli.errors import InputError, UsageError
from mos_cli.runtime.masks import read_mask
from mos_cli.runtime.outputs import read_record
from mos_cli.runtime.pictures import Picture, read_picture
from mos_cli.runtime.recipe import EditRecipe, PictureRecord, SourcePicture, pixels_hash
from mos_cli.runtime.specs import first_problem


@dataclass(frozen=True)
class Inputs:
    """The pictures of an edit, the one to be edited first, and where it may change: L, 255 may, of its size.

    `records` are those of pictures that we made.
    """

    pictures: tuple[Picture, ...]
    records: tuple[PictureRecord | None, ...]
    mask: Image.Image | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for picture in self.pictures for note in picture.notes)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads pictures for an edit, without a mask; raises InputError."""
    pictures = tuple(read_picture(path) for path in paths)
    return Inputs(pictures, tuple(read_record(path) for path in paths))


def describe_edit(inputs: Inputs, **settings: Any) -> EditRecipe:
    """An edit's recipe from its pictures and the settings that `EditRecipe` has beside them.

    Raises:
        UsageError: a setting is out of range.
    """
    sources = tuple(
        SourcePicture(
            sha256=pixels_hash(picture.image), width=picture.image.width, height=picture.image.height, record=record
        )
        for picture, record in zip(inputs.pictures, inputs.records, strict=True)
    )
    try:
        return EditRecipe(sources=sources, **settings)
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None


def find_inputs(
    edit: EditRecipe,
    given: Sequence[Path],
    mask: Path | None,
    redraw: Callable[[PictureRecord], Image.Image],
) -> Inputs:
    """The pictures that an edit was made from: those given, or drawn again from the records in the recipe.

    Args:
        given: files, in any order; each is known by its pixels.
        mask: the file of the mask.
        redraw: makes a picture of ours again.

    Raises:
        InputError: a picture or the mask is missing, or the mask is another one.
    """
    at_hand = {pixels_hash(picture.image): picture for picture in map(read_picture, given)}
    pictures = []
    for number, source in enumerate(edit.sources, start=1):
        if source.sha256 in at_hand:
            pictures.append(at_hand[source.sha256])
        elif source.record is not None:
            redrawn = redraw(source.record)
            same = pixels_hash(redrawn) == source.sha256
            note = f"picture {number} of the chain did not come out exactly as it was: --input has it replayed exactly"
            pictures.append(Picture(redrawn, () if same else (note,)))
        else:
            size = f"{source.width}x{source.height}"
            raise InputError(f"picture {number} of the edit ({size}) is not in the PNG: give it with --input FILE")
    if edit.mask is None:
        return Inputs(tuple(pictures), tuple(source.record for source in edit.sources))
    if mask is None:
        raise InputError("the mask of the edit is not in the PNG: give it with --mask FILE")
    read = read_mask(mask, pictures[0].image.size, invert=edit.mask.invert, feather=edit.mask.feather)
    if pixels_hash(read) != edit.mask.sha256:
        raise InputError(f"{mask} is not the mask of this edit")
    return Inputs(tuple(pictures), tuple(source.record for source in edit.sources), read)
