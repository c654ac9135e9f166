"""What a model was taught to draw, by the recipe of its training. Imports no torch."""

import json
import re
from dataclasses import dataclass
from typing import Any

from mos_cli.bundles.bundle import Bundle

PLURALS = {"y": "ies", "f": "ves", "fe": "ves", "man": "men", "mouse": "mice", "ox": "oxen", "die": "dice"}
"""Ends of words and of their plurals, besides -s and -es."""


@dataclass(frozen=True)
class TaughtScenes:
    """The scenes that a model was trained on.

    Attributes:
        words: the names of every object, by its name in the art file.
        styles: the sets of the art file, by style.
        alone: whether it was trained on scenes alone, and not on pictures of a user's own as well.
    """

    words: dict[str, list[str]]
    styles: Any
    alone: bool

    @property
    def objects(self) -> list[str]:
        """The first name of every object, sorted."""
        return sorted(names[0] for names in self.words.values())

    def names_one(self, prompt: str) -> bool:
        """Whether a prompt has the name of one of the objects, in the singular or the plural, as words of its own."""
        names = ("[ -]?".join(map(_forms, name.split())) for names in self.words.values() for name in names)
        return re.search(rf"\b({'|'.join(names)})\b", prompt.casefold()) is not None


def _forms(word: str) -> str:
    """The pattern of a word in the singular and the plural."""
    plurals = [word.removesuffix(end) + plural for end, plural in PLURALS.items() if word.endswith(end)]
    return f"(?:{'|'.join([f'{re.escape(word)}(?:e?s)?', *map(re.escape, plurals)])})"


def taught_scenes(bundle: Bundle) -> TaughtScenes | None:
    """The scenes that a model was trained on; None where its recipe is not there or names none."""
    try:
        data = json.loads((bundle.folder / "recipe.json").read_bytes())["data"]
        alone = data.get("kind", "scenes") == "scenes"
        scenes = data if alone else data["scenes"]
        return TaughtScenes({word: list(names) for word, names in scenes["words"].items()}, scenes["styles"], alone)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
