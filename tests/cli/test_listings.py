"""`mos models ls` and `mos presets ls`."""

import json


def test_listings_are_one_json_object_a_line(mos) -> None:
    for listing in ("presets", "models"):
        lines = mos(listing, "ls", "--json").stdout.splitlines()
        assert len([json.loads(line)["name"] for line in lines]) > 1
    kinds = {row["name"]: row["kind"] for row in map(json.loads, lines)}
    assert (kinds["emoji"], kinds["mos-l"]) == ("bundle", "blueprint")
    assert "blueprint" in mos("models", "ls").stdout
    (line,) = mos("presets", "show", "fast", "--json").stdout.splitlines()
    assert line in mos("presets", "ls", "--json").stdout.splitlines()
