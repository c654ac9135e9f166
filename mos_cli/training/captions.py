"""Writes scenes with captions that say exactly what is drawn: objects, style, size, place, relation and ground."""

from dataclasses import dataclass
from random import Random

from mos_cli.training.scenes import RGB, Placed, Scene

STYLES = {
    "fluent-3d": ("3d", "3d render"),
    "fluent": ("gradient", "soft gradient"),
    "fluent-flat": ("flat", "flat vector"),
    "noto": ("noto",),
    "noto-v1": ("vintage", "retro"),
    "fxemoji": ("fx",),
    "twemoji": ("twemoji",),
    "emojione": ("emojione",),
}
"""How captions name the hand of each art set."""

UNNAMED_GROUND = "white"
GROUNDS: dict[str, RGB] = {
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

PLACES = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}

RELATIONS = {
    # phrase: centre of the first object, centre of the second
    "to the left of": ((0.27, 0.5), (0.73, 0.5)),
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "and": ((0.27, 0.5), (0.73, 0.5)),
    "next to": ((0.27, 0.5), (0.73, 0.5)),
    "to the right of": ((0.73, 0.5), (0.27, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "over": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
    "under": ((0.5, 0.73), (0.5, 0.27)),
}

PLURALS = {"cherries", "fries", "french fries", "glasses", "sunglasses", "headphones", "grapes", "pancakes", "books"}
PLURALS |= {"scissors", "scales"}
UNCOUNTED = {
    "bread",
    "corn",
    "milk",
    "coffee",
    "beer",
    "sushi",
    "fire",
    "chocolate",
    "cheese",
    "popcorn",
    "poo",
}


@dataclass(frozen=True)
class Word:
    """A concept the model learns: the names captions use for it, and its picture's row in each style."""

    names: tuple[str, ...]
    pictures: dict[str, int]


@dataclass(frozen=True)
class SceneWriter:
    """Draws scenes and captions at random.

    Args:
        words: the vocabulary; every word has a picture in every style.
        styles: the art sets, the first of which is also what an unnamed style means.
        pairs: share of scenes with two objects.
    """

    words: tuple[Word, ...]
    styles: tuple[str, ...]
    pairs: float

    def write(self, random: Random) -> Scene:
        """One scene; everything random comes from `random`."""
        style = self.styles[0] if random.random() < 0.2 else random.choice(self.styles)
        named = style != self.styles[0] or random.random() < 0.4
        style_name = random.choice(STYLES[style]) if named else None
        ground = UNNAMED_GROUND if random.random() < 0.35 else random.choice(list(GROUNDS))
        ground_named = ground != UNNAMED_GROUND or random.random() < 0.3
        if random.random() < self.pairs:
            objects, subject = self._pair(style, random)
        else:
            objects, subject = self._single(style, random)
        caption = _caption(subject, style_name, ground if ground_named else None, random)
        return Scene(objects, GROUNDS[ground], caption)

    def _single(self, style: str, random: Random) -> tuple[tuple[Placed, ...], str]:
        word = random.choice(self.words)
        noun = random.choice(word.names)
        x, y, side, place, size = 0.5, 0.5, random.uniform(0.72, 0.82), "", ""
        kind = random.random()
        if kind < 0.12:
            place, (x, y) = random.choice(list(PLACES.items()))
            side = random.uniform(0.42, 0.48)
        elif kind < 0.2:
            size, side = random.choice(["small", "tiny"]), random.uniform(0.38, 0.46)
        elif kind < 0.28:
            size, side = random.choice(["big", "large"]), random.uniform(0.9, 0.96)
        phrase = " ".join(part for part in (_noun_phrase(noun, size, random), place) if part)
        return (Placed(word.pictures[style], _near(x, random), _near(y, random), side),), phrase

    def _pair(self, style: str, random: Random) -> tuple[tuple[Placed, ...], str]:
        first, second = random.sample(self.words, 2)
        relation, centres = random.choice(list(RELATIONS.items()))
        objects = tuple(
            Placed(word.pictures[style], _near(x, random), _near(y, random), random.uniform(0.42, 0.48))
            for word, (x, y) in zip((first, second), centres, strict=True)
        )
        phrases = [_noun_phrase(random.choice(word.names), "", random) for word in (first, second)]
        return objects, f"{phrases[0]} {relation} {phrases[1]}"


def _noun_phrase(noun: str, size: str, random: Random) -> str:
    words = f"{size} {noun}".strip()
    if noun in UNCOUNTED | PLURALS or random.random() < 0.3:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _caption(subject: str, style: str | None, ground: str | None, random: Random) -> str:
    """Puts the parts into one of several forms: a sentence, or keywords after commas."""
    if style is not None:
        subject = random.choice(
            [
                f"{subject}, {style} style",
                f"{subject} in {style} style",
                f"{style} drawing of {subject}",
                f"{subject}, {style}",
                f"{style} style, {subject}",
            ]
        )
    if ground is not None:
        article = "an" if ground[0] in "aeiou" else "a"
        subject += random.choice(
            [
                f" on {article} {ground} background",
                f", {ground} background",
                f" on {ground}",
                f" on {article} {ground} ground",
            ]
        )
    return subject


def _near(place: float, random: Random) -> float:
    return place + random.uniform(-0.02, 0.02)
