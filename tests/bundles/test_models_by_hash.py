"""A model is the bundle that was loaded: it is planned with its own numbers, and found again by its hash."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mos_cli.bundles import blueprints
from mos_cli.bundles.bundle import Bundle, find_bundle, read_bundle
from mos_cli.images.outputs import png, read_drawing
from tests.helpers.tiny_bundle import write_bundle

PROMPT = "a red apple"


@pytest.fixture
def elsewhere(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that is not found by its name, "mine"."""
    folder = tmp_path / "elsewhere" / "mine"
    shutil.copytree(bundle.folder, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"name": "tiny"', '"name": "mine"'))
    return folder


def test_a_model_in_a_folder_is_planned(mos, elsewhere: Path, tmp_path: Path) -> None:
    drawn = mos("generate", PROMPT, "-m", elsewhere, "-p", "auto", "-o", tmp_path / "one.png")
    assert drawn.exit_code == 0, drawn.stderr
    assert "auto: " in drawn.stderr


def test_a_model_named_as_another_is_planned_with_its_own_numbers(
    mos, bundle: Bundle, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bundles named "tiny" the one in the folder is asked for; the other is what the name finds."""
    other = write_bundle(tmp_path / "elsewhere" / "tiny", encoder_folder)
    planned, network_of = [], blueprints.network_of

    def watched(found: Bundle, **run: Any) -> blueprints.Network:
        planned.append(found)
        return network_of(found, **run)

    monkeypatch.setattr("mos_cli.inference.requests.network_of", watched)
    drawn = mos("generate", PROMPT, "-m", other.folder, "-p", "auto", "-o", tmp_path / "one.png")
    assert drawn.exit_code == 0, drawn.stderr
    assert [found.folder for found in planned] == [other.folder]
    assert find_bundle("tiny").folder == bundle.folder


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (("replay", "one.png", "--verify"), "exact"),
        (("replay", "one.png", "--set", "seed=9"), "s9.png"),
        (("routing", "ablate", "one.png", "-w", "red"), "red"),
    ],
)
def test_a_picture_of_a_model_in_a_folder_needs_nothing_else(
    mos, elsewhere: Path, tmp_path: Path, command: tuple[str, ...], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mos("generate", PROMPT, "-m", elsewhere, "-s", 3, "-o", "one.png").exit_code == 0
    again = mos(*command)
    assert again.exit_code == 0, again.stderr
    assert output in again.stdout


def test_no_path_of_this_machine_is_in_a_picture_or_its_trace(mos, elsewhere: Path, tmp_path: Path) -> None:
    mos("generate", PROMPT, "-m", elsewhere, "-o", tmp_path / "one.png")
    for suffix in (".png", ".json"):
        assert b"elsewhere" not in (tmp_path / "one.png").with_suffix(suffix).read_bytes()


def test_a_folder_that_was_moved_is_found_where_it_is_named_or_listed(
    mos, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mos("generate", PROMPT, "-m", elsewhere, "-s", 3, "-o", tmp_path / "one.png")
    made = read_bundle(elsewhere).hash
    moved = elsewhere.rename(tmp_path / "moved")
    lost = mos("replay", tmp_path / "one.png", "--verify")
    assert lost.exit_code == 4
    assert f"was made by mine {made[:10]}; that model is not here: name it with --model FOLDER" in lost.stderr
    assert mos("replay", tmp_path / "one.png", "--verify", "-m", moved).stdout.strip() == "exact"
    # It is remembered there now.
    assert mos("replay", tmp_path / "one.png", "--verify").stdout.strip() == "exact"
    shutil.rmtree(os.environ["MOS_DATA"])
    with monkeypatch.context() as patch:
        patch.setenv("MOS_MODEL", str(moved))
        assert mos("replay", tmp_path / "one.png", "--verify").stdout.strip() == "exact"
    shutil.rmtree(os.environ["MOS_DATA"])
    (tmp_path / "listed").mkdir()
    moved.rename(tmp_path / "listed" / "mine")
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "listed"))
    assert mos("replay", tmp_path / "one.png", "--verify").stdout.strip() == "exact"


def test_a_model_of_another_hash_is_refused_with_both(mos, bundle: Bundle, elsewhere: Path, tmp_path: Path) -> None:
    mos("generate", PROMPT, "-m", elsewhere, "-s", 3, "-o", tmp_path / "one.png")
    made = read_bundle(elsewhere).hash
    shutil.rmtree(elsewhere)
    refused = mos("replay", tmp_path / "one.png", "--verify", "-m", bundle.folder)
    assert refused.exit_code == 4
    assert made[:10] in refused.stderr
    assert bundle.hash[:10] in refused.stderr
    other = mos("replay", tmp_path / "one.png", "--set", f"model={bundle.folder}", "-o", tmp_path / "two.png")
    assert other.exit_code == 0, other.stderr


def test_a_chain_over_two_models_in_folders_is_drawn_again(
    mos, editor: Bundle, elsewhere: Path, tmp_path: Path
) -> None:
    """Both were moved, so that both have to be named."""
    edits = tmp_path / "elsewhere" / "edits"
    shutil.copytree(editor.folder, edits)
    index = edits / "model_index.json"
    index.write_text(index.read_text().replace('"name": "editor"', '"name": "edits"'))
    assert mos("generate", PROMPT, "-m", elsewhere, "-s", 3, "-o", tmp_path / "one.png").exit_code == 0
    assert mos("edit", tmp_path / "one.png", "a dog", "-m", edits, "-s", 4, "-o", tmp_path / "two.png").exit_code == 0
    assert mos("replay", tmp_path / "two.png", "--verify").stdout.strip() == "exact"
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    (tmp_path / "one.png").unlink()
    moved = [option for name in ("mine", "edits") for option in ("-m", tmp_path / "moved" / name)]
    assert mos("replay", tmp_path / "two.png", "--verify", *moved[2:]).exit_code == 4
    shown = mos("replay", tmp_path / "two.png", "--verify", *moved)
    assert shown.stdout.strip() == "exact", shown.stderr


@pytest.mark.parametrize("forged", ["../../secret", "a\0b", "/etc/hostname", "x" * 5000])
def test_a_forged_hash_names_no_file(mos, bundle: Bundle, tmp_path: Path, forged: str) -> None:
    """What lies at such a path is a bundle's folder, which must not be taken."""
    mos("generate", PROMPT, "-o", tmp_path / "one.png")
    image, record = read_drawing(tmp_path / "one.png")
    secret = Path(os.environ["MOS_DATA"]).parent / "secret"
    secret.write_text(str(bundle.folder))
    made = record.made.model_copy(update={"bundle_hash": forged})
    (tmp_path / "forged.png").write_bytes(png(image, record.model_copy(update={"made": made})))
    refused = mos("replay", tmp_path / "forged.png")
    assert refused.exit_code == 4
    assert len(refused.stderr.strip().splitlines()) == 1
