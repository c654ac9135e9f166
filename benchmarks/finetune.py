"""A made-up character for trying `mos train finetune`: a folder of 20 captioned pictures, and ten new scenes.

python benchmarks/finetune.py pictures FOLDER                   needs the art file of `mos data build`
python benchmarks/finetune.py draw MODEL SHEET [LORA]           draws the ten new scenes with a model

The zog is a green octopus with a top hat that is painted orange: neither this shape nor these colours are together in
the scenes that the shipped model was trained on. It is shown in ten poses, turned, mirrored, near and far, on two
backgrounds each.

Shapes: V pictures, H x W a picture's size.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mos_cli.datasets.art.file import Art, data_folder, load_art
from mos_cli.datasets.scenes.backgrounds import WHITE, named_background
from mos_cli.datasets.scenes.compositor import Compositor, scaled
from mos_cli.datasets.scenes.layout import Placed, Scene
from mos_cli.datasets.scenes.packed import pack_scenes, split_objects
from mos_cli.datasets.scenes.vocabulary import COLOURS
from mos_cli.towers.autoencoder import to_image

NAME, CANVAS, SPRITE = "zog", 256, 256
PARTS = (("octopus", "green", (0.5, 0.6, 0.8)), ("top hat", "orange", (0.5, 0.22, 0.44)))
"""What the character is made of: names in the art file, paints, and centre and side."""
POSES = (
    (0, 0.76, 0.5, 0.5, ""),
    (-20, 0.76, 0.5, 0.5, "leaning to the left"),
    (20, 0.76, 0.5, 0.5, "leaning to the right"),
    (180, 0.7, 0.5, 0.5, "upside down"),
    (0, 0.42, 0.5, 0.5, "small"),
    (0, 0.93, 0.5, 0.5, "big"),
    (0, 0.45, 0.27, 0.27, "in the top left corner"),
    (0, 0.45, 0.73, 0.27, "in the top right corner"),
    (0, 0.45, 0.27, 0.73, "in the bottom left corner"),
    (0, 0.45, 0.73, 0.73, "in the bottom right corner"),
)
"""Degrees by which it is turned, side, centre, and what captions say."""
BACKGROUNDS = ("sky blue", "beige", "teal", "pink", "yellow", "meadow", "snow", "beach", "grey", "white")
PHRASES = {"meadow": "on a meadow", "snow": "in the snow", "beach": "on a beach"}
NEW_SCENES = (
    "a zog",
    "a zog on a purple background",
    "a zog at night",
    "a zog on a street",
    "a small zog on a red background",
    "a zog in a room",
    "a zog in the top left corner on an orange background",
    "a zog and a cat",
    "a zog to the right of a tree",
    "a zog above a car",
)


def character(art: Art) -> Image.Image:
    """The character, RGBA, on a transparent background."""
    rows = {(picture.name, picture.style): picture.index for picture in art.manifest.pictures}
    sprites = art.pixels[[rows[name, "fluent-3d"] for name, _, _ in PARTS]]
    compositor, layers = Compositor(sprites), []
    for index, (_, colour, (x, y, side)) in enumerate(PARTS):
        scene = Scene((Placed(index, x, y, side, COLOURS[colour][0]),), WHITE)
        (packed,) = split_objects(pack_scenes([scene], objects=1))
        layers.append(scaled(*compositor.prepared(packed, SPRITE))[0])
    body, hat = layers
    premultiplied_4HW = body * (1 - hat[3:]) + hat
    alpha = premultiplied_4HW[3:].clamp_min(1e-6)
    straight_HW4 = torch.cat([premultiplied_4HW[:3] / alpha, premultiplied_4HW[3:]]).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((straight_HW4.numpy() * 255).round().astype(np.uint8), "RGBA")


def write_pictures(folder: Path) -> None:
    """Twenty pictures of the character with captions in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, sprites, scenes, captions = character(load_art(data_folder())), [], [], []
    for number in range(2 * len(POSES)):
        angle, side, x, y, words = POSES[number % len(POSES)]
        name = BACKGROUNDS[(number + number // len(POSES) * 3) % len(BACKGROUNDS)]
        turned = np.asarray(figure.rotate(-angle, Image.Resampling.BICUBIC)).astype(np.float32)
        turned[..., :3] *= turned[..., 3:] / 255
        sprites.append(turned.round().astype(np.uint8))
        placed = Placed(number, x, y, side, mirrored=number >= len(POSES))
        scenes.append(Scene((placed,), named_background(name)))
        size, place = (words, "") if words in ("small", "big") else ("", words)
        where = "" if name == "white" else PHRASES.get(name, f"on a {name} background")
        captions.append(" ".join(f"a {size} {NAME} {place} {where}".split()))
    drawn = Compositor(torch.from_numpy(np.stack(sprites))).draw(scenes, CANVAS)
    for number, caption in enumerate(captions, start=1):
        to_image(drawn[number - 1 : number]).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")


def draw(model: str, sheet: Path, loras: list[str]) -> None:
    """Draws the ten new scenes with seeds 1 to 10 as a sheet."""
    from mos_cli import load
    from mos_cli.images.sheets import contact_sheet

    loaded = load(model, loras=loras)
    drawn = [
        (loaded.generate(prompt, seed=seed).image.convert("RGB"), prompt)
        for seed, prompt in enumerate(NEW_SCENES, start=1)
    ]
    contact_sheet(drawn).save(sheet)


def main() -> None:
    match sys.argv[1:]:
        case ["pictures", folder]:
            write_pictures(Path(folder))
        case ["draw", model, sheet, *loras]:
            draw(model, Path(sheet), loras)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
