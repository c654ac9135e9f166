"""Edits with base models: references, masks, strength; with closed gates equal to diffusers' pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, ZImageImg2ImgPipeline, ZImageInpaintPipeline
from PIL import Image
from typer.testing import Result

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.images.inputs import Inputs
from mos_cli.sampling.guidance import POSITIVE
from tests.helpers.adapted import (
    PROMPT,
    SIZE,
    check_read,
    edit_of,
    plain_arguments,
    plain_pipeline,
    random_picture,
    recorded_text,
    trained_adapter,
    with_adapter,
)

FIRST, SECOND, THIRD = (random_picture(seed) for seed in range(3))
MASK = Image.new("L", (SIZE, SIZE), 0)
MASK.paste(255, (SIZE // 2, 0, SIZE, SIZE))


def plain_edit(name: str, pipe: Any, case: str) -> tuple[Any, dict[str, Any]]:
    """Diffusers' pipeline of an edit, and the arguments for the pictures."""
    if name == "z-image":
        if "mask" in case:
            return ZImageInpaintPipeline(**pipe.components), {"image": FIRST.image, "mask_image": MASK, "strength": 1.0}
        return ZImageImg2ImgPipeline(**pipe.components), {"image": FIRST.image, "strength": 0.7}
    if case in ("one picture", "three pictures"):
        return pipe, {"image": [picture.image for picture in (FIRST, SECOND, THIRD)[: 1 if "one" in case else 3]]}
    inpaint = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=pipe.config.is_distilled)
    mask = MASK if "mask" in case else Image.new("L", MASK.size, 255)
    arguments: dict[str, Any] = {"image": FIRST.image, "mask_image": mask}
    arguments["strength"] = 0.7 if case == "strength" else 1.0
    return inpaint, arguments | ({"image_reference": [SECOND.image]} if "reference" in case else {})


CASES = {
    "one picture": (Inputs((FIRST,)), 1.0),
    "three pictures": (Inputs((FIRST, SECOND, THIRD)), 1.0),
    "mask": (Inputs((FIRST,), MASK), 1.0),
    "mask and a reference": (Inputs((FIRST, SECOND), MASK), 1.0),
    "strength": (Inputs((FIRST,)), 0.7),
}


@pytest.mark.parametrize(
    ("name", "case"), [*(("klein", case) for case in CASES), ("z-image", "strength"), ("z-image", "mask")]
)
def test_closed_gates_change_no_pixel_of_an_edit(
    loaded: Callable[..., AdapterPipeline], base_folders: Callable[[str], Path], tmp_path: Path, name: str, case: str
) -> None:
    pipeline, (inputs, strength) = loaded(name), CASES[case]
    recipe = edit_of(pipeline, inputs, strength=strength)
    pipe, arguments = plain_edit(name, plain_pipeline(base_folders(name), beside=pipeline), case)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(**plain_arguments(name, recipe), **arguments).images[0]
    closed = pipeline.draw(recipe, inputs=inputs)
    assert closed.image.tobytes() == plain.tobytes()
    with with_adapter(pipeline, trained_adapter(pipeline, 0.5)), torch.no_grad(), recorded_text(pipeline) as blocks:
        opened = pipeline.draw(recipe, inputs=inputs)
    assert opened.image.tobytes() != plain.tobytes()
    picture, *_ = opened.save(tmp_path / "picture.png")
    assert check_read(pipeline, blocks, picture, {POSITIVE: PROMPT}) > 0.01


def test_edits_on_the_command_line(
    mos: Callable[..., Result], base_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With references and a mask; what is black in the mask stays bit for bit, and the picture is replayed."""
    monkeypatch.setenv("MOS_PRECISION", "fp32")
    for name, image in (("a.png", FIRST.image), ("b.png", SECOND.image), ("mask.png", MASK)):
        image.save(tmp_path / name)
    common = ("-m", base_folders("klein"), "--steps", "2", "-s", "3", "--max-pixels", SIZE * SIZE, "-q")
    made = mos(
        *(
            "edit",
            tmp_path / "a.png",
            "make it snow",
            "--reference",
            tmp_path / "b.png",
            "--mask",
            tmp_path / "mask.png",
        ),
        *common,
        *("-o", tmp_path / "c.png"),
    )
    assert made.exit_code == 0, made.output
    left = (0, 0, SIZE // 2, SIZE)
    assert Image.open(tmp_path / "c.png").crop(left).tobytes() == FIRST.image.crop(left).tobytes()
    given = ("--input", tmp_path / "a.png", "--input", tmp_path / "b.png", "--mask", tmp_path / "mask.png")
    verified = mos("replay", tmp_path / "c.png", "--verify", *given)
    assert (verified.exit_code, verified.output.strip().splitlines()[-1]) == (0, "exact")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("klein", ["--image-cfg", "2"], "--image-cfg"),
        ("z-image", [], "--strength 0.6"),
        ("z-image", ["--reference", "b.png", "--strength", "0.5"], "--reference"),
        ("prx", [], "only draws"),
    ],
)
def test_what_a_base_model_cannot_edit_is_refused_in_one_line(
    mos: Callable[..., Result],
    base_folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    FIRST.image.save("a.png")
    SECOND.image.save("b.png")
    refused = mos("edit", "a.png", "make it snow", "-m", base_folders(name), *options)
    assert refused.exit_code == (4 if name == "prx" else 2)
    assert told in " ".join(refused.output.split())
