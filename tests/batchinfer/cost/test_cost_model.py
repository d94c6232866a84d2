"""The cost model, against figures worked out elsewhere for Llama-3-8B."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from families import QUICK, made
from repository import SHAPE_852M
from safetensors.torch import load_file

from batchinfer.cost.cost_model import CostModel, Requests
from batchinfer.cost.step_cost import layer_weights
from batchinfer.models.config import parse_model_config, read_model_config

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
MODEL = CostModel.of(parse_model_config(LLAMA_3_8B), kv_bytes=2)


def test_the_shape_of_llama_3_8b() -> None:
    assert MODEL.linear_parameters == pytest.approx(6.98e9, rel=1e-3)
    assert MODEL.attention_operations == 524_288
    assert MODEL.kv_bytes_per_token == 128 << 10


@pytest.mark.parametrize(("prompt", "output", "rate"), [(1024, 128, 7640), (161, 338, 45300), (8192, 256, 1850)])
def test_operations_on_an_h100(prompt: int, output: int, rate: float) -> None:
    """New tokens a second where computing is all, to the digits that are given."""
    assert output / (MODEL.operations(Requests(prompt, output)) / 989e12) == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize(("prompt", "output", "batch"), [(1024, 128, 456), (161, 338, 1503), (8192, 256, 60)])
def test_keys_and_values_that_an_output_reads(prompt: int, output: int, batch: int) -> None:
    """So many rows fit into 65 GB, half of their output being there on average, and a step reads all of that."""
    assert batch * MODEL.bytes_read(Requests(prompt, output)) == pytest.approx(output * 65e9, rel=0.01)


def test_the_852m_shape() -> None:
    path = SHAPE_852M
    model = CostModel.of(parse_model_config(json.loads(path.read_text())), 2)
    assert model.linear_parameters + 2 * model.head_parameters == pytest.approx(852e6, rel=2e-3)


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
}  # fmt: skip


def test_of_a_mixture_the_experts_that_a_token_chooses_compute() -> None:
    """Its name says it: 3.3 of 30.5 thousand million parameters are active, with the embedding's 0.3 among them."""
    model = CostModel.of(parse_model_config(QWEN3_30B_A3B), 2)
    assert model.linear_parameters + 2 * model.head_parameters == pytest.approx(3.3e9, rel=0.02)


def test_a_state_of_qwen_3_5() -> None:
    """A state has 32 heads of 128 x 128 in float32, and three inputs of 8,192 channels, in each of 24 layers."""
    shape = {
        "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = CostModel.of(parse_model_config(shape), 2, stream_bytes=2)
    assert model.state_bytes == 24 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert model.state_sums == 24 * 32 * 128 * 128
    without = CostModel(model.linear_parameters, model.head_parameters, model.query_numbers, 0, 0)
    more = model.operations(Requests(64, 1)) - without.operations(Requests(64, 1))
    assert more == 2 * model.tile_multiplications + 6 * model.state_sums


@pytest.mark.parametrize("case", QUICK)
def test_the_matrices_are_those_that_transformers_stores(make_model: Callable[..., Path], case: str) -> None:
    """Routers and the kernels of convolutions are too small to count. Where keys are the values of Gemma 4, too, the
    matrix is multiplied twice."""
    model = made(make_model, case)
    tensors = load_file(model / "model.safetensors")
    stored = sum(tensor.numel() for name, tensor in tensors.items() if "layers." in name and tensor.ndim > 1)
    most = 0.05 if case.startswith("gemma4") else 0.02
    assert layer_weights(read_model_config(model)) == pytest.approx(stored, rel=most)
