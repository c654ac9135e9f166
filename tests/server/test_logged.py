"""What a server drew for clients stands in the log of the user who started it, once, and not where it is off."""

import json
import shutil
import urllib.request

import pytest

from mos_cli.images.log import log_file
from tests.helpers.running_server import RunningServer

GENERATIONS = "/v1/images/generations"


def logged(mos) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in mos("logs", "--json").stdout.splitlines()]
    assert all((row["path"] is None) == (row["state"] == "served") for row in rows)
    return [(row["state"], row["prompt"]) for row in rows]


def test_pictures_of_clients_are_logged_once(server: RunningServer, mos, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert server.ask("POST", GENERATIONS, {"prompt": "a (dog:1.5)", "steps": 1, "n": 2}).status == 200
    assert mos("generate", "a cat", "--steps", 1, "-o", "cat.png", "--server", "auto").exit_code == 0
    assert mos("replay", "cat.png", "-o", "again.png", "--server", "auto", "--no-log").exit_code == 0
    picture = (tmp_path / "cat.png").read_bytes()
    for path, *parts in (
        ("/v1/images/edits", ("image", picture), ("prompt", "a red cat"), ("steps", 1)),
        ("/v1/images/replays", ("image", picture)),
    ):
        assert server.form(path, *parts).status == 200
    assert server.ask("POST", GENERATIONS, {"prompt": "a dog", "routes": ["cat=1"]}).status == 400
    twice = [("served", "a (dog:1.5)")] * 2
    assert logged(mos) == [*twice, ("there", "a cat"), ("served", "a red cat"), ("served", "a cat")]
    assert mos("logs", "-q").stdout == f"{tmp_path / 'cat.png'}\n"
    assert "(served)" in mos("logs", "red").stdout


def test_a_log_that_cannot_be_written_stops_no_server(server: RunningServer) -> None:
    log_file().mkdir(parents=True)
    assert server.ask("POST", GENERATIONS, {"prompt": "a dog", "steps": 1}).status == 200
    shutil.rmtree(log_file().parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [([], "", [("served", "a dog")]), (["--no-log"], "", []), ([], 'metadata = "none"', [])],
)
def test_the_settings_of_the_server_decide(started, mos, tmp_path, options, config: str, expected: list) -> None:
    (tmp_path / "config.toml").write_text(f"[generate]\n{config}\n")
    process, state = started(*options)
    body = json.dumps({"prompt": "a dog", "steps": 1}).encode()
    request = urllib.request.Request(state.url + GENERATIONS, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
    process.terminate()
    assert process.wait() == 0
    assert logged(mos) == expected
