"""Random edits: a picture, an instruction, and the picture with only that changed.

Objects that the instruction does not name are the same before and after. An instruction has one answer: an amount, size
or place that it does not name follows from the picture.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Literal, get_args

from mos_cli.datasets.scenes.captions import RELATIONS, noun_phrase
from mos_cli.datasets.scenes.composer import Composer, background_for
from mos_cli.datasets.scenes.composition import (
    APART,
    Composition,
    Item,
    choose_spots,
    direction,
    free_spots,
    relation_of,
)
from mos_cli.datasets.scenes.description import MOST_OBJECTS, Thing, held_out_style
from mos_cli.datasets.scenes.instructions import (
    ALL,
    backdrop,
    counted,
    direction_phrase,
    instruct,
    number,
    result,
    style_name,
    where,
)
from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.referring import colour_name, refer
from mos_cli.datasets.scenes.vocabulary import Vocabulary, plural

EditKind = Literal[
    "add",
    "remove",
    "replace",
    "move",
    "resize",
    "recolour",
    "count",
    "style",
    "style all",
    "background",
    "swap",
    "mirror",
    "nothing",
]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
OFTEN = {"mirror": 0.5, "nothing": 0.5}
"""The weights of the kinds; 1 for the others."""
BY_RESULT = {"remove", "replace", "recolour", "count", "style all", "background", "nothing"}
"""Kinds whose result a caption can describe without positions."""
SMALLER = 0.55
"""The factor by which an object that is made smaller shrinks; one that is made bigger grows by its inverse."""
Change = tuple[Composition, Composition, str]
"""Before, after, instruction."""


@dataclass(frozen=True)
class Edit:
    """An instruction with the pictures before and after it, as compositions and as what the compositor draws."""

    kind: EditKind
    instruction: str
    was: Composition
    now: Composition
    before: Scene
    after: Scene


@dataclass(frozen=True)
class EditWriter:
    """Makes random edits.

    Args:
        held_out_pairs: every edit shows a pair of words held out of training, for evaluation; by default none does.
    """

    vocabulary: Vocabulary
    held_out_pairs: bool = False

    def write(self, random: Random, kind: EditKind | None = None) -> Edit:
        """One edit, of a random kind unless one is given; all randomness comes from `random`."""
        if kind is None:
            (kind,) = random.choices(EDIT_KINDS, [OFTEN.get(kind, 1.0) for kind in EDIT_KINDS])
        make = getattr(self, f"_{kind.replace(' ', '_')}")
        while (change := make(random)) is None:
            pass
        was, now, instruction = change
        # A caption does not mention a white background, so a change to it needs an instruction.
        has_caption = (
            kind in BY_RESULT and 1 <= len(now.items) < MOST_OBJECTS and (kind != "background" or now.background)
        )
        if has_caption and random.random() < 0.2 and (kind == "count" or not _mistakable(was, now)):
            instruction = result(now, self.vocabulary, random, style_named=kind == "style all")
        return Edit(kind, instruction, was, now, was.scene(self.vocabulary), now.scene(self.vocabulary))

    def _add(self, random: Random) -> Change | None:
        style, count = self._composer.style(random), random.choices((1, 2, 3), (5, 3, 2))[0]
        new, *words = self._composer.words(count + 1, (style,), random)
        if count == 1 and random.random() < 0.2:
            now = self._composer.stacked(words[0], new, style, random)
            was = now.without(1)
            place = f"{random.choice(RELATIONS['on'])} {self._refer(was, 0, random)}"
            return was, now, instruct("add at", random, new=self._phrase(now.items[1], random), where=place)
        was, free = self._composer.picture(words, style, random, spare=1)
        item = self._composer.item(new, style, free[0], random, {was.background or "white"})
        now = replace(was, items=(*was.items, item))
        phrase = self._phrase(item, random)
        # The place is left out only where no other spot is free.
        if len(free) == 1 and random.random() < 0.3:
            return was, now, instruct("add", random, new=phrase)
        return was, now, instruct("add at", random, new=phrase, where=self._where(item, was, random))

    def _remove(self, random: Random) -> Change | None:
        style, count = self._composer.style(random), self._composer.count(random)
        words = self._composer.words(count, (style,), random)
        if count == 2 and random.random() < 0.2:
            was = self._composer.stacked(words[0], words[1], style, random)
            base, it = (self._refer(was, index, random) for index in range(2))
            return None if not base or not it else (was, was.without(1), instruct("take off", random, it=it, base=base))
        was, _ = self._composer.picture(words, style, random)
        index = random.randrange(count)
        it = self._refer(was, index, random)
        if it is None:
            return None
        if count > 1 and random.random() < 0.12:
            now = replace(was, items=(was.items[index],))
            return was, now, instruct("keep only", random, it=it)
        return was, was.without(index), instruct("remove", random, it=it)

    def _replace(self, random: Random) -> Change | None:
        style, count = self._composer.style(random), self._composer.count(random)
        new, *words = self._composer.words(count + 1, (style,), random)
        was, _ = self._composer.picture(words, style, random)
        index = count - 1
        old = was.items[index]
        item = self._composer.item(new, style, (old.x, old.y, old.side), random, {was.background or "white"})
        it = self._refer(was, index, random)
        if it is None:
            return None
        return was, was.with_item(index, item), instruct("replace", random, it=it, new=self._phrase(item, random))

    def _move(self, random: Random) -> Change | None:
        style, count = self._composer.style(random), self._composer.count(random, most=MOST_OBJECTS - 1)
        was, free = self._composer.picture(self._composer.words(count, (style,), random), style, random, spare=1)
        index = random.randrange(count)
        item = was.items[index].at(*free[0][:2])
        it = self._refer(was, index, random)
        if it is None:
            return None
        form = random.random()
        if form < 0.4:
            instruction = instruct(
                "move", random, it=it, to=direction_phrase(direction(was.items[index], item), random)
            )
        else:
            instruction = instruct("move at", random, it=it, where=self._where(item, was, random, index))
        return was, was.with_item(index, item), instruction

    def _resize(self, random: Random) -> Change | None:
        was, index, it = self._one(random)
        large = was.items[index]
        if it is None or large.side < 0.25:
            return None
        shrunk = was.with_item(index, replace(large, side=round(large.side * SMALLER, 4)))
        if random.random() < 0.5:
            return was, shrunk, instruct(random.choice(("half", "smaller", "smaller")), random, it=it)
        it = self._refer(shrunk, index, random)
        instruction = random.choice(("twice", "bigger", "bigger"))
        return None if it is None else (shrunk, was, instruct(instruction, random, it=it))

    def _recolour(self, random: Random) -> Change | None:
        was, index, it = self._one(random)
        item = was.items[index]
        if it is None or item.word not in self._composer.paintable:
            return None
        colour = self._composer.paint(random, {was.background or "white", *self._composer.colours_of(item)})
        instruction = instruct("recolour", random, it=it, colour=colour_name(colour, random))
        return was, was.with_item(index, replace(item, colour=colour)), instruction

    def _count(self, random: Random) -> Change | None:
        """Removes the last objects in reading order, or adds ones of the same size on the first free spots."""
        style = self._composer.style(random)
        others = 1 if self.held_out_pairs else random.choices((0, 1, 2), (5, 3, 2))[0]
        before, after = random.sample(range(1, MOST_OBJECTS - others + 1), 2)
        word, *words = self._composer.words(1 + others, (style,), random)
        names = self.vocabulary.words[word].names_for(counted=True, painted=word in self._composer.paintable)
        if not names:
            return None
        spots = choose_spots(max(before, after) + others, random)
        taken = random.sample(range(len(spots)), before + others)
        rest = tuple(
            self._composer.item(other, style, spots[at], random)
            for other, at in zip(words, taken[before:], strict=True)
        )
        colour = self._composer.paint(random) if word in self._composer.paintable and random.random() < 0.25 else None
        alike = [Item(word, style, *spots[at], colour) for at in sorted(taken[:before])]
        was = Composition((*alike, *rest), background_for((*alike, *rest), random))
        new = [alike[0].at(x, y) for x, y, _ in free_spots(was.items, max(0, after - before))]
        now = replace(was, items=(*alike[:after], *new, *rest))
        one = random.choice(names)
        if colour and random.random() < 0.5:
            one = f"{colour_name(colour, random)} {one}"
        difference = abs(after - before)
        form = "one " * (difference == 1) + ("more" if after > before else "less")
        if after == 1 and random.random() < 0.5:
            form = "leave one"
        instruction = instruct(
            "count" if random.random() < 0.6 else form,
            random,
            one=one,
            many=plural(one),
            number=number(after, random),
            target=counted(after, one, random),
            count=counted(before, one, random) if others else number(before, random),
            difference=number(difference, random),
        )
        return was, now, instruction

    def _style(self, random: Random) -> Change | None:
        was, index, it = self._one(random, least=2)
        item = was.items[index]
        styles = [
            style for style in self.vocabulary.styles if style != item.style and not held_out_style(item.word, style)
        ]
        if it is None or not styles:
            return None
        style = random.choice(styles)
        instruction = instruct("style", random, it=it, style=style_name(style, random))
        return was, was.with_item(index, replace(item, style=style)), instruction

    def _style_all(self, random: Random) -> Change | None:
        styles = random.sample(self.vocabulary.styles, 2)
        was, _ = self._composer.picture(
            self._composer.words(self._composer.count(random), tuple(styles), random), styles[0], random
        )
        now = replace(was, items=tuple(replace(item, style=styles[1]) for item in was.items))
        named = style_name(styles[1], random)
        return was, now, instruct("style all", random, it=random.choice(ALL), style=named)

    def _background(self, random: Random) -> Change | None:
        was = self._picture(random)
        now = replace(was, background=background_for(was.items, random))
        if now == was:
            return None
        form = "no background" if now.background is None and random.random() < 0.5 else "background"
        return was, now, instruct(form, random, all=random.choice(ALL), **backdrop(now.background, random))

    def _swap(self, random: Random) -> Change | None:
        was = self._picture(random, least=2)
        pair = random.sample(range(len(was.items)), 2)
        one, other = (was.items[index] for index in pair)
        if (one.word, one.colour) == (other.word, other.colour):
            return None
        now = was.with_item(pair[0], one.at(other.x, other.y)).with_item(pair[1], other.at(one.x, one.y))
        if len(was.items) == 2 and random.random() < 0.2:
            return was, now, instruct("swap both", random)
        it, its = (self._refer(was, index, random) for index in pair)
        return None if not it or not its else (was, now, instruct("swap", random, it=it, other=its))

    def _mirror(self, random: Random) -> Change | None:
        was = self._picture(random)
        if all(abs(item.x - 0.5) < APART / 2 for item in was.items):
            return None
        return was, was.mirrored(), instruct("mirror", random, all=random.choice(ALL))

    def _nothing(self, random: Random) -> Change:
        was = self._picture(random)
        return was, was, instruct("nothing", random)

    def _one(self, random: Random, least: int = 1) -> tuple[Composition, int, str | None]:
        """A picture, the number of one of its objects, and a phrase for it."""
        was = self._picture(random, least)
        index = random.randrange(len(was.items))
        return was, index, self._refer(was, index, random)

    def _picture(self, random: Random, least: int = 1) -> Composition:
        style, count = self._composer.style(random), self._composer.count(random, least)
        return self._composer.picture(self._composer.words(count, (style,), random), style, random)[0]

    def _refer(self, was: Composition, index: int, random: Random) -> str | None:
        return refer(index, was.items, self.vocabulary, random)

    def _phrase(self, item: Item, random: Random) -> str:
        """'a red dog'."""
        return noun_phrase(Thing(word=item.word, colour=item.colour), self.vocabulary, random)

    def _where(self, item: Item, was: Composition, random: Random, index: int | None = None) -> str:
        """The place of a new object, or of the moved object `index`, on the canvas or relative to another object."""
        if random.random() < 0.5:
            for anchor in random.sample(range(len(was.items)), len(was.items)):
                relation = relation_of(item, was.items[anchor])
                called = None if anchor == index else self._refer(was, anchor, random)
                if relation and called:
                    return f"{random.choice(RELATIONS[relation])} {called}"
        return where(item.place, random)

    @cached_property
    def _composer(self) -> Composer:
        return Composer(self.vocabulary, self.held_out_pairs)


def _mistakable(was: Composition, now: Composition) -> bool:
    """Whether an object that is removed or changed looks like one that stays, so that a caption is ambiguous."""
    kept = {(item.word, item.colour) for item in was.items if item in now.items}
    return any((item.word, item.colour) in kept for item in was.items if item not in now.items)
