"""Reading a prompt: the pipeline's own `encode_prompt` runs once with the language model, and then once for each of its
layers, with a table in the language model's place.

Shapes: B rows, L tokens of the language model, T text tokens of the transformer, Q tokens of the prompt among them, M
layers, S width of a state, E width of an embedding (one state for each slot).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mos_cli.adapters.facts import BaseModel, replaced
from mos_cli.errors import InputError
from mos_cli.routing.trace import TraceToken


@dataclass(frozen=True)
class EncodedText:
    """A prompt as a base model reads it.

    Args:
        prompt: as the pipeline read it, which may have cleaned it.
        tokens: the tokens of the prompt; those that the base model adds (template, padding) are left out.
        positions_Q: their positions among the text tokens.
        embeds_TE, mask_T: what the pipeline gives to the transformer.
        layers_QME: the embeddings of the prompt's tokens if every slot read layer m.
        states_QS: the states of the tokens at layer 0, for the router.
    """

    prompt: str
    tokens: tuple[TraceToken, ...]
    positions_Q: Tensor
    embeds_TE: Tensor
    mask_T: Tensor | None
    layers_QME: Tensor
    states_QS: Tensor

    def to(self, device: torch.device) -> "EncodedText":
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Template:
    """The text that a pipeline puts around a prompt."""

    before: str
    after: str


class _TokensError(Exception):
    """Ends the reading of a prompt once its tokens are known."""


def read_template(base: BaseModel, pipe: Any) -> Template:
    """The template of a pipeline; the language model is not run."""
    first, second = (_text(pipe, _tokens(base, pipe, letter)) for letter in "ab")
    start = next(n for n, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return Template(first[:start], first[start + 1 :])


def encode_text(base: BaseModel, pipe: Any, prompt: str, own_layers: Sequence[int], template: Template) -> EncodedText:
    """Reads a prompt. Layer m stands in for a layer that the base model reads, scaled token by token to its size.

    Raises:
        InputError: the prompt is too long, or the tokenizer cannot give the characters of its tokens.
    """
    ids_L, real_L = _tokens(base, pipe, prompt)
    if bool(real_L.all()):
        raise InputError(f"the prompt is too long: the base model takes less than {len(ids_L)} tokens")
    read, spans = _spans(pipe, (ids_L, real_L), template, prompt)
    output, (embeds_TE, mask_T) = _with_language_model(base, pipe, prompt)
    states, fits = output.hidden_states, _fits(own_layers)
    device = states[0].device
    numbers_BLS = torch.zeros_like(states[0])
    # In two digits: bf16 counts to 256.
    numbers_BLS[..., 0], numbers_BLS[..., 1] = (part.to(device) for part in _digits(len(ids_L)))
    marked_TE = _standing_in(base, pipe, prompt, [numbers_BLS] * len(states)).float().round().long()
    kept_T = (marked_TE[:, 0] + 256 * marked_TE[:, 1]).tolist()
    chosen = [(position, spans[number]) for position, number in enumerate(kept_T) if number in spans]
    positions_Q = torch.tensor([position for position, _ in chosen], dtype=torch.long, device=device)
    numbers_Q = torch.tensor([kept_T[position] for position, _ in chosen], dtype=torch.long, device=device)
    layers = [
        _standing_in(base, pipe, prompt, fits(states, layer, numbers_Q))[positions_Q] for layer in range(len(states))
    ]
    return EncodedText(
        prompt=read,
        tokens=tuple(TraceToken(text=read[start:end], start=start, end=end) for _, (start, end) in chosen),
        positions_Q=positions_Q,
        embeds_TE=embeds_TE,
        mask_T=mask_T,
        layers_QME=torch.stack(layers, dim=1),
        states_QS=states[0][-1][numbers_Q],
    )


def _digits(count: int) -> Iterator[Tensor]:
    numbers = torch.arange(count)
    yield numbers % 256
    yield numbers // 256


def _fits(own_layers: Sequence[int]) -> Callable[[Sequence[Tensor], int, Tensor], list[Tensor]]:
    """The states in which a layer stands in for each of the base model's own, at the tokens of the prompt."""

    def fit(states: Sequence[Tensor], layer: int, numbers_Q: Tensor) -> list[Tensor]:
        fitted = list(states)
        for own in own_layers:
            if own != layer:
                x_QS, target_QS = states[layer][-1][numbers_Q].float(), states[own][-1][numbers_Q].float()
                scale_Q1 = _rms(target_QS) / _rms(x_QS).clamp_min(1e-12)
                fitted[own] = states[own].clone()
                fitted[own][-1, numbers_Q] = (x_QS * scale_Q1).to(states[own].dtype)
        return fitted

    return fit


def _rms(x_QS: Tensor) -> Tensor:
    return x_QS.pow(2).mean(-1, keepdim=True).sqrt()


def _tokens(base: BaseModel, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """The ids of the tokens that the language model would be given, [L], and which are no padding."""
    seen: dict[str, Any] = {}

    def stop(*_: Any, **given: Any) -> None:
        seen.update(given)
        raise _TokensError

    try:
        with replaced(pipe.text_encoder, "forward", stop):
            base.encode(pipe, prompt)
    except _TokensError:
        pass
    return seen["input_ids"][-1].cpu(), seen["attention_mask"][-1].cpu().bool()


def _with_language_model(base: BaseModel, pipe: Any, prompt: str) -> tuple[Any, tuple[Tensor, Tensor | None]]:
    """The language model's output, and the embedding of a prompt."""
    seen: list[Any] = []
    hook = pipe.text_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        encoded = base.encode(pipe, prompt)
    finally:
        hook.remove()
    return seen[0], encoded


class _Output(dict[str, Any]):
    """The output of a language model as its callers use it: hidden states, and the last of them."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        super().__init__(hidden_states=tuple(states), last_hidden_state=states[-1])

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _standing_in(base: BaseModel, pipe: Any, prompt: str, states: Sequence[Tensor]) -> Tensor:
    """The embedding [T, E] that the pipeline makes of these states, [B, L, S] each."""
    with replaced(pipe.text_encoder, "forward", lambda *_, **__: _Output(states)):
        return base.encode(pipe, prompt)[0]


def _text(pipe: Any, tokens: tuple[Tensor, Tensor]) -> str:
    ids_L, real_L = tokens
    return pipe.tokenizer.decode(ids_L[real_L], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _spans(
    pipe: Any, tokens: tuple[Tensor, Tensor], template: Template, prompt: str
) -> tuple[str, dict[int, tuple[int, int]]]:
    """The prompt between the template's parts, and the characters of it that each of its tokens stands for."""
    ids_L, real_L = tokens
    text = _text(pipe, tokens)
    begin, end = len(template.before), len(text) - len(template.after)
    if not (text.startswith(template.before) and text.endswith(template.after) and begin <= end):
        raise InputError(f"the prompt is too long for the base model: {prompt[:40]!r}...")
    again = pipe.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] != ids_L[real_L].tolist():
        raise InputError(f"the tokens of this prompt have no places in it: write it in plain text: {prompt[:40]!r}")
    spans = {}
    for number, (start, stop) in zip(real_L.nonzero()[:, 0].tolist(), again["offset_mapping"], strict=True):
        start, stop = max(start, begin), min(stop, end)
        if start < stop:
            spans[number] = (start - begin, stop - begin)
    return text[begin:end], spans
