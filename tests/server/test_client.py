"""`mos generate --server`: the same files as without, from a server that runs."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mos_cli.server.state import read_state, remove_state, state_file, write_state
from mos_cli.utils.threads import cpu_threads
from tests.helpers.running_server import Gate, RunningServer, running_server, until


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def both(mos, server: RunningServer, tmp_path: Path, monkeypatch):
    """Runs a command without and with the server, in folders of the same files; returns both results and folders."""

    def run(*line: object, prepare=lambda: None):
        found = []
        for name, where in {"here": "off", "there": "auto"}.items():
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            prepare()
            found.append(mos(*line, "--server", where))
        assert len(server.queue.jobs) > 0 or found[1].exit_code
        return found, [contents(tmp_path / name) for name in ("here", "there")]

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["-n", 2, "-o", "{seed}.png", "--trace", "full", "--preview-steps", "--regions"],
        ["-o", "a.webp", "--route", "dog=1", "--sheet", "sheet.png", "--cfg", 1],
        ["-o", "a.jpg", "--metadata", "none", "--trace", "summary", "--size", "24x16"],
        ["-n", 2, "-o", "{number}.png", "--manifest", "run.jsonl", "--trace", "off", "--json"],
    ],
)
def test_files_and_output_are_the_same(both, options: list) -> None:
    results, (here, there) = both("generate", "a red dog", "-s", 7, "--steps", 2, *options)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    if "run.jsonl" in here:
        here["run.jsonl"], there["run.jsonl"] = (
            b"".join(json.dumps(json.loads(line) | {"seconds": 0}).encode() for line in file.splitlines())
            for file in (here["run.jsonl"], there["run.jsonl"])
        )
    assert here == there
    assert results[0].stdout == results[1].stdout


def test_edits_are_the_same(both) -> None:
    def prepare() -> None:
        photo = Image.new("RGBA", (40, 32), "teal")
        photo.paste((0, 0, 0, 0), (0, 0, 8, 8))
        photo.save("photo.png")
        mask = Image.new("L", (40, 32))
        mask.paste(255, (8, 8, 30, 30))
        mask.save("mask.png")

    line = ("edit", "photo.png", "a red dog", "-r", "mask.png", "-s", 7, "--steps", 2)
    results, (here, there) = both(*line, "--mask", "mask.png", "--feather", 3, "-o", "a.png", prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here == there


def test_routes_of_another_run_and_chains(both, mos) -> None:
    def prepare() -> None:
        assert mos("generate", "a red dog", "-s", 1, "--steps", 2, "-o", "first.png").exit_code == 0

    line = ("edit", "first.png", "a green cat", "-s", 7, "--steps", 2, "-o", "a.png")
    results, (here, there) = both(*line, prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here == there


def test_routes_of_another_run(both, mos) -> None:
    def prepare() -> None:
        assert mos("generate", "a red dog", "-s", 1, "--steps", 2, "-o", "first.png").exit_code == 0

    results, (here, there) = both(
        *("generate", "a red cat", "-s", 7, "--steps", 2, "--route-from", "first.png", "-o", "a.png"), prepare=prepare
    )
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here == there


def test_pictures_that_are_expanded_are_the_same(both, mos) -> None:
    def prepare() -> None:
        Image.new("RGB", (32, 24), "teal").save("photo.png")

    line = ("edit", "photo.png", "a red dog", "-s", 7, "--steps", 2, "--expand", "left=8,top=8", "-o", "a.png")
    results, (here, there) = both(*line, prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here == there
    results, (here, there) = both("replay", "a.png", "-i", "photo.png", "-o", "again.png")
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here["again.png"] == here["a.png"] == there["again.png"]


REPLAYED = {
    "a picture": [],
    "another format": ["-o", "b.webp", "--trace", "full"],
    "a variation": ["--set", "seed=8", "--set", "prompt=a (green:1.5) cat"],
    "previews": ["--preview-steps", "--regions"],
    "verified": ["--verify"],
}


@pytest.mark.parametrize("options", REPLAYED.values(), ids=REPLAYED)
def test_replays_are_the_same(both, mos, options: list) -> None:
    def prepare() -> None:
        # Some other number of threads than the server has.
        with cpu_threads(2):
            assert mos("generate", "a red dog", "-s", 1, "--steps", 2, "-o", "first.png").exit_code == 0

    results, (here, there) = both("replay", "first.png", *options, prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert (results[0].stdout, here) == (results[1].stdout, there)


def test_the_numbers_of_threads_are_those_of_the_picture(both, mos) -> None:
    def prepare() -> None:
        assert mos("generate", "a red dog", "-s", 1, "--steps", 3, "-o", "first.png").exit_code == 0
        with Image.open("first.png") as image:
            record, info = json.loads(image.info["mos"]), PngInfo()
            record["made"] |= {"threads": 2, "thread_changes": [[1, 1], [2, 2]]}
            info.add_itxt("mos", json.dumps(record))
            image.save("forged.png", pnginfo=info)

    results, (here, there) = both("replay", "forged.png", "-o", "again.png", prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here["again.png"] == there["again.png"]
    made = json.loads(here["again.json"])["made"]
    assert (made["threads"], made["thread_changes"]) == (2, [[1, 1], [2, 2]])


def test_replays_of_what_else_a_picture_was_made_from(both, mos, tmp_path: Path) -> None:
    """A chain of an edit of a foreign picture, and a picture of a batch whose routes are those of another run."""

    def prepare() -> None:
        Image.new("RGB", (32, 24), "teal").save("photo.png")
        assert mos("edit", "photo.png", "a dog", "-s", 1, "--steps", 2, "-o", "first.png").exit_code == 0
        assert mos("edit", "first.png", "a cat", "-s", 1, "--steps", 2, "-o", "second.jpg").exit_code == 0
        Path("first.png").unlink()
        line = ("--batch-size", 2, "-n", 2, "-s", 1, "--steps", 2, "--route-from", "first.json", "-o", "b{seed}.png")
        assert mos("generate", "a dog", *line).exit_code == 0

    results, (here, there) = both("replay", "second.jpg", "-i", "photo.png", "-o", "again.jpg", prepare=prepare)
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here == there
    assert here["again.jpg"] == here["second.jpg"]
    results, (here, there) = both("replay", "b2.png", "--route-from", "first.json", "-o", "again.png")
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert here["again.png"] == here["b2.png"] == there["again.png"]


def other_precision(picture: Path | str) -> str:
    """The precision that a picture was not drawn in, which is that of this CPU."""
    from mos_cli.images.outputs import read_drawing

    return "fp32" if read_drawing(Path(picture))[1].recipe.precision == "bf16" else "bf16"


def test_a_replay_that_a_server_cannot_repeat_is_drawn_without_it(mos, server: RunningServer, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    assert mos("generate", "a dog", "--steps", 1, "-o", "default.png").exit_code == 0
    for options, told in {
        ("--precision", other_precision("default.png")): "precision",
        ("-m", "tiny"): "model",
    }.items():
        line = ("generate", "a dog", "--steps", 1, "-o", f"{told}.png", *options)
        assert mos(*line).exit_code == 0
        result = mos("replay", f"{told}.png", "--verify", "--server", "auto")
        assert (result.exit_code, result.stdout) == (0, "exact\n")
        assert told in result.stderr
        result = mos("replay", f"{told}.png", "--verify", "--server", server.url)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert not server.queue.jobs


def test_errors_are_the_same(both) -> None:
    results, (here, there) = both("generate", "a red dog", "-s", 7, "--route", "cat=1", "-o", "a.png")
    assert [result.exit_code for result in results] == [2, 2]
    assert results[0].stderr.splitlines()[-1:] == results[1].stderr.splitlines()
    assert here == there == {}


def test_a_command_with_a_server_imports_no_torch(server: RunningServer, tmp_path: Path) -> None:
    code = """
