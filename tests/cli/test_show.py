"""`mos show`: what a picture was made from."""

import json

import numpy as np
from PIL import Image


def shown(result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return {line[:14].strip(): line[15:] for line in result.stdout.splitlines()}


def test_the_recipe_what_drew_it_and_the_files_beside(mos, bundle, tmp_path) -> None:
    path = tmp_path / "a.png"
    options = [
        "-s",
        3,
        "--steps",
        2,
        "--cfg",
        2.5,
        "--cfg-interval",
        "0.1,0.9",
        "--negative",
        "cat",
        "--route",
        "dog=1",
    ]
    assert mos("generate", "a {red|red} dog", *options, "-o", path).exit_code == 0
    facts = shown(mos("show", path))
    expected = {
        "prompt": "a red dog",
        "template": "a {red|red} dog",
        "seed": "3",
        "steps": "2",
        "cfg": "2.5",
        "cfg_interval": "0.1,0.9",
        "negative": "cat",
        "routes": "dog=1",
        "model": "tiny",
        "pixels": "as drawn",
        "files": f"{tmp_path / 'a.json'}, {tmp_path / 'a.routing.safetensors'}",
    }
    assert {name: facts.get(name) for name in expected} == expected
    record = json.loads(mos("show", path, "--json").stdout)
    assert record == json.loads(Image.open(path).text["mos"])  # type: ignore[attr-defined]


def test_an_edit_names_what_it_was_made_from(mos, editor, tmp_path) -> None:
    first, second, photo = tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "teal").save(photo)
    short = ["--steps", 1, "-s", 4]
    assert mos("generate", "a dog", *short, "-o", first).exit_code == 0
    assert mos("edit", first, "make it red", "-r", photo, *short, "-o", second).exit_code == 0
    facts = shown(mos("show", second))
    assert facts["edit"] == "'a dog' (seed 4), a picture of 32x32 that is not in this file"
    assert (facts["strength"], facts["image_cfg"]) == ("1.0", str(float(facts["image_cfg"])))
    assert facts["pixels"] == "as drawn, but for what JPEG loses"


def test_a_changed_picture_and_files_that_are_none(mos, bundle, tmp_path) -> None:
    path, changed = tmp_path / "a.png", tmp_path / "c.png"
    assert mos("generate", "a dog", "--steps", 1, "-o", path).exit_code == 0
    from mos_cli.images.outputs import png, read_drawing

    image, record = read_drawing(path)
    pixels = np.asarray(image).copy()
    pixels[0, 0] ^= 1
    changed.write_bytes(png(Image.fromarray(pixels), record))
    assert shown(mos("show", changed))["pixels"] == "changed by another program"
    for name in ("a.json", "none.png"):
        result = mos("show", tmp_path / name)
        assert result.exit_code == 3
        assert len(result.stderr.splitlines()) == 1
