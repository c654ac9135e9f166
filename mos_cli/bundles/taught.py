"""What a model was taught to draw, by the recipe of its training. Imports no torch."""

import json
from dataclasses import dataclass

from mos_cli.bundles.bundle import Bundle


@dataclass(frozen=True)
class TaughtScenes:
    """The scenes that a model was trained on.

    Attributes:
        words: the names of every object, by its name in the art file.
        styles: the sets of the art file, by style.
        alone: whether it was trained on scenes alone, and not on pictures of a user's own as well.
    """

    words: dict[str, list[str]]
    styles: list[str]
    alone: bool

    @property
    def objects(self) -> list[str]:
        """The first name of every object, sorted."""
        return sorted(names[0] for names in self.words.values())


def taught_scenes(bundle: Bundle) -> TaughtScenes | None:
    """The scenes that a model was trained on; None where its recipe is not there or names none."""
    try:
        data = json.loads((bundle.folder / "recipe.json").read_bytes())["data"]
        alone = data.get("kind", "scenes") == "scenes"
        scenes = data if alone else data["scenes"]
        return TaughtScenes(
            {word: list(names) for word, names in scenes["words"].items()}, list(scenes["styles"]), alone
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
