r"""Alternatives in prompts: {red|blue} is one of them, {2$$a|b|c} two, __animals__ a line of a word file.

Which, is decided by the seed of the picture. A picture's recipe has the prompt that came out, and what was chosen.
"""

import re
from functools import cache
from hashlib import sha256
from pathlib import Path

from mos_cli.config.recipe import PromptTemplate
from mos_cli.errors import InputError, UsageError
from mos_cli.utils.folders import presets_folder, user_data_folder
from mos_cli.utils.validation import did_you_mean

_SPECIAL = re.compile(r"\\(?P<escaped>[{}|_])|__(?P<name>[A-Za-z0-9-]+(?:_[A-Za-z0-9-]+)*)__|[{}|]")
_SEVERAL = re.compile(r"(\d{1,4})\$\$(?:([^|{}]*?)\$\$)?")
MAX_DEPTH = 20
MAX_CHOICES = 1000
"""Choices in one prompt: word files that name one another could ask for more than there is time for."""


def expand_prompt(text: str, seed: int) -> tuple[str, PromptTemplate | None]:
    r"""The prompt of a picture, and how it came about; None for a text without alternatives.

    A choice depends on the seed and on its number in the prompt. A backslash before {, }, | or _ makes it a character.

    Raises:
        UsageError: a brace is not closed, there is nothing to choose from, or a word file is unknown.
        InputError: a word file cannot be read, or nothing is left of the prompt.
    """
    chooser = _Chooser(seed)
    prompt = chooser.expand(text)
    if not chooser.choices:
        return prompt, None
    prompt = " ".join(prompt.split())
    if not prompt:
        raise InputError(f"nothing is left of the prompt {text!r} with seed {seed}: give it words that always stand")
    return prompt, PromptTemplate(text=text, choices=tuple(chooser.choices))


def word_folders() -> tuple[Path, Path]:
    """The folders of word files (NAME.txt), the user's before that of the package."""
    return user_data_folder() / "words", presets_folder() / "words"


def word_files() -> dict[str, Path]:
    """The word files by name; one of the user's replaces one of the package."""
    own, shipped = word_folders()
    return {path.stem: path for folder in (shipped, own) for path in sorted(folder.glob("*.txt"))}


class _Chooser:
    """Expands the text of one prompt; `choices` are those made so far, in order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.choices: list[str] = []
        self._number = 0

    def expand(self, text: str, depth: int = 0) -> str:
        if depth > MAX_DEPTH:
            raise UsageError(f"alternatives lie more than {MAX_DEPTH} deep: look for word files that name one another")
        parts, end = [], 0
        while special := _SPECIAL.search(text, end):
            parts.append(text[end : special.start()])
            end = special.end()
            if special["escaped"]:
                parts.append(special["escaped"])
            elif special["name"]:
                parts += self._pick(_lines(_word_file(special["name"])), 1, depth)
            elif special[0] == "{":
                options, end = _options(text, end)
                number, separator = 1, ", "
                if several := _SEVERAL.match(options[0]):
                    number, separator = int(several[1]), several[2] or separator
                    options[0] = options[0][several.end() :]
                if not 1 <= number <= len(options) or len(options) == 1:
                    raise UsageError(
                        f"{text[special.start() : end]} is no choice of {number} of {len(options)}: write "
                        r"{red|blue}, {2$$a|b|c}, or \{ for the character"
                    )
                picked = self._pick(options, number, depth)
                parts.append(separator.join(one.strip() for one in picked) if number > 1 else picked[0])
            else:
                parts.append(special[0])
        return "".join((*parts, text[end:]))

    def _pick(self, options: list[str], number: int, depth: int) -> list[str]:
        """Some of the options, none twice, each expanded in turn."""
        left, picked = list(options), []
        for _ in range(number):
            if self._number == MAX_CHOICES:
                raise UsageError(f"a prompt has at most {MAX_CHOICES} choices")
            digest = sha256(f"{self.seed} {self._number}".encode()).digest()
            self._number += 1
            option = left.pop(int.from_bytes(digest[:8]) % len(left))
            # The place is kept: choices within this one come after it.
            self.choices.append("")
            place = len(self.choices) - 1
            self.choices[place] = self.expand(option, depth + 1)
            picked.append(self.choices[place])
        return picked


def _options(text: str, start: int) -> tuple[list[str], int]:
    """The alternatives of the brace that ends at `start`, and where its closing brace ends."""
    options, depth, begin, end = [], 0, start, start
    while special := _SPECIAL.search(text, end):
        end = special.end()
        if special[0] == "{":
            depth += 1
        elif special[0] in "|}" and depth == 0:
            options.append(text[begin : special.start()])
            begin = end
            if special[0] == "}":
                return options, end
        elif special[0] == "}":
            depth -= 1
    raise UsageError(rf"a {{ is not closed in {text[:60]!r}: write {{red|blue}}, or \{{ for the character")


def _word_file(name: str) -> Path:
    files = word_files()
    if name not in files:
        raise UsageError(
            f"__{name}__ is no word file{did_you_mean(name, files)} (there are: {', '.join(sorted(files))}): put one "
            rf"of your own at {word_folders()[0] / f'{name}.txt'}, or write \_ for the character"
        )
    return files[name]


@cache
def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{path} has no words: write one a line")
    return lines
