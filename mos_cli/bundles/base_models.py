"""Base models: pipelines of diffusers as folders, which of their files are read, and their networks as numbers.

Imports no torch.
"""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mos_cli.bundles.shapes import Header, read_config
from mos_cli.errors import ModelError
from mos_cli.utils.validation import Frozen

DIFFUSERS_INDEX = "model_index.json"
"""The file of a diffusers folder that names its pipeline and its parts; a bundle has a file of the same name."""
PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
KEPT: dict[str, tuple[str, ...]] = {
    "Flux2KleinPipeline": (
        "context_embedder",
        "x_embedder",
        "proj_out",
        "norm_out",
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    "ZImagePipeline": ("cap_embedder", "all_x_embedder", "all_final_layer", "t_embedder"),
    "PRXPipeline": ("txt_in", "img_in", "time_in", "final_layer"),
}
"""The modules of each transformer that are not quantised: its inputs and outputs, and what sets all of its blocks."""
SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""The files of a base model that are read; none of them is code."""

TEXT_TOKENS = {"Flux2KleinPipeline": 512, "ZImagePipeline": 512, "PRXPipeline": 256}
"""The tokens of the text that each transformer reads at most; PRX and FLUX.2-klein pad to as many."""
PipelineClass = Literal["Flux2KleinPipeline", "ZImagePipeline", "PRXPipeline"]
"""The pipelines of diffusers that can be base models. A folder of any other class is refused."""


class PartShape(Frozen):
    """A network of a base model as numbers, for plans.

    Args:
        parameters: all of them.
        linear: weights of the layers that are quantised, and `rows` their outputs.
        widest: weights of the largest of these layers, and `longest` its outputs.
    """

    parameters: int = Field(gt=0)
    linear: int = Field(default=0, ge=0)
    rows: int = Field(default=0, ge=0)
    widest: int = Field(default=0, ge=0)
    longest: int = Field(default=0, ge=0)


class BaseShape(Frozen):
    """The networks of a base model as numbers.

    Args:
        width, head_width: of the transformer's blocks, and of their attention's heads.
        states_width: width of a state of the language model.
        text_tokens: tokens of the text that the transformer reads, padding included.
        joint: whether the text is in one sequence with the picture.
    """

    transformer: PartShape
    text_encoder: PartShape
    vae: PartShape
    width: int = Field(gt=0)
    head_width: int = Field(gt=0)
    states_width: int = Field(gt=0)
    text_tokens: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    decoder_width: int = Field(gt=0)
    joint: bool


def is_base_file(name: str) -> bool:
    """Whether a path, relative to a diffusers folder, is a file that is read from it."""
    folder, _, file = name.rpartition("/")
    inside = folder in PARTS and "/" not in file and not file.startswith(".")
    return name == DIFFUSERS_INDEX or (inside and "\\" not in file and file.endswith(SUFFIXES))


def base_files(folder: Path) -> list[str]:
    """The files of a diffusers folder that are read, sorted."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(filter(is_base_file, files))


def diffusers_class(folder: Path) -> str | None:
    """The class of pipeline that a diffusers folder names; None for any other folder."""
    try:
        name = json.loads((folder / DIFFUSERS_INDEX).read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def diffusers_config(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's index; raises ModelError."""
    try:
        return dict(json.loads((folder / DIFFUSERS_INDEX).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{folder / DIFFUSERS_INDEX} cannot be read") from None


def text_layers(config: dict[str, Any]) -> int:
    """The states of a token of a text encoder, the embedding's output included, from its config."""
    text = config.get("text_config") or config.get("encoder") or config
    try:
        return int(text["num_hidden_layers"]) + 1
    except (KeyError, TypeError, ValueError):
        raise ModelError("the text encoder's config has no num_hidden_layers") from None


def text_blocks(pipeline: PipelineClass, config: dict[str, Any]) -> int:
    """The blocks of a transformer that read text, from its config."""
    names = {
        "Flux2KleinPipeline": ("num_layers", "num_single_layers"),
        "ZImagePipeline": ("n_layers",),
        "PRXPipeline": ("depth",),
    }[pipeline]
    try:
        return sum(int(config[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"the transformer's config has no {' and '.join(names)}") from None


def own_layers(pipeline: PipelineClass, layers: int) -> tuple[int, ...]:
    """The layers that a pipeline of diffusers reads itself, one per slot."""
    own: dict[PipelineClass, Sequence[int]] = {
        "Flux2KleinPipeline": (9, 18, 27),
        "ZImagePipeline": (layers - 2,),
        "PRXPipeline": (layers - 1,),
    }
    if max(own[pipeline]) >= layers:
        raise ModelError(f"{pipeline} reads the layers {own[pipeline]}, and the text encoder has {layers} states")
    return tuple(own[pipeline])


def shape_of_folder(pipeline: PipelineClass, folder: Path) -> BaseShape:
    """The networks of a diffusers folder as numbers, from its configs and the headers of its weights.

    Raises:
        ModelError: a config or a header is damaged.
    """
    transformer, vae = (read_config(folder / part) for part in ("transformer", "vae"))
    text = read_config(folder / "text_encoder")
    text = text.get("text_config") or text.get("encoder") or text
    try:
        width, head_width = {
            "Flux2KleinPipeline": lambda c: (
                c["attention_head_dim"] * c["num_attention_heads"],
                c["attention_head_dim"],
            ),
            "ZImagePipeline": lambda c: (c["dim"], c["dim"] // c["n_heads"]),
            "PRXPipeline": lambda c: (c["hidden_size"], c["hidden_size"] // c["num_heads"]),
        }[pipeline](transformer)
        return BaseShape(
            transformer=_part_shape(folder / "transformer", KEPT[pipeline]),
            text_encoder=_part_shape(folder / "text_encoder", ("lm_head",)),
            vae=_part_shape(folder / "vae", ()),
            width=width,
            head_width=head_width,
            states_width=text["hidden_size"],
            text_tokens=TEXT_TOKENS[pipeline],
            latent_channels=vae["latent_channels"],
            decoder_width=(vae.get("decoder_block_out_channels") or vae["block_out_channels"])[0],
            joint=pipeline != "PRXPipeline",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the configs in {folder} are damaged: {error}") from None


def _part_shape(folder: Path, kept: tuple[str, ...]) -> PartShape:
    shapes = Header.of(folder).shapes
    linear = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and shape[1] % 64 == shape[0] % 32 == 0
        and "embed_tokens" not in name
        and not any(name.startswith(f"{module}.") for module in kept)
    ]
    widest = max(linear, key=prod, default=(0, 0))
    return PartShape(
        parameters=sum(map(prod, shapes.values())),
        linear=sum(map(prod, linear)),
        rows=sum(rows for rows, _ in linear),
        widest=prod(widest),
        longest=widest[0],
    )
