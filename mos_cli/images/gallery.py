"""A page that shows the pictures of a folder with their recipes, and searches them; it needs no network."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from mos_cli.config.recipe import PictureRecord, with_weights
from mos_cli.errors import InputError
from mos_cli.images.companions import PREVIEWS_SUFFIX
from mos_cli.images.outputs import SUFFIXES
from mos_cli.images.pictures import opened_picture
from mos_cli.images.records import record_text
from mos_cli.utils.pages import fill_page

PARTS = Path(__file__).with_name("gallery_page")


@dataclass(frozen=True)
class GalleryPicture:
    """A picture of a folder, and its record; None if it has none that this version can read."""

    path: Path
    size: tuple[int, int]
    record: PictureRecord | None


def pictures_in(folder: Path) -> Iterator[GalleryPicture | InputError]:
    """The pictures in a folder and the folders in it, by name, without hidden ones; an error for each damaged file."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in SUFFIXES or path.name.endswith(PREVIEWS_SUFFIX) or not path.is_file():
            continue
        try:
            with opened_picture(path) as (opened, _):
                yield GalleryPicture(path, opened.size, _record(record_text(opened)))
        except InputError as error:
            yield error


def gallery_page(pictures: list[GalleryPicture], folder: Path, page: Path) -> str:
    """The page as HTML; it names the pictures by paths relative to its own, `page`.

    Its content security policy forbids loading anything but files beside it, and all text of recipes is put in as text.
    """
    shown = [_shown(picture, folder, page) for picture in pictures]
    return fill_page(PARTS, data={"folder": folder.name or str(folder), "pictures": shown})


def _record(text: str | None) -> PictureRecord | None:
    try:
        return None if text is None else PictureRecord.model_validate_json(text)
    except ValidationError:
        return None


def _shown(picture: GalleryPicture, folder: Path, page: Path) -> dict[str, Any]:
    relative = os.path.relpath(picture.path.absolute(), page.parent.absolute())
    facts: dict[str, Any] = {
        # Names may have any bytes.
        "src": quote(os.fsencode(Path(relative).as_posix())),
        "name": os.fsencode(picture.path.relative_to(folder)).decode(errors="replace"),
        "size": picture.size,
        "prompt": None,
    }
    if picture.record is None:
        return facts
    recipe, made = picture.record.recipe, picture.record.made
    settings = recipe.model_dump(
        mode="json",
        exclude_none=True,
        exclude={"prompt", "negative", "weights", "negative_weights", "width", "height", "edit", "template"},
    )
    if recipe.template is not None:
        settings["template"] = recipe.template.text
    if recipe.edit is not None:
        settings["edit"] = recipe.edit.model_dump(mode="json", exclude_none=True)
    settings |= {"mos": made.mos, "device": made.device, "bundle": made.bundle_hash}
    return facts | {
        "prompt": recipe.weighted_prompt,
        "negative": with_weights(recipe.negative, recipe.negative_weights),
        "edit": recipe.edit is not None,
        "settings": [
            (name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()
        ],
    }
