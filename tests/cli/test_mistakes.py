"""What happens to mistakes: one line, the right exit code, nothing left behind."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from mos_cli.bundles.bundle import write_index
from tests.helpers.printed import errors

PROMPT = "a red apple"


MISTAKES = {
    "empty prompt": (["generate", "  "], 3, "the prompt is empty"),
    "unknown model": (["generate", PROMPT, "-m", "emoji-nono"], 4, "emoji"),
    "blueprint": (["generate", PROMPT, "-m", "mos-l"], 4, "mos models init mos-l"),
    "blueprint to be shown": (["models", "show", "mos-l"], 4, "is a blueprint"),
    "no feature cache at all": (["generate", PROMPT, "--feature-cache", "0"], 2, "--feature-cache"),
    "absurd size": (["generate", PROMPT, "--size", "100000"], 2, "multiples of 8 from 16 to 64"),
    "size of another shape": (["generate", PROMPT, "--size", "big"], 2, "write 256, 384x256 or 3:2"),
    "no steps": (["generate", PROMPT, "--steps", "0"], 2, "steps"),
    "interval upside down": (["generate", PROMPT, "--cfg-interval", "0.9,0.1"], 2, "the smaller first"),
    "negative seed": (["generate", PROMPT, "--seed", "-1"], 2, "seed"),
    "seed too large": (["generate", PROMPT, "--seed", "1" + 19 * "0"], 2, "--seed: Input should be less"),
    "too many steps": (["generate", PROMPT, "--steps", "2000"], 2, "--steps: Input should be less"),
    "seed with a point": (["generate", PROMPT, "-s", "1.5"], 2, "Invalid value for '--seed' / '-s': "),
    "output without a name": (["generate", PROMPT, "-o", ""], 2, "the output's name is empty"),
    "folder that only looks writable": (["generate", PROMPT, "-o", "/proc/x/y.png"], 3, "cannot write to /proc/x"),
    "options after the last prompt": (["generate", "--", PROMPT, "--steps", "3"], 2, "write the options before --"),
    "replay of a trace": (["replay", "{tmp}/drawn.json"], 3, "name the one that it stands beside"),
    "inspection of a stranger": (["inspect-routing", "{tmp}/taken.png"], 3, "taken.png has no trace beside it"),
    "unknown preset": (["generate", PROMPT, "-p", "fst"], 2, "no preset 'fst', did you mean fast? (there are: auto,"),
    "unknown trace level": (["generate", PROMPT, "--trace", "all"], 2, "trace"),
    "negative without guidance": (["generate", PROMPT, "--negative", "x", "--cfg", "1"], 2, "no effect"),
    "interval without guidance": (["generate", PROMPT, "--cfg-interval", "0.2,0.8", "--cfg", "1"], 2, "no effect"),
    "times among events": (["generate", PROMPT, "-v", "--json"], 2, "--verbose"),
    "events that are not to be heard": (["generate", PROMPT, "-q", "--json"], 2, "--quiet"),
    "times that are not to be heard": (["generate", PROMPT, "-q", "-v"], 2, "choose one"),
    "replay with times among events": (["replay", "{tmp}/taken.png", "-v", "--json"], 2, "--verbose"),
    "name taken": (["generate", PROMPT, "-o", "{tmp}/taken.png"], 3, "--overwrite"),
    "one name for two": (["generate", PROMPT, "-n", "2", "-o", "{tmp}/a.png"], 2, "{seed}"),
    "unknown field": (["generate", PROMPT, "-o", "{sead}.png"], 2, "{sead}"),
    "field with a layout": (["generate", PROMPT, "-o", "{number:04d}.png"], 2, "as they are"),
    "sheet of another format": (["generate", PROMPT, "-o", "a.png", "--sheet", "a.jpg"], 2, "--sheet"),
    "sheet that is a picture": (["generate", PROMPT, "-o", "a.png", "--sheet", "a.png"], 2, "--sheet"),
    "sheet that is there": (["generate", PROMPT, "-o", "a.png", "--sheet", "{tmp}/taken.png"], 3, "--overwrite"),
    "name too long": (["generate", PROMPT, "-o", "a" * 300 + ".png"], 3, "too long"),
    "model name too long": (["generate", PROMPT, "-m", "a" * 300], 3, "too long"),
    "home of nobody": (["generate", PROMPT, "-m", "~nobody-at-all/x"], 4, "~nobody-at-all"),
    "run in the home of nobody": (
        ["train", "train-smoke", "--run", "~nobody-at-all/x", "--tracker", "nothing"],
        2,
        "accelerate has no tracker nothing",
    ),
    "another format": (["generate", PROMPT, "-o", "a.tiff"], 2, ".png, .jpg, .jpeg or .webp"),
    "folder that is a file": (["generate", PROMPT, "-o", "{tmp}/file/a.png"], 3, "cannot"),
    "routes from no file": (["generate", PROMPT, "--route-from", ""], 3, "is a folder"),
    "routes from a folder": (["generate", PROMPT, "--route-from", "."], 3, "is a folder"),
    "no prompts file": (["generate", "@nowhere.txt"], 3, "nowhere.txt"),
    "too long": (["generate", "apple " * 40], 3, "shorten it"),
    "no GPU": (["generate", PROMPT, "--device", "cuda:7"], 6, "--device cpu"),
    "unknown device": (["generate", PROMPT, "--device", "abacus"], 2, "abacus"),
    "replay of nothing": (["replay", "nowhere.png"], 3, "nowhere.png"),
    "replay of text": (["replay", "{tmp}/text.png"], 3, "not a PNG, JPEG"),
    "replay of a stranger": (["replay", "{tmp}/taken.png"], 3, "no recipe"),
    "not one of the choices": (["eval", "--suite", "paint"], 2, "'paint' is not one of 'scenes', 'edit': see mos eval"),
    # Versions of typer word these differently.
    "no number": (["generate", PROMPT, "--steps", "few"], 2, "Invalid value for '--steps': 'few' is no"),
    "no number to vary": (["generate", PROMPT, "--vary", "steps=4,x"], 2, "--vary steps: 'x' is no whole number"),
    "no batch size": (["generate", PROMPT, "--batch-size", "few"], 2, "--batch-size: 'few' is no whole number"),
    "three runs": (["routing", "diff", "a", "b", "c"], 2, "diff takes one A and one B: see mos routing diff"),
    "a share in percent": (["edit", "{tmp}/taken.png", PROMPT, "--strength", "50%"], 2, "'50%' is no"),
    "no solver": (["generate", PROMPT, "--solver", "heun"], 2, "--solver: 'heun' is not 'euler' or 'ab2'"),
    "the count of others": (["generate", PROMPT, "--num-images", "4"], 2, ": write -n or --count: see mos generate"),
    "the width of others": (["edit", "a.png", PROMPT, "--width=64"], 2, ": write --size 256x256: see mos edit"),
    "the width of nothing": (["show", "a.png", "--width=64"], 2, ": see mos show --help"),
    "change without --set": (["replay", "a.png", "--seed", "9"], 2, ": write --set seed=9: see mos replay"),
    "change of an edit": (["replay", "a.png", "--image-cfg=2"], 2, ": write --set image_cfg=2: see mos replay"),
    "two pictures": (["replay", "a.png", "b.png"], 2, "(b.png): mos replay takes one PICTURE: see mos replay --help"),
    "arguments of a command without": (["doctor", "me"], 2, "mos doctor takes no arguments: see mos doctor --help"),
    "no instruction": (["edit", "-s", "1", "cat.png"], 2, 'say what to change, for example: mos edit cat.png "make'),
    "no instruction for a folder": (["edit", "{tmp}"], 2, "say what to change, for example: mos edit"),
    "no picture for a long instruction": (["edit", "make it blue " * 30], 2, "Missing argument 'PICTURE...' of mos"),
    "no picture": (["edit", "make it blue"], 2, "Missing argument 'PICTURE...' of mos edit PICTURE... INSTRUCTION"),
    "word file that is nearly there": (["generate", "an __animal__"], 2, ", did you mean animals? (there are: animals"),
    "no prompt": (["generate"], 2, "of mos generate PROMPT: see mos generate --help"),
    "no such option": (["generate", PROMPT, "--nope"], 2, "--nope"),
    "no such command": (["paint"], 2, "see mos --help"),
    "no value": (["generate", PROMPT, "--steps"], 2, "requires an argument"),
    "words without quotes": (["generate", "a", "red", "apple"], 2, "in quotes"),
    "prompt with a dash": (["generate", "-5 cats"], 2, "write -- before a text that begins with a dash"),
    "prompt taken for an option with a value": (["generate", "-old cats"], 2, "write -- before a text"),
    "one time": (["generate", PROMPT, "--cfg-interval", "0.2"], 2, "0.2 is not two times"),
    "replay of an unknown key": (
        ["replay", "{tmp}/drawn.png", "--set", "sped=3"],
        2,
        "did you mean seed? (there are: prompt, negative,",
    ),
    "preset file that is not there": (["generate", PROMPT, "-p", "nowhere.toml"], 3, "nowhere.toml is not there"),
    "xformers without a GPU": (["generate", PROMPT, "--attention", "xformers", "--device", "cpu"], 6, "auto or sdpa"),
    "dry run that would fail": (
        ["generate", PROMPT, "--attention", "xformers", "--device", "cpu", "--dry-run"],
        6,
        "auto or sdpa",
    ),
    "inspection of nothing": (["inspect-routing", "nowhere.json"], 3, "nowhere.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(mos, bundle, tmp_path, monkeypatch, mistake: str) -> None:
    arguments, code, words = MISTAKES[mistake]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    Image.new("RGB", (8, 8)).save(tmp_path / "taken.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if f"{tmp_path}/drawn.png" in arguments:
        assert mos("generate", PROMPT, "-o", tmp_path / "drawn.png").exit_code == 0
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    result = mos(*arguments)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert len(errors(result)) == 1
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


EARLY = """
import sys
from typer.testing import CliRunner
from mos_cli.cli.app import app

