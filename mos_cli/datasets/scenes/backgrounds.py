"""Backgrounds: plain colours, gradients from one to another, and simple sceneries with a horizon."""

from dataclasses import dataclass

from mos_cli.datasets.scenes.vocabulary import RGB


@dataclass(frozen=True)
class Background:
    """Two colours, divided by a sharp horizon (in canvas heights from the top); without one, a gradient."""

    top: RGB
    bottom: RGB
    horizon: float | None = None


PAINTS: dict[str, RGB] = {
    "white": (0.98, 0.98, 0.98),
    "grey": (0.6, 0.6, 0.62),
    "black": (0.08, 0.08, 0.09),
    "red": (0.86, 0.2, 0.22),
    "orange": (0.98, 0.6, 0.2),
    "yellow": (0.99, 0.88, 0.36),
    "green": (0.35, 0.7, 0.38),
    "teal": (0.15, 0.6, 0.6),
    "sky blue": (0.58, 0.83, 0.97),
    "blue": (0.2, 0.38, 0.82),
    "purple": (0.52, 0.32, 0.74),
    "pink": (0.98, 0.72, 0.82),
    "brown": (0.5, 0.34, 0.22),
    "beige": (0.94, 0.88, 0.76),
}

SCENERIES: dict[str, tuple[Background, tuple[str, ...]]] = {
    "meadow": (
        Background((0.62, 0.85, 0.98), (0.42, 0.73, 0.32), 0.62),
        ("on a meadow", "on the grass", "in a green field"),
    ),
    "beach": (Background((0.5, 0.8, 0.96), (0.95, 0.85, 0.62), 0.62), ("on a beach", "on the sand", "at the beach")),
    "snow": (Background((0.74, 0.83, 0.92), (0.97, 0.98, 1.0), 0.6), ("in the snow", "on snow", "in a snowy field")),
    "sea": (Background((0.66, 0.87, 0.98), (0.1, 0.42, 0.72), 0.55), ("on the sea", "on the water", "at sea")),
    "night": (Background((0.07, 0.08, 0.22), (0.1, 0.2, 0.16), 0.65), ("at night", "in the dark", "under a night sky")),
    "sunset": (
        Background((0.98, 0.56, 0.34), (0.42, 0.22, 0.3), 0.6),
        ("at sunset", "in the evening", "under an evening sky"),
    ),
    "street": (
        Background((0.72, 0.84, 0.93), (0.42, 0.43, 0.46), 0.66),
        ("on a street", "on the road", "on grey asphalt"),
    ),
    "room": (Background((0.93, 0.86, 0.74), (0.58, 0.39, 0.24), 0.7), ("in a room", "on a wooden floor", "indoors")),
}
"""Simple sceneries, and the phrases for them in captions."""

WHITE = Background(PAINTS["white"], PAINTS["white"])
"""The default background, which captions do not mention."""


def named_background(name: str | None) -> Background:
    """The background of a name: a paint, a scenery, or 'PAINT to PAINT' for a gradient from top to bottom."""
    if name is None:
        return WHITE
    if name in SCENERIES:
        return SCENERIES[name][0]
    top, _, bottom = name.partition(" to ")
    return Background(PAINTS[top], PAINTS[bottom or top])
