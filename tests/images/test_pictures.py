"""The user's pictures: what is read of them, and where they lie on a model's canvas; for masks see test_masks."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mos_cli.bundles.specs import Canvas
from mos_cli.errors import InputError, UsageError
from mos_cli.images.masks import read_mask
from mos_cli.images.pictures import Fit, opened_picture, read_picture, working_size
from tests.helpers.pictures import array, noise

CANVAS = Canvas(native=(64, 64), multiple=8, min=32, max=128)
SIZES = [(37, 91), (300, 200), (1, 1), (2000, 3), (3, 2000), (1, 40), (64, 64), (63, 65), (500, 501), (900, 671)]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red and green change places: sRGB it is not.
SWAPPED = SRGB.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")


def nearly_srgb() -> bytes:
    """sRGB as other programs round it: a red that is a little stronger."""
    place = struct.unpack_from(">I", SRGB, SRGB.index(b"rXYZ") + 4)[0] + 8
    profile = bytearray(SRGB)
    struct.pack_into(">I", profile, place, struct.unpack_from(">I", SRGB, place)[0] + 24)
    return bytes(profile)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(width: int, height: int, depth: int, kind: int, rows: bytes = b"", **chunks: bytes) -> bytes:
    """A PNG as no encoder at hand would write it."""
    parts = {"IHDR": struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(rows), "IEND": b""}
    body = [(name.encode() + data, data) for name, data in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + named + struct.pack(">I", zlib.crc32(named)) for named, data in body
    )


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, name: str = "picture.png"):
        (tmp_path / name).write_bytes(data)
        return read_picture(tmp_path / name)

    return read


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_what_is_stored_without_loss_is_read_exactly(read, mode: str, kind: str) -> None:
    source = noise(mode=mode)
    picture = read(encoded(source, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert picture.image.mode == ("RGBA" if source.has_transparency_data else "RGB")
    assert np.array_equal(array(picture.image), array(source.convert(picture.image.mode)))
    assert picture.rgb.mode == "RGB"
    assert picture.notes == ()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_are_read_under_any_name(read, mode: str) -> None:
    source = noise(8, 8).resize((64, 64)).convert(mode)
    picture = read(encoded(source, "JPEG", quality=98, subsampling=0), "picture.png")
    assert picture.image.mode == "RGB"
    assert np.abs(array(picture.image) - array(source.convert("RGB"))).mean() < 3


def test_sixteen_bits_keep_their_upper_half(read) -> None:
    values = np.array([[0, 257 * 80, 0x8080, 0xFFFF]], np.uint16)
    grey = read(encoded(Image.fromarray(values)))
    assert [pixel[0] for pixel in array(grey.image)[0]] == [0, 80, 0x80, 255]
    colours = b"\0" + struct.pack(">6H", 0x1212, 0x8080, 0xFFFF, 0, 0x4545, 0x0101)
    assert array(read(raw_png(2, 1, 16, 2, colours)).image).tolist() == [[[0x12, 0x80, 255], [0, 0x45, 1]]]
    see_through = read(raw_png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 700, 0x1212), tRNS=struct.pack(">H", 700)))
    assert array(see_through.image)[0, :, 3].tolist() == [0, 255]


def test_transparency_is_kept_and_shown_on_white(read) -> None:
    source = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        source.putpixel((x, 0), (200, 0, 0, alpha))
    picture = read(encoded(source))
    assert picture.image.tobytes() == source.tobytes()
    assert array(picture.rgb)[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    palette = noise(mode="RGB").quantize(8)
    palette.info["transparency"] = 3
    assert read(encoded(palette)).image.mode == "RGBA"
    assert read(encoded(noise().convert("RGBA"))).image.mode == "RGB", "opaque all over"


LYING = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""EXIF orientation to the Pillow transposition that lays an upright picture as the camera stored it."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_pictures_are_turned_upright(read, orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (32, 16, 48, 32))
    lying = upright.transpose(LYING[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read(encoded(lying, kind, exif=exif, quality=95))
    assert picture.image.size == upright.size
    assert np.abs(array(picture.image) - array(upright)).mean() < 4
    assert picture.notes == ()


def test_colour_profiles(read) -> None:
    source = noise(200, 200)
    for srgb in (SRGB, nearly_srgb()):
        assert read(encoded(source, icc_profile=srgb)).image.tobytes() == source.tobytes(), "sRGB stays exact"
    assert read(encoded(source.convert("L"), icc_profile=SRGB)).notes == ()
    red = read(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 77)), icc_profile=SWAPPED))
    assert np.abs(array(red.image)[0, 0] - (0, 255, 0, 77)).max() <= 2
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for unfit in (b"nonsense", lab):
        picture = read(encoded(source, icc_profile=unfit))
        assert picture.image.tobytes() == source.tobytes()
        assert len(picture.notes) == 1
        assert "profile" in picture.notes[0]


def test_of_animations_the_first_frame_is_read_with_a_note(read) -> None:
    frames = [noise(seed=1), noise(seed=2)]
    for kind in ("PNG", "WEBP"):
        picture = read(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        assert picture.image.tobytes() == frames[0].tobytes()
        assert len(picture.notes) == 1
        assert "animated" in picture.notes[0]
    phone = read(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95))
    assert phone.notes == (), "a phone's JPEG with a preview is no animation"


MISTAKES = {
    "nothing": (None, "No such file"),
    "text": (b"no picture", "not a PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP"),
    "empty": (b"", "not a PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP"),
    "another format": (encoded(noise(), "PPM"), "not a PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP"),
    "truncated PNG": (encoded(noise())[:-300], "damaged"),
    "truncated JPEG": (encoded(noise(200, 200), "JPEG")[:-900], "damaged"),
    "truncated WebP": (encoded(noise(), "WEBP")[:-100], "damaged"),
    "only a header": (encoded(noise())[:33], "damaged"),
    "no width": (raw_png(0, 5, 8, 2), "damaged"),
    "no pixels": (raw_png(0, 0, 8, 2), "damaged"),
    "PNG bomb": (raw_png(60_000, 60_000, 8, 2), "too large"),
    "PNG a little too large": (raw_png(10_000, 10_000, 8, 2), "too large"),
    "WebP bomb": (encoded(noise(16, 16), "WEBP", lossless=True), "too large"),
}
_lossless = bytearray(MISTAKES["WebP bomb"][0] or b"")
_lossless[21:25] = struct.pack("<I", 16382 | 16382 << 14)
MISTAKES["WebP bomb"] = (bytes(_lossless), "too large")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, mistake: str) -> None:
    data, words = MISTAKES[mistake]
    path = tmp_path / "picture.png"
    if data is not None:
        path.write_bytes(data)
    for read in (read_picture, lambda path: read_mask(path, (24, 17))):
        with pytest.raises(InputError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_pictures_that_are_read_at_once_share_the_filters_of_warnings(tmp_path) -> None:
    """Threads end in another order than they began."""
    (tmp_path / "good.png").write_bytes(encoded(noise()))
    (tmp_path / "large.png").write_bytes(raw_png(10_000, 10_000, 8, 2))
    before = list(warnings.filters)
    first, second = (opened_picture(tmp_path / "good.png") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(InputError, match="too large"):
        read_picture(tmp_path / "large.png")
    second.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_a_folder_is_no_picture(tmp_path) -> None:
    with pytest.raises(InputError, match="directory"):
        read_picture(tmp_path)


def test_damaged_files_never_raise_anything_else(tmp_path) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(noise(), kind, exif=exif, icc_profile=SRGB) for kind in ("PNG", "JPEG", "WEBP")]
    outcomes = set()
    for index in range(60):
        data = bytearray(whole[index % 3])
        for place in random.integers(0, random.choice([60, len(data)]), 4):
            data[place] = random.integers(256)
        (tmp_path / "picture").write_bytes(data)
        try:
            outcomes.add(read_picture(tmp_path / "picture").image.mode)
        except InputError as error:
            outcomes.add(len(str(error).splitlines()))
    assert outcomes <= {"RGB", "RGBA", 1}
    assert {"RGB", 1} <= outcomes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [None, 32 * 32, 5000, 10**9])
def test_working_sizes(size: tuple[int, int], budget: int | None) -> None:
    width, height = working_size(size, CANVAS, budget)
    sides = range(CANVAS.min, CANVAS.max + 1, CANVAS.multiple)
    allowed = [(w, h) for w in sides for h in sides if w * h <= (budget or 64 * 64)]
    assert (width, height) in allowed

    def scale(w: int, h: int) -> float:
        return min(w / size[0], h / size[1])

    assert scale(width, height) == max(scale(w, h) for w, h in allowed)
    as_large = [w * h for w, h in allowed if scale(w, h) == scale(width, height)]
    assert width * height == min(as_large)
    fit, factor = Fit(size, (width, height)), scale(width, height)
    for inner, source in zip(fit.inner, size, strict=True):
        assert abs(inner - source * factor) <= 0.5 or inner == 1


def test_working_sizes_of_a_canvas_whose_least_side_is_no_multiple() -> None:
    canvas = Canvas(native=(48, 32), multiple=16, min=20, max=100)
    for size in SIZES:
        assert all(side % 16 == 0 and 20 <= side <= 100 for side in working_size(size, canvas))
    with pytest.raises(UsageError, match="--max-pixels 1000 is too few"):
        working_size((64, 64), canvas, 1000)


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back_keeps_size_mode_and_plain_colours(size: tuple[int, int]) -> None:
    for mode, colour in (("RGB", (12, 200, 77)), ("L", 99)):
        plain = Image.new(mode, size, colour)
        for working in (working_size(size, CANVAS), (64, 64), (128, 32)):
            fit = Fit(size, working)
            there = fit.forward(plain)
            assert (there.size, there.mode) == (working, mode)
            assert len(there.getcolors()) == 1, "no seam around the picture"
            assert fit.back(there).tobytes() == plain.tobytes()


def test_a_picture_that_fits_is_not_touched_and_padding_repeats_its_edge() -> None:
    exact, narrow = noise(64, 64), noise(32, 64)
    fit = Fit(exact.size, (64, 64))
    assert fit.forward(exact).tobytes() == fit.back(exact).tobytes() == exact.tobytes()
    fit = Fit(narrow.size, (64, 64))
    there = array(fit.forward(narrow))
    assert fit.corner == (16, 0)
    assert np.array_equal(there[:, :16], np.repeat(array(narrow)[:, :1], 16, axis=1))
    assert np.array_equal(there[:, 48:], np.repeat(array(narrow)[:, -1:], 16, axis=1))
    assert fit.back(Image.fromarray(there.astype(np.uint8))).tobytes() == narrow.tobytes()


GRIDS = [((37, 91), 8), ((300, 200), 25), ((2000, 3), 125), ((3, 2000), 125), ((63, 65), 9), ((640, 480), 60)]


@pytest.mark.parametrize(("size", "pitch"), GRIDS)
@pytest.mark.parametrize("working", [None, (128, 96)])
def test_grids_come_back_without_shift_or_zoom(size: tuple[int, int], pitch: int, working) -> None:
    """Lines keep their places to a quarter of a pixel, and no shift fits better than none."""
    fit = Fit(size, working or working_size(size, CANVAS))
    thickness = pitch // 4 | 1
    for axis in (0, 1):
        if size[axis] < 3 * pitch:
            continue
        centres = np.arange(pitch, size[axis] - pitch, pitch)
        line = np.full(size[axis], 60, np.uint8)
        for centre in centres:
            line[centre - thickness // 2 : centre + thickness // 2 + 1] = 200
        pixels = np.broadcast_to(line, (size[1], size[0])) if axis == 0 else np.broadcast_to(line[:, None], size[::-1])
        grid = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
        profile = array(fit.back(fit.forward(grid)))[..., 0].mean(axis) - 60
        reach = pitch // 2
        offsets = np.arange(-reach, reach + 1)
        found = [
            centre + (offsets * profile[centre - reach : centre + reach + 1]).sum()
            / profile[centre - reach : centre + reach + 1].sum()
            for centre in centres
        ]  # fmt: skip
        assert np.abs(found - centres).max() < 0.25
        assert abs(np.polyfit(centres, found, 1)[0] - 1) * size[axis] < 0.5, "no zoom: under half a pixel end to end"
        match = [np.dot(np.roll(profile, shift), line) for shift in range(-reach, reach + 1)]
        assert np.argmax(match) == reach
