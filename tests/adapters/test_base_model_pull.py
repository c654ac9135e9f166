"""`mos models pull` of base models, from a hub that is a folder on the disk.

The lowest calls of the hub's client are replaced.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from typer.testing import Result

from mos_cli.bundles.adapters import local_index
from mos_cli.bundles.specs import Canvas
from mos_cli.utils.files import sha256_of
from tests.helpers.adapted import PROMPT

Mos = Callable[..., Result]
REVISION, OTHER = "a" * 40, "b" * 40


class FakeHub:
    """A hub with one repository, and its cache."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.revision, self.repo_id = repository, cache, REVISION, "tiny/base"
        self.downloads = 0

    def model_info(self, repo_id: str, revision: str | None = None, **_: Any) -> Any:
        if repo_id != self.repo_id:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        names = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]
        siblings = []
        for name in names:
            weights = name.endswith(".safetensors")
            lfs = SimpleNamespace(sha256=sha256_of(self.repository / name)) if weights else None
            siblings.append(SimpleNamespace(rfilename=name, size=(self.repository / name).stat().st_size, lfs=lfs))
        return SimpleNamespace(sha=self.revision, siblings=siblings)

    def snapshot_download(
        self, repo_id: str, *, revision: str, local_files_only: bool = False, allow_patterns: Any = None, **_: Any
    ) -> str:
        folder = self.cache / revision
        if local_files_only and not folder.is_dir():
            raise LocalEntryNotFoundError("not in the cache")
        if not folder.is_dir():
            self.downloads += 1
            for name in allow_patterns:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository / name, folder / name)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, base_folders: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with a tiny klein, and an adapter for it named "tiny-klein"."""
    repository = tmp_path / "repository"
    shutil.copytree(base_folders("klein"), repository)
    (repository / "README.md").write_text("not fetched")
    (repository / "run_me.py").write_text("raise SystemExit('code of the hub was run')")
    fake = FakeHub(repository, tmp_path / "hub")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, *args, **given: fake.model_info(*args, **given)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("MOS_PRECISION", "fp32")
    write_adapter(tmp_path)
    return fake


def write_adapter(root: Path, **changes: Any) -> None:
    """The adapter of the fake hub's model."""
    folder = root / "models" / "tiny-klein"
    folder.mkdir(parents=True, exist_ok=True)
    index = local_index(root / "repository").model_dump(mode="json", by_alias=True, exclude_none=True)
    small = Canvas(native=(64, 64), multiple=16, min=64, max=128).model_dump(mode="json")
    source = {"repo_id": "tiny/base", "size": 1}
    (folder / "adapter.json").write_text(
        json.dumps(index | {"name": "tiny-klein", "source": source, "canvas": small} | changes)
    )


def draw(mos: Mos, picture: Path) -> Result:
    return mos("generate", PROMPT, "-m", "tiny-klein", "--steps", "1", "-s", "1", "-q", "-o", picture)


