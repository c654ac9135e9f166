"""The page in a browser: drawing, editing, steering and comparing, by hand and by keyboard; it loads nothing else."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mos_cli.images.outputs import read_drawing
from tests.helpers.running_server import Gate, RunningServer, running_server, until

pytestmark = pytest.mark.slow


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; when the test is over, it must have asked for nothing elsewhere and had no error."""
    contexts, asked, errors, urls = [], [], [], []

    def open_page(server: RunningServer, width: int = 1360, ready: bool = True, **context: Any) -> Any:
        urls.append(server.url)
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        contexts[-1].set_default_timeout(60_000)
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        if ready:
            page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((*urls, "data:", "blob:"))] == []
    # A refusal is told on the page, and the browser notes it.
    assert [error for error in errors if "Failed to load resource" not in error] == []


def draw(page: Any, prompt: str, **fields: object) -> None:
    pictures = page.locator("#strip button").count()
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Control+Enter")
    page.locator("#strip button").nth(pictures).wait_for()
    page.locator("#progress").wait_for(state="hidden")


def saved(page: Any) -> tuple[Image.Image, Any]:
    """The picture that is shown, as it would be saved."""
    with page.expect_download() as download:
        page.click("#save")
    return read_drawing(Path(download.value.path()))


def test_drawing_steering_and_comparing(server: RunningServer, opened: Callable[..., Any]) -> None:
    page = opened(server)
    assert page.locator("#empty").is_visible()
    draw(page, "a red dog", seed=2**53 + 1, steps=2)
    recipe = saved(page)[1].recipe
    assert (recipe.prompt, recipe.seed, recipe.steps) == ("a red dog", 2**53 + 1, 2)
    assert page.locator("#facts").inner_text().startswith(f"seed {2**53 + 1}")

    # A layer is pinned by a click and banned with Shift, by keyboard too; the seed stays.
    page.fill("#seed", "")
    assert page.locator("#words [aria-pressed=true]").inner_text() == "dog"
    page.click("#grids [data-layer='2']")
    page.focus("#grids [data-layer='1']")
    page.keyboard.press("Enter")
    page.locator("#words button", has_text="red").click()
    page.click("#grids [data-layer='0']", modifiers=["Shift"])
    assert page.locator("#rules button").all_inner_texts() == ["dog=1,2", "red!=0"]
    page.fill("#rule", "a=3")
    page.keyboard.press("Enter")
    page.locator("#rules button", has_text="a=3").click()
    assert page.locator("#go").inner_text().startswith("Draw with these rules")
    draw(page, "a red dog")
    recipe = saved(page)[1].recipe
    assert (recipe.routes, recipe.seed) == (("dog=1-2", "red!=0"), 2**53 + 1)
    page.locator("#words button", has_text="dog").click()
    assert page.locator("#grids .share").all_inner_texts()[-1].startswith("0")

    page.locator("[data-mode=compare]").click()
    assert page.locator("#differences").inner_text().split()[-2:] == ["dog=1-2,", "red!=0"]
    assert page.locator("#grids .grid").count() == 2
    assert "of its weight from the same layers" in page.locator("#hint").inner_text()
    before = page.locator("#second").evaluate("image => getComputedStyle(image).clipPath")
    page.focus("#wipe")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#second").evaluate("image => getComputedStyle(image).clipPath") != before
    with page.expect_popup() as popup:
        page.click("#report")
    popup.value.wait_for_selector("html[data-ready]", state="attached")
    assert popup.value.locator("#pictures img").count() == 2

    # What was drawn is there after the page is loaded again.
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#strip button").count() == 2


