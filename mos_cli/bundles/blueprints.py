"""Blueprints: models without weights, as numbers; and the same numbers of bundles that have theirs. Imports no torch.

A blueprint is `models/<name>/blueprint.json`. `mos models init` makes a bundle with random weights of it.
"""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mos_cli.bundles.adapters import AdapterBundle, base_network, is_adapter
from mos_cli.bundles.bundle import INDEX, Bundle, bundle_folders, find_bundle, unknown_name
from mos_cli.bundles.shapes import (
    AutoencoderShape,
    GenerationShape,
    Header,
    UnderstandingShape,
    read_config,
    read_generation,
)
from mos_cli.bundles.sources import tower_folder
from mos_cli.bundles.specs import Canvas, Defaults, EditDefaults, TowerSpec
from mos_cli.errors import ModelError, UsageError
from mos_cli.quantization.method import HEADER, Quantisation
from mos_cli.utils.files import expand
from mos_cli.utils.folders import BLUEPRINT, list_blueprints
from mos_cli.utils.migration import GenerationConfig, part_folder
from mos_cli.utils.validation import Frozen, PlainName, read_json

_PERCEPTION_PATCH = 14
"""Pixels along a patch of PerceptionLM's vision part. Its config holds no number for it, only the model's name."""
_BYTES: dict[str, Literal[2, 4]] = {"bf16": 2, "fp32": 4}
_VISION = {"visual", "vision_tower", "multi_modal_projector"}


class Blueprint(Frozen):
    """The content of `blueprint.json`.

    Args:
        why: what the numbers were chosen for, in sentences.
        generation: the generation tower's config, without what the understanding tower decides.
        understanding: the understanding towers it can be built for, by name; the first is the default.
    """

    schema_: Literal["mos-blueprint/1"] = Field(alias="schema")
    name: PlainName
    description: str
    license: str
    why: tuple[str, ...]
    canvas: Canvas
    defaults: Defaults
    edits: EditDefaults | None = None
    """Only of models that edit pictures."""
    generation: GenerationConfig
    autoencoder: AutoencoderShape
    understanding: dict[PlainName, UnderstandingShape] = Field(min_length=1)

    @model_validator(mode="after")
    def _edits_need_vision(self) -> Self:
        blind = [name for name, tower in self.understanding.items() if not tower.image_token_size]
        if self.edits is not None and (blind or not self.generation.get("has_vision")):
            raise ValueError(
                "edits: has_vision must be true in generation, and image_token_size given in every understanding tower"
            )
        return self

    def tower(self, name: str | None) -> tuple[str, UnderstandingShape]:
        """An understanding tower by name, or the default; raises UsageError."""
        name = name or next(iter(self.understanding))
        if name not in self.understanding:
            raise UsageError(f"{self.name} has no understanding tower {name!r}: take {', '.join(self.understanding)}")
        return name, self.understanding[name]

    def shape(self, tower: UnderstandingShape) -> GenerationShape:
        """The generation tower for an understanding tower."""
        layers, width = tower.states
        return GenerationShape(**self.generation, states_layers=layers, states_width=width)


@dataclass(frozen=True)
class Network:
    """All networks of a model as numbers, and what is drawn with them.

    Args:
        ref: the model's name, folder or hub id.
        image_encoder_parameters: 0 for a model without an image encoder.
        references: the number of reference pictures; each is counted as large as the picture that is drawn.
        method: how the generation tower's weights are quantised already, if they are.
        weightless: whether it is a blueprint; `mos models init` writes random weights for it.
        value_bytes: bytes of a value of the generation tower and the autoencoder: 4 in fp32.
    """

    ref: str
    generation: GenerationShape
    understanding_name: str
    understanding: UnderstandingShape
    autoencoder: AutoencoderShape | None
    image_encoder_parameters: int
    references: int
    canvas: Canvas
    defaults: Defaults
    method: Literal["nf4", "int8"] | None
    weightless: bool
    value_bytes: Literal[2, 4] = 2

    @property
    def guided(self) -> bool:
        """Whether guidance needs a second branch; with references one is counted, unless guidance is distilled."""
        return self.generation.guidance_max is None and (self.defaults.cfg != 1 or self.references > 0)


def find_blueprint(ref: str) -> Blueprint:
    """A blueprint by name, or that of a folder or .json file; raises ModelError."""
    known = list_blueprints()
    if ref in known:
        return read_json(Blueprint, known[ref])
    path = expand(ref)
    if path.suffix == ".json":
        return read_json(Blueprint, path)
    if (path / BLUEPRINT).is_file():
        return read_json(Blueprint, path / BLUEPRINT)
    raise unknown_name("blueprint", ref, known)


