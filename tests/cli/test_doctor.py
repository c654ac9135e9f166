import json
import sys
from importlib.machinery import ModuleSpec

import pytest
import typer
from typer.testing import CliRunner

from mos_cli import __version__
from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.sources import tower_folder
from mos_cli.bundles.specs import Canvas, Defaults, TowerSpec
from mos_cli.cli.app import MosGroup
from mos_cli.cli.doctor import doctor
from mos_cli.errors import DeviceError
from mos_cli.utils.devices import choose_device

app = typer.Typer(cls=MosGroup)
app.command()(doctor)
app.callback()(lambda: None)

TOWER = {
    "schema": "mos-tower/1",
    "name": "reader",
    "description": "",
    "license": "",
    "format": "safetensors",
    "files": {"model.safetensors": "0" * 64},
    "size": 5_000_000,
    "sources": [{"kind": "hub", "repo_id": "owner/name", "revision": "main"}],
}


@pytest.fixture(autouse=True)
def bundle(tmp_path, monkeypatch) -> Bundle:
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    return write_index(
        folder,
        name="tiny",
        description="",
        license="",
        understanding=TowerSpec.model_validate(TOWER),
        canvas=Canvas(native=(64, 64), multiple=8, min=32, max=128),
        defaults=Defaults(steps=20, cfg=3.0, cfg_interval=(0.1, 0.9)),
    )


def examine() -> dict:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    report["checks"] = {check["what"]: check for check in report["checks"]}
    return report


def test_reports_what_is_here_and_makes_nothing(tmp_path):
    report = examine()
    assert report["versions"]["mos"] == __version__
    assert report["versions"]["torch"]
    assert report["cpu"]["memory"] > 1e8
    assert {cache["name"] for cache in report["caches"]} == {"mos", "hub"}
    assert report["checks"]["PyTorch"]["ok"]
    assert report["checks"]["cache folder"]["ok"]
    assert not (tmp_path / "cache").exists()


def test_says_whether_the_tower_of_a_model_is_here(bundle):
    before = examine()["checks"]["model tiny"]
    assert not before["ok"]
    assert "5.0 MB" in before["detail"]
    assert before["hint"].endswith("mos models pull tiny")
    tower_folder(bundle.index.understanding).mkdir(parents=True)
    assert examine()["checks"]["model tiny"]["ok"]


def test_a_broken_model_is_a_finding_and_no_failure(bundle):
    (bundle.folder / "model_index.json").write_text("{")
    check = examine()["checks"]["model tiny"]
    assert not check["ok"]
    assert "model_index.json" in check["detail"]


def test_a_broken_pytorch_is_a_finding_and_no_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = examine()
    assert not report["checks"]["PyTorch"]["ok"]
    assert report["gpus"] == []


def test_a_card_with_too_old_a_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    report = examine()
    assert report["gpus"] == []
    assert not report["checks"]["GPU"]["ok"]
    with pytest.raises(DeviceError, match="no GPU for device 'cuda'"):
        choose_device("cuda")


def test_an_unwritable_cache_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "file" / "cache"))
    check = examine()["checks"]["cache folder"]
    assert not check["ok"]
    assert "MOS_CACHE" in check["hint"]


def test_one_thread_is_one(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert ", 2 cores, 1 thread, " in CliRunner().invoke(app, ["doctor"]).stdout


def test_every_failed_check_has_a_hint_and_the_text_shows_all():
    checks = examine()["checks"].values()
    assert all(check["ok"] or check["hint"] for check in checks)
    text = CliRunner().invoke(app, ["doctor"]).stdout
    lines = text.split("\n\n")[1].splitlines()
    assert [line[:3] for line in lines] == ["ok " if check["ok"] else "no " for check in checks]


def test_settings_that_are_broken_are_told(tmp_path, monkeypatch) -> None:
    def settings() -> dict:
        return examine()["checks"]["settings"]

    monkeypatch.setenv("MOS_CONFIG", str(tmp_path / "config.toml"))
    assert "is not a file" in settings()["detail"]
    (tmp_path / "config.toml").write_text("[generate]\nsteps = 0\n")
    assert "config.toml: generate.steps" in settings()["detail"]
    (tmp_path / "config.toml").write_text("[generate]\nsteps = 4\n")
    assert settings()["ok"]
    monkeypatch.setenv("MOS_PRESET", "nono")
    assert "no preset 'nono'" in settings()["detail"]
    monkeypatch.delenv("MOS_PRESET")
    monkeypatch.setenv("MOS_CFG", "much")
    assert settings()["detail"].startswith("--cfg: ")


def test_a_folder_is_writable_if_something_can_be_written(monkeypatch) -> None:
    monkeypatch.setenv("MOS_CACHE", "/proc/mos")
    assert not examine()["checks"]["cache folder"]["ok"]


def test_the_runtime_that_xformers_misses_is_named_with_the_command_that_brings_it(monkeypatch):
    gpu = {"name": "a GPU", "memory": 8 << 30, "free": 8 << 30, "capability": [9, 0]}
    monkeypatch.setattr("mos_cli.cli.doctor._gpus", lambda torch: [gpu])
    monkeypatch.setattr("mos_cli.cli.doctor.find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr("mos_cli.utils.xformers_runtime.missing_runtime", lambda: 12)
    monkeypatch.setattr("mos_cli.utils.xformers_runtime.runtime_library", lambda major: None)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    check = examine()["checks"]["xformers"]
    assert check["detail"] == "it needs the runtime of CUDA 12, and this PyTorch has CUDA 13.0"
    assert "pip install 'mos-cli[cuda]'" in check["hint"]
    monkeypatch.setattr("mos_cli.cli.doctor.find_spec", lambda name: None)
    check = examine()["checks"]["xformers"]
    assert check["detail"] == "not installed"
    assert "pip install 'mos-cli[cuda]'" in check["hint"]