def test_editing_with_a_painted_mask(server: RunningServer, opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(server)
    photo = Image.new("RGB", (48, 32), "teal")
    photo.save(tmp_path / "photo.png")
    page.locator("[data-mode=edit]").click()
    page.set_input_files("#file", tmp_path / "photo.png")
    until(lambda: page.locator("#mask").evaluate("mask => mask.width") == 48)
    box = page.locator("#mask").bounding_box()
    left, middle = box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(left, middle)
    page.mouse.down()
    page.mouse.move(left + 20, middle)
    page.mouse.up()
    # And a dab by keyboard, in the middle.
    page.focus("#mask")
    page.keyboard.press("Space")
    draw(page, "a red dog", seed=1, steps=2)
    image, record = saved(page)
    assert record.recipe.edit is not None
    assert record.recipe.edit.mask is not None
    assert image.size == photo.size
    changed = [image.getpixel(at) != photo.getpixel(at) for at in ((10, 16), (24, 16), (47, 0), (47, 31))]
    assert changed == [True, True, False, False]

    # Without paint, the result is edited as a whole, and its history goes on.
    page.click("#clear")
    draw(page, "a green dog")
    record = saved(page)[1]
    assert record.recipe.edit.mask is None
    assert [one.recipe.prompt for one in record.earlier] == ["a red dog"]


def test_errors_and_cancelling(bundle, opened: Callable[..., Any], gate: Gate) -> None:
    with running_server(draw=gate) as server:
        page = opened(server)
        assert page.locator("[data-mode=edit]").is_hidden()
        page.click("#go")
        page.locator("#error", has_text="prompt").wait_for()
        page.fill("#prompt", "<img src=x onerror=alert(1)> dog")
        page.click("#go")
        page.locator("#said", has_text="step 1 of 3").wait_for()
        page.keyboard.press("Escape")
        page.locator("#progress").wait_for(state="hidden")
        until(lambda: server.queue.current is None)
        page.click("#go")
        page.locator("#said", has_text="step 1 of 3").wait_for()
        page.click("#cancel")
        until(lambda: [job.status for job in server.queue.jobs.values()] == ["cancelled", "cancelled"])
        gate.open.set()
        page.click("#go")
        page.locator("#title", has_text="onerror").wait_for()
        assert page.locator("#title img").count() == 0


def test_the_token_is_asked_for(editor, opened: Callable[..., Any]) -> None:
    with running_server(token="secret") as server:
        page = opened(server, ready=False)
        page.locator("#token").wait_for()
        for given in ("wrong", "secret"):
            page.fill("#token", given)
            page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]", state="attached")
        draw(page, "a dog", steps=1)
        assert saved(page)[1].recipe.prompt == "a dog"
        with page.expect_download() as download:
            page.click("#report")
        assert download.value.suggested_filename == "report.html"
        other = page.context.new_page()
        other.goto(f"{server.url}/#token=secret")
        other.wait_for_selector("html[data-ready]", state="attached")
        assert "secret" not in other.url


def test_it_fits_and_follows_the_scheme(server: RunningServer, opened: Callable[..., Any]) -> None:
    server.ask("POST", "/v1/images/generations", {"prompt": "a red dog", "steps": 1})
    colour = "getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        for width in (360, 800, 1360):
            page = opened(server, width=width, color_scheme=scheme, reduced_motion="reduce")
            for mode in ("draw", "edit", "compare"):
                page.locator(f"[data-mode={mode}]").click()
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            before = page.evaluate(colour)
            assert (sum(map(int, re.findall(r"\d+", before))) < 384) == (scheme == "dark")
            page.keyboard.press("t")
            assert page.evaluate(colour) != before
            unnamed = """[...document.querySelectorAll('button, input, select, textarea, a')].filter((e) =>
                e.type !== 'file' && !(e.ariaLabel || e.textContent.trim() || e.labels?.length))"""
            assert page.evaluate(f"{unnamed}.length") == 0


def test_the_page_is_one_file_without_addresses() -> None:
    from mos_cli.server.page import page

    assert not re.findall(r"https?://|//[a-z]|@import|url\(", page())
    assert not re.findall(r"\son\w+=|\sstyle=", page())
