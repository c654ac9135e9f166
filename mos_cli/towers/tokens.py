"""The tokens of prompts, for which no weights are needed: this file imports no networks."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding
from transformers import AutoConfig, AutoTokenizer, BatchEncoding

from mos_cli.errors import InputError, ModelError

SAFELY = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Token:
    """A context token and its span of characters in the prompt, empty for special tokens.

    An image token has a cell of a picture instead: `patch` is (picture, row, column), all counted from 0.
    """

    text: str
    start: int
    end: int
    patch: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ImageSpan:
    """The image tokens of a picture: a grid, row by row, from token `first` of its prompt on."""

    first: int
    rows: int
    columns: int


def tokens_of_encoding(prompt: str, encoding: Encoding, prefix: int, image_spans: tuple[ImageSpan, ...]) -> list[Token]:
    """The tokens of a prompt, without padding; see `HiddenStates` for the arguments."""
    real = sum(encoding.attention_mask)
    tokens = [
        Token(text, start - prefix, end - prefix) if prompt and start >= prefix else Token(text, 0, 0)
        for text, (start, end) in zip(encoding.tokens[:real], encoding.offsets[:real], strict=True)
    ]
    for picture, span in enumerate(image_spans):
        for cell in range(span.rows * span.columns):
            index = span.first + cell
            tokens[index] = Token(tokens[index].text, 0, 0, (picture, *divmod(cell, span.columns)))
    return tokens


class PromptTokenizer:
    """Turns prompts into the tokens of the understanding tower in a folder, without its weights.

    Raises:
        ModelError: the folder has no tokenizer or no config that can be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
            self._config = AutoConfig.from_pretrained(folder, **SAFELY).get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoders without a start token have no tokens for an empty prompt: an end token replaces it.
        self._empty_prompt = "" if self.tokenizer("")["input_ids"] else self.tokenizer.eos_token

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self._config.max_position_embeddings)

    def tokens(self, prompt: str) -> tuple[Token, ...]:
        """The tokens of a prompt without pictures; raises InputError if it is too long."""
        return tuple(tokens_of_encoding(prompt, self([""], [prompt]).encodings[0], 0, ()))  # type: ignore[index]

    def __call__(self, prefixes: list[str], prompts: list[str], least: int | None = None) -> BatchEncoding:
        """Each prompt after its prefix, padded at its end; raises InputError if one is too long.

        Args:
            least: pad to this number of tokens; None for that of the longest.
        """
        batch = self.tokenizer(
            [prefix + (prompt or self._empty_prompt) for prefix, prompt in zip(prefixes, prompts, strict=True)],
            return_tensors="pt",
            padding=True if least is None else "max_length",
            max_length=least,
            padding_side="right",
            verbose=False,
        )
        if (tokens := batch["input_ids"].shape[1]) > self.max_tokens:
            pictures = ", its pictures included" if any(prefixes) else ""
            raise InputError(
                f"the prompt has {tokens} tokens{pictures}, the model reads {self.max_tokens}: shorten it"
                + (", or give fewer or smaller pictures" if pictures else "")
            )
        return batch