import sys
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "huggingface_hub", "starlette", "uvicorn")
from mos_cli.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print([name for name in HEAVY if name in sys.modules])
"""
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "dog"}')
    for line in (
        "generate dog -s 7 --steps 2 -q --server auto -o a.png",
        "edit a.png cat -s 7 --steps 2 -q --server auto -o b.png",
        "replay b.png -q --server auto -o c.png",
        "run jobs.jsonl -s 7 --steps 2 -q --server auto -o d.png",
    ):
        run = [sys.executable, "-c", code, *line.split()]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()) == (0, [line[-5:], "[]"]), done.stderr
    # An edit is drawn again with what it was edited from.
    assert len(server.queue.jobs) == 5


def test_a_server_with_another_model_or_other_settings_is_left_alone(
    mos, server: RunningServer, tmp_path: Path
) -> None:
    other = {("-m", "tiny"): "model", ("--precision", "bf16"): "precision", ("--batch-size", "2"): "batches"}
    for options, told in other.items():
        line = ("generate", "a dog", "--steps", 1, "-o", f"{tmp_path}/{told}.png", *options)
        result = mos(*line, "--server", "auto")
        assert result.exit_code == 0
        assert told in result.stderr
        assert "drawn without it" in result.stderr
        named = mos(*line, "--overwrite", "--server", server.url)
        assert (named.exit_code, len(named.stderr.splitlines())) == (2, 1)
    assert not server.queue.jobs


def test_without_a_server_auto_draws_here(mos, editor, tmp_path: Path) -> None:
    line = ("generate", "a dog", "--steps", 1, "-o", "{seed}.png", "-q", "--server")
    os.chdir(tmp_path)
    assert mos(*line, "auto", "-s", 1).exit_code == 0
    for where, code, told in [
        ("http://127.0.0.1:9", 4, "does not answer"),
        ("http://nowhere.invalid", 4, "does not answer"),
        ("https://localhost", 2, "--server"),
        ("yes", 2, "--server"),
        ("http://[", 4, "does not answer"),
    ]:
        result = mos(*line, where, "-s", 2)
        assert (result.exit_code, told in result.stderr) == (code, True), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_stale_state_file_is_ignored(mos, editor, tmp_path: Path) -> None:
    state = write_state("http://127.0.0.1:9", "secret")
    assert stat.S_IMODE(state_file().stat().st_mode) == 0o600
    assert read_state() == state
    # The same process number, of a process that began later, or of this one after the clock was set.
    other = state.model_copy(update={"started": state.started - 5})
    state_file().write_text(other.model_dump_json())
    assert read_state() is None
    remove_state(state)
    assert state_file().exists()
    remove_state(other)
    assert not state_file().exists()
    for content in ("", "{", "[]", '{"schema": "mos-server/2"}'):
        state_file().write_text(content)
        assert read_state() is None
        result = mos("generate", "a dog", "--steps", 1, "-o", f"{tmp_path}/{len(content)}.png", "--server", "auto")
        assert result.exit_code == 0, result.stderr
    # A process that lives and does not listen.
    write_state("http://127.0.0.1:9", None)
    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "b.png", "--server", "auto").exit_code == 0


def test_the_token_comes_from_the_state_file_or_the_environment(mos, editor, tmp_path: Path, monkeypatch) -> None:
    with running_server(token="secret") as server:
        line = ("generate", "a dog", "--steps", 1, "-q", "--overwrite", "-o", tmp_path / "a.png", "--server")
        assert mos(*line, "auto").exit_code == 0
        assert mos(*line, server.url).exit_code == 0
        state_file().unlink()
        result = mos(*line, server.url)
        assert (result.exit_code, "MOS_TOKEN" in result.stderr) == (2, True)
        monkeypatch.setenv("MOS_TOKEN", "secret")
        assert mos(*line, server.url).exit_code == 0


def test_a_full_queue_is_waited_for(mos, gated: RunningServer, gate: Gate, tmp_path: Path) -> None:
    import threading

    for _ in range(4):
        assert gated.ask("POST", "/v1/images/generations", {"prompt": "a dog", "wait": False}).status == 202
        until(lambda: gate.begun)
    threading.Timer(0.3, gate.open.set).start()
    result = mos("generate", "a dog", "-o", tmp_path / "a.png", "--server", "auto")
    # What stands for the model gives no trace: the answer is not one of ours, and nothing is written.
    assert (result.exit_code, len(gate.drawn)) == (4, 5)
    assert not (tmp_path / "a.png").exists()


def test_the_config_file_can_name_the_server(mos, server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[generate]\nserver = "auto"\n')
    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "a.png").exit_code == 0
    assert len(server.queue.jobs) == 1
    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "b.png", "--server", "off").exit_code == 0
    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "c.png", "--dry-run").exit_code == 0
    assert len(server.queue.jobs) == 1


def test_recipes_that_were_forged_on_the_way(server: RunningServer, mos, tmp_path: Path) -> None:
    """What a command sends is checked as what anyone sends."""
    from mos_cli.images.outputs import read_drawing

    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "a.png").exit_code == 0
    recipe = read_drawing(tmp_path / "a.png")[1].recipe.model_dump(mode="json", exclude_none=True)
    body = {"recipe": recipe, "model_hash": server.served.bundle.hash}
    assert server.ask("POST", "/v1/draw", body).status == 200
    for change, status in [
        ({"model_hash": "0" * 64}, 400),
        ({"recipe": recipe | {"width": 100_000}}, 400),
        ({"recipe": recipe | {"model": "/etc"}}, 409),
        ({"recipe": recipe | {"precision": other_precision(tmp_path / "a.png")}}, 409),
        ({"recipe": recipe | {"routes": ["dog=99"]}}, 400),
        ({"threads": 100_000}, 400),
        ({"pictures": ["AAAA"]}, 400),
        ({"pictures": ["no base64!"]}, 400),
        ({"route_from": {"head": {}, "arrays": "AAAA"}}, 400),
        ({"more": 1}, 400),
    ]:
        answer = server.ask("POST", "/v1/draw", body | change)
        assert answer.status == status, (change, answer.body)
