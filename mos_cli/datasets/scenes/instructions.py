"""The phrasings of edit instructions: orders, requests, and captions of the result."""

from random import Random

from mos_cli.datasets.scenes.backgrounds import SCENERIES
from mos_cli.datasets.scenes.captions import NUMBERS, PLACES, background_phrase, caption
from mos_cli.datasets.scenes.composition import Composition
from mos_cli.datasets.scenes.description import Description, Thing
from mos_cli.datasets.scenes.vocabulary import STYLES, Vocabulary, plural, with_article

ORDERS: dict[str, tuple[str, ...]] = {
    "add": ("add {new}", "add {new}", "put {new} in the picture", "insert {new}", "draw {new} too", "include {new}"),
    "add at": ("add {new} {where}", "add {new} {where}", "put {new} {where}", "place {new} {where}"),
    "remove": (
        "remove {it}",
        "remove {it}",
        "delete {it}",
        "take away {it}",
        "erase {it}",
        "get rid of {it}",
        "take {it} out",
    ),
    "take off": ("take {it} off {base}", "remove {it} from {base}"),
    "keep only": ("remove everything except {it}", "keep only {it}", "remove all but {it}"),
    "replace": (
        "replace {it} with {new}",
        "replace {it} by {new}",
        "turn {it} into {new}",
        "change {it} to {new}",
        "swap {it} for {new}",
        "exchange {it} for {new}",
        "put {new} in place of {it}",
    ),
    "move": ("move {it} {to}", "move {it} {to}", "shift {it} {to}"),
    "move at": ("put {it} {where}", "place {it} {where}", "move {it} so that it is {where}"),
    "bigger": ("make {it} bigger", "make {it} larger", "enlarge {it}", "scale {it} up", "make {it} big"),
    "twice": ("make {it} twice as big", "double the size of {it}"),
    "smaller": ("make {it} smaller", "shrink {it}", "scale {it} down", "make {it} small", "make {it} tiny"),
    "half": ("make {it} half as big", "halve the size of {it}"),
    "recolour": (
        "make {it} {colour}",
        "paint {it} {colour}",
        "colour {it} {colour}",
        "color {it} {colour}",
        "turn {it} {colour}",
        "change the colour of {it} to {colour}",
        "change the color of {it} to {colour}",
        "give {it} a {colour} colour",
    ),
    "count": ("make it {target}", "change the number of {many} to {number}", "turn {count} into {target}"),
    "one more": ("add another {one}", "add one more {one}"),
    "more": ("add {difference} more {many}",),
    "one less": ("take away one {one}", "remove one of the {many}"),
    "less": ("take away {difference} {many}", "remove {difference} of the {many}"),
    "leave one": ("leave only one {one}", "keep just one {one}"),
    "style": (
        "make {it} {style} style",
        "draw {it} in {style} style",
        "redraw {it} in {style} style",
        "change the style of {it} to {style}",
        "turn {it} into {style} style",
    ),
    "background": (
        "change the background to {backdrop}",
        "make the background {backdrop}",
        "replace the background with {backdrop}",
        "put {all} {on_background}",
        "show {all} {on_background}",
        "place {all} {on_background}",
    ),
    "no background": ("remove the background", "make the background plain white"),
    "swap": (
        "swap {it} and {other}",
        "swap {it} with {other}",
        "exchange {it} and {other}",
        "switch the places of {it} and {other}",
        "let {it} and {other} trade places",
    ),
    "swap both": ("swap the two", "swap both objects", "let both trade places", "switch their places"),
    "mirror": (
        "mirror {all}",
        "mirror {all} left to right",
        "flip {all} horizontally",
        "flip {all} left to right",
        "show {all} as in a mirror",
    ),
    "nothing": (
        "leave it as it is",
        "keep everything as it is",
        "keep everything",
        "change nothing",
        "do nothing",
        "don't change anything",
        "keep the picture",
        "leave everything alone",
    ),
}
"""Phrasings of each form as an order."""

