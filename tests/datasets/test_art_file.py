"""The art file: built from packages made on the spot by the real builder, and read back."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mos_cli.cli.data import data_app
from mos_cli.datasets.art.build import build_art, choose_sets
from mos_cli.datasets.art.file import ArtManifest, load_art, load_manifest
from mos_cli.datasets.art.names import SHORTCODES, Annotations
from mos_cli.datasets.art.rasterise import rasterise, svg_document
from mos_cli.datasets.art.sets import SETS, ArtSet, Package
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.utils.files import sha256_of

SIZE = 32
RED_DISC = '<circle cx="16" cy="16" r="12" fill="red" fill-opacity="0.5"/>'
BLUE_SQUARE = '<rect x="4" y="4" width="24" height="24" fill="#00f"/>'
GREEN_BAR = '<rect width="32" height="16" fill="#0f0"/>'


def _emoji(order: int, label: str, hexcode: str, group: int, tags: tuple[str, ...] = ()) -> dict:
    return {"label": label, "hexcode": hexcode, "group": group, "order": order, "tags": tags}


EMOJI = [
    _emoji(2, "red apple", "1F34E", 4, ("Fruit", "apple", "red apple")),
    _emoji(1, "grinning face", "1F600", 0, tuple(f"t{n}" for n in range(20))),
    _emoji(3, "woman\u2019s boot", "1F462", 7),
    _emoji(4, "cloud", "2601-FE0F", 5),
    _emoji(5, "hundred points", "1F4AF", 0),
    _emoji(6, "flag: Japan", "1F1EF-1F1F5", 9),
    _emoji(7, "waving hand", "1F44B", 1) | {"skins": [_emoji(8, "waving hand: dark", "1F44B-1F3FF", 1)]},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
GROUPS = {"0": "smileys-emotion", "1": "people-body", "4": "food-drink", "5": "travel-places", "7": "objects"}


def _package(folder: Path, name: str, members: dict[str, bytes]) -> Package:
    draft = Package(name, "1.0.0", "", "MIT")
    with tarfile.open(folder / draft.tarball, "w:gz") as archive:
        for path, content in members.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return Package(name, "1.0.0", sha256_of(folder / draft.tarball), "MIT")


def _webp(width: int, height: int, colour: tuple[int, int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (width, height), colour).save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def _icons(bodies: dict[str, str], **extra: object) -> bytes:
    icons = {name: {"body": body} for name, body in bodies.items()}
    return json.dumps({"width": 32, "height": 32, "icons": icons, **extra}).encode()


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def names(downloads) -> Package:
    members = {
        "en/data.json": json.dumps(EMOJI).encode(),
        "meta/groups.json": json.dumps({"groups": {**GROUPS, "9": "flags"}, "subgroups": {}}).encode(),
        **{f"en/shortcodes/{source}.json": b"{}" for source in SHORTCODES},
        "en/shortcodes/cldr.json": json.dumps({"1F462": ["boot", "cloud"], "1F34E": "apfel"}).encode(),
    }
    return _package(downloads, "names", members)


@pytest.fixture(scope="module")
def sets(downloads) -> tuple[ArtSet, ...]:
    painted = {
        "assets/1f600.webp": _webp(64, 64, (200, 100, 50, 128)),
        "assets/2601-fe0f.webp": _webp(64, 128, (255, 255, 255, 255)),
        "assets/1f462.webp": _webp(64, 64, (9, 9, 9, 0)),
        "assets/1f1ef-1f1f5.webp": _webp(64, 64, (255, 0, 0, 255)),
        "assets/1f44b-1f3ff.webp": _webp(64, 64, (255, 0, 0, 255)),
        "assets/1f4af.webp": _webp(64, 64, (255, 0, 0, 255)),
        "assets/dead.webp": _webp(64, 64, (255, 0, 0, 255)),
    }
    named = {
        "chars.json": b"[]",
        "icons.json": _icons(
            {"apfel": RED_DISC, "redapple": BLUE_SQUARE, "boot": BLUE_SQUARE}
            | {"cloud": GREEN_BAR, "nonsense": RED_DISC},
            aliases={"grinning-face": {"parent": "boot"}},
        ),
    }
    coded = {
        "chars.json": json.dumps({"1f34e": "thing", "2601": "cloud"}).encode(),
        "icons.json": _icons({"thing": RED_DISC, "boot": BLUE_SQUARE, "cloud": GREEN_BAR}),
    }
    return (
        ArtSet("painted", _package(downloads, "@art/painted", painted), "P"),
        ArtSet("named", _package(downloads, "@art/named", named), "N", misnamed=("cloud",)),
        ArtSet("coded", _package(downloads, "@art/coded", coded), "C"),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory, sets, names, downloads) -> Path:
    return build_art(tmp_path_factory.mktemp("art"), SIZE, sets, names, downloads)


def test_objects_are_kept_once_a_style_and_the_rest_is_counted(built):
    manifest = load_manifest(built)
    assert [(picture.style, picture.name) for picture in manifest.pictures] == [
        ("painted", "grinning face"),
        ("painted", "cloud"),
        ("named", "red apple"),
        ("named", "woman's boot"),
        ("coded", "red apple"),
        ("coded", "cloud"),
    ]
    assert [picture.index for picture in manifest.pictures] == list(range(6))
    assert manifest.counts.model_dump() == {
        "pictures": 6,
        "concepts": 4,
        "dropped": {"blank": 1, "flags": 1, "misnamed": 1, "second picture": 1}
        | {"skin tones": 1, "symbols": 1, "unknown name": 3},
    }
    assert [art.pictures for art in manifest.sets] == [2, 2, 2]


def test_words_of_a_picture_are_clean(built):
    pictures = {picture.name: picture for picture in load_manifest(built).pictures}
    assert pictures["red apple"].concept == "1f34e"
    assert pictures["red apple"].keywords == ("fruit", "apple")
    assert pictures["cloud"].concept == "2601"
    assert len(pictures["grinning face"].keywords) == 12
    assert pictures["woman's boot"].group == "objects"


def test_pixels_show_the_pictures_premultiplied(built):
    art = load_art(built)
    assert art.pixels.dtype == torch.uint8
    assert tuple(art.pixels.shape) == (6, SIZE, SIZE, 4)
    assert (art.pixels[..., :3] <= art.pixels[..., 3:]).all()
    centre = art.pixels[:, SIZE // 2, SIZE // 2].int()
    # Half transparent: straight (200, 100, 50) is stored times 128/255, straight red times one half.
    assert (centre[0] - torch.tensor([100, 50, 25, 128])).abs().max() <= 1
    assert (centre[4] - torch.tensor([128, 0, 0, 128])).abs().max() <= 1
    assert centre[3].tolist() == [0, 0, 255, 255]
    corner = art.pixels[:, 0, 0, 3].tolist()
    assert corner == [128, 0, 0, 0, 0, 255]


def test_shrinking_never_leaves_a_colour_above_its_alpha():
    stripes = np.zeros((64, 64, 4), np.uint8)
    stripes[:, 24:40, :3], stripes[..., 3] = 255, 128
    file = io.BytesIO()
    Image.fromarray(stripes, "RGBA").save(file, "WEBP", lossless=True, exact=True)
    pixels = rasterise(file.getvalue(), 24)
    assert pixels[..., :3].max() == 128
    assert (pixels[..., :3] <= pixels[..., 3:]).all()


def test_a_tall_picture_is_centred_and_not_stretched():
    opaque = rasterise(_webp(64, 128, (255, 255, 255, 255)), SIZE)[..., 3] > 127
    assert opaque.sum(axis=1).tolist() == [SIZE // 2] * SIZE
    assert opaque[:, SIZE // 4 : -SIZE // 4].all()


def test_a_wide_svg_is_centred_and_not_stretched():
    document = svg_document('<rect x="2" y="3" width="40" height="20"/>', 2, 3, 40, 20)
    drawn = rasterise(document, SIZE)[..., 3] > 127
    assert drawn.sum(axis=0).tolist() == [SIZE // 2] * SIZE
    assert not drawn[: SIZE // 4].any()


def test_filtered_edges_are_smooth():
    shadow = '<filter id="f"><feColorMatrix values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 127 0"/></filter>'
    disc = shadow + '<g filter="url(#f)"><circle cx="16" cy="16" r="12"/></g>'
    alpha = rasterise(svg_document(disc, 0, 0, 32, 32), SIZE)[..., 3]
    assert alpha.max() == 255
    assert np.isin(alpha, range(32, 224)).sum() > 20


def test_the_same_build_gives_the_same_bytes(built, tmp_path, sets, names, downloads):
    again = build_art(tmp_path, SIZE, sets, names, downloads)
    for suffix in (".json", ".safetensors"):
        assert again.with_suffix(suffix).read_bytes() == built.with_suffix(suffix).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"art-{SIZE}.json", f"art-{SIZE}.safetensors"]


def test_the_manifest_round_trips_and_names_its_pixels(built, sets):
    text = built.read_text()
    manifest = ArtManifest.model_validate_json(text)
    assert manifest.model_dump_json(by_alias=True, indent=1) == text
    assert json.loads(text)["schema"] == "mos-art/1"
    assert manifest.sha256 == sha256_of(built.with_suffix(".safetensors"))
    assert [art.sha256 for art in manifest.sets] == [art.package.sha256 for art in sets]
    assert load_art(built.parent).manifest == manifest


def test_what_is_built_is_not_built_over_unless_asked(built, sets, names, downloads):
    before, text = built.stat().st_mtime_ns, built.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        build_art(built.parent, SIZE, sets, names, downloads)
    assert built.stat().st_mtime_ns == before
    assert build_art(built.parent, SIZE, sets, names, downloads, overwrite=True).read_bytes() == text
    assert built.stat().st_mtime_ns != before


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path, sets, names, downloads):
    wrong = replace(sets[0], package=replace(sets[0].package, sha256="0" * 64))
    with pytest.raises(ModelError, match=r"art-painted-1\.0\.0\.tgz does not match its sha256"):
        build_art(tmp_path, SIZE, (wrong,), names, downloads)
    assert not list(tmp_path.iterdir())


def test_labels_win_over_nicknames(downloads, names):
    annotations = Annotations(downloads / names.tarball)
    found = {name: annotations.by_name(name) for name in ("Cloud", "boot", "womans-boot", "RED APPLE", "pear")}
    assert {name: concept and concept.label for name, concept in found.items()} == {
        "Cloud": "cloud",
        "boot": "woman's boot",
        "womans-boot": "woman's boot",
        "RED APPLE": "red apple",
        "pear": None,
    }


def _copy(built: Path, folder: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        (folder / built.name).with_suffix(suffix).write_bytes(built.with_suffix(suffix).read_bytes())
    return folder / built.name


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"mos-art/1"', '"mos-art/9"', "schema 'mos-art/9'"),
        ('"size": 32', '"size": "big"', "damaged at size"),
        ('"size": 32', '"size": 16', "does not belong"),
        ("{", "", "not JSON"),
    ],
)
def test_a_damaged_manifest_is_refused(built, tmp_path, old, new, complaint):
    manifest = _copy(built, tmp_path)
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=complaint):
        load_art(manifest)


def test_damaged_missing_and_ambiguous_files_are_refused(built, tmp_path):
    with pytest.raises(InputError, match="no art in"):
        load_art(tmp_path)
    manifest = _copy(built, tmp_path)
    pixels = manifest.with_suffix(".safetensors")
    with pytest.raises(InputError, match=r"safetensors holds pixels only: give art-32\.json, or the folder"):
        load_art(pixels)
    pixels.write_bytes(pixels.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"cannot read .*safetensors"):
        load_art(tmp_path)
    pixels.unlink()
    with pytest.raises(InputError, match=r"cannot read .*safetensors"):
        load_art(manifest)
    (tmp_path / "art-64.json").write_text("{}")
    with pytest.raises(InputError, match="several sizes"):
        load_art(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_art(tmp_path / "art-8.json")


def test_absurd_choices_are_refused(tmp_path):
    with pytest.raises(UsageError, match="pixels, not 5000"):
        build_art(tmp_path, 5000)
    with pytest.raises(UsageError, match="no set is called 'openmoji'"):
        choose_sets(["noto", "openmoji"])


def test_show_prints_what_is_in_the_file(built):
    shown = CliRunner().invoke(data_app, ["show", str(built.parent)])
    assert shown.exit_code == 0
    assert "6 pictures of 4 objects at 32 px" in shown.stdout
    assert "unknown name 3" in shown.stdout
    assert "1 picture came out blank" in shown.stderr


def test_sets_come_in_their_usual_order():
    assert [art.style for art in choose_sets(["twemoji", "fluent-3d"])] == ["fluent-3d", "twemoji"]
    assert choose_sets([]) == SETS
    assert {art.package.licence for art in SETS} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
