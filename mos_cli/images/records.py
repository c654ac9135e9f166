"""The record of a picture in its file: the text chunk `mos` of a PNG, the EXIF field MakerNote of other formats."""

from typing import TYPE_CHECKING

from pydantic import ValidationError

from mos_cli.config.recipe import PictureRecord

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

CHUNK = "mos"
_EXIF_FIELDS, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286


def png_text(record: PictureRecord, *, parameters: bool) -> "PngInfo":
    """The text chunks of a PNG; `parameters`: also the text for other tools."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if parameters:
        info.add_itxt("parameters", record.parameters())
    info.add_itxt(CHUNK, record.to_json())
    return info


def exif(record: PictureRecord, *, parameters: bool) -> bytes:
    """The EXIF data of a JPEG or a WebP; `parameters`: also the text for other tools, as UserComment."""
    from PIL.Image import Exif

    data = Exif()
    fields = data.get_ifd(_EXIF_FIELDS)
    fields[_MAKER_NOTE] = record.to_json().encode()
    if parameters:
        fields[_USER_COMMENT] = b"UNICODE\0" + record.parameters().encode("utf-16-be")
    return data.tobytes()


def record_text(image: "Image") -> str | None:
    """The text of the record in an opened picture of any format; None if there is none."""
    if isinstance(text := image.info.get(CHUNK), str):
        return text
    try:
        note = image.getexif().get_ifd(_EXIF_FIELDS).get(_MAKER_NOTE)
        text = note.decode() if isinstance(note, bytes) else ""
    except Exception:
        # Pillow raises many kinds of errors for damaged EXIF data, which is not ours then.
        return None
    # Cameras have a MakerNote too.
    return text if text.startswith("{") else None


def read_record(image: "Image") -> PictureRecord | None:
    """The record in an opened picture; None if there is none, or this version cannot read it."""
    text = record_text(image)
    try:
        return None if text is None else PictureRecord.model_validate_json(text)
    except ValidationError:
        return None
