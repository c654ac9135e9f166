"""The benchmarks that draw run with a model of any defaults, here the smallest."""

import sys

import batching
import caching
import pytest
import solvers

from mos_cli.bundles.bundle import Bundle


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (batching, ["--rounds", "1", "--steps", "2", "--device", "cpu"]),
        (caching, ["--prompts", "1", "--steps", "8"]),
        (solvers, ["--prompts", "1", "--steps", "2", "3"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_table_is_printed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys, script, options) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--model", str(bundle.folder), *options])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert len({row.count("|") for row in rows}) == 1