for line in sys.argv[1:]:
    result = CliRunner().invoke(app, ["models", *line.split()])
    print(result.exit_code, "torch" in sys.modules, result.stderr.strip())
"""


def test_what_cannot_be_written_is_told_before_heavy_libraries_are_loaded(bundle, tmp_path) -> None:
    weights = bundle.folder / "generation" / "diffusion_pytorch_model.safetensors"
    header = json.dumps({"__metadata__": {"mos_quantisation": '{"method": "nf4", "kept": []}'}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "there").mkdir()
    lines = {
        f"quantize emoji --quant nf4 --out {tmp_path}/there": (3, "exists"),
        f"quantize tiny --quant nf4 --out {tmp_path}/less": (4, "quantised already (nf4)"),
        f"init mos-s --out {tmp_path}/there": (3, "exists"),
        f"init mos-s --out {tmp_path}/new --tower {tmp_path}/nowhere": (4, "nowhere"),
        f"init mos-s --out {tmp_path}/new --shard-size some": (2, "500MB"),
    }
    done = subprocess.run([sys.executable, "-c", EARLY, *lines], capture_output=True, text=True, check=True)
    for said, (code, words) in zip(done.stdout.splitlines(), lines.values(), strict=True):
        assert said.startswith(f"{code} False "), said
        assert words in said


def test_a_changed_weight_is_noticed(mos, bundle, tmp_path) -> None:
    weights = bundle.folder / "generation" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = mos("generate", PROMPT, "-o", tmp_path / "one.png")
    assert result.exit_code == 4
    assert "diffusion_pytorch_model.safetensors" in result.stderr
    assert not (tmp_path / "one.png").exists()


def test_a_bundle_whose_parts_do_not_fit_is_refused(mos, bundle, tmp_path) -> None:
    index = bundle.index
    shared = {name: getattr(index, name) for name in ("name", "description", "license", "understanding", "defaults")}
    config = bundle.folder / "generation" / "config.json"
    good = config.read_text()
    for bad in (
        good.replace('"states_layers": 4', '"states_layers": 5'),
        good.replace('"depth": 3', '"depth": 2'),
        "{",
    ):
        config.write_text(bad)
        write_index(bundle.folder, canvas=index.canvas, **shared)
        result = mos("generate", PROMPT, "-o", tmp_path / "one.png")
        assert result.exit_code == 4, result.stderr
        assert len(errors(result)) == 1


CLOSED_FOLDER = """
import os, tempfile
from pathlib import Path
from mos_cli.errors import InputError
from mos_cli.utils.files import write_all
from mos_cli.images.naming import naming
from mos_cli.config.recipe import Recipe

