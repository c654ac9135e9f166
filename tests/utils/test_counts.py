"""Numbers of things, in words."""

from mos_cli.utils.counts import counted


def test_one_of_a_thing_takes_no_plural() -> None:
    assert [counted(number, "file") for number in (0, 1, 2, 1200)] == ["0 files", "1 file", "2 files", "1,200 files"]
