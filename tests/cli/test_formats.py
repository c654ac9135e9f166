"""Pictures as JPEG and WebP with their recipes inside, and `-` as standard input and output."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from mos_cli.config.recipe import pixels_hash
from mos_cli.images.companions import companions
from mos_cli.images.outputs import read_drawing, read_stored
from mos_cli.routing.trace import load_recording

PROMPT = "a red apple"
SUFFIXES = pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.radial_gradient("L").resize((48, 40)).convert("RGB").save(tmp_path / "photo.tiff")
    return tmp_path / "photo.tiff"


# JPEG and WebP.


@SUFFIXES
def test_a_picture_of_another_format_holds_its_recipe_and_replays(mos, bundle, out, suffix) -> None:
    assert mos("generate", PROMPT, "-s", 1, "-o", out / "a.png").exit_code == 0
    made = mos("generate", PROMPT, "-s", 1, "-o", out / f"a{suffix}", "--preview-steps")
    assert made.exit_code == 0, made.stderr
    (original, of_png), (image, record) = (read_drawing(out / name) for name in ("a.png", f"a{suffix}"))
    assert Image.open(out / f"a{suffix}").format == ("WEBP" if suffix == ".webp" else "JPEG")
    assert record.sha256 == of_png.sha256 == pixels_hash(original), "the pixels before they were encoded"
    assert (pixels_hash(image) == record.sha256) is (suffix == ".webp")
    assert record.model_dump(exclude={"stored"}) == of_png.model_dump(exclude={"stored"})
    assert mos("replay", out / f"a{suffix}", "--verify").stdout.strip() == "exact"
    assert mos("replay", out / f"a{suffix}", "-o", out / "again.png").exit_code == 0
    assert (out / "again.png").read_bytes() == (out / "a.png").read_bytes()
    assert mos("generate", PROMPT, "-s", 1, "-o", out / f"b{suffix}", "--trace", "off").exit_code == 0
    assert (out / f"a{suffix}").read_bytes() == (out / f"b{suffix}").read_bytes(), "always the same bytes"


@SUFFIXES
def test_what_stands_beside_it_is_its_own(mos, bundle, out, suffix) -> None:
    for name, seed in (("a.png", 1), (f"a{suffix}", 2)):
        assert mos("generate", PROMPT, "-s", seed, "-o", out / name, "--preview-steps").exit_code == 0
    parts = (".json", ".routing.safetensors", ".steps.webp")
    assert names(out) == {
        *(f"a{part}" for part in (".png", *parts)),
        *(f"a{suffix}{part}" for part in ("", *parts)),
    }
    for name, seed in (("a.png", 1), (f"a{suffix}", 2), ("a.json", 1), (f"a{suffix}.json", 2)):
        recording = load_recording(out / name)
        assert recording.trace.recipe.seed == seed
        assert recording.checked
        assert recording.picture == out / {"a.json": "a.png"}.get(name, name.removesuffix(".json"))
        shown = mos("inspect-routing", out / name, "--json")
        assert json.loads(shown.stdout)["picture"]["checked"], shown.stderr
    assert mos("inspect-routing", out / f"a{suffix}", "--html", out / "a.html").exit_code == 0
    kind = "webp" if suffix == ".webp" else "jpeg"
    assert f"data:image/{kind};base64" in (out / "a.html").read_text()
    assert mos("routing", "diff", out / "a.png", out / f"a{suffix}").exit_code == 0
    assert mos("generate", PROMPT, "-s", 3, "-o", out / f"a{suffix}", "--trace", "off", "--overwrite").exit_code == 0
    assert not {f"a{suffix}{part}" for part in parts} & names(out)
    assert load_recording(out / "a.png").trace.recipe.seed == 1


def test_a_png_named_like_a_jpeg_keeps_its_trace(mos, bundle, out) -> None:
    assert mos("generate", PROMPT, "-o", out / "a.jpg.png").exit_code == 0
    Image.new("RGB", (8, 8)).save(out / "a.jpg")
    assert load_recording(out / "a.jpg.json").picture == out / "a.jpg.png"
    refused = mos("generate", PROMPT, "-o", out / "a.jpg", "--overwrite")
    assert (refused.exit_code, "was not made with" in refused.stderr) == (3, True)


@pytest.mark.parametrize(
    ("first", "second"), [(".jpg", ".png"), (".jpg", ".jpg"), (".webp", ".jpg"), (".png", ".webp")]
)
def test_a_chain_goes_through_files_of_any_format(mos, editor, out, first, second) -> None:
    a, b, c = out / f"a{first}", out / f"b{second}", out / "c.png"
    assert mos("generate", PROMPT, "-s", 1, "-o", a).exit_code == 0
    assert mos("edit", a, "a green apple", "-s", 2, "-o", b).exit_code == 0
    assert mos("edit", b, "a dog", "-s", 3, "-o", c).exit_code == 0
    record = read_drawing(c)[1]
    assert [one.recipe.prompt for one in record.earlier] == [PROMPT, "a green apple"]
    for one, path in zip(record.earlier, (a, b), strict=True):
        assert one.sha256 == pixels_hash(read_stored(path)[0]), "the pixels of the file"
        path.unlink()
    verified = mos("replay", c, "--verify")
    assert verified.stdout.strip() == "exact", verified.stderr


def test_a_jpeg_that_another_program_changed_has_no_history_and_is_not_exact(mos, editor, out) -> None:
    assert mos("generate", PROMPT, "-s", 1, "-o", out / "a.jpg").exit_code == 0
    opened = Image.open(out / "a.jpg")
    changed = opened.convert("RGB")
    changed.paste("blue", (0, 0, 9, 9))
    changed.save(out / "b.jpg", exif=opened.getexif(), quality=95)
    verified = mos("replay", out / "b.jpg", "--verify")
    assert (verified.exit_code, verified.stdout.split()[0]) == (1, "different")
    assert mos("edit", out / "b.jpg", PROMPT, "-o", out / "c.png").exit_code == 0
    assert read_drawing(out / "c.png")[1].earlier == ()


@SUFFIXES
def test_metadata_holds_for_every_format(mos, editor, out, suffix) -> None:
    assert mos("generate", PROMPT, "-s", 1, "-o", out / "0.png").exit_code == 0
    for level in ("full", "recipe", "none"):
        path = out / f"{level}{suffix}"
        assert mos("edit", out / "0.png", "a green apple", "-o", path, "--metadata", level).exit_code == 0
        fields = Image.open(path).getexif().get_ifd(ExifTags.IFD.Exif)
        assert (ExifTags.Base.UserComment in fields) is (level == "full")
        assert (b"apple" in path.read_bytes()) is (level != "none")
        assert load_recording(path).checked, "the trace knows its picture without a record"
        replayed = mos("replay", path, "--verify")
        if level == "none":
            assert (replayed.exit_code, "carries no recipe" in replayed.stderr) == (3, True)
        else:
            assert len(read_drawing(path)[1].earlier) == (level == "full")
    comment = Image.open(out / f"full{suffix}").getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert "a green apple\n" in comment[8:].decode("utf-16-be")


def test_default_names_have_the_format_of_the_config_file(mos, bundle, out, monkeypatch) -> None:
    (out / "config.toml").write_text('[generate]\nformat = "webp"\n')
    monkeypatch.setenv("MOS_CONFIG", str(out / "config.toml"))
    monkeypatch.chdir(out)
    assert mos("generate", PROMPT, "-s", 1).stdout.endswith("0001_a-red-apple_s1.webp\n")
    assert mos("generate", PROMPT, "-s", 1, "-o", "folder").stdout == "folder/0001_a-red-apple_s1.webp\n"
    assert mos("generate", PROMPT, "-s", 1, "-o", "{seed}.jpg", "-n", 2).stdout == "1.jpg\n2.jpg\n"
    assert mos("generate", PROMPT, "-s", 1, "-o", "folder").stdout == "folder/0002_a-red-apple_s1.webp\n"
    (out / "config.toml").write_text('[generate]\nformat = "gif"\n')
    assert mos("generate", PROMPT).exit_code == 2


def test_what_a_format_cannot_hold_is_refused_before_drawing(mos, editor, out) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.paste("red", (0, 0, 16, 32))
    clear.save(out / "clear.png")
    Image.new("RGB", (17_000, 3)).save(out / "wide.png")
    Image.new("L", (32, 32), 255).save(out / "mask.png")
    before = names(out)
    for line, words in {
        ("clear.png", "--keep-alpha", "-o", "b.jpg"): "cannot be transparent",
        ("clear.png", "--mask", "mask.png", "-o", "b.jpg"): "cannot be transparent",
        ("wide.png", "-o", "b.webp"): "at most 16383 pixels",
    }.items():
        paths = [out / part if "." in part else part for part in line]
        refused = mos("edit", paths[0], PROMPT, *paths[1:], "--dry-run")
        assert (refused.exit_code, words in refused.stderr) == (2, True), refused.stderr
        assert mos("edit", paths[0], PROMPT, *paths[1:]).exit_code == 2
    assert names(out) == before
    assert mos("edit", out / "clear.png", PROMPT, "--keep-alpha", "-o", out / "b.webp", "-s", 1).exit_code == 0
    assert Image.open(out / "b.webp").mode == "RGBA"
    verified = mos("replay", out / "b.webp", "--verify", "-i", out / "clear.png")
    assert verified.stdout.strip() == "exact", verified.stderr


def test_a_history_that_is_too_long_for_a_jpeg_is_refused_before_drawing(mos, editor, out) -> None:
    assert mos("generate", PROMPT, "-s", 1, "-o", out / "a.png").exit_code == 0
    image, record = read_drawing(out / "a.png")
    from mos_cli.config.recipe import EarlierPicture
    from mos_cli.images.outputs import png

    earlier = tuple(EarlierPicture(sha256=f"{n:064x}", recipe=record.recipe, made=record.made) for n in range(200))
    (out / "long.png").write_bytes(png(image, record.model_copy(update={"earlier": earlier})))
    refused = mos("edit", out / "long.png", PROMPT, "-o", out / "b.jpg")
    assert (refused.exit_code, ".webp" in refused.stderr) == (2, True), refused.stderr
    for name, options in {"b.webp": [], "c.jpg": ["--metadata", "recipe"]}.items():
        assert mos("edit", out / "long.png", PROMPT, "-o", out / name, *options).exit_code == 0
    assert len(read_drawing(out / "b.webp")[1].earlier) == 201


def test_the_python_interface_writes_and_reads_them(editor, out) -> None:
    from mos_cli import load

    model = load("editor")
    drawn = model.generate(PROMPT, seed=1)
    drawn.save(out / "a.jpg")
    edited = model.edit(out / "a.jpg", "a green apple", seed=2)
    assert [one.stored for one in edited.record.earlier] == ["JPEG"]
    from mos_cli.errors import UsageError

    with pytest.raises(UsageError, match=r"\.jpeg or \.webp"):
        drawn.save(out / "a.gif")


# What is read, and its notes.


def test_pictures_and_masks_of_other_formats(mos, editor, photo, out) -> None:
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    mask.save(out / "mask.gif", save_all=True, append_images=[Image.new("L", (48, 40), 99)])
    result = mos("edit", photo, PROMPT, "--mask", out / "mask.gif", "-s", 1, "-o", out / "a.png")
    assert result.exit_code == 0, result.stderr
    assert f"{out / 'mask.gif'} is animated: only its first frame is read" in result.stderr
    kept = Image.open(out / "a.png").crop((24, 0, 48, 40))
    assert kept.tobytes() == Image.open(photo).crop((24, 0, 48, 40)).tobytes()
    given = ["--input", photo, "--mask", out / "mask.gif"]
    assert mos("replay", out / "a.png", "--verify", *given).stdout.strip() == "exact"


# Standard input and output.


def test_a_picture_or_a_mask_from_standard_input(mos, editor, photo, out) -> None:
    Image.new("L", (48, 40), 255).save(out / "mask.png")
    runs = {
        "picture": (["edit", "-", PROMPT, "--mask", out / "mask.png"], photo),
        "mask": (["edit", photo, PROMPT, "--mask", "-"], out / "mask.png"),
        "files": (["edit", photo, PROMPT, "--mask", out / "mask.png"], out / "mask.png"),
    }
    for name, (line, piped) in runs.items():
        made = mos(*line, "-s", 1, "-o", out / f"{name}_.png", input=piped.read_bytes())
        assert made.exit_code == 0, made.stderr
    assert len({(out / f"{name}_.png").read_bytes() for name in runs}) == 1
    data = (out / "files_.png").read_bytes()
    given = ["--input", photo, "--mask", out / "mask.png"]
    assert mos("replay", "-", "--verify", *given, input=data).stdout.strip() == "exact"
    mask = (out / "mask.png").read_bytes()
    assert mos("replay", out / "files_.png", "--verify", *given[:3], "-", input=mask).exit_code == 0


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["edit", "-", "-"], 2, "only one"),
        (["edit", "-", PROMPT, "--mask", "-"], 2, "only one"),
        (["edit", "-", PROMPT, "-r", "-"], 2, "only one"),
        (["replay", "-", "-i", "-"], 2, "only one"),
        (["edit", "-", PROMPT], 3, "standard input is not a PNG, JPEG"),
        (["replay", "-"], 3, "standard input is not a PNG, JPEG"),
        (["generate", PROMPT, "-o", "-", "-n", "2"], 2, "one picture"),
        (["generate", "-", "-o", "-"], 2, "one picture"),
        (["generate", PROMPT, "-o", "-", "--json"], 2, "--json"),
        (["generate", PROMPT, "-o", "-", "--preview-steps"], 2, "--preview-steps"),
        (["generate", PROMPT, "-o", "-", "--trace", "full"], 2, "--trace off"),
    ],
)
def test_mistakes_with_standard_streams(mos, editor, out, monkeypatch, line, code, words) -> None:
    monkeypatch.chdir(out)
    result = mos(*line, input="a cat\na dog\n")
    assert result.exit_code == code, result.output
    (error,) = [line for line in result.stderr.splitlines() if not line.startswith("fetching")]
    assert words in error
    assert result.stdout == ""
    assert names(out) == set()


@pytest.mark.parametrize("quiet", [[], ["-q"], ["-v"]])
def test_a_picture_to_standard_output(cache, bundle, out, monkeypatch, quiet) -> None:
    from mos_cli.cli.app import app

    monkeypatch.chdir(out)
    result = CliRunner().invoke(app, ["generate", PROMPT, "-s", "1", "-o", "-", *quiet])
    assert result.exit_code == 0, result.stderr
    image = Image.open(io.BytesIO(result.stdout_bytes))
    assert (image.format, image.size) == ("PNG", (32, 32))
    assert result.stdout_bytes.endswith(b"IEND\xaeB`\x82"), "nothing comes after it"
    assert names(out) == set()
    result = CliRunner().invoke(app, ["generate", PROMPT, "-s", "1", "-o", "a.png"])
    assert (out / "a.png").read_bytes() == CliRunner().invoke(app, ["replay", "a.png", "-o", "-"]).stdout_bytes


@pytest.mark.slow
def test_a_pipe_of_commands(mos, bundle, editor, out) -> None:
    made = mos("generate", PROMPT, "-s", "1", "-o", "-").stdout_bytes
    command = [sys.executable, "-m", "mos_cli"]
    edited = subprocess.run(
        [*command, "edit", "-", "a green apple", "-o", "-"], input=made, capture_output=True, check=True, cwd=out
    )
    (out / "b.png").write_bytes(edited.stdout)
    assert len(read_drawing(out / "b.png")[1].earlier) == 1
    typed = [*command, "generate", PROMPT, "-o", "-"]
    closed = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert closed.stdout is not None
    closed.stdout.close()
    assert closed.wait() == 141


def test_a_terminal_is_no_place_for_bytes(bundle, out) -> None:
    import pty

    _, slave = pty.openpty()
    command = [sys.executable, "-m", "mos_cli", "generate", PROMPT, "-o", "-"]
    result = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, text=True, cwd=out)
    assert (result.returncode, "> a.png" in result.stderr) == (2, True), result.stderr


def test_companions_of_names_in_capitals(tmp_path: Path) -> None:
    assert companions(tmp_path / "A.PNG").head == tmp_path / "A.json"
    assert companions(tmp_path / "A.JPG").head == tmp_path / "A.JPG.json"
    assert companions(tmp_path / "a.b.webp").arrays == tmp_path / "a.b.webp.routing.safetensors"