os.getuid() or os.seteuid(65534)  # for the administrator no folder is closed
recipe = Recipe.model_construct(prompt="a", seed=1, model="m")
with tempfile.TemporaryDirectory() as folder:
    closed = Path(folder, "closed")
    closed.mkdir(mode=0o500)
    for attempt in (lambda: naming(f"{closed}/new/").path(recipe), lambda: write_all({closed / "a.png": b"x"})):
        try:
            attempt()
        except InputError as error:
            print(str(error).partition(str(closed))[0])
    assert list(closed.iterdir()) == []
"""


def test_a_folder_that_may_not_be_written() -> None:
    result = subprocess.run([sys.executable, "-c", CLOSED_FOLDER], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["cannot write to ", "cannot write "]


def test_a_prompt_that_is_too_long_is_not_repeated_in_full(mos, bundle, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n" + "apple " * 400 + "\n")
    result = mos("generate", f"@{tmp_path / 'prompts.txt'}", "-o", f"{tmp_path}/here/")
    assert result.exit_code == 7
    assert "shorten it" in result.stderr
    assert max(map(len, errors(result))) < 200


def test_a_word_that_is_not_there_is_named_as_it_was_typed(mos, bundle, tmp_path) -> None:
    assert mos("generate", PROMPT, "-o", tmp_path / "a.png").exit_code == 0
    result = mos("routing", "ablate", tmp_path / "a.png", "--word", "zebra")
    assert result.exit_code == 2
    (line,) = errors(result)
    assert line.startswith("error: --word zebra finds nothing in this prompt: its words are a, red, apple")


def test_commands_for_the_terminal_in_a_name_are_shown_not_sent(mos, bundle) -> None:
    result = mos("generate", PROMPT, "-m", "emoji\x1b[2J")
    assert "\x1b" not in result.stderr
    assert r"\x1b" in result.stderr
