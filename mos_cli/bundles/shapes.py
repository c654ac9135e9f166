"""The networks of a model as numbers: what their configs say, and how many parameters that makes. Imports no torch.

Shapes: D width, H heads, S width of a state, M understanding layers, J generation blocks, R width of the router,
P values of a patch.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from mos_cli.errors import ModelError
from mos_cli.utils.migration import Migrated
from mos_cli.utils.validation import Frozen, first_problem

IMAGE_GRID = 4
"""Image tokens along each side of a picture, where they come from an image encoder."""


class GenerationShape(Migrated):
    """The config of a generation tower; the fields and defaults are those of `towers.generation.GenerationTower`."""

    channels: int = Field(default=3, gt=0)
    patch: int = Field(default=8, gt=0)
    width: int = Field(default=256, gt=0)
    depth: int = Field(default=8, gt=0)
    heads: int = Field(default=4, gt=0)
    hidden: int = Field(default=704, gt=0)
    states_layers: int = Field(default=7, gt=0)
    states_width: int = Field(default=384, gt=0)
    image_state_widths: tuple[int, ...] = ()
    has_vision: bool = False
    fusion: Literal["routed", "last", "aligned", "mean"] = "routed"
    context: Literal["kv", "tokens", "joint", "cross"] = "kv"
    router_inputs: tuple[str, ...] = ("tokens", "latent", "time")
    routing: Literal["token", "sample"] = "token"
    router_width: int = Field(default=128, gt=0)
    router_depth: int = Field(default=2, gt=0)
    router_heads: int = Field(default=2, gt=0)
    top_k: int = Field(default=2, gt=0)
    renormalise: bool = True
    rope_theta: float = Field(default=100.0, gt=0)
    guidance_max: float | None = Field(default=None, gt=1)

    @property
    def in_sequence(self) -> bool:
        """Whether the context's tokens pass through the blocks together with the patches."""
        return self.context in ("tokens", "joint")

    @property
    def kept_layers(self) -> int:
        """Layers that a block reads for each token, K."""
        return {"routed": self.top_k, "mean": self.states_layers}.get(self.fusion, 1)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """The linear layers of all blocks, (in, out): those that are quantised."""
        D, hidden = self.width, self.hidden
        block = [(D, 3 * D), (D, D), (D, 2 * hidden), (hidden, D)]
        if self.context == "kv":
            block.append((D, 2 * D))
        if self.context == "cross":
            block += [(D, D), (D, 2 * D), (D, D)]
        return tuple(block) * self.depth

    @property
    def block_parameters(self) -> int:
        """Parameters of all blocks."""
        D, head = self.width, self.width // self.heads
        rest = 2 * head + 6 * D + (2 * head if self.context == "cross" else 0)
        readers = 1 if self.context == "joint" else self.depth
        return sum(i * o for i, o in self.linears) + self.depth * rest + readers * D

    @property
    def router_parameters(self) -> int:
        if self.fusion != "routed":
            return 0
        R, head = self.router_width, self.router_width // self.router_heads
        block = 4 * R * R + 2 * head + 9 * R * R + 2 * R
        image_states = self.image_state_widths[-1] * R if self.image_state_widths else 0
        latent = self._patch_values * R + R if "latent" in self.router_inputs else 0
        time = _time_parameters(R) + R if "time" in self.router_inputs else 0
        head_out = R * self.states_layers * self.depth
        return self.states_width * R + image_states + R + latent + time + self.router_depth * block + R + head_out

    @property
    def parameters(self) -> int:
        """All parameters, the router's included."""
        D, P = self.width, self._patch_values
        images = sum(self.image_state_widths) * D + (P * D if self.image_state_widths or self.has_vision else 0)
        ends = self.states_width * D + P * D + D + D * P + P
        time = (1 if self.guidance_max is None else 2) * _time_parameters(D) + 6 * D * D + 6 * D + 2 * D * D + 2 * D
        return images + ends + time + self.block_parameters + self.router_parameters

    @property
    def _patch_values(self) -> int:
        return self.channels * self.patch**2


def _time_parameters(width: int) -> int:
    return 256 * width + width + width * width + width


class UnderstandingShape(Migrated):
    """An understanding tower by its numbers.

    Args:
        layers, width, hidden: transformer layers, width of a state, inner width of the feed-forward layers.
        linear: parameters of the text part's linear layers, without an output head, which is not used.
        other: its remaining parameters: embeddings, norms, biases.
        vision: parameters of the vision part, its projection to the text's width included.
        image_token_size: pixels along an image token; 0 for a tower without vision.
        image_size: the side of the square that every picture is scaled to; None where a picture keeps its size.
        hub_id: its repository on the model hub, in descriptions without weights.
    """

    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    hidden: int = Field(gt=0)
    linear: int = Field(ge=0)
    other: int = Field(ge=0)
    vision: int = Field(ge=0)
    image_token_size: int = Field(default=0, ge=0)
    image_size: int | None = None
    hub_id: str | None = None

    @property
    def parameters(self) -> int:
        return self.linear + self.other + self.vision

    @property
    def states(self) -> tuple[int, int]:
        """The states of a token: how many, the embedding's output included, and their width (M, S)."""
        return self.layers + 1, self.width

    def image_tokens(self, size: tuple[int, int]) -> int:
        """The tokens of a picture of `size` pixels, width and height."""
        width, height = size if self.image_size is None else (self.image_size, self.image_size)
        return round(width / self.image_token_size) * round(height / self.image_token_size)


class AutoencoderShape(Frozen):
    """An autoencoder by its parameters and its config in diffusers' format."""

    parameters: int = Field(gt=0)
    config: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.config["_class_name"]

    @property
    def tiles(self) -> bool:
        """Whether it can decode tile by tile."""
        return self.kind != "Enlarger"

    @property
    def stages(self) -> tuple[int, ...]:
        """Channels of the decoder's stages, the one at the picture's size first."""
        return tuple(self.config.get("decoder_block_out_channels") or self.config["block_out_channels"])

    @property
    def factor(self) -> int:
        """Pixels of the picture along a pixel of the latent."""
        return 2 if self.kind == "Enlarger" else 2 ** (len(self.stages) - 1)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a network; raises ModelError if it is not there or damaged."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{folder / 'config.json'} cannot be read") from None


def read_generation(folder: Path) -> GenerationShape:
    """The shape of the generation tower in a folder; raises ModelError."""
    config = {name: value for name, value in read_config(folder).items() if not name.startswith("_")}
    try:
        return GenerationShape.model_validate(config)
    except ValidationError as error:
        raise ModelError(f"{folder / 'config.json'}: {first_problem(error)}") from None


class Header(Frozen):
    """The headers of a folder's safetensors: the shape of every tensor, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Reads the headers of all safetensors in a folder, no weights; raises ModelError if one is damaged."""
        shapes, metadata = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with path.open("rb") as file:
                    head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                metadata |= head.pop("__metadata__", {})
                shapes |= {name: tuple(tensor["shape"]) for name, tensor in head.items()}
            except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
                raise ModelError(f"{path} is damaged") from None
        return cls(shapes=shapes, metadata=metadata)


def understanding_parameters(folder: Path) -> int:
    """The parameters of an understanding tower, without an output head, which is not used."""
    return sum(prod(shape) for name, shape in Header.of(folder).shapes.items() if "lm_head" not in name)
