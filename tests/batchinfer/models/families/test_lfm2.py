"""LFM2: the fields of the files on the Hub, which are older than transformers' own, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import assert_logits_of_transformers, engine_of

from batchinfer.models.config import parse_model_config

# Fields of LFM2's older files; no code reads those of the second line.
OLDER = {
    "block_ff_dim": 288, "block_multiple_of": 16, "full_attn_idxs": [1], "tie_embedding": False, "rope_theta": 5e5,
    "block_dim": 96, "conv_dim": 96, "conv_dim_out": 96, "num_heads": 6, "block_norm_eps": 1e-2,
    "block_use_swiglu": True, "use_pos_enc": True,
}  # fmt: skip


def test_older_files_mean_the_same(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers reads the file too, which names neither a size of feed-forward blocks nor types of layers."""
    model = make_model(
        "lfm2", intermediate_size=288, block_multiple_of=16, layer_types=["conv", "full_attention", "conv"]
    )
    older = shutil.copytree(model, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    for key in ("layer_types", "rope_parameters", "tie_word_embeddings"):
        del raw[key]
    (older / "config.json").write_text(json.dumps({**raw, **OLDER, "intermediate_size": 7}))
    assert_logits_of_transformers(older)
    [note] = [note for note in engine_of(older).stats().notes if "not read" in note]
    assert note.endswith("block_dim, conv_dim, conv_dim_out, num_heads, block_norm_eps")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": ["conv"] * 3}, "layer_types has no full_attention; at least one layer must have it"),
        ({"layer_types": ["conv", "mamba", "full_attention"]}, "layer_types must name full_attention or conv for 3"),
        ({"layer_types": ["full_attention"]}, "layer_types must name full_attention or conv for 3 layers"),
        ({"layer_types": None, "full_attn_idxs": "all"}, "full_attn_idxs is 'all'; it must be a list of layers'"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1; it must be at least 2"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0; it must be a whole number from 1"),
        ({"block_ffn_dim_multiplier": -1}, "block_ffn_dim_multiplier is -1; it must be a positive number"),
        ({"block_use_swiglu": False}, "block_use_swiglu is False; supported is True"),
        ({"norm_eps": "small"}, "norm_eps is 'small'; it must be a positive number"),
    ],
)
def test_what_is_not_supported_is_named(make_model: Callable[..., Path], fields: dict[str, Any], words: str) -> None:
    raw = json.loads((make_model("lfm2") / "config.json").read_text())
    with pytest.raises(ValueError, match=words):
        parse_model_config({**raw, **fields})
