"""`mos models ls` and `mos presets ls`."""

import json
import re

import pytest


def test_listings_are_one_json_object_a_line(mos) -> None:
    for listing in ("presets", "models"):
        lines = mos(listing, "ls", "--json").stdout.splitlines()
        assert len([json.loads(line)["name"] for line in lines]) > 1
    kinds = {row["name"]: row["kind"] for row in map(json.loads, lines)}
    assert (kinds["emoji"], kinds["mos-l"]) == ("bundle", "blueprint")
    assert "blueprint" in mos("models", "ls").stdout
    (line,) = mos("presets", "show", "fast", "--json").stdout.splitlines()
    assert line in mos("presets", "ls", "--json").stdout.splitlines()


@pytest.mark.parametrize("listing", [("models", "ls"), ("presets", "ls"), ("plan", "mos-s", "--max-vram", "24")])
def test_a_table_in_a_pipe_is_as_wide_as_it_is(mos, listing: tuple[str, ...]) -> None:
    result = mos(*listing)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith(" ")] == []
    # No row was broken to fit 80 columns: a continuation would begin with spaces.
    if listing[-1] == "ls":
        assert [line for line in lines if re.match("  ", line)] == []