def find_network(
    ref: str, understanding: str | None = None, *, precision: str = "bf16", references: int = 0
) -> Network:
    """The numbers of a bundle (name, folder or hub id) or a blueprint (name, folder or file), read from configs alone.

    Args:
        understanding: one of a blueprint's understanding towers; a bundle has its own.
        precision: of the generation tower and the autoencoder, bf16 or fp32.
        references: the number of reference pictures.

    Raises:
        ModelError: there is no such model, it is damaged, or its understanding tower is not pulled.
        UsageError: the understanding tower cannot be chosen, or the model draws from no pictures.
    """
    bundles, blueprints = bundle_folders(), list_blueprints()
    path = expand(ref)
    if ref in bundles or (path.is_dir() and is_adapter(path)):
        found = find_bundle(ref)
        if isinstance(found, AdapterBundle):
            if understanding is not None:
                raise UsageError(f"{ref} has a language model of its own: leave --understanding out")
            return base_network(found, precision=precision, references=references)  # type: ignore[return-value]
    weightless = path.suffix == ".json" or ((path / BLUEPRINT).is_file() and not (path / INDEX).is_file())
    if ref not in bundles and (ref in blueprints or weightless):
        blueprint = find_blueprint(ref)
        network = _network_of_blueprint(ref, blueprint, understanding)
        return _with_request(network, precision, references, edits=blueprint.edits is not None)
    if "/" not in ref and not path.is_dir() and ref not in bundles:
        raise unknown_name("model", ref, [*bundles, *blueprints])
    if understanding is not None:
        raise UsageError(f"--understanding chooses among the towers of a blueprint; {ref} has its own")
    return network_of(find_bundle(ref), precision=precision, references=references)


def _with_request(network: Network, precision: str, references: int, *, edits: bool) -> Network:
    if references and not edits:
        raise UsageError(f"{network.ref} does not edit pictures: it draws from none")
    return replace(network, value_bytes=_BYTES[precision], references=references)


def _network_of_blueprint(ref: str, blueprint: Blueprint, understanding: str | None) -> Network:
    """The numbers of a blueprint, without references."""
    name, tower = blueprint.tower(understanding)
    return Network(
        ref=ref,
        generation=blueprint.shape(tower),
        understanding_name=name,
        understanding=tower,
        autoencoder=blueprint.autoencoder,
        image_encoder_parameters=0,
        references=0,
        canvas=blueprint.canvas,
        defaults=blueprint.defaults,
        method=None,
        weightless=True,
    )


def network_of(bundle: Bundle, *, precision: str = "bf16", references: int = 0) -> Network:
    """The numbers of a bundle, as `find_network` returns them; raises as it does.

    Those of a base model are a `BaseNetwork`, which plans take as well.
    """
    if isinstance(bundle, AdapterBundle):
        return base_network(bundle, precision=precision, references=references)  # type: ignore[return-value]
    folder, index = bundle.folder, bundle.index
    autoencoder = None
    if (folder / "autoencoder").is_dir():
        parameters = _parameters(Header.of(folder / "autoencoder"))
        autoencoder = AutoencoderShape(parameters=parameters, config=read_config(folder / "autoencoder"))
    image_encoder = part_folder(folder, "image_encoder")
    quantised = Header.of(folder / "generation").metadata.get(HEADER)
    network = Network(
        ref=bundle.ref,
        generation=read_generation(folder / "generation"),
        understanding_name=index.understanding.name,
        understanding=_pulled(index.understanding),
        autoencoder=autoencoder,
        image_encoder_parameters=_parameters(Header.of(image_encoder)) if image_encoder.is_dir() else 0,
        references=0,
        canvas=index.canvas,
        defaults=index.defaults,
        method=None if quantised is None else Quantisation.model_validate_json(quantised).method,
        weightless=False,
    )
    return _with_request(network, precision, references, edits=index.edits is not None)


def _pulled(spec: TowerSpec) -> UnderstandingShape:
    """The numbers of an understanding tower, from its config and the headers of its weights."""
    folder = tower_folder(spec)
    if not folder.is_dir():
        raise ModelError(f"the size of {spec.name} is known once it is here: run mos models pull {spec.name}")
    config = read_config(folder)
    text = config.get("text_config", config)
    linear = other = vision = 0
    for name, shape in Header.of(folder).shapes.items():
        size = prod(shape)
        if _VISION & set(name.split(".")):
            vision += size
        elif "lm_head" in name:
            continue
        elif len(shape) == 2 and "embed" not in name:
            linear += size
        else:
            other += size
    image_token_size, image_size = _image_token_size(folder, config)
    return UnderstandingShape(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        hidden=text["intermediate_size"],
        linear=linear,
        other=other,
        vision=vision,
        image_token_size=image_token_size,
        image_size=image_size,
    )


def _image_token_size(folder: Path, config: dict[str, Any]) -> tuple[int, int | None]:
    """Pixels along an image token, and the side that pictures are scaled to; None where they keep their size."""
    vision = config.get("vision_config", {})
    match config.get("model_type"):
        case "qwen3_vl":
            return vision["patch_size"] * vision["spatial_merge_size"], None
        case "internvl":
            return round(vision["patch_size"][0] / config["downsample_ratio"]), vision["image_size"][0]
        case "perception_lm":
            settings = json.loads((folder / "preprocessor_config.json").read_bytes())
            return _PERCEPTION_PATCH * config["projector_pooling_ratio"], settings["tile_size"]
    return 0, None


def _parameters(header: Header) -> int:
    return sum(prod(shape) for shape in header.shapes.values())