WISHES: dict[str, tuple[str, ...]] = {
    "add": ("i want {new} in it", "there should be {new} too"),
    "add at": ("there should be {new} {where}", "i'd like {new} {where}", "i want {new} {where}"),
    "remove": ("without {it}", "i don't want {it}", "{it} should go", "the picture without {it}"),
    "keep only": ("only {it} should stay",),
    "replace": ("{new} instead of {it}", "{it} should be {new}", "i'd rather have {new} than {it}"),
    "move": ("{it} should move {to}",),
    "move at": ("{it} should be {where}", "i want {it} {where}"),
    "bigger": ("{it} should be bigger", "i'd like {it} to be larger"),
    "smaller": ("{it} should be smaller", "i'd like {it} to be smaller"),
    "recolour": ("{it} should be {colour}", "i want {it} in {colour}", "i'd like {it} to be {colour}"),
    "count": ("there should be {target}", "i want {target}", "{target} instead of {count}"),
    "style": ("{it} should be {style} style", "i want {it} in {style} style"),
    "background": ("the background should be {backdrop}", "i want {all} {on_background}"),
    "swap": ("{it} and {other} should trade places",),
    "mirror": ("the mirror image", "i want {all} mirrored"),
    "nothing": ("no changes", "it is fine as it is", "nothing should change", "the same picture"),
}
"""Phrasings of each form as a wish."""

ORDERS["style all"], WISHES["style all"] = ORDERS["style"], WISHES["style"]
WHOLE = {"keep only", "style all", "mirror", "nothing"}
"""Forms that name the whole picture, so that no phrase about the rest may follow."""

MANNERS = ("please {}", "{}, please", "could you {}?", "can you {}?", "just {}", "now {}", "i want you to {}")
KEEPING = (" and keep the rest", " and leave the rest alone", ", nothing else", " but change nothing else")
ALL = ("it", "everything", "the picture", "the whole picture", "the image")
MIDDLE = ("in the middle", "in the centre", "in the center")
TOWARDS = {
    "left": ("to the left", "left", "to the left side"),
    "right": ("to the right", "right", "to the right side"),
    "top": ("to the top", "up"),
    "bottom": ("to the bottom", "down"),
}
NAMED_BACKDROPS = {"snow": "snow", "sea": "the sea", "night": "night"}


def instruct(form: str, random: Random, **slots: str) -> str:
    """One of the phrasings of a form.

    Args:
        form: a key of `ORDERS`.
        slots: the values of the fields in the form's phrasings.
    """
    wishes = WISHES.get(form, ())
    if wishes and random.random() < 0.3:
        return random.choice(wishes).format_map(slots)
    order = random.choice(ORDERS[form]).format_map(slots)
    manners = random.random()
    if manners < 0.2:
        return random.choice(MANNERS).format(order)
    return order + random.choice(KEEPING) if manners < 0.3 and form not in WHOLE else order


def where(place: str | None, random: Random) -> str:
    """'in the top left corner', 'in the middle'."""
    return random.choice(MIDDLE if place is None else PLACES[place])


def direction_phrase(place: str | None, random: Random) -> str:
    """'to the left', 'to the top left corner', 'to the middle'."""
    if place is None:
        return random.choice(("to the middle", "to the centre", "to the center"))
    if place in TOWARDS:
        return random.choice(TOWARDS[place])
    return random.choice((f"to the {place}", f"to the {place} corner"))


def style_name(style: str, random: Random) -> str:
    """One of the names of a style in captions."""
    return random.choice(STYLES[style])


def number(count: int, random: Random) -> str:
    """'three', '3'."""
    return "one" if count == 1 else random.choice(NUMBERS[count][:3])


def counted(count: int, noun: str, random: Random) -> str:
    """'one cat', 'three cats'."""
    return f"{number(count, random)} {noun if count == 1 else plural(noun)}"


def backdrop(background: str | None, random: Random) -> dict[str, str]:
    """Two phrases for a background: 'a meadow' (backdrop) and 'on the grass' (on_background)."""
    name = background or "white"
    if name in SCENERIES:
        thing = NAMED_BACKDROPS.get(name) or with_article(name)
    else:
        thing = f"a gradient from {name}" if " to " in name else name
    return {"backdrop": thing, "on_background": background_phrase(name, random)}


def result(composition: Composition, vocabulary: Vocabulary, random: Random, *, style_named: bool) -> str:
    """A caption of the result: its things in one style, without their positions."""
    counts: dict[tuple[str, str | None], int] = {}
    for item in composition.items:
        key = item.word, item.colour
        counts[key] = counts.get(key, 0) + 1
    description = Description(
        things=tuple(Thing(word=word, colour=colour, count=count) for (word, colour), count in counts.items()),
        style=composition.items[0].style,
        style_named=style_named,
        background=composition.background,
    )
    return caption(description, vocabulary, random)
