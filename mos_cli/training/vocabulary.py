"""From an art file to the words a model learns: names, and a picture in every style.

Shapes: V pictures, H x W a picture's size.
"""

from torch import Tensor

from mos_cli.errors import InputError
from mos_cli.training.art.file import Art
from mos_cli.training.captions import Word
from mos_cli.training.recipe import DataTable


def choose_words(art: Art, data: DataTable) -> tuple[tuple[Word, ...], Tensor]:
    """The recipe's words with their pictures, and the sprites they use alone, uint8 [V, H, W, 4].

    Raises:
        InputError: a word has no picture in one of the styles.
    """
    found = {(picture.name, picture.style): picture.index for picture in art.manifest.pictures}
    words, rows = [], []
    for name, names in data.words.items():
        missing = [style for style in data.styles if (name, style) not in found]
        if missing:
            raise InputError(f"the art file has no '{name}' in {', '.join(missing)}: drop the word or the style")
        pictures = {style: len(rows) + offset for offset, style in enumerate(data.styles)}
        rows += [found[name, style] for style in data.styles]
        words.append(Word(names, pictures))
    return tuple(words), art.pixels[rows]
