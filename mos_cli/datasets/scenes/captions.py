"""Captions of descriptions: sentences, phrases and keywords that say what is drawn and nothing else."""

from random import Random

from mos_cli.datasets.scenes.backgrounds import SCENERIES
from mos_cli.datasets.scenes.description import Description, Thing
from mos_cli.datasets.scenes.vocabulary import COLOURS, NO_PLURAL, NO_SINGULAR, STYLES, Vocabulary, plural, with_article

NUMBERS = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
SIZES = {"small": ("small", "tiny", "little"), "big": ("big", "large", "huge")}
PLACES = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATIONS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "on": ("on", "on top of", "standing on"),
    "inside": ("inside", "in the middle of"),
    "behind": ("behind",),
}
CONVERSES = {"left": "right", "right": "left", "above": "below", "below": "above"}
ENDS = {"left": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
ARRANGEMENTS = {
    "row": ("in a row", "in a line", "side by side"),
    "pile": ("in a pile", "piled up", "in a heap"),
    "ring": ("in a ring", "in a circle"),
}
LIST = "{things} and {last}"
PAIRS = ("{first} next to {second}", "{first} with {second}", "{first} beside {second}")
PLAIN_BACKGROUNDS = ("on {a_colour} background", "on {a_colour} ground", "in front of {a_colour} wall", "on {colour}")
GRADIENTS = ("on a background from {top} to {bottom}", "on {a_top} to {bottom} gradient")
PICTURES = ("picture", "drawing", "illustration", "image")
SENTENCES = ("{picture} of {scene}", "{picture} showing {scene}", "this is {picture} of {scene}")
STYLED = ("{scene}, {style} style", "{scene} in {style} style", "{scene}, {style}", "{style} style, {scene}")


def caption(description: Description, vocabulary: Vocabulary, random: Random) -> str:
    """One of the captions of a description."""
    phrases = [noun_phrase(thing, vocabulary, random) for thing in description.things]
    subject = _subject(description, phrases, random)
    style = random.choice(STYLES[description.style]) if description.style_named else None
    background = None if description.background is None else background_phrase(description.background, random)
    form = random.random()
    if form < 0.2:
        return _keywords(description, subject, style, random)
    if form < 0.4:
        return _sentence(subject, style, background, random)
    return _phrase(subject, style, background, random)


def noun_phrase(thing: Thing, vocabulary: Vocabulary, random: Random) -> str:
    """'a small red dog', 'three cats', 'cheese'."""
    names = vocabulary.words[thing.word].names_for(counted=thing.count > 1, painted=thing.colour is not None)
    noun = random.choice(names)
    qualities = []
    if thing.size:
        qualities.append(random.choice(SIZES[thing.size]))
    if thing.colour:
        named = COLOURS[thing.colour][1]
        qualities.append(named[0] if random.random() < 0.75 else random.choice(named))
    if thing.count > 1:
        return " ".join([random.choice(NUMBERS[thing.count]), *qualities, plural(noun)])
    phrase = " ".join([*qualities, noun])
    bare = noun in NO_SINGULAR | NO_PLURAL or random.random() < 0.2
    return phrase if bare else with_article(phrase)


def _subject(description: Description, phrases: list[str], random: Random) -> str:
    """The things and their arrangement."""
    if description.place:
        return f"{phrases[0]} {random.choice(PLACES[description.place])}"
    if description.relation:
        return _related(description.relation, phrases, random)
    subject = _listed(phrases, random)
    if description.arrangement is None:
        return subject
    if len(phrases) == 1 and random.random() < 0.3:
        return f"a {description.arrangement} of {phrases[0]}"
    return f"{subject} {random.choice(ARRANGEMENTS[description.arrangement])}"


def _related(relation: str, phrases: list[str], random: Random) -> str:
    first, second = phrases
    form = random.random()
    if relation in CONVERSES and form < 0.15:
        return f"{second} {random.choice(RELATIONS[CONVERSES[relation]])} {first}"
    if relation in ENDS and form < 0.3:
        here, there = ENDS[relation]
        return f"{first} {here} and {second} {there}"
    if relation == "behind" and form < 0.4:
        return f"{second} in front of {first}"
    return f"{first} {random.choice(RELATIONS[relation])} {second}"


def _listed(phrases: list[str], random: Random) -> str:
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 2 and random.random() < 0.4:
        return random.choice(PAIRS).format(first=phrases[0], second=phrases[1])
    return LIST.format(things=", ".join(phrases[:-1]), last=phrases[-1])


def background_phrase(name: str, random: Random) -> str:
    """'on a red background', 'on the beach', 'on a background from red to blue'."""
    if name in SCENERIES:
        return random.choice(SCENERIES[name][1])
    top, _, bottom = name.partition(" to ")
    if bottom:
        return random.choice(GRADIENTS).format(top=top, a_top=with_article(top), bottom=bottom)
    return random.choice(PLAIN_BACKGROUNDS).format(colour=top, a_colour=with_article(top))


def _keywords(description: Description, subject: str, style: str | None, random: Random) -> str:
    words = [subject]
    if style:
        words.insert(random.randint(0, 1), random.choice((style, f"{style} style")))
    if description.background in SCENERIES:
        words.append(description.background)
    elif description.background:
        words.append(f"{description.background} {'gradient' if ' to ' in description.background else 'background'}")
    return ", ".join(words)


def _sentence(subject: str, style: str | None, background: str | None, random: Random) -> str:
    kind = random.choice(PICTURES)
    picture = with_article(f"{style} {kind}" if style else kind)
    scene = f"{subject} {background}" if background else subject
    return random.choice(SENTENCES).format(picture=picture, scene=scene)


def _phrase(subject: str, style: str | None, background: str | None, random: Random) -> str:
    scene = f"{subject} {background}" if background else subject
    return scene if style is None else random.choice(STYLED).format(scene=scene, style=style)
