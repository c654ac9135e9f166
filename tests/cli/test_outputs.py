"""What a command writes and where: nothing of the user's is replaced, nothing drawn is lost, and a pipe has paths."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from mos_cli.config.recipe import pixels_hash
from mos_cli.images.companions import companions
from mos_cli.images.outputs import read_drawing
from mos_cli.routing.trace import load_recording

PROMPT = "a red apple"
MINE = b'{"caption": "mine"}'
OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "pictures"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# --overwrite replaces the picture that was named, and what was made with it.


@pytest.mark.parametrize("name", ["3.json", "3.routing.safetensors", "3.steps.webp"])
@pytest.mark.parametrize("trace", ["off", "topk"])
def test_a_file_of_the_users_beside_a_picture_stays(mos, editor, out, name, trace) -> None:
    Image.new("RGB", (32, 32), "orange").save(out / "3.png")
    (out / name).write_bytes(MINE)
    before = contents(out)
    result = mos("edit", out / "3.png", PROMPT, "-o", out / "3.png", "--overwrite", "--trace", trace)
    assert result.exit_code == 3
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("fetching")]
    assert f"{out / name} was not made with {out / '3.png'} and stays" in line
    assert contents(out) == before


@pytest.mark.parametrize("name", ["one.json", "one.routing.safetensors", "one.steps.webp"])
def test_what_was_made_with_another_picture_stays(mos, bundle, out, name) -> None:
    for number, picture in enumerate(("one.png", "other.png")):
        assert mos("generate", PROMPT, "-s", number, "-o", out / picture, "--preview-steps").exit_code == 0
    (out / name.replace("one", "other")).replace(out / name)
    before = contents(out)
    result = mos("generate", PROMPT, "-o", out / "one.png", "--overwrite")
    assert result.exit_code == 3
    assert f"{out / name} was not made with" in result.stderr
    assert contents(out) == before


def test_what_was_made_with_the_picture_is_replaced_or_removed(mos, bundle, out) -> None:
    path = out / "one.png"
    assert mos("generate", PROMPT, "-s", 1, "-o", path, "--preview-steps").exit_code == 0
    assert set(contents(out)) == {"one.png", *(other.name for other in companions(path))}
    assert mos("generate", PROMPT, "-s", 2, "-o", path, "--preview-steps", "--overwrite").exit_code == 0
    assert load_recording(path).trace.recipe.seed == 2
    assert mos("generate", PROMPT, "-s", 3, "-o", path, "--trace", "off", "--overwrite").exit_code == 0
    assert set(contents(out)) == {"one.png"}


def test_a_trace_of_the_first_version_is_replaced_with_its_picture(mos, bundle, out) -> None:
    for file in OLD.glob("apple.*"):
        (out / file.name).write_bytes(file.read_bytes())
    assert mos("generate", PROMPT, "-o", out / "apple.png", "--trace", "off", "--overwrite").exit_code == 0
    assert set(contents(out)) == {"apple.png"}


def test_a_sheet_replaces_no_picture_of_its_run_under_another_spelling(mos, bundle, out, monkeypatch) -> None:
    monkeypatch.chdir(out)
    result = mos("generate", PROMPT, "-o", "a.png", "--sheet", out / "a.png", "--overwrite")
    assert result.exit_code == 2
    assert "--sheet" in result.stderr
    assert contents(out) == {}


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--limit", 1, "-o"],
        ["eval", "--suite", "edit", "--limit", 1, "-o"],
        ["train-judge", "-o"],
        ["train-enlarger", "-o"],
        ["train", "train-emoji", "--run"],
        ["train", "train-emoji", "--export"],
    ],
    ids=lambda command: " ".join(map(str, command[:2])) + str(command[-1]),
)
def test_a_folder_of_the_users_is_not_filled_with_others_files(mos, editor, out, command) -> None:
    for name in ("sheet.png", "config.json", "recipe.txt", "loss.png"):
        (out / name).write_bytes(MINE)
    result = mos(*command, out)
    assert result.exit_code == 3, result.output
    assert f"{out} has files of something else" in result.stderr
    assert set(contents(out).values()) == {MINE}
    assert len(list(out.iterdir())) == 4


# A name that is taken is passed over.


def _meanwhile(monkeypatch: pytest.MonkeyPatch, *taken: Path) -> None:
    """Files appear while the first picture is drawn."""
    from mos_cli.inference.pipeline import MoSPipeline

    draw = MoSPipeline.draw

    def slow(self, *arguments, **options):
        for path in taken:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(MINE)
        return draw(self, *arguments, **options)

    monkeypatch.setattr(MoSPipeline, "draw", slow)


def test_numbers_that_were_taken_meanwhile_are_passed_over(mos, bundle, out, monkeypatch) -> None:
    _meanwhile(monkeypatch, out / "0001_a-red-apple_s1.png", out / "0002_a-red-apple_s2.json")
    result = mos("generate", PROMPT, "-n", 3, "-s", 1, "-o", f"{out}/")
    assert result.exit_code == 0, result.stderr
    names = ["0004_a-red-apple_s1", "0005_a-red-apple_s2", "0003_a-red-apple_s3"]
    assert result.stdout.splitlines() == [f"{out / name}.png" for name in names]
    assert [load_recording(out / f"{name}.png").trace.recipe.seed for name in names] == [1, 2, 3]
    assert contents(out)["0001_a-red-apple_s1.png"] == contents(out)["0002_a-red-apple_s2.json"] == MINE
    assert not (out / "0002_a-red-apple_s2.png").exists()


@pytest.mark.parametrize("template", ["one.png", "{seed}.png"])
@pytest.mark.parametrize("taken", [".png", ".json"])
def test_a_name_without_a_number_that_was_taken_meanwhile_gets_one(
    mos, bundle, out, monkeypatch, template, taken
) -> None:
    name = template.format(seed=1)
    _meanwhile(monkeypatch, (out / name).with_suffix(taken), (out / name).with_stem(f"{Path(name).stem}_2"))
    result = mos("generate", PROMPT, "-s", 1, "-o", out / template)
    assert result.exit_code == 0, result.stderr
    saved = (out / name).with_stem(f"{Path(name).stem}_3")
    assert result.stdout == f"{saved}\n"
    assert f"{out / name} was taken while this was drawn: it is saved as {saved}" in result.stderr
    assert load_recording(saved).picture == saved


def test_with_overwrite_a_number_is_still_a_new_one(mos, bundle, out, monkeypatch) -> None:
    _meanwhile(monkeypatch, out / "0001.png")
    assert mos("generate", PROMPT, "-o", out / "{number}.png", "--overwrite", "--trace", "off").exit_code == 0
    assert contents(out)["0001.png"] == MINE
    assert (out / "0002.png").is_file()


def test_a_strip_of_an_ablation_whose_name_was_taken_meanwhile_gets_the_next(mos, bundle, out, monkeypatch) -> None:
    assert mos("generate", PROMPT, "-o", out / "one.png", "--trace", "off").exit_code == 0
    _meanwhile(monkeypatch, out / "one_ablate-apple.png")
    result = mos("routing", "ablate", out / "one.png", "--word", "apple")
    assert result.exit_code == 0, result.stderr
    assert contents(out)["one_ablate-apple.png"] == MINE
    assert Image.open(out / "one_ablate-apple-2.png").size[0] > 100
    assert mos("routing", "ablate", out / "one.png", "--word", "apple", "--overwrite").exit_code == 0
    assert contents(out)["one_ablate-apple.png"] == MINE, "only a name that is given is replaced"
    assert (out / "one_ablate-apple-3.png").is_file()


def test_two_runs_at_once_lose_nothing(bundle, out) -> None:
    command = [sys.executable, "-m", "mos_cli", "generate", PROMPT, "-n", "4", "-s", "1", "-q", "-o", f"{out}/"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate()[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    pictures = sorted(out.glob("*.png"))
    assert sorted(printed[0] + printed[1]) == [str(path) for path in pictures]
    assert len(pictures) == 8
    assert all(load_recording(path).picture == path for path in pictures)


# All of a picture's files or none.


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_dangling_link_is_a_name_that_is_taken(mos, bundle, out, options) -> None:
    (out / "one.png").symlink_to(out / "nowhere.png")
    result = mos("generate", PROMPT, "-o", out / "one.png", *options)
    if options:
        assert result.exit_code == 0
        assert not (out / "one.png").is_symlink()
    else:
        assert result.exit_code == 3
        assert "exists" in result.stderr
        assert [path.name for path in out.iterdir()] == ["one.png"]


@pytest.mark.parametrize("suffix", [".png", ".json", ".routing.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_said_before_anything_is_drawn(mos, bundle, out, suffix) -> None:
    (out / f"one{suffix}").mkdir()
    if suffix != ".png":
        result = mos("generate", PROMPT, "-o", out / "one.png", "--overwrite")
        assert result.exit_code == 3
    (out / "one.png").mkdir(exist_ok=True)
    result = mos("generate", PROMPT, "-o", f"{out}/{{prompt}}.png", "--sheet", out / "one.png", "--overwrite")
    assert result.exit_code == 3
    assert "is not a file" in result.stderr
    assert list(out.glob("*.json")) == [path for path in out.glob("*.json") if path.is_dir()]


def test_a_link_to_nowhere_as_a_folder_is_said_before_anything_is_drawn(mos, bundle, out) -> None:
    (out / "folder").symlink_to(out / "nowhere")
    for options in (["-o", out / "folder" / "one.png"], ["-o", f"{out}/", "--sheet", out / "folder" / "sheet.png"]):
        result = mos("generate", PROMPT, *options)
        assert result.exit_code == 3
        assert "cannot write to" in result.stderr
        assert [path.name for path in out.iterdir()] == ["folder"]


# A trace belongs to one picture.


def test_a_trace_of_another_run_beside_a_picture_is_said(mos, bundle, out) -> None:
    for number, name in enumerate(("one", "other")):
        assert mos("generate", PROMPT, "-s", number, "-o", out / f"{name}.png").exit_code == 0
    for suffix in (".json", ".routing.safetensors"):
        (out / f"other{suffix}").replace(out / f"one{suffix}")
    other = out / "third.png"
    for command in (
        ["inspect-routing", out / "one.png"],
        ["inspect-routing", out / "one.json"],
        ["inspect-routing", out / "one.png", "--html", out / "report.html"],
        ["routing", "diff", out / "one.png", out / "one.png"],
        ["generate", PROMPT, "--route-from", out / "one.png", "-o", other],
    ):
        result = mos(*command)
        assert result.exit_code == 3, command
        (line,) = result.stderr.splitlines()
        assert f"{out / 'one.json'} is the trace of another picture than {out / 'one.png'}" in line
    assert not other.exists()
    (out / "one.png").unlink()
    (out / "one.routing.safetensors").rename(out / "other.routing.safetensors")
    assert mos("inspect-routing", out / "one.json").exit_code == 0, "alone, a trace can be shown"


def test_a_picture_that_was_painted_on_is_no_longer_that_of_its_trace(mos, bundle, out) -> None:
    assert mos("generate", PROMPT, "-o", out / "one.png").exit_code == 0
    assert mos("inspect-routing", out / "one.png").exit_code == 0
    image, record = read_drawing(out / "one.png")
    assert load_recording(out / "one.png").trace.picture == record.sha256 == pixels_hash(image)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(out / "one.png")
    assert mos("inspect-routing", out / "one.png").exit_code == 3


def test_a_trace_of_the_first_version_is_shown_though_it_cannot_be_checked(mos, out) -> None:
    for file in OLD.glob("apple.*"):
        (out / file.name).write_bytes(file.read_bytes())
    for command in (["inspect-routing", out / "apple.png"], ["routing", "diff", out / "apple.png", out / "apple.png"]):
        result = mos(*command)
        assert result.exit_code == 0, result.stderr
        assert "cannot be checked" in result.stderr
    facts = json.loads(mos("inspect-routing", out / "apple.png", "--json").stdout)
    assert facts["picture"] == {"file": str(out / "apple.png"), "checked": False}
    (out / "apple.png").write_bytes((OLD / "cat.png").read_bytes())
    assert mos("inspect-routing", out / "apple.png").exit_code == 3, "the record in the picture is another"


# Transparency.


@pytest.fixture
def clear(tmp_path: Path) -> Path:
    """A picture whose left half is transparent."""
    image = Image.new("RGBA", (61, 45), (200, 90, 10, 255))
    image.paste((0, 0, 0, 0), (0, 0, 30, 45))
    image.save(tmp_path / "clear.png")
    return tmp_path / "clear.png"


def test_an_opaque_result_of_a_transparent_picture_is_said(mos, editor, clear, out) -> None:
    result = mos("edit", clear, PROMPT, "-o", out / "one.png")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "transparent" in line]
    assert "--keep-alpha" in line
    assert Image.open(out / "one.png").mode == "RGB"
    events = mos("edit", clear, PROMPT, "-o", out / "2.png", "--json").stdout.splitlines()
    assert any(json.loads(event)["event"] == "note" for event in events)


def test_transparency_that_a_larger_canvas_loses_is_said_too(mos, editor, clear, out) -> None:
    result = mos("edit", clear, PROMPT, "--composite", "--size", "64x48", "-o", out / "one.png")
    assert result.exit_code == 0
    assert "--keep-alpha" in result.stderr


@pytest.mark.parametrize("options", [[], ["--composite"], ["--size", "64x48"]])
def test_keep_alpha_keeps_it_and_replays(mos, editor, clear, out, options) -> None:
    result = mos("edit", clear, PROMPT, "--keep-alpha", *options, "-s", 1, "-o", out / "one.png")
    assert result.exit_code == 0, result.stderr
    assert "transparent" not in result.stderr
    alpha = np.asarray(Image.open(out / "one.png"))[..., 3]
    if "--size" in options:
        assert (alpha[:, :25] < 9).all()
        assert (alpha[:, -25:] == 255).all()
    else:
        assert np.array_equal(alpha, np.asarray(Image.open(clear))[..., 3])
    replayed = mos("replay", out / "one.png", "--verify", "--input", clear)
    assert replayed.stdout.strip() == "exact", replayed.stderr
    assert mos("edit", out / "one.png", PROMPT, "--keep-alpha", "-o", out / "two.png").exit_code == 0
    assert len(read_drawing(out / "two.png")[1].earlier) == 1


def test_keep_alpha_of_an_opaque_picture_is_nothing(mos, editor, out) -> None:
    Image.new("RGB", (32, 32), "orange").save(out / "0.png")
    for name, options in {"1.png": [], "2.png": ["--keep-alpha"]}.items():
        result = mos("edit", out / "0.png", PROMPT, *options, "-s", 1, "-o", out / name)
        assert (result.exit_code, "transparent" in result.stderr) == (0, False)
    assert contents(out)["1.png"] == contents(out)["2.png"]


# The home folder.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "out") if (tmp_path / "out").is_dir() else monkeypatch.chdir(tmp_path)
    return folder


def test_the_home_folder_is_meant_wherever_a_path_is_taken(mos, editor, out, home) -> None:
    Image.new("RGB", (32, 32), "orange").save(home / "0.png")
    Image.new("L", (32, 32), 255).save(home / "mask.png")
    (home / "prompts.txt").write_text("a red apple\n")
    for command in (
        ["generate", "@~/prompts.txt", "-o", "~/1.png", "--sheet", "~/sheet.png"],
        ["edit", "~/0.png", PROMPT, "-r", "~/0.png", "--mask", "~/mask.png", "-o", "~/2.png", "--strip", "~/strip.png"],
        ["replay", "~/2.png", "--input", "~/0.png", "--mask", "~/mask.png", "-o", "~/3.png"],
        ["generate", PROMPT, "--route-from", "~/1.json", "-o", "~/pictures/"],
        ["generate", PROMPT, "-o", "~/more"],
        ["inspect-routing", "~/1.png", "--html", "~/1.html", "--compare", "~/1.png"],
        ["routing", "diff", "~/1.png", "~/1.png"],
        ["routing", "ablate", "~/1.png", "-w", "apple", "-o", "~/ablated.png"],
    ):
        result = mos(*command)
        assert result.exit_code == 0, (command, result.stderr)
    written = {"1.png", "2.png", "3.png", "sheet.png", "strip.png", "1.html", "ablated.png", "pictures", "more"}
    assert written <= {path.name for path in home.iterdir()}
    assert list(out.iterdir()) == []


def test_the_home_folder_is_meant_in_settings(mos, bundle, out, home, monkeypatch) -> None:
    (home / "mos.toml").write_text('[generate]\noutput = "~/of-the-file/"\n')
    monkeypatch.setenv("MOS_CONFIG", "~/mos.toml")
    assert mos("generate", PROMPT).exit_code == 0
    monkeypatch.setenv("MOS_OUTPUT", "~/of-the-environment/{seed}.png")
    assert mos("generate", PROMPT).exit_code == 0
    assert {"of-the-file", "of-the-environment"} <= {path.name for path in home.iterdir()}
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("variable", ["MOS_CACHE", "MOS_DATA", "MOS_MODELS", "MOS_CONFIG", "MOS_OUTPUT"])
def test_the_home_of_nobody_is_no_traceback(mos, bundle, out, home, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "~nobody-at-all/x")
    assert mos("generate", PROMPT, "--dry-run").exit_code in (0, 3, 4)
    assert mos("models", "ls").exit_code in (0, 3)


# What is printed.


@pytest.mark.parametrize("name", ["out", "a/b", "{prompt}"])
def test_a_name_without_a_suffix_is_a_folder(mos, bundle, tmp_path, name) -> None:
    assert mos("generate", PROMPT, "-s", 1, "-o", tmp_path / "new" / name).exit_code == 0
    (picture,) = tmp_path.glob("new/**/*.png")
    assert picture == tmp_path / "new" / name.format(prompt="a-red-apple") / "0001_a-red-apple_s1.png"


def test_a_file_without_a_suffix_is_no_folder(mos, bundle, out) -> None:
    (out / "notes").write_bytes(MINE)
    result = mos("generate", PROMPT, "-o", out / "notes")
    assert result.exit_code == 2
    assert ".png" in result.stderr
    assert contents(out) == {"notes": MINE}


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_a_pipe_has_the_paths_of_pictures_and_nothing_else(mos, editor, out, clear, options) -> None:
    sheet = ["--sheet", out / "sheet.png", "--preview-steps", "-n", 2, "-s", 1]
    noted = mos("generate", PROMPT, "-o", out / "plain.png", "--metadata", "none", *options)
    assert noted.stdout == f"{out / 'plain.png'}\n"
    result = mos("edit", clear, PROMPT, "-o", f"{out}/{{seed}}.png", *sheet, *options)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(out / "1.png"), str(out / "2.png")]
    result = mos("replay", out / "1.png", "-i", clear, "-o", out / "again.png", *options)
    assert result.stdout == f"{out / 'again.png'}\n"


def test_events_of_pictures_have_their_prompt_and_their_index(mos, bundle, out) -> None:
    result = mos("generate", "-", "-n", 2, "-s", 5, "-o", f"{out}/", "--json", input="a dog\na cat\n")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    pictures = [event for event in events if event["event"] == "picture"]
    assert [(event["index"], event["prompt"], event["seed"]) for event in pictures] == [
        (1, "a dog", 5),
        (2, "a dog", 6),
        (3, "a cat", 5),
        (4, "a cat", 6),
    ]
    assert {event["index"] for event in events if event["event"] == "step"} == {1, 2, 3, 4}


def test_a_terminal_has_the_seed_and_the_files_beside(bundle, out) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "mos_cli", "generate", PROMPT, "-s", "7", "-o", str(out / "one.png")]
    read: list[bytes] = []

    def collect() -> None:
        try:
            while data := os.read(terminal, 1 << 16):
                read.append(data)
        except OSError:
            return  # How Linux says that the other end is closed.

    reader = Thread(target=collect)
    reader.start()
    done = subprocess.run(command, stdout=end, stderr=subprocess.PIPE, env=os.environ | {"NO_COLOR": "1"}, check=False)
    os.close(end)
    reader.join()
    assert done.returncode == 0, done.stderr
    lines = b"".join(read).decode().replace("\r", "").splitlines()
    beside = [str(path) for path in companions(out / "one.png")[:2]]
    assert lines == [f"{out / 'one.png'}  (seed 7)", *beside]
