"""`mos generate` with random weights: files, names, traces and events; for mistakes see test_mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mos_cli.bundles.bundle import write_index
from mos_cli.images.outputs import read_drawing
from mos_cli.routing.trace import load_routes, load_trace

PROMPT = "a red apple"


def test_a_picture_its_recipe_and_its_trace(mos, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = mos("generate", PROMPT, "--seed", 42)
    assert result.exit_code == 0, result.output
    (picture,) = tmp_path.glob("outputs/*/*.png")
    assert picture.name == "0001_a-red-apple_s42.png"
    assert {p.name for p in picture.parent.iterdir()} == {
        "0001_a-red-apple_s42.png",
        "0001_a-red-apple_s42.json",
        "0001_a-red-apple_s42.routing.safetensors",
    }
    assert result.stdout == f"{picture.relative_to(tmp_path)}\n"
    image, record = read_drawing(picture)
    assert image.size == (32, 32)
    assert (record.recipe.prompt, record.recipe.seed, record.recipe.steps) == (PROMPT, 42, 3)
    assert record.made.bundle_hash == bundle.hash
    parameters = Image.open(picture).info["parameters"]
    assert parameters.startswith(
        "a red apple\nSteps: 3, Sampler: Adams-Bashforth 2, CFG scale: 2.0, Seed: 42, Size: 32x32"
    )
    trace = load_trace(picture)
    assert [t.text for t in trace.branches["positive"].tokens] == ["[CLS]", "a", "red", "apple", "[SEP]"]
    assert [t.text for t in trace.branches["negative"].tokens] == ["[CLS]", "[SEP]"]
    routes = load_routes(trace, picture.with_suffix(".json"))
    assert routes["positive"].ids_SJTK.shape == (3, 3, 5, 2)
    assert trace.times == pytest.approx((1, 2 / 3, 1 / 3))


def test_a_picture_of_a_batch_equals_the_one_drawn_alone(mos, bundle, tmp_path) -> None:
    assert mos("generate", PROMPT, "-n", 4, "--seed", 7, "-o", tmp_path / "batch_{seed}.png").exit_code == 0
    assert mos("generate", PROMPT, "--seed", 9, "-o", tmp_path / "alone.png").exit_code == 0
    for suffix in (".png", ".json"):
        batch, alone = tmp_path / f"batch_9{suffix}", tmp_path / f"alone{suffix}"
        assert batch.read_bytes().replace(b"batch_9", b"alone") == alone.read_bytes()
    assert (tmp_path / "batch_8.png").read_bytes() != (tmp_path / "batch_9.png").read_bytes()


def test_a_solver_that_is_not_there_is_refused(mos, bundle, tmp_path) -> None:
    result = mos("generate", PROMPT, "--solver", "heun", "-o", tmp_path / "one.png")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--solver" in line
    assert "'euler' or 'ab2'" in line


def test_a_dry_run_writes_nothing(mos, bundle, tmp_path) -> None:
    result = mos("generate", PROMPT, "--dry-run", "-o", tmp_path / "out.png")
    assert result.exit_code == 0
    assert "out.png" in result.stdout
    assert not (tmp_path / "out.png").exists()
    assert "libraries" in mos("generate", PROMPT, "--dry-run", "-v").stderr


@pytest.mark.parametrize(("level", "suffixes"), [("off", []), ("summary", [".json"])])
def test_trace_levels(mos, bundle, tmp_path, level: str, suffixes: list[str]) -> None:
    assert mos("generate", PROMPT, "--trace", level, "-o", tmp_path / "one.png").exit_code == 0
    assert sorted(p.suffix for p in tmp_path.glob("one.*")) == sorted([".png", *suffixes])


def test_prompts_from_a_file_and_from_stdin(mos, bundle, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("# animals\na dog\n\n  # a bird\n  a cat \n")
    assert mos("generate", f"@{tmp_path / 'prompts.txt'}", "-o", f"{tmp_path}/out/", "-s", 1).exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "0001_a-dog_s1.png",
        "0002_a-cat_s1.png",
    ]
    assert mos("generate", "-", "-o", f"{tmp_path}/out/", "-s", 1, input="an apple\n").exit_code == 0
    assert (tmp_path / "out" / "0003_an-apple_s1.png").exists()


def test_one_bad_prompt_of_several_does_not_stop_the_others(mos, bundle, tmp_path) -> None:
    result = mos("generate", "-", "-o", tmp_path / "{number}.png", input=f"a dog\n{'apple ' * 40}\na cat\n")
    assert result.exit_code == 7
    assert "the model reads 24: shorten it" in result.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_json_events(mos, bundle, tmp_path) -> None:
    result = mos("generate", PROMPT, "-s", 1, "-o", tmp_path / "one.png", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["step", "step", "step", "picture"]
    assert events[-1]["seed"] == 1
    assert all(Path(file).exists() for file in events[-1]["files"])


def test_a_sheet_shows_every_picture(mos, bundle, tmp_path) -> None:
    result = mos("generate", PROMPT, "-n", 3, "-s", 1, "-o", f"{tmp_path}/out/", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(path) for path in sorted(tmp_path.glob("out/*.png"))]
    assert str(tmp_path / "sheet.png") in result.stderr
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    drawn = [
        Image.open(path).resize((128, 128), Image.Resampling.BICUBIC) for path in sorted(tmp_path.glob("out/*.png"))
    ]
    for column, picture in enumerate(drawn):
        x = 8 + column * 136
        assert np.array_equal(sheet[8:136, x : x + 128], np.asarray(picture))


def test_overwrite_replaces_and_nothing_else_does(mos, bundle, tmp_path) -> None:
    path = tmp_path / "one.png"
    mos("generate", PROMPT, "-s", 1, "-o", path)
    first = path.read_bytes()
    assert mos("generate", PROMPT, "-s", 2, "-o", path).exit_code == 3
    assert path.read_bytes() == first
    assert mos("generate", PROMPT, "-s", 2, "-o", path, "--overwrite").exit_code == 0
    assert path.read_bytes() != first


def test_a_replaced_picture_takes_its_trace_along(mos, bundle, tmp_path) -> None:
    path = tmp_path / "one.png"
    mos("generate", PROMPT, "-s", 1, "-o", path)
    assert mos("generate", PROMPT, "-s", 2, "-o", path, "--overwrite", "--trace", "summary").exit_code == 0
    assert load_trace(path).recipe.seed == 2
    assert not path.with_suffix(".routing.safetensors").exists()
    assert mos("generate", PROMPT, "-s", 3, "-o", path, "--overwrite", "--trace", "off").exit_code == 0
    assert [p.name for p in tmp_path.glob("one.*")] == ["one.png"]


def test_a_bundle_given_by_its_folder_is_found_again(mos, bundle, tmp_path, monkeypatch) -> None:
    assert mos("generate", PROMPT, "-m", bundle.folder, "-o", tmp_path / "one.png").exit_code == 0
    # A path would speak of this machine alone.
    assert read_drawing(tmp_path / "one.png")[1].recipe.model == "tiny"
    monkeypatch.delenv("MOS_MODELS")
    assert mos("replay", tmp_path / "one.png", "-o", tmp_path / "2.png").exit_code == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_a_latent_bundle_draws_at_the_autoencoders_scale(mos, bundle, tmp_path) -> None:
    from diffusers import AutoencoderTiny

    widths = (16, 16, 16)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=3,
    ).save_pretrained(bundle.folder / "autoencoder")
    index = bundle.index
    shared = {name: getattr(index, name) for name in ("name", "description", "license", "understanding", "defaults")}
    canvas = index.canvas.model_copy(update={"native": (64, 32), "multiple": 32, "min": 32, "max": 96})
    write_index(bundle.folder, canvas=canvas, **shared)
    result = mos("generate", PROMPT, "-o", tmp_path / "one.png")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "one.png").size == (64, 32)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(bundle, tmp_path) -> None:
    command = [sys.executable, "-c", "from mos_cli.__main__ import main; main()", "generate", PROMPT]
    options = ["-n", "500", "-s", "1", "-o", str(tmp_path / "{seed}.png")]
    process = subprocess.Popen([*command, *options], env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "2.png").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    pictures = list(tmp_path.glob("*.png"))
    assert 2 <= len(pictures) < 500
    assert f"interrupted: {len(pictures)} of 500 pictures written" in errors.decode()
    assert all(read_drawing(picture)[0].size == (32, 32) for picture in pictures)
    assert {p.stem for p in tmp_path.glob("*.json")} >= {p.stem for p in pictures}


def test_what_a_picture_says_of_itself(mos, editor, tmp_path) -> None:
    def chunks(name: str) -> dict:
        with Image.open(tmp_path / name) as opened:
            return opened.info

    assert mos("generate", PROMPT, "-o", tmp_path / "full.png").exit_code == 0
    assert {"mos", "parameters"} <= chunks("full.png").keys()
    edited = ("edit", tmp_path / "full.png", "a green apple", "--metadata", "recipe", "-o", tmp_path / "recipe.png")
    assert mos(*edited).exit_code == 0
    assert chunks("recipe.png").keys() == {"mos"}
    assert PROMPT not in chunks("recipe.png")["mos"]
    verified = mos("replay", tmp_path / "recipe.png", "--verify", "--input", tmp_path / "full.png")
    assert verified.stdout == "exact\n"
    result = mos("generate", PROMPT, "--metadata", "none", "--trace", "off", "-o", tmp_path / "none.png")
    assert result.stderr.splitlines()[0] == "without metadata, mos replay cannot draw the picture again"
    assert chunks("none.png") == {}
    assert PROMPT.encode() not in (tmp_path / "none.png").read_bytes()
    assert mos("replay", tmp_path / "none.png").exit_code == 3
    with_trace = mos("generate", PROMPT, "--metadata", "none", "-o", tmp_path / "other.png")
    assert "the trace beside it still holds the prompt" in with_trace.stderr
