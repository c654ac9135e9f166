import json

import pytest

from mos_cli.bundles.sources import fetch_tower, verify_tower
from mos_cli.bundles.specs import TowerSpec
from mos_cli.errors import ModelError
from mos_cli.utils.files import sha256_of

LAYERS, WIDTH, HEADS, INNER = 2, 32, 2, 48
pytestmark = pytest.mark.slow


def write_gguf(path):
    """A llama of random weights with one token per byte: a real GGUF file, small enough for a test."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "re", "red"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["r e", "re d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def spec(tmp_path, monkeypatch) -> TowerSpec:
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "original").mkdir()
    path = tmp_path / "original" / "tiny.gguf"
    write_gguf(path)
    fields = {"schema": "mos-tower/1", "name": "tiny", "description": "", "license": "", "format": "gguf"}
    fields |= {"files": {path.name: sha256_of(path)}, "size": path.stat().st_size}
    return TowerSpec.model_validate({**fields, "sources": [{"kind": "folder", "path": str(path.parent)}]})


def test_a_converted_tower_computes_what_the_file_says_and_is_checked_later(spec, tmp_path):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder = fetch_tower(spec)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("red car", return_tensors="pt", return_offsets_mapping=True)
    assert tokens["offset_mapping"][0].tolist()[0] == [0, 3]
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "original", gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        states = [
            model(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states
            for model in (wanted, AutoModel.from_pretrained(folder))
        ]
    assert len(states[0]) == LAYERS + 1
    for expected, state in zip(*states, strict=True):
        assert torch.equal(expected, state)

    assert verify_tower(spec) == folder
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"config\.json does not match"):
        fetch_tower(spec)
    (folder / "converted.json").unlink()
    with pytest.raises(ModelError, match=r"converted\.json is missing"):
        fetch_tower(spec)
