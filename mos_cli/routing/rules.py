"""Route rules: their syntax, and the tokens of a prompt that they apply to.

    red=5,6           pin: the word reads these layers and no others
    cat!=0-2          ban: it reads none of these
    dog+=0.5@4        bias: 0.5 is added to the router's logit for layer 4 (-= subtracts)
    ... blocks 0-3 steps 0-7      only there; by default everywhere
    ... slots 0                   in models whose blocks read several layers side by side: only in these places

    *                 every token          red#2     the second "red" of the prompt
    "red apple"       both words           [CLS]     a special token       "picture 1"   a picture that is edited

    last, uniform, fixed:2,5          baselines: the last layer, all layers or these, equally, for every token
    shuffle:7                         the router's choices with the layers permuted at random, block by block

Numbers count from 0, ranges include both ends, case is ignored.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mos_cli.errors import UsageError
from mos_cli.routing.analysis import Spanned, split_words

Baseline = Literal["last", "uniform", "fixed", "shuffle"]
Operator = Literal["=", "!=", "+="]


@dataclass(frozen=True)
class Rule:
    """A rule for the tokens of a word. `nth` (from 1) is an occurrence; None means all.

    `amount` is what "+=" adds to the logits. None for `blocks` or `steps` means all of them. None for `slots` means,
    for each layer, the slot whose own layer is nearest, and all slots for a ban.
    """

    target: str
    operator: Operator
    layers: tuple[int, ...]
    nth: int | None = None
    amount: float = 0.0
    blocks: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None

    def __str__(self) -> str:
        plain = re.fullmatch(r'(?!fixed:|shuffle:)(\*|[^\s"#=!+*-]+(-[^\s"#=!+*-]+)*)', self.target, re.IGNORECASE)
        word = self.target if plain else f'"{self.target}"'
        occurrence = "" if self.nth is None else f"#{self.nth}"
        operator, amount = self.operator, ""
        if operator == "+=":
            operator = "+=" if self.amount >= 0 else "-="
            amount = f"{abs(self.amount):.6f}".rstrip("0").rstrip(".") + "@"
        ranges = [("blocks", self.blocks), ("steps", self.steps), ("slots", self.slots)]
        where = "".join(f" {name} {_written(numbers)}" for name, numbers in ranges if numbers is not None)
        return f"{word}{occurrence}{operator}{amount}{_written(self.layers)}{where}"


@dataclass(frozen=True)
class BaselineRule:
    """Baseline routes for every token, to compare the router with; `layers` of "fixed", `seed` of "shuffle"."""

    name: Baseline
    layers: tuple[int, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        value = {"fixed": f":{_written(self.layers)}", "shuffle": f":{self.seed}"}.get(self.name, "")
        return f"{self.name}{value}"


AnyRule = Rule | BaselineRule


def parse_rules(texts: Sequence[str]) -> tuple[AnyRule, ...]:
    """Parses the rules of a run.

    Raises:
        UsageError: a rule is invalid, or there is a baseline with other rules, which would have no effect.
    """
    rules = tuple(map(parse_rule, texts))
    for rule in rules:
        if isinstance(rule, BaselineRule) and len(rules) > 1:
            raise UsageError(f"the route rule {rule} is for every token: it cannot stand beside others")
    return rules


def parse_rule(text: str) -> AnyRule:
    """Parses one rule; `str` is the inverse.

    Raises:
        UsageError: it is invalid; the message has the position.
    """
    return _Parser(text).rule()


def check_numbers(rules: Sequence[AnyRule], *, layers: int, blocks: int, steps: int, slots: int = 0) -> None:
    """Raises UsageError if a rule names a layer, a block, a step or a slot that a run does not have.

    `slots` is 0 for models without slots.
    """
    for rule in rules:
        named = {"layers": (rule.layers, layers)}
        if isinstance(rule, Rule):
            named |= {"blocks": (rule.blocks or (), blocks), "steps": (rule.steps or (), steps)}
            named |= {"slots": (rule.slots or (), slots)}
        for kind, (numbers, count) in named.items():
            if numbers and not count:
                raise UsageError(f"the route rule {rule} names slots, and the blocks of this model have none")
            if numbers and max(numbers) >= count:
                raise UsageError(f"the route rule {rule} names {kind} that are not there: they are 0 to {count - 1}")


def tokens_of(rule: Rule, prompt: str, tokens: Sequence[Spanned]) -> tuple[int, ...]:
    """The numbers of the tokens that a rule applies to, by their characters; empty if there are none."""
    if rule.target == "*":
        return tuple(range(len(tokens)))
    spans: dict[tuple[int, int], list[int]] = {}
    # An accented letter may be one character or two in the prompt.
    forms = "|".join(dict.fromkeys(_pattern(unicodedata.normalize(form, rule.target)) for form in ("NFC", "NFD")))
    for match in re.finditer(forms, prompt, re.IGNORECASE):
        held = [n for n, token in enumerate(tokens) if max(token.start, match.start()) < min(token.end, match.end())]
        spans[match.span()] = held
    groups = list(spans.values())
    if not groups:
        others = [word for word in split_words(prompt, tokens) if tokens[word.tokens[0]].end == 0]
        groups = [list(word.tokens) for word in others if word.text.casefold() == rule.target.casefold()]
    if rule.nth is not None:
        groups = groups[rule.nth - 1 : rule.nth]
    return tuple(sorted({number for group in groups for number in group}))


def _pattern(target: str) -> str:
    """A pattern for the target's words, with any space between them, but not for parts of words."""
    words = r"\s+".join(map(re.escape, target.split()))
    first, last = (r"(?<!\w)" if target[0].isalnum() else ""), (r"(?!\w)" if target[-1].isalnum() else "")
    return f"{first}{words}{last}"


