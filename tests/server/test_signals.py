"""A server that is stopped or killed: nothing is half written, and the next run does not look for it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mos_cli.server.state import ServerState, read_state, state_file
from tests.helpers.running_server import until

GENERATIONS = "/v1/images/generations"
pytestmark = pytest.mark.slow


def ask(state: ServerState, path: str, body: dict | None = None) -> tuple[int, bytes]:
    import json
    import urllib.error
    import urllib.request

    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(state.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_signals(started, mos, tmp_path: Path) -> None:
    process, state = started()
    answers = []
    body = {"prompt": "a dog", "seed": 1, "steps": 300}
    client = threading.Thread(target=lambda: answers.append(ask(state, GENERATIONS, body)))
    client.start()
    until(lambda: b'"drawing":true' in ask(state, "/v1/server")[1])
    process.send_signal(signal.SIGTERM)
    client.join()
    out, err = process.communicate()
    assert ([code for code, _ in answers], process.returncode) == ([200], 0)
    assert "stopping" in err
    assert "Traceback" not in out + err
    assert not state_file().exists()

    # Nobody waits: it ends after the step.
    process, state = started()
    assert ask(state, GENERATIONS, body | {"steps": 1000, "wait": False, "n": 3})[0] == 202
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0

    # A command loses its server: one line, no file, and the next draws without it.
    process, state = started()
    folder = tmp_path / "out"
    line = ["generate", "a dog", "-n", "5", "-s", "1", "--steps", "400", "-q", "-o", f"{folder}/{{seed}}.png"]
    command = [sys.executable, "-m", "mos_cli", *line, "--server", "auto"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (folder / "1.png").exists())
    os.kill(process.pid, signal.SIGKILL)
    out, err = run.communicate()
    assert run.returncode == 7
    assert all("does not answer" in told for told in err.splitlines()[:-1])
    assert all(Path(path).exists() for path in out.splitlines())
    assert {path.suffix for path in folder.iterdir()} == {".png", ".json", ".safetensors"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert state_file().exists()
    process.wait()
    assert read_state() is None
    assert mos("generate", "a dog", "--steps", 1, "-o", tmp_path / "a.png", "--server", "auto").exit_code == 0
