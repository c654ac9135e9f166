"""Makes the pictures, transcripts and tables of the documents anew, after the default model has changed.

python docs/redraw.py                       pictures and transcripts, with what `mos` on the PATH draws
python docs/redraw.py SCENES EDITS          also the tables, from the folders that `mos eval` wrote
python tests/project/test_shipped.py        the golden pictures

What the text around them says has to be read again by a person. The report's picture needs chromium and playwright, the
edited pictures the art file of `mos data build`.
"""

import contextlib
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

from mos_cli.bundles.bundle import find_bundle, write_index
from mos_cli.config.settings import RunSettings
from mos_cli.datasets.art.file import data_folder, load_art
from mos_cli.evaluation.editbench import read_edit_bench
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.images.sheets import contact_sheet
from mos_cli.towers.autoencoder import to_image

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TABLED = {
    "scenes": [ROOT / "README.md", DOCS / "scenebench.md", ROOT / "models" / "emoji" / "card.md"],
    "edits": [ROOT / "README.md", ROOT / "models" / "emoji" / "card.md"],
}
EDITS = ("add", "remove", "replace", "move", "resize", "recolour", "style", "background", "swap")
"""Kinds of EditBench of which one is shown."""
BASELINES = ("last", "uniform", "shuffle:7")
HOME = "/home/me"
"""What transcripts call the folder that they are made in."""
SERVER = "http://127.0.0.1:8017"
REPORT = {"width": 1360, "height": 790}
"""Pixels of the report's page, which is shown smaller."""


def run(command: str, folder: Path) -> str:
    """Runs a command line as a reader would type it; returns what it prints, also where it ends in an error.

    Its stdout is a terminal, without colours: into a pipe only the paths of pictures would be printed. It is wide,
    since paths are shorter in the documents. The log is one of the folder's own.
    """
    terminal, end = pty.openpty()
    wide = os.environ | {"TERM": "xterm", "COLUMNS": "160", "MOS_DATA": str(folder / ".data")}
    with subprocess.Popen(shlex.split(command), cwd=folder, stdout=end, stderr=subprocess.PIPE, env=wide) as process:
        os.close(end)
        printed = b""
        # Linux says by an error that the other end was closed.
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 1 << 16):
                printed += data
        os.close(terminal)
        assert process.stderr is not None
        printed += process.stderr.read()
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed.decode()).replace(str(folder), HOME).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def write_card_hash() -> None:
    """Hashes the files of the default model anew: its card has the tables."""
    index = find_bundle(RunSettings().model).index
    fields = {name: getattr(index, name) for name in ("name", "description", "license", "understanding", "canvas")}
    write_index(ROOT / "models" / index.name, **fields, defaults=index.defaults, edits=index.edits)


def save(image: Image.Image, name: str) -> None:
    """Pictures of the documents are small: a palette is enough."""
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)


def transcripts(page: Path, folder: Path) -> None:
    """Types every command of a page's console blocks, in order and in one folder, and replaces what follows it."""

    def again(block: re.Match[str]) -> str:
        typed = re.findall(r"^\$ (.*)$", block[1], re.MULTILINE)
        printed = [f"$ {line}\n{run(line, folder)}".rstrip() for line in typed]
        if "\n...\n" in block[0]:
            # Shortened by hand.
            return block[0]
        return "```console\n" + "".join(f"{text}\n" for text in printed) + "```"

    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"```console\n(.*?)```", again, text, flags=re.DOTALL), encoding="utf-8")