def no_such_word(rule: Rule, prompt: str, tokens: Sequence[Spanned]) -> UsageError:
    """The error for a rule without tokens in a prompt."""
    there = ", ".join(dict.fromkeys(word.text for word in split_words(prompt, tokens)))
    return UsageError(f"the route rule {rule} finds nothing in this prompt: its words are {there}")


def parse_target(text: str) -> tuple[str, int | None]:
    """Parses the target of a rule, quoted or not: the word or words, and the occurrence.

    Raises:
        UsageError: it is invalid.
    """
    match = re.fullmatch(r'\s*(?:"([^"]*[^"\s][^"]*)"|([^"#]*[^"#\s]))(?:#([1-9]\d{0,3}))?\s*', text)
    if match is None:
        raise UsageError(f'--word {text!r} is not understood: write cat, "red apple", cat#2 or *')
    return (match[1] or match[2]).strip(), None if match[3] is None else int(match[3])


class _Parser:
    """Parses a rule from left to right, so that an error has the position of the first problem."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def rule(self) -> AnyRule:
        self._take(r"\s*")
        rule = self._baseline() or self._word()
        self._take(r"\s*")
        if self.at < len(self.text):
            raise self._wrong(
                "the rule ends" if isinstance(rule, BaselineRule) else "'blocks', 'steps', 'slots' or the end"
            )
        return rule

    def _baseline(self) -> BaselineRule | None:
        if name := self._take(r"(last|uniform)(?=\s*$)"):
            return BaselineRule("last" if name.casefold() == "last" else "uniform")
        if self._take("fixed:"):
            return BaselineRule("fixed", layers=self._numbers("a layer"))
        if self._take("shuffle:"):
            return BaselineRule("shuffle", seed=int(self._need(r"\d{1,9}", "a seed (a whole number)")))
        return None

    def _word(self) -> Rule:
        if self._take('"'):
            target = self._need(r'\s*[^"\s][^"]*(?=")', "a word").strip()
            self._take('"')
        else:
            target = self._need(r'\*|[^\s"#=!+*][^\s"#=!+]*?(?=#|\s*(=|!=|\+=|-=))', "a word, then =, !=, += or -=")
        nth = int(self._need(r"[1-9]\d{0,3}", "a number from 1")) if self._take("#") else None
        operator = self._need(r"\s*(=|!=|\+=|-=)\s*", "=, !=, += or -=").strip()
        amount = 0.0
        if operator in ("+=", "-="):
            amount = float(self._need(r"\d{1,4}(\.\d{1,6})?|\.\d{1,6}", "a number to add"))
            self._need(r"\s*@\s*", "@ and a layer")
        layers, ranges = self._numbers("a layer"), {}
        while taken := self._take(r"\s+(blocks|steps|slots)\s+"):
            name = taken.strip().casefold()
            if name in ranges:
                raise self._wrong(f"{name} only once")
            ranges[name] = self._numbers("a number")
        if operator == "-=":
            operator, amount = "+=", -amount
        return Rule(target, operator, layers, nth, amount, **ranges)  # type: ignore[arg-type]

    def _numbers(self, kind: str) -> tuple[int, ...]:
        """A list such as 0-2,5."""
        numbers: set[int] = set()
        while True:
            first = int(self._need(r"\d{1,4}", f"{kind} (a whole number)"))
            last = int(self._need(r"\d{1,4}", "the end of the range")) if self._take("-") else first
            if last < first:
                raise self._wrong(f"a range that rises, not {first}-{last},")
            numbers |= set(range(first, last + 1))
            if not self._take(r"\s*,\s*"):
                return tuple(sorted(numbers))

    def _take(self, pattern: str) -> str | None:
        match = re.compile(pattern, re.IGNORECASE).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[0]

    def _need(self, pattern: str, expected: str) -> str:
        taken = self._take(pattern)
        if taken is None:
            raise self._wrong(expected)
        return taken

    def _wrong(self, expected: str) -> UsageError:
        rest = self.text[self.at :]
        place = f'before "{rest}"' if rest else "at its end"
        return UsageError(
            f'the route rule "{self.text}" is not understood at character {self.at + 1}: expected {expected} {place}'
        )


def _written(numbers: Sequence[int]) -> str:
    """The numbers as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
