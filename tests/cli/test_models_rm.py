"""`mos models rm`: only what mos put into its cache."""

from mos_cli.bundles.sources import fetch_tower, tower_folder


def test_a_tower_is_removed_from_the_cache_if_the_user_says_so(mos, bundle, cache) -> None:
    spec = bundle.index.understanding
    folder = fetch_tower(spec)
    assert mos("models", "rm", spec.name).exit_code == 2
    assert folder.is_dir()
    result = mos("models", "rm", spec.name, "--yes")
    assert (result.exit_code, result.stdout) == (0, f"removed {folder}\n")
    assert list((cache / "towers").iterdir()) == []
    # The source that it came from is not the cache's.
    assert fetch_tower(spec) == folder


def test_nothing_else_is_removed(mos, bundle, cache, tmp_path) -> None:
    kept = tower_folder(bundle.index.understanding).with_name("mine")
    kept.mkdir(parents=True)
    linked = kept.with_name("link-0123456789ab")
    linked.symlink_to(tmp_path / "models")
    for name, words in {
        "emoji": "comes with mos and stays",
        "tiny": f"delete {bundle.folder} yourself",
        "mine": "no understanding tower mine in the cache",
        "link": "no understanding tower link in the cache",
        "../models": "no understanding tower",
        "tiny-encoder": "no understanding tower tiny-encoder in the cache",
    }.items():
        result = mos("models", "rm", name, "--yes")
        assert result.exit_code == 4
        assert words in result.stderr
    assert kept.is_dir()
    assert linked.is_symlink()
    assert bundle.folder.is_dir()
