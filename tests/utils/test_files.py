import pytest

from mos_cli.errors import InputError
from mos_cli.utils import files
from mos_cli.utils.files import (
    NameTakenError,
    atomic_file,
    atomic_write,
    check_folder,
    expand,
    folder_size,
    link_or_copy,
    replace_folder,
    sha256_of,
    write_all,
)
from tests.helpers.failing_rename import fail_first_rename


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_in_missing_folders_and_leaves_only_the_file(tmp_path):
    atomic_write(tmp_path / "a" / "b.png", b"one")
    assert (tmp_path / "a" / "b.png").read_bytes() == b"one"
    assert names(tmp_path / "a") == ["b.png"]


def test_never_overwrites_unless_asked(tmp_path):
    path = tmp_path / "b.png"
    atomic_write(path, b"one")
    with pytest.raises(InputError):
        atomic_write(path, b"two")
    assert path.read_bytes() == b"one"
    atomic_write(path, b"two", overwrite=True)
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["b.png"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "b.png"

    def race():
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"mine")
            path.write_bytes(b"theirs")

    with pytest.raises(InputError):
        race()
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["b.png"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_nothing_behind(tmp_path, failure):
    path = tmp_path / "b.png"
    atomic_write(path, b"before")

    def fail():
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["b.png"]


def test_the_temporary_file_has_the_same_suffix(tmp_path):
    with atomic_file(tmp_path / "b.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"")


def test_an_unwritable_place_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot make the folder"):
        atomic_write(tmp_path / "file" / "b.png", b"one")
    assert names(tmp_path) == ["file"]


def test_sha256_of_known_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


def test_folder_size_counts_files_and_not_what_links_point_to(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "sub" / "x")
    assert folder_size(tmp_path) == 5
    assert folder_size(tmp_path / "nowhere") == 0


def test_link_or_copy_follows_links(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    link_or_copy(tmp_path / "link", tmp_path / "y")
    (tmp_path / "x").unlink()
    assert (tmp_path / "y").read_bytes() == b"12345"


def test_files_written_together_are_all_there_or_none(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.json"
    write_all({first: b"1", second: b"2"})
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")
    with pytest.raises(InputError):
        write_all({tmp_path / "c.png": b"3", second: b"4"})
    assert names(tmp_path) == ["a.png", "b.json"]
    assert second.read_bytes() == b"2"


def test_files_are_removed_together_with_what_is_written(tmp_path):
    first, second, third = tmp_path / "a.png", tmp_path / "b.json", tmp_path / "c.webp"
    write_all({first: b"1", second: b"2", third: b"3"})
    write_all({first: b"4", second: b"5"}, overwrite=True, remove=[third])
    assert (first.read_bytes(), second.read_bytes()) == (b"4", b"5")
    assert names(tmp_path) == ["a.png", "b.json"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(4))
def test_whatever_fails_in_between_all_is_as_it_was(tmp_path, monkeypatch, failure, at):
    paths = [tmp_path / name for name in ("a.png", "b.json", "c.webp")]
    write_all(dict.fromkeys(paths, b"before"))
    publish, calls = files._publish, iter(range(9))

    def fails(*arguments):
        if next(calls) == at:
            raise failure
        publish(*arguments)

    monkeypatch.setattr(files, "_publish", fails)
    new = {tmp_path / "a.png": b"new", tmp_path / "b.json": b"new", tmp_path / "d.json": b"new"}
    if at < len(new):
        with pytest.raises((InputError, KeyboardInterrupt)):
            write_all(new, overwrite=True, remove=[paths[2]])
        assert {path.read_bytes() for path in paths} == {b"before"}
        assert names(tmp_path) == ["a.png", "b.json", "c.webp"]
    else:
        write_all(new, overwrite=True, remove=[paths[2]])
        assert names(tmp_path) == ["a.png", "b.json", "d.json"]


def test_the_first_file_gets_its_name_last(tmp_path, monkeypatch):
    published = []
    publish = files._publish

    def watched(temporary, path, overwrite):
        published.append(path.name)
        publish(temporary, path, overwrite)

    monkeypatch.setattr(files, "_publish", watched)
    write_all({tmp_path / "a.png": b"1", tmp_path / "b.json": b"2", tmp_path / "c.webp": b"3"})
    assert published == ["c.webp", "b.json", "a.png"]


def test_a_disk_without_hard_links_replaces_nothing_and_has_no_empty_files(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    path = tmp_path / "b.png"

    def seen_by_others(temporary):
        assert not path.exists(), "a placeholder would outlive a killed run"
        temporary.write_bytes(b"one")

    with atomic_file(path) as temporary:
        seen_by_others(temporary)
    rename, empty = files.Path.rename, []

    def watched(self, target):
        empty.extend(other for other in tmp_path.iterdir() if not other.stat().st_size)
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", watched)
    atomic_write(tmp_path / "c.png", b"two")
    assert empty == []
    with pytest.raises(NameTakenError):
        atomic_write(path, b"three")
    path.unlink()

    def race():
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"mine")
            path.write_bytes(b"theirs")

    with pytest.raises(NameTakenError):
        race()
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["b.png", "c.png"]


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path, monkeypatch):
    folder, made = tmp_path / "bundle", tmp_path / ".made"

    def make(name):
        made.mkdir()
        (made / name).write_bytes(b"")

    for name in ("first", "second"):
        make(name)
        replace_folder(made, folder)
        assert (names(tmp_path), names(folder)) == (["bundle"], [name])
    make("third")
    fail_first_rename(monkeypatch, folder)
    with pytest.raises(InputError, match=r"cannot write .*bundle: Permission denied"):
        replace_folder(made, folder)
    assert (names(tmp_path), names(folder)) == ([".made", "bundle"], ["second"])


def test_a_folder_of_something_else_is_not_filled(tmp_path):
    check_folder(tmp_path / "new" / "folder")
    check_folder(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match="choose a new folder"):
        check_folder(tmp_path, "eval.json")
    (tmp_path / "eval.json").write_bytes(b"{}")
    check_folder(tmp_path, "judge.json", "eval.json")


def test_the_home_of_nobody_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(expand("~/a")) == "/home/me/a"
    assert str(expand("~nobody-at-all/a")) == "~nobody-at-all/a"
