"""A corpus of troublesome pictures: each is read, or refused in one line; nothing else is raised, and notes are lines.

Made here: every format that is read, in every mode that it has; cut, damaged, under another suffix, with huge metadata,
and with more pixels than can be.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mos_cli.errors import InputError
from mos_cli.images.outputs import read_stored
from mos_cli.images.pictures import FORMATS, read_picture

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F")


def pixels(mode: str) -> Image.Image:
    levels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    colours = Image.fromarray(levels)
    if mode.startswith("I;16"):
        return Image.fromarray(levels[..., 0].astype(">u2" if mode.endswith("B") else np.uint16) * 257)
    if mode == "LAB":
        return Image.new("LAB", colours.size)
    if mode in ("I", "F"):
        return colours.convert("L").convert(mode)
    return colours.convert("RGBA").convert(mode) if mode in ("LA", "RGBA") else colours.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes | None:
    file = io.BytesIO()
    try:
        image.save(file, kind, **options)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def whole() -> dict[str, bytes]:
    """Every format in every mode that Pillow writes and, in all its versions, reads again."""
    files = {}
    for kind in FORMATS:
        for mode in MODES:
            if (kind, mode) != ("TIFF", "YCbCr") and (data := encoded(pixels(mode), kind)):
                files[f"{kind} {mode}"] = data
    palette = pixels("RGB").quantize(7)
    for transparency in (2, bytes(range(7))):
        files[f"PNG palette {type(transparency).__name__}"] = encoded(palette, "PNG", transparency=transparency) or b""
    files["GIF transparent"] = encoded(palette, "GIF", transparency=2) or b""
    for kind in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
        frames = {"save_all": True, "append_images": [pixels("L").convert("RGB")]}
        files[f"{kind} frames"] = encoded(pixels("RGB"), kind, **frames) or b""
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        mode = "1" if compression == "group4" else "RGB"
        files[f"TIFF {compression}"] = encoded(pixels(mode), "TIFF", compression=compression) or b""
    for kind in ("JPEG", "WEBP", "TIFF", "AVIF", "PNG"):
        exif = Image.Exif()
        exif[0x0112] = 6
        files[f"{kind} turned"] = encoded(pixels("RGB"), kind, exif=exif) or b""
    return files


WHOLE = whole()


def broken() -> Iterator[tuple[str, bytes]]:
    """Cut and damaged files, a bomb of each format that says its size in plain numbers, and what is no picture."""
    random = np.random.default_rng(0)
    for name, data in WHOLE.items():
        for part in (4, 30, len(data) // 2, len(data) - 1):
            yield f"{name} cut at {part}", data[:part]
        for number in range(4):
            damaged = bytearray(data)
            for place in random.integers(0, len(data) if number % 2 else min(60, len(data)), 3):
                damaged[place] = random.integers(256)
            yield f"{name} damaged {number}", bytes(damaged)
    huge = struct.pack(">2I5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    yield "PNG without pixels", b"\x89PNG\r\n\x1a\n" + chunk
    yield "GIF bomb", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;"
    yield "BMP bomb", b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    tags = [(256, 3, 1, 60_000), (257, 3, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    yield "TIFF bomb", b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    yield "TIFF that leads to itself", b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    for text in (b"", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"-"):
        yield f"no picture {text[:9]!r}", text


def test_every_format_is_read_in_every_mode(tmp_path: Path) -> None:
    assert {name.split()[0] for name in WHOLE} == set(FORMATS)
    for name, data in WHOLE.items():
        (tmp_path / "picture.txt").write_bytes(data)
        kind, mode = name.split()[:2]
        if mode in ("LAB", "F", "I") and kind == "TIFF":
            with pytest.raises(InputError, match="save it as RGB or grey with 8 or 16 bits"):
                read_picture(tmp_path / "picture.txt")
            continue
        picture = read_picture(tmp_path / "picture.txt")
        assert picture.image.size == ((9, 13) if mode == "turned" else (13, 9)), name
        assert picture.image.mode in ("RGB", "RGBA")
        deep = mode.startswith("I") and kind in ("PNG", "TIFF")
        assert len(picture.notes) == (mode == "frames" or deep), (name, picture.notes)
    assert any(name.startswith("AVIF") for name in WHOLE)


def test_a_broken_picture_ends_in_one_line(tmp_path: Path, capfd) -> None:
    path, outcomes = tmp_path / "picture.jpg", {"read": 0, "refused": 0}
    for name, data in broken():
        path.write_bytes(data)
        for read in (read_picture, read_stored):
            refusal = None
            try:
                read(path)
            except InputError as error:
                refusal = str(error)
            outcomes["read" if refusal is None else "refused"] += 1
            assert refusal is None or (len(refusal.splitlines()) == 1 and str(path) in refusal), name
        if "bomb" in name:
            with pytest.raises(InputError, match="too large"):
                read_picture(path)
    assert min(outcomes.values()) > 50
    assert capfd.readouterr() == ("", ""), "a decoder prints errors of its own"


def test_pictures_read_by_several_threads_leave_stderr_as_it_is(tmp_path: Path, capfd) -> None:
    """Decoders of TIFF are kept from printing to it, which concerns the whole process."""
    paths = [tmp_path / f"{number}.tiff" for number in range(8)]
    for path in paths:
        path.write_bytes(encoded(pixels("RGB"), "TIFF") or b"")
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_picture, paths * 40))) == 320
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_nothing_is_lost_that_is_printed_while_a_png_is_read(tmp_path: Path, capfd, monkeypatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(pixels("RGB"), "PNG") or b"")
    load, loads = ImageFile.ImageFile.load, []

    def printing(image: ImageFile.ImageFile) -> object:
        loads.append(os.write(2, b"."))
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", printing)
    read_picture(path)
    assert capfd.readouterr().err == "." * len(loads)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_that_depth_is_lost_is_said_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "grey").write_bytes(encoded(pixels("I;16"), kind) or b"")
    picture = read_picture(tmp_path / "grey")
    (note,) = picture.notes
    assert note == f"{tmp_path / 'grey'} has 16 bits per channel, of which the upper 8 are used"
    assert np.array_equal(np.asarray(picture.image)[..., 0], np.asarray(pixels("RGB"))[..., 0])


def test_that_the_depth_of_colours_is_lost_is_said(tmp_path: Path) -> None:
    head = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    parts = {b"IHDR": head, b"IDAT": zlib.compress(b"\0" + bytes(range(12))), b"IEND": b""}
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items()]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    (note,) = read_picture(tmp_path / "deep.png").notes
    assert "16 bits per channel" in note


def test_huge_metadata_of_other_programs_is_no_damage(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("workflow", "x" * 5_000_000, zip=True)
    info.add_itxt("notes", "y" * 3_000_000)
    source = pixels("RGB")
    (tmp_path / "a.png").write_bytes(encoded(source, "PNG", pnginfo=info, icc_profile=bytes(2_000_000)) or b"")
    picture = read_picture(tmp_path / "a.png")
    assert picture.image.tobytes() == source.tobytes()
    (tmp_path / "a.jpg").write_bytes(encoded(source, "JPEG", xmp=b"x" * 60_000, comment=b"y" * 4_000) or b"")
    assert read_picture(tmp_path / "a.jpg").notes == ()
