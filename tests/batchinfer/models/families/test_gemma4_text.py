"""Gemma 4 as it was published, what its layers take of memory and time, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import EDGES, compare_logits, engine_of, tokens
from families import CASES, FULL, SLIDING, made
from safetensors.torch import load_file, save_file

from batchinfer.cost.cost_model import CostModel, Requests
from batchinfer.cost.step_cost import Weights, Work, layer_weights, quantities
from batchinfer.engine.config import Speculation
from batchinfer.engine.pool_size import bytes_per_token
from batchinfer.engine.request import Requests as Rows
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.models.config import parse_model_config, read_model_config

E2B = "gemma4_text, like E2B"
"""Layers 4, 5 and 6 read the keys and values of layers 2, 2 and 3."""


def changed(model: Path, folder: Path, **fields: Any) -> Path:
    """A copy with other fields of config.json; None removes one."""
    shutil.copytree(model, folder)
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def largest_error(model: Path, original: Path) -> float:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    ours, expected = (
        torch.stack(column) for column in zip(*compare_logits(engine_of(model), oracle, EDGES), strict=True)
    )
    return float((ours - expected).abs().max() / expected.abs().max())


def test_sizes_of_heads_are_read_as_they_were_published(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers reads them too, and saves `per_layer_config` in their place."""
    model = made(make_model, "gemma4_text, like 31B")
    assert "global_head_dim" not in (model / "config.json").read_text()
    published = changed(
        model, tmp_path / "model", per_layer_config=None, global_head_dim=32, num_global_key_value_heads=1
    )
    assert read_model_config(published).layers == read_model_config(model).layers
    assert largest_error(published, published) <= 1e-4
    heads = changed(published, tmp_path / "heads", attention_k_eq_v=False)
    assert [a.attention.kv_heads for a in read_model_config(heads).layers] == [2, 2, 2], "only where keys are values"


def test_published_models_hold_keys_that_nobody_reads(make_model: Callable[..., Path], tmp_path: Path) -> None:
    original = made(make_model, E2B)
    model = shutil.copytree(original, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
        tensors[f"model.layers.5.self_attn.{name}"] = torch.ones(16, 96)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert largest_error(model, original) <= 1e-4
    save_file(tensors | {"model.layers.3.self_attn.k_norm.bias": torch.ones(16)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors that the model does not use: model\.layers\.3\.self_attn\.k_norm"):
        engine_of(model)


def test_layers_that_read_the_keys_of_others_take_no_memory_for_them(make_model: Callable[..., Path]) -> None:
    model = made(make_model, E2B)
    config = read_model_config(model)
    assert [layer.attention.source for layer in config.layers] == [None] * 4 + [2, 2, 3]
    sliding, full = 2 * 2 * 16, 2 * 2 * 32  # numbers of a token's keys and values
    assert bytes_per_token(config, torch.bfloat16) == 2 * (2 * sliding + 2 * full)
    assert bytes_per_token(config, torch.int8) == 2 * sliding + 2 * full + 4 * 2 * 2 * 4
    engine = engine_of(model)
    blocks = len(engine.runner.caches[0].key)
    assert engine.runner.kv_cache_bytes == blocks * engine.table.block_size * engine.runner.bytes_per_token
    cost = CostModel.of(config, 2)
    assert cost.kv_bytes_per_token == engine.runner.bytes_per_token / 2
    assert cost.bytes_read(Requests(10, 1)) == 10.5 * 2 * (4 * sliding + 3 * full)
    one = np.ones(1)
    counted = quantities(Work(*[one] * 7), config, Weights(4, 4, 1), "float32", "greedy")
    assert counted["stored key in float32"] == (2 * sliding + 2 * full) / 2
    assert counted["decoding key in float32"] == (4 * sliding + 3 * full) / 2
    head = config.embedding.size
    assert layer_weights(config) == sum(
        int(np.prod(shape)) for name, shape in config.tensors() if len(shape) == 2 and "embed_tokens" not in name
    )
    assert counted["head"] == head


def test_a_gpus_attention_counts_the_keys_that_each_layer_reads(
    make_model: Callable[..., Path], interpreted: Callable[..., Any]
) -> None:
    engine = interpreted(made(make_model, E2B))
    engine.add(Rows.of([[5]], SamplingParams(max_tokens=2)))
    batch = engine.scheduler.schedule()
    read, _ = engine.runner.kv_bytes_read(batch)
    assert read == 4 * (4 * 2 * 2 * 16 + 3 * 2 * 2 * 32), "one key of a layer's two heads, and its value"


def test_shared_prefixes_and_drafts_change_nothing_where_layers_share_keys(make_model: Callable[..., Path]) -> None:
    model = made(make_model, E2B)
    prompts = [EDGES[5] + prompt[:60] for prompt in EDGES] + [EDGES[5] + EDGES[3][:20]] * 2
    rows = Rows.of(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    together = tokens(engine_of(model), rows)
    for settings in (
        {"max_num_seqs": 1, "max_num_batched_tokens": 64, "prefix_sharing": False},
        {"speculation": Speculation("ngram", gate=False)},
        {"kv_cache_tokens": 600},
    ):
        assert tokens(engine_of(model, **settings), rows) == together, settings


def test_random_weights_give_numbers(make_model: Callable[..., Path]) -> None:
    engine = engine_of(made(make_model, E2B), random_weights=True)
    assert len(tokens(engine, Rows.of(EDGES[:3], SamplingParams(max_tokens=3, ignore_eos=True)))) == 3


FIELDS = {"model_type": "gemma4_text", "num_hidden_layers": 3, "vocab_size": 320, **CASES["gemma4_text"][1]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_moe_block": True, "num_experts": 8}, "enable_moe_block is True; supported is False"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; supported are"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is not read for Gemma 4"),
        ({"vocab_size": 321}, "vocab_size_per_layer_input is 320, and vocab_size 321: each token needs a row"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2: of 3 layers, those before"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3: of 3 layers, those before"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1; it must be a whole number"),
        ({"per_layer_config": {"7": {"head_dim": 64}}}, "per_layer_config has a key '7'; expected the number of a"),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, "per_layer_config sets sliding_window of layer 1"),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, r"layers\.2\. reads the keys of layer 1, which has 4 "),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    parse_model_config(FIELDS)
    with pytest.raises(ValueError, match=message):
        parse_model_config(FIELDS | fields)


def test_the_last_layer_sees_all_positions_whatever_the_file_says() -> None:
    layers = parse_model_config(FIELDS | {"layer_types": [FULL, SLIDING, SLIDING]}).layers
    assert [layer.attention.window for layer in layers] == [None, 24, None]
    assert (
        transformers.AutoConfig.for_model(**FIELDS | {"layer_types": [FULL, SLIDING, SLIDING]}).layer_types[-1] == FULL
    )