def test_pull_shows_what_it_fetches_and_locks_it(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    missing = draw(mos, tmp_path / "a.png")
    assert missing.exit_code == 4
    assert "mos models pull tiny-klein" in missing.output
    unasked = mos("models", "pull", "tiny-klein")
    assert (unasked.exit_code, hub.downloads) == (2, 0)
    assert "--yes" in unasked.output
    pulled = mos("models", "pull", "tiny-klein", "--yes")
    assert pulled.exit_code == 0, pulled.output
    for shown in ("tiny/base", REVISION, "licence", "size"):
        assert shown in pulled.output
    locks = list((tmp_path.with_name(f"{tmp_path.name}-data") / "base-models").iterdir())
    lock = json.loads(locks[0].read_text())
    assert (lock["revision"], lock["repo_id"]) == (REVISION, "tiny/base")
    assert not {"README.md", "run_me.py"} & set(lock["files"])
    for name, sha256 in lock["files"].items():
        assert sha256_of(hub.cache / REVISION / name) == sha256
    assert draw(mos, tmp_path / "a.png").exit_code == 0
    assert mos("models", "verify", "tiny-klein").exit_code == 0
    assert REVISION in mos("models", "show", "tiny-klein").output
    rows = {row["name"]: row for row in map(json.loads, mos("models", "ls", "--json").output.splitlines())}
    assert (rows["tiny-klein"]["kind"], rows["tiny-klein"]["pulled"]) == ("base model", True)
    assert mos("models", "pull", "tiny-klein").exit_code == 0
    assert hub.downloads == 1
    assert mos("replay", tmp_path / "a.png", "--verify").exit_code == 0


def test_the_same_files_in_a_folder_are_the_same_model(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    """The hash is that of the files, so a picture is replayed by either."""
    assert mos("models", "pull", "tiny-klein", "--yes").exit_code == 0
    assert draw(mos, tmp_path / "a.png").exit_code == 0
    (tmp_path / "models" / "tiny-klein" / "adapter.json").unlink()
    verified = mos("replay", tmp_path / "a.png", "--verify", "-m", tmp_path / "repository")
    assert (verified.exit_code, verified.output.strip()) == (0, "exact")


def test_a_tampered_file_is_refused(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    assert mos("models", "pull", "tiny-klein", "--yes").exit_code == 0
    weights = next((hub.cache / REVISION / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for refused in (draw(mos, tmp_path / "a.png"), mos("models", "verify", "tiny-klein")):
        assert refused.exit_code == 4
        assert "does not match its sha256" in refused.output


def test_a_file_other_than_the_hub_says_is_not_locked(mos: Mos, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*args: Any, **given: Any) -> str:
        folder = Path(hub.snapshot_download(*args, **given))
        next((folder / "vae").glob("*.safetensors")).write_bytes(b"other")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", damaged)
    refused = mos("models", "pull", "tiny-klein", "--yes")
    assert refused.exit_code == 4
    assert "does not match its sha256" in refused.output
    assert "mos models pull" in mos("generate", PROMPT, "-m", "tiny-klein").output


def test_another_revision_is_refused(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    """Where the adapter names one and the lock has another, and where the hub answers with another than was locked."""
    assert mos("models", "pull", "tiny-klein", "--yes").exit_code == 0
    write_adapter(tmp_path, source={"repo_id": "tiny/base", "size": 1, "revision": OTHER})
    refused = draw(mos, tmp_path / "a.png")
    assert refused.exit_code == 4
    assert OTHER[:12] in refused.output
    write_adapter(tmp_path)
    shutil.rmtree(hub.cache)
    hub.revision = OTHER
    refused = mos("models", "pull", "tiny-klein", "--yes")
    assert refused.exit_code == 4
    assert OTHER in refused.output


def test_terms_have_to_be_accepted(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    assert mos("models", "pull", "tiny-klein", "--yes").exit_code == 0
    terms = {"name": "Terms of Somebody", "url": "https://example.org/terms", "part": "text_encoder"}
    write_adapter(tmp_path, terms=terms)
    refused = draw(mos, tmp_path / "a.png")
    assert refused.exit_code == 4
    assert "--accept-terms" in refused.output
    refused = mos("models", "pull", "tiny-klein", "--yes")
    assert refused.exit_code == 4
    assert "Terms of Somebody" in refused.output
    accepted = mos("models", "pull", "tiny-klein", "--yes", "--accept-terms")
    assert accepted.exit_code == 0, accepted.output
    assert draw(mos, tmp_path / "a.png").exit_code == 0


def test_a_pipeline_of_another_class_is_refused(mos: Mos, hub: FakeHub, tmp_path: Path) -> None:
    index = hub.repository / "model_index.json"
    write_adapter(tmp_path)
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "StableDiffusionPipeline"))
    refused = mos("models", "pull", "tiny-klein", "--yes")
    assert refused.exit_code == 4
    assert "StableDiffusionPipeline" in refused.output
    local = mos("generate", PROMPT, "-m", hub.repository, "-o", tmp_path / "a.png")
    assert local.exit_code == 4
    assert "StableDiffusionPipeline" in local.output


@pytest.mark.parametrize("damage", ["no hub", "offline", "unknown"])
def test_an_unreachable_hub_is_one_line(mos: Mos, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    if damage == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if damage == "unknown":
        hub.repo_id = "somebody/else"
    if damage == "no hub":

        def unreachable(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no route to the hub")

        monkeypatch.setattr(hub, "model_info", unreachable)
    refused = mos("models", "pull", "tiny-klein", "--yes")
    assert refused.exit_code == 4
    assert len(refused.output.strip().splitlines()) == 1


@pytest.mark.parametrize("missing", ["transformer", "vae", "text_encoder/config.json", "transformer/config.json"])
def test_a_damaged_folder_is_refused_in_one_line(
    mos: Mos, base_folders: Callable[[str], Path], tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "klein"
    shutil.copytree(base_folders("klein"), folder)
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    refused = mos("generate", PROMPT, "-m", folder, "--size", "64", "-o", tmp_path / "a.png")
    assert refused.exit_code == 4
    assert len(refused.output.strip().splitlines()) == 1


def test_a_pickle_is_not_read(mos: Mos, base_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "klein"
    shutil.copytree(base_folders("klein"), folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused = mos("generate", PROMPT, "-m", folder, "--size", "64", "-o", tmp_path / "a.png")
    assert refused.exit_code == 4


def test_the_shipped_adapters_are_shown_without_their_models(mos: Mos, cache: Path) -> None:
    for name in ("klein", "z-image", "prx"):
        shown = mos("models", "show", name)
        assert shown.exit_code == 0, shown.output
        assert "pulled    no" in shown.output
    assert "Gemma Terms of Use" in mos("models", "show", "prx").output
