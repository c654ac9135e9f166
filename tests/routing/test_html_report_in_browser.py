"""The report in a browser: it opens without a network, and everything in it works by hand and by keyboard."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mos_cli.routing.analysis import strongest_layers
from mos_cli.routing.trace import Recording, Steered
from mos_cli.routing.views.html import html_report
from tests.helpers.recordings import HOSTILE, record


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report; when the test is over, it must have asked for nothing but itself and reported no error."""
    contexts, asked, errors = [], [], []
    file = tmp_path / "report.html"

    def open_report(*recordings: Recording, width: int = 1360, **context: Any) -> Any:
        file.write_text(html_report(*recordings), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        contexts[-1].set_default_timeout(120_000)
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        settle(page)
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    assert errors == []


def settle(page: Any) -> None:
    """Waits until what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def press(page: Any, key: str) -> None:
    page.keyboard.press(key)
    settle(page)


def pinned(page: Any) -> list[str]:
    return page.locator("#rows [aria-pressed=true]").all_inner_texts()


@pytest.mark.slow
def test_it_tells_what_was_drawn_and_what_was_read(opened: Callable[..., Any], tmp_path: Path) -> None:
    recording = record(tmp_path)
    page = opened(recording)
    assert page.locator("h1").inner_text().split() == ["a", "red", "apple", "and", "a", "cat"]
    layer, share = strongest_layers(recording.trace.branches["positive"].summary.layer_use_JM)[0]
    assert (
        f"reads layer {layer} most ({round(100 * share)}\u202f% of the weight)" in page.locator("#story").inner_text()
    )
    assert "--preview-steps" in page.locator("#seen").inner_text()
    assert page.locator("#pictures img").evaluate("image => image.naturalWidth") == 64


@pytest.mark.slow
def test_weights_of_the_prompt_are_told(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path, weights=[{"start": 2, "end": 5, "weight": 0.5}]))
    rules = page.locator("#rules")
    assert rules.inner_text().split("\n") == ["Weights in the prompt", "red routed context \u00d7 0.5"]
    page.locator("h1 .inked", has_text="red").click()
    settle(page)
    assert "red \u00d7 0.5" in page.locator("#inspector").inner_text()
    page.get_by_role("button", name="negative").click()
    settle(page)
    assert rules.is_hidden()


@pytest.mark.slow
def test_the_scrubber_moves(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path, previews=True))

    def state() -> tuple[str, str, str]:
        frame = page.locator(".sprite")
        flow = page.locator("#flow .charts").inner_html()
        return page.locator("#now").inner_text(), frame.get_attribute("data-frame"), flow

    assert state()[:2] == ("step 5 of 5 · t 0.17", "5")
    assert page.locator(".sprite").is_hidden()
    seen = [state()]
    press(page, "ArrowLeft")
    assert state()[:2] == ("step 4 of 5 · t 0.33", "4")
    assert page.locator(".sprite").is_visible()
    seen.append(state())
    page.locator("#step").fill("1")
    settle(page)
    assert state()[:2] == ("step 1 of 5 · t 0.83", "1")
    seen.append(state())
    assert len({flow for *_, flow in seen}) == 3
    press(page, "Home")
    press(page, "ArrowLeft")
    assert state()[0].startswith("step 0 ")
    page.locator("body").press(" ")
    page.locator("#now", has_text="step 5").wait_for()
    page.get_by_role("button", name="Play", exact=True).wait_for()


@pytest.mark.slow
def test_a_cell_tells_its_layers(opened: Callable[..., Any], tmp_path: Path) -> None:
    recording = record(tmp_path)
    assert recording.routes is not None
    page = opened(recording)
    cells = page.locator("#rows .row").nth(2).locator(".cells")
    box = cells.bounding_box()
    page.mouse.move(box["x"] + 1.5 * box["width"] / 4, box["y"] + 5)
    text = page.locator("#inspector").inner_text()
    routes = recording.routes["positive"]
    kept = zip(routes.ids_SJTK[5, 1, 3], routes.weights_SJTK[5, 1, 3], strict=True)
    wanted = ", ".join(
        f"layer {layer} {round(100 * round(255 * float(weight)) / 255)}\u202f%" for layer, weight in kept
    )
    assert "apple · step 5 · block 1" in text
    assert wanted in text


@pytest.mark.slow
def test_a_word_is_pinned_by_mouse_and_by_keyboard(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path))
    everything = page.locator("#time .charts").inner_html()
    page.get_by_role("button", name="apple", exact=True).click()
    settle(page)
    assert pinned(page) == ["apple"]
    assert "“apple” reads" in page.locator("#story").inner_text()
    assert page.locator("#time .of").inner_text() == page.locator("#flow .of").inner_text() == "“apple”"
    assert page.locator("#time .charts").inner_html() != everything
    assert page.locator(".heat").is_visible()
    press(page, "Escape")
    assert pinned(page) == []
    assert page.locator("#time .charts").inner_html() == everything
    assert page.locator(".heat").is_hidden()
    page.get_by_role("button", name="red", exact=True).focus()
    press(page, "Enter")
    assert pinned(page) == ["red"]
    press(page, "ArrowDown")
    assert pinned(page) == ["apple"]
    press(page, ".")
    assert "apple · step 5 · block 0" in page.locator("#inspector").inner_text()
    press(page, "ArrowUp")
    press(page, "ArrowUp")
    assert pinned(page) == ["a"]
    page.locator("h1 .inked", has_text="cat").click()
    settle(page)
    assert pinned(page) == ["cat"]


@pytest.mark.slow
def test_the_branch_and_the_span_switch(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path))
    page.get_by_role("button", name="negative").click()
    settle(page)
    assert page.locator("#rows .name").all_inner_texts() == ["blurry", "[CLS]", "[SEP]"]
    assert "not computed at this step" in page.locator("#flow").inner_text()
    press(page, "f")
    assert page.locator("#flow .band").count() > 0
    assert page.get_by_role("button", name="all steps").get_attribute("aria-pressed") == "true"
    press(page, "b")
    assert page.get_by_role("button", name="positive").get_attribute("aria-pressed") == "true"


@pytest.mark.slow
def test_two_traces_compare(opened: Callable[..., Any], tmp_path: Path) -> None:
    first, second = record(tmp_path, "a red cat", previews=True), record(tmp_path, "a big cat", seed=1)
    page = opened(first, second)
    assert page.locator("#pictures img").count() == 2
    assert "Draw the second with --preview-steps" in page.locator("#seen").inner_text()
    assert "of the choices agree" in page.locator("#story").inner_text()
    rows = {row.locator(".name").inner_text(): row for row in page.locator("#rows .row").all()}
    assert rows["red"].locator(".cells").get_attribute("data-why") == "only in first"
    assert rows["big"].locator(".cells").get_attribute("data-why") == "only in second"
    assert rows["cat"].locator(".mean").inner_text() != "0\u202f%"
    press(page, "v")
    assert page.locator("#time svg").count() == 1
    assert rows["cat"].locator(".mean").count() == 1


@pytest.mark.slow
def test_both_prompts_are_spelled_as_they_were_given(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path, "a red cat"), record(tmp_path, "A Red cat", seed=1))
    prompts = page.locator("#prompts .prompt").all_inner_texts()
    assert [prompt.split()[1:] for prompt in prompts] == [["a", "red", "cat"], ["A", "Red", "cat"]]
    assert page.locator("#rows .name").all_inner_texts() == ["a", "red", "cat", "[CLS]", "[SEP]"]


@pytest.mark.slow
def test_a_trace_does_not_differ_from_itself(opened: Callable[..., Any], tmp_path: Path) -> None:
    recording = record(tmp_path)
    page = opened(recording, recording)
    assert "identical" in page.locator("#story").inner_text()
    assert set(page.locator("#rows .mean").all_inner_texts()) == {"0\u202f%"}


@pytest.mark.slow
def test_a_feature_cache_is_told_once(opened: Callable[..., Any], tmp_path: Path) -> None:
    assert not opened(record(tmp_path)).locator("#unread").is_visible()
    note = opened(record(tmp_path, feature_cache=3)).locator("#unread")
    assert note.is_visible()
    assert note.text_content().count("eature cache 3") == 1


@pytest.mark.slow
def test_rules_are_shown_as_asked_and_done(opened: Callable[..., Any], tmp_path: Path) -> None:
    recording = record(tmp_path, routes=("cat=1-2",))
    branch = recording.trace.branches["positive"]
    done = branch.model_copy(update={"steered": (Steered(rule="cat=1-2", tokens=(6,), decisions=24),), "changed": 7})
    branches = {**recording.trace.branches, "positive": done}
    page = opened(replace(recording, trace=recording.trace.model_copy(update={"branches": branches})))
    text = page.locator("#rules").inner_text()
    assert "cat=1-2 24 decisions" in text
    assert "7 of 192 decisions" in text


@pytest.mark.slow
def test_a_hostile_prompt_is_shown_and_does_nothing(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(record(tmp_path, HOSTILE), record(tmp_path, f"{HOSTILE} cat", seed=1))
    assert page.locator("h1").inner_text().split()[1:] == HOSTILE.split()
    assert page.locator("#rows .name").first.inner_text() == HOSTILE.split()[0].lstrip("</")
    assert page.locator("img").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_scheme(opened: Callable[..., Any], tmp_path: Path, width: int, scheme: str) -> None:
    page = opened(record(tmp_path), width=width, color_scheme=scheme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    assert (sum(map(int, re.findall(r"\d+", before))) < 384) == (scheme == "dark")
    press(page, "t")
    assert page.evaluate(colour) != before
    unnamed = "[...document.querySelectorAll('button, input')].filter((e) => !(e.ariaLabel || e.textContent.trim()))"
    assert page.evaluate(f"{unnamed}.length") == 0
