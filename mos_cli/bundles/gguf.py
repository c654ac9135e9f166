"""Conversion of a GGUF language model to a folder with safetensors."""

import json
from pathlib import Path

from pydantic import TypeAdapter

from mos_cli.errors import ModelError
from mos_cli.utils.files import sha256_of
from mos_cli.utils.validation import PlainName, Sha256

_RECORD = "converted.json"


def require_gguf() -> None:
    """Raises ModelError if the package that reads GGUF files is not installed."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ModelError("this understanding tower is a GGUF file, to read it: pip install 'mos-cli[gguf]'")


def convert_gguf(file: Path, folder: Path) -> Path:
    """Writes the model in `file` to `folder` as config, tokenizer and fp32 model.safetensors; returns it.

    The sha256 of what was written goes into converted.json (see `converted_files`). Takes about 20 s for 135
    million parameters, and five times the space of a 4-bit file. Raises ModelError if it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(f"{file.name} cannot be converted: {error}") from None
    # transformers does not save a model loaded from a quantized file, so its weights are copied into a plain one.
    config = type(read.config).from_dict({**read.config.to_dict(), "quantization_config": None})
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / _RECORD).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    return folder


def converted_files(folder: Path) -> dict[str, str]:
    """The files written by `convert_gguf` with their sha256; raises ModelError if the list is damaged."""
    try:
        return TypeAdapter(dict[PlainName, Sha256]).validate_json((folder / _RECORD).read_bytes())
    except (OSError, ValueError):
        raise ModelError(f"{_RECORD} is missing or damaged in {folder}") from None
