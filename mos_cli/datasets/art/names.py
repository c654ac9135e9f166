"""The objects of pictures: code points and icon names of the sets, mapped to one English label."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from mos_cli.datasets.art.sets import read_members

KEYWORDS = 12
"""The largest number of keywords of a picture."""

OBJECT_GROUPS = {"smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
OTHER_GROUPS = {"people-body": "people", "component": "components", "symbols": "symbols", "flags": "flags"}

# Signs that sit in a group of objects: hundred points, zzz, anger, the four card suits, hot springs.
PLAIN_SYMBOLS = {"1f4af", "1f4a4", "1f4a2", "2660", "2663", "2665", "2666", "2668"}

# Older names come last, so that the label of one object is not matched as an alias of another.
SHORTCODES = ("cldr", "joypixels", "iamcal", "github", "emojibase", "emojibase-legacy")


@dataclass(frozen=True)
class Concept:
    """One emoji with its names; `left_out` is the reason why it is not in the art file, None for objects."""

    hexcode: str
    label: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    order: int
    left_out: str | None


class Annotations:
    """Every emoji of an emojibase-data tarball, found by hexcode or by any of its English names."""

    def __init__(self, tarball: Path) -> None:
        folder = "package/en/shortcodes/"
        shortcodes = [f"{folder}{source}.json" for source in SHORTCODES]
        data, groups = "package/en/data.json", "package/meta/groups.json"
        members = {data, groups, *shortcodes}
        files = {name: json.loads(text) for name, text in read_members(tarball, members.__contains__).items()}
        self._concepts = _concepts(files[data], files[groups])
        self._by_name = _index(self._concepts, [files[name] for name in shortcodes])

    def by_hexcode(self, hexcode: str) -> Concept | None:
        """The emoji with these code points, in any spelling (FE0F is ignored)."""
        return self._concepts.get(plain_hexcode(hexcode))

    def by_name(self, name: str) -> Concept | None:
        """The emoji with this label, shortcode or Unicode name, whatever its case and word breaks."""
        hexcode = self._by_name.get(_key(name))
        return None if hexcode is None else self._concepts[hexcode]


def plain_hexcode(hexcode: str) -> str:
    """Code points joined by hyphens, lower case, without the presentation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _concepts(data: list[dict], groups: dict) -> dict[str, Concept]:
    concepts = {}
    for entry in data:
        base = _concept(entry, groups, None)
        concepts[base.hexcode] = base
        for skin in entry.get("skins", ()):
            toned = _concept(skin, groups, "skin tones")
            concepts[toned.hexcode] = toned
    return concepts


def _concept(entry: dict, groups: dict, left_out: str | None) -> Concept:
    hexcode = plain_hexcode(entry["hexcode"])
    # Entries without a group are the letters that flags are spelled with.
    group = groups["groups"][str(entry["group"])] if "group" in entry else "component"
    subgroup = groups["subgroups"][str(entry["subgroup"])] if "subgroup" in entry else ""
    if left_out is None and group not in OBJECT_GROUPS:
        left_out = OTHER_GROUPS[group]
    if left_out is None and hexcode in PLAIN_SYMBOLS:
        left_out = "symbols"
    label = _plain_english(entry["label"])
    keywords = [word for word in dict.fromkeys(map(_plain_english, entry.get("tags", ()))) if word != label]
    return Concept(hexcode, label, tuple(keywords[:KEYWORDS]), group, subgroup, entry.get("order", 0), left_out)


def _index(concepts: dict[str, Concept], shortcodes: list[dict]) -> dict[str, str]:
    index: dict[str, str] = {}
    for concept in concepts.values():
        index.setdefault(_key(concept.label), concept.hexcode)
    for hexcode in concepts:
        if "-" not in hexcode and (name := unicodedata.name(chr(int(hexcode, 16)), "")):
            index.setdefault(_key(name), hexcode)
    for source in shortcodes:
        for hexcode, names in source.items():
            if (plain := plain_hexcode(hexcode)) in concepts:
                for name in [names] if isinstance(names, str) else names:
                    index.setdefault(_key(name), plain)
    return index


def _plain_english(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return " ".join(text.encode("ascii", "ignore").decode().lower().split())


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _plain_english(name).replace("&", "and"))
