"""The page of a folder's pictures: what is in it, what hostile recipes do to it, and how it works in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mos_cli.config.recipe import PictureRecord, make_recipe, pixels_hash, provenance
from mos_cli.images.outputs import encode, picture_format

HOSTILE = "</script><img src=x onerror=alert(1)>"


def write(path: Path, prompt: str, colour: str = "teal", **more: Any) -> None:
    """A picture with a recipe."""
    image = Image.new("RGB", (32, 24), colour)
    sizes = {"width": 32, "height": 24, "steps": 2, "cfg": 1, "cfg_interval": "0,1", "precision": "fp32"}
    recipe = make_recipe(prompt=prompt, model="tiny", seed=7, **sizes, **more)
    made = provenance(bundle_hash="0" * 64, device="cpu", attention="sdpa")
    record = PictureRecord(schema="mos-picture/1", recipe=recipe, made=made, sha256=pixels_hash(image))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image, picture_format(path), record).data)


def data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in two folders: one with hostile text, one without a recipe; and what is no picture of the gallery."""
    folder = tmp_path / "pictures & more"
    write(folder / "1.png", "a red cat", weights=[{"start": 2, "end": 5, "weight": 2}], negative="blur")
    write(folder / "in a folder" / "50% #2?.jpg", "a blue dog", "navy")
    write(folder / "x.webp", HOSTILE, "orange", negative=HOSTILE)
    Image.new("RGB", (9, 9)).save(folder / "plain.png")
    write(folder / ".hidden.png", "hidden")
    write(folder / ".folder" / "a.png", "hidden")
    write(folder / "1.steps.webp", "steps")
    (folder / "1.json").write_text("{}")
    return folder


def test_the_pictures_of_a_folder_are_listed_with_their_recipes(mos, folder: Path) -> None:
    result = mos("gallery", folder)
    assert result.exit_code == 0, result.stderr
    page = folder / "gallery.html"
    assert result.stdout == f"{page}\n"
    shown = {one["name"]: one for one in data(page)["pictures"]}
    assert list(shown) == ["1.png", "in a folder/50% #2?.jpg", "plain.png", "x.webp"]
    assert shown["1.png"]["prompt"] == "a (red:2) cat"
    assert {"seed": "7", "model": "tiny", "steps": "2"}.items() <= dict(shown["1.png"]["settings"]).items()
    assert shown["in a folder/50% #2?.jpg"]["src"] == "in%20a%20folder/50%25%20%232%3F.jpg"
    assert shown["plain.png"]["prompt"] is None
    assert HOSTILE not in page.read_text("utf-8")
    assert "http" not in page.read_text("utf-8").replace("http-equiv", "")
    refused = mos("gallery", folder)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1)
    assert mos("gallery", folder, "--overwrite").exit_code == 0


def test_a_page_elsewhere_finds_the_pictures(mos, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "site" / "index.html"
    assert mos("gallery", folder, "-o", page).exit_code == 0
    assert data(page)["pictures"][0]["src"] == "../pictures%20%26%20more/1.png"


def test_what_cannot_be_shown_is_said(mos, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    result = mos("gallery", folder)
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 1
    assert "broken.png" in result.stderr
    (tmp_path / "empty").mkdir()
    for arguments, code in {
        (tmp_path / "empty",): 3,
        (tmp_path / "nowhere",): 3,
        (folder / "1.png",): 3,
        (folder, "-o", tmp_path / "a.png"): 2,
    }.items():
        refused = mos("gallery", *arguments)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (code, 1), refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_in_a_browser_without_a_network(mos, folder: Path, browser: Any, tmp_path: Path, scheme: str) -> None:
    assert mos("gallery", folder).exit_code == 0
    context = browser.new_context(viewport={"width": 900, "height": 700}, color_scheme=scheme)
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
    page.goto((folder / "gallery.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    shown = page.locator(".picture:visible")
    assert shown.count() == 4
    page.wait_for_function("[...document.querySelectorAll('.picture img')].every((image) => image.naturalWidth > 0)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 248)", "dark": "rgb(19, 20, 22)"}[scheme]
    page.keyboard.press("/")
    page.keyboard.type("BLUE dog")
    assert shown.count() == 1
    assert page.locator("#count").inner_text() == "1 of 4 pictures"
    page.locator("#search").fill("")
    shown.first.click()
    facts = page.locator("#settings").inner_text()
    assert page.locator("#prompt").inner_text() == "a (red:2) cat"
    assert "blur" in facts
    assert "seed\n7" in facts
    page.screenshot(path=tmp_path / f"{scheme}.png")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#prompt").inner_text() == HOSTILE
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    context.close()
    assert all(url.startswith("file:") for url in asked)
    assert errors == []
