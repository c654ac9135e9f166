import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.bundle import (
    INDEX,
    Bundle,
    find_bundle,
    find_model,
    list_bundles,
    list_tower_specs,
    load_tower_spec,
    read_bundle,
    verify_bundle,
    write_index,
)
from mos_cli.bundles.specs import BundleIndex, Canvas, Defaults, TowerSpec
from mos_cli.cli.app import app
from mos_cli.errors import ModelError
from mos_cli.utils.folders import models_folder

SHA = "0" * 64
TOWER = {
    "schema": "mos-tower/1",
    "name": "reader",
    "description": "reads",
    "license": "Apache-2.0",
    "format": "safetensors",
    "files": {"config.json": SHA, "model.safetensors": SHA},
    "size": 10,
    "sources": [{"kind": "hub", "repo_id": "owner/name", "revision": "main"}],
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A folder of models that names are looked up in."""
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def bundle(root) -> Bundle:
    folder = root / "tiny"
    (folder / "generation").mkdir(parents=True)
    (folder / "card.md").write_text("# tiny\n")
    (folder / "generation" / "config.json").write_text("{}")
    (folder / "generation" / "weights.safetensors").write_bytes(b"weights")
    return index(folder)


def index(folder: Path, name: str = "tiny") -> Bundle:
    return write_index(
        folder,
        name=name,
        description="draws nothing",
        license="Apache-2.0",
        understanding=TowerSpec.model_validate(TOWER),
        canvas=Canvas(native=(64, 64), multiple=8, min=32, max=128),
        defaults=Defaults(steps=20, cfg=3.0, cfg_interval=(0.1, 0.9)),
    )


def rewrite(bundle: Bundle, **changes: object) -> None:
    path = bundle.folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read_again(bundle):
    assert find_bundle("tiny") == bundle
    assert list(bundle.index.files) == ["card.md", "generation/config.json", "generation/weights.safetensors"]
    verify_bundle(bundle)


def test_writing_the_index_twice_changes_nothing(bundle):
    assert index(bundle.folder).hash == bundle.hash


def test_the_hash_is_that_of_the_index_and_pins_every_file(bundle):
    assert bundle.hash == hashlib.sha256((bundle.folder / INDEX).read_bytes()).hexdigest()
    (bundle.folder / "generation" / "weights.safetensors").write_bytes(b"Weights")
    assert index(bundle.folder).hash != bundle.hash


def test_verify_names_a_changed_a_missing_and_an_unlisted_file(bundle):
    weights = bundle.folder / "generation" / "weights.safetensors"
    weights.write_bytes(b"Weights")
    with pytest.raises(ModelError, match=r"generation/weights\.safetensors does not match"):
        verify_bundle(bundle)
    weights.unlink()
    with pytest.raises(ModelError, match=r"generation/weights\.safetensors is missing"):
        verify_bundle(bundle)
    weights.write_bytes(b"weights")
    (bundle.folder / "more.json").write_text("{}")
    with pytest.raises(ModelError, match=r"more\.json is not listed"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["model.bin", "a/b.pt", "x.ckpt", "x.PKL", "generation/w.pth"])
def test_pickles_are_refused_wherever_they_lie(bundle, name):
    path = bundle.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    for attempt in (lambda: find_bundle("tiny"), lambda: verify_bundle(bundle), lambda: index(bundle.folder)):
        with pytest.raises(ModelError, match=r"pickle.*safetensors only"):
            attempt()


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "a/../../x.json",
        "/x.json",
        "a//x.json",
        "a\\x.json",
        "C:x.json",
        ".x.json",
        "",
        "run.py",
        "a",
    ],
)
def test_paths_that_leave_the_folder_or_hold_code_are_refused(bundle, name):
    rewrite(bundle, files={name: SHA})
    with pytest.raises(ModelError, match="files") as caught:
        find_bundle("tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"schema": "mos-bundle/2"}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"name": "../x"}, "name"),
        ({"files": {"a.json": "00"}}, r"files\.a\.json"),
        ({"canvas": {"native": [64, 64], "multiple": 0, "min": 32, "max": 128}}, r"canvas\.multiple"),
        ({"understanding": {**TOWER, "files": {"../config.json": SHA}}}, r"understanding\.files"),
    ],
)
def test_a_bad_index_is_one_line_with_the_file_and_the_field(bundle, changes, where):
    rewrite(bundle, **changes)
    with pytest.raises(ModelError, match=rf"{INDEX}: {where}.*") as caught:
        find_bundle("tiny")
    assert "\n" not in str(caught.value)


def test_an_index_that_is_no_json_is_refused(bundle):
    (bundle.folder / INDEX).write_text("{")
    with pytest.raises(ModelError, match=INDEX):
        find_bundle("tiny")


def test_bundles_are_found_by_path_and_in_all_folders_of_mos_models(bundle, root, tmp_path, monkeypatch):
    shutil.copytree(bundle.folder, tmp_path / "more" / "other")
    assert find_bundle(str(tmp_path / "more" / "other")).hash == bundle.hash
    monkeypatch.chdir(tmp_path)
    assert find_bundle("more/other").hash == bundle.hash
    index(tmp_path / "more" / "other", name="other")
    monkeypatch.setenv("MOS_MODELS", os.pathsep.join([str(root), str(tmp_path / "more")]))
    assert {"tiny", "other"} <= set(list_bundles())
    assert list_bundles()["tiny"] == bundle


def test_a_broken_bundle_does_not_hide_the_others(bundle, root):
    shutil.copytree(bundle.folder, root / "abc")
    rewrite(read_bundle(root / "abc"), canvas=None)
    found = list_bundles()
    assert found["tiny"] == bundle
    assert isinstance(found["abc"], ModelError)
    assert "canvas" in str(found["abc"])
    result = CliRunner().invoke(app, ["models", "ls", "--json"])
    assert result.exit_code == 0
    names = [json.loads(line)["name"] for line in result.stdout.splitlines()]
    assert "tiny" in names
    assert "abc" not in names
    (line,) = result.stderr.splitlines()
    assert "abc" in line
    assert "canvas" in line


def test_a_bundle_lying_under_another_name_is_refused(bundle):
    bundle.folder.rename(bundle.folder.with_name("moved"))
    with pytest.raises(ModelError, match="holds a bundle named tiny"):
        find_bundle("moved")


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known(bundle):
    with pytest.raises(ModelError, match=r"named 'tinny', did you mean tiny\? \(there is: .*tiny") as caught:
        find_bundle("tinny")
    assert caught.value.exit_code == 4


def test_folders_that_are_no_bundles(tmp_path):
    with pytest.raises(ModelError, match=f"no {INDEX}"):
        find_bundle(str(tmp_path))
    with pytest.raises(ModelError, match="there is no folder"):
        find_bundle(str(tmp_path / "nowhere"))


def test_a_hub_id_is_read_from_the_hubs_cache_without_a_network(bundle, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(bundle.folder, stored / "snapshots" / SHA[:40])
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(SHA[:40])
    assert find_bundle("owner/tiny").hash == bundle.hash
    with pytest.raises(ModelError, match=r"no folder owner/none, and from the hub: .*reached") as caught:
        find_bundle("owner/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"a/config.json": SHA, "model.safetensors": SHA}},
        {"files": {"..": SHA, "model.safetensors": SHA}},
        {"files": {"pytorch_model.bin": SHA, "model.safetensors": SHA}},
        {"files": {"modeling.py": SHA, "model.safetensors": SHA}},
        {"files": {"config.json": SHA}},
        {"files": {"model.safetensors": SHA[1:]}},
        {"files": {"a.gguf": SHA, "b.gguf": SHA}, "format": "gguf"},
        {"name": "../reader"},
        {"sources": []},
        {"sources": [{"kind": "ftp", "path": "/x"}]},
        {"sources": [{"kind": "folder", "path": "relative/path"}]},
        {"sources": [{"kind": "hub", "repo_id": "owner", "revision": "main"}]},
        {"sources": [{"kind": "wheel", "package": "--index-url=x", "version": "1", "folder": "x"}]},
        {"sources": [{"kind": "wheel", "package": "x", "version": "1 --pre", "folder": "x"}]},
    ],
)
def test_bad_tower_descriptions_are_refused(changes):
    TowerSpec.model_validate(TOWER)
    with pytest.raises(ValidationError):
        TowerSpec.model_validate({**TOWER, **changes})


def test_towers_are_found_by_name_and_by_file(tmp_path):
    names = [spec.name for spec in list_tower_specs()]
    assert {"all-minilm-l6-v2", "smollm2-135m"} <= set(names)
    assert names == sorted(names)
    assert find_model("all-minilm-l6-v2") == load_tower_spec("all-minilm-l6-v2")
    (tmp_path / "mine.json").write_text(json.dumps(TOWER))
    assert load_tower_spec(str(tmp_path / "mine.json")).name == "reader"
    with pytest.raises(ModelError, match="did you mean all-minilm-l6-v2"):
        load_tower_spec("all-minilm")
    with pytest.raises(ModelError, match="cannot read"):
        load_tower_spec(str(tmp_path / "none.json"))


def test_what_comes_with_mos_is_sound(monkeypatch):
    monkeypatch.delenv("MOS_MODELS", raising=False)
    for path in (models_folder() / "towers").glob("*.json"):
        assert load_tower_spec(path.stem) == load_tower_spec(str(path))
    for found in list_bundles().values():
        assert isinstance(found, Bundle)
        if isinstance(found, AdapterBundle):
            assert found.index.name == found.folder.name
            continue
        verify_bundle(found)


def test_the_index_round_trips(bundle):
    text = (bundle.folder / INDEX).read_text()
    assert BundleIndex.model_validate_json(text).model_dump_json(indent=2) + "\n" == text
    assert read_bundle(bundle.folder).index.understanding == TowerSpec.model_validate(TOWER)