def batches(folder: Path) -> None:
    """The transcripts of the page on batches, with its jobs file, and the picture of its matrix."""
    page = DOCS / "batches.md"
    jobs = re.search(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert jobs
    (folder / "jobs.jsonl").write_text(jobs[1], encoding="utf-8")
    transcripts(page, folder)
    save(Image.open(folder / "grid.png"), "batches-grid.png")


def server(folder: Path) -> None:
    """The transcripts of the page on the server, and the picture of its page, with a server that runs meanwhile."""
    from urllib.request import urlopen

    serving = subprocess.Popen(["mos", "serve", "-q"], cwd=folder)
    try:
        while True:
            with contextlib.suppress(OSError), urlopen(f"{SERVER}/health"):
                break
            time.sleep(0.2)
        transcripts(DOCS / "server.md", folder)
        server_picture(folder / "server.png")
    finally:
        serving.terminate()
        serving.wait()
    picture = Image.open(folder / "server.png")
    save(picture.resize((1100, 1100 * picture.height // picture.width), Image.Resampling.LANCZOS), "server.png")


def server_picture(picture: Path) -> None:
    """The page after a picture, with a rule for its first animal."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=REPORT)  # type: ignore[arg-type]
        page.goto(SERVER)
        page.wait_for_selector("html[data-ready]", state="attached")
        before = page.locator("#strip button").count()
        page.fill("#prompt", "a cat and a dog")
        page.fill("#seed", "7")
        page.click("#go")
        page.locator("#strip button").nth(before).wait_for(timeout=300_000)
        page.locator("#words button", has_text="cat").click()
        page.locator("#grids [data-layer='3']").click()
        page.screenshot(path=picture)
        browser.close()


def routing_pictures(folder: Path) -> None:
    """The pictures of the tour, from the files that its transcripts left in `folder`."""
    run("mos inspect-routing cat.json --word cat --word red --word background --regions map.png", folder)
    save(Image.open(folder / "map.png"), "routing-regions.png")
    save(Image.open(folder / "only.png"), "routing-only.png")
    drawn = [(Image.open(folder / "cat.png"), "as drawn")]
    for name in BASELINES:
        run(f'mos generate "a cat on a red background" -s 1 --route {name} --trace off -o {name[:4]}.png', folder)
        drawn.append((Image.open(folder / f"{name[:4]}.png"), name))
    save(contact_sheet(drawn), "routing-baselines.png")
    run("mos inspect-routing cat.json --html report.html", folder)
    report_picture(folder / "report.html", folder / "report.png")
    report = Image.open(folder / "report.png")
    save(report.resize((1100, 1100 * report.height // report.width), Image.Resampling.LANCZOS), "routing-report.png")


def report_picture(report: Path, picture: Path) -> None:
    """The report with the second word pinned, two thirds of the way."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=REPORT)  # type: ignore[arg-type]
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        page.locator("#rows button").nth(1).click()
        last = int(page.locator("#step").get_attribute("max") or 0)
        page.locator("#step").fill(str(last * 2 // 3))
        page.wait_for_timeout(500)
        page.screenshot(path=picture)
        browser.close()


def edited_pictures(folder: Path) -> None:
    """Edits of EditBench, and of pictures that the compositor did not make."""
    entries = [next(one for one in read_edit_bench() if one.kind == kind) for kind in EDITS]
    art = load_art(data_folder())
    true = TrueScenes(art)
    scenes, shown = [entry.before.scene(true.vocabulary) for entry in entries], []
    for entry, before_3HW in zip(entries, true.draw_scenes(scenes, 256), strict=True):
        path = folder / f"{entry.id}.png"
        to_image(before_3HW[None]).save(path)
        shown.append((path, entry.instruction))
    for name, instruction in {"house": "make it night", "apple": "make the apple blue"}.items():
        drawing(name).save(folder / f"{name}.png")
        shown.append((folder / f"{name}.png", instruction))
    unseen = next(one for one in art.manifest.pictures if (one.name, one.style) == ("cat face", "emojione"))
    sprite = Image.fromarray(art.pixels[unseen.index].numpy()).resize((112, 112))
    cat = Image.new("RGB", (128, 128), "#ffe08a")
    cat.paste(sprite.convert("RGB"), (8, 8), sprite.getchannel("A"))
    cat.save(folder / "unseen.png")
    shown.append((folder / "unseen.png", "put it on a green background"))
    pictures = []
    for path, instruction in shown:
        after = path.with_name(f"{path.stem}-edited.png")
        run(f"mos edit {path.name} {shlex.quote(instruction)} -s 1 --trace off -o {after.name}", folder)
        pictures += [(Image.open(path), "before"), (Image.open(after), instruction)]
    save(contact_sheet(pictures), "edits.png")


def drawing(name: str) -> Image.Image:
    """A house with a sun, or an apple, by Pillow."""
    if name == "house":
        image = Image.new("RGB", (192, 128), "#87ceeb")
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, 86, 192, 128), fill="#4caf50")
        pen.rectangle((62, 54, 118, 100), fill="#f0c8a0")
        pen.polygon(((54, 54), (90, 20), (126, 54)), fill="#b03040")
        pen.rectangle((82, 72, 98, 100), fill="#6a4a3a")
        pen.ellipse((150, 12, 178, 40), fill="#ffd54f")
        return image
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((24, 30, 104, 110), fill="#d32f2f")
    pen.rectangle((60, 16, 66, 36), fill="#5d4037")
    pen.ellipse((66, 12, 90, 26), fill="#4caf50")
    return image


def tables(kind: str, table: str) -> None:
    """Puts a table of `mos eval` in the place of the one before, with the line below it."""
    heading = table.splitlines()[0]
    for page in TABLED[kind]:
        text = page.read_text(encoding="utf-8")
        old = re.search(rf"{re.escape(heading)}\n(\|.*\n)+", text)
        assert old, f"{page} has no table {heading}"
        new = "".join(line + "\n" for line in table.splitlines() if line.startswith("|"))
        page.write_text(text.replace(old[0], new), encoding="utf-8")


def main() -> None:
    for kind, folder in zip(("scenes", "edits"), sys.argv[1:], strict=False):
        name = "eval.md" if kind == "scenes" else "edit.md"
        tables(kind, (Path(folder) / name).read_text(encoding="utf-8"))
    write_card_hash()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = shlex.quote(f"@{DOCS / 'prompts.txt'}")
        run(f"mos generate {prompts} -s 1 --trace off -o sheet/ --sheet sheet.png", folder)
        save(Image.open(folder / "sheet.png"), "emoji.png")
        edited_pictures(folder)
        transcripts(DOCS / "routing.md", folder)
        routing_pictures(folder)
    with tempfile.TemporaryDirectory() as temporary:
        batches(Path(temporary))
    with tempfile.TemporaryDirectory() as temporary:
        server(Path(temporary))


if __name__ == "__main__":
    main()
