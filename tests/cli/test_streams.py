"""Text meets streams: any locale, closed and full outputs, Ctrl-C at any moment, and nobody else's progress bars."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess

import pytest

MOS = [sys.executable, "-c", "from mos_cli.__main__ import main; main()"]
CHINESE = "\u4e00\u53ea\u72d7"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN_1 = {"PYTHONIOENCODING": "latin-1"}


def run(*arguments: object, environment: dict[str, str] | None = None, **options) -> CompletedProcess[bytes]:
    """The command in a process of its own; asserts that there is no traceback."""
    typed = [os.fsencode(str(argument)) for argument in arguments]
    options = {"stdout": PIPE, "stderr": PIPE} | options
    done = subprocess.run([*MOS, *typed], env=os.environ | (environment or {}), **options)
    assert b"Traceback" not in (done.stderr or b""), done.stderr.decode()
    return done


@pytest.mark.parametrize(
    ("environment", "name"),
    [(ASCII, "0001_picture_s1.png"), (LATIN_1, f"0001_{CHINESE}_s1.png")],
    ids=["locale", "streams"],
)
def test_a_prompt_that_the_encoding_does_not_have_is_drawn_and_printed(bundle, tmp_path, environment, name) -> None:
    """The name of the picture has only what the file system can write."""
    picture = tmp_path / "here" / name
    done = run("generate", CHINESE, "--seed", 1, "-o", f"{picture.parent}/", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert picture.is_file()
    assert [event["seed"] for event in events if event["event"] == "picture"] == [1]
    shown = run("inspect-routing", picture.with_suffix(".json"), "--json", environment=environment)
    assert CHINESE in str(json.loads(shown.stdout))
    assert run("inspect-routing", picture.with_suffix(".json"), environment=environment).returncode == 0


def test_a_name_that_the_file_system_cannot_write_is_refused(bundle, tmp_path) -> None:
    (tmp_path / "config.toml").write_text(f'[generate]\noutput = "{tmp_path}/{CHINESE}.png"\n', encoding="utf-8")
    done = run("generate", "a dog", environment=ASCII)
    assert done.returncode == 3
    assert b"set LC_ALL=C.UTF-8" in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith(b"fetching")]) == 1


def test_arguments_that_are_no_text_are_refused_in_one_line(bundle) -> None:
    for arguments in (["generate", b"caf\xe9"], ["generate", "a dog", "--negative", b"\xff"]):
        done = subprocess.run([*MOS, *arguments, "--dry-run"], capture_output=True)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert b"not UTF-8 text" in line


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(mos, bundle, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n", encoding="utf-8-sig")
    result = mos("generate", f"@{tmp_path / 'prompts.txt'}", "--dry-run", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["recipe"]["prompt"] == "a dog"


def test_a_pipe_that_is_closed_ends_quietly(bundle, tmp_path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        for arguments in (["--help"], ["generate", "a dog", "-n", 2, "-o", f"{tmp_path}/here/"], ["presets", "ls"]):
            done = run(*arguments, stdout=closed)
            assert done.returncode == 141, arguments
            assert [line for line in done.stderr.splitlines() if not line.startswith(b"fetching")] == []
    # What was drawn before is whole.
    assert len(list((tmp_path / "here").iterdir())) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["presets", "ls"], ["models", "ls", "--json"], ["--version"]])
def test_a_full_output_is_told_in_one_line(bundle, arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(*arguments, stdout=full)
        assert done.returncode == 3
        assert done.stderr.decode().splitlines() == ["error: standard output: No space left on device"]
        assert run("--nope", stderr=full).returncode == 2


def test_streams_may_be_closed(bundle) -> None:
    command = " ".join(f"'{part}'" for part in MOS)
    done = subprocess.run(f"{command} generate - --dry-run <&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.splitlines() == ["error: stdin is closed: give the prompt itself, or @FILE"]
    assert subprocess.run(f"{command} presets ls >&- 2>&-", shell=True).returncode == 0


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == place:
            os.kill(os.getpid(), signal.SIGINT)

place, sys.argv = sys.argv[1], ["mos", *sys.argv[2:]]
sys.meta_path.insert(0, Interrupt())
from mos_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "mos_cli.cli.replay", "pydantic", "torch"])
def test_an_interruption_of_an_import_ends_without_a_traceback(bundle, tmp_path, module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, "generate", "a dog", "-o", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (-signal.SIGINT, 130), done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("fetching")] in (
        [],
        ["error: interrupted"],
    )
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_libraries_print_nothing_where_a_training_begins(bundle, tmp_path: Path) -> None:
    """In a process of its own, as they print when they are first imported."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    typed = ["train", "finetune", "--from", "tiny", "--data", str(pictures), "--run", str(tmp_path / "run")]
    done = subprocess.run([*MOS, *typed], capture_output=True, text=True)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("training finetune in ")]
    assert (
        line == f"error: no pictures in {pictures} that can be used: put pictures with captions there, or *.tar shards"
    )


def test_a_background_process_goes_on_ignoring_interruptions() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); from mos_cli.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout[:4]) == (0, "mos ")


def test_quiet_prints_nothing_of_a_first_run(mos, bundle, tmp_path) -> None:
    from mos_cli.bundles.sources import tower_folder

    assert not tower_folder(bundle.index.understanding).exists()
    result = mos("generate", "a dog", "-q", "-o", tmp_path / "a.png")
    assert (result.exit_code, result.stderr) == (0, "")


def test_other_libraries_draw_no_bars() -> None:
    code = """
import sys
from mos_cli.cli.app import run
sys.argv = ["mos", "--version"]
try:
    run()
except SystemExit:
    import huggingface_hub.utils, tqdm
    for kind in (tqdm.tqdm, huggingface_hub.utils.tqdm):
        list(kind(range(3), desc="bar"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
