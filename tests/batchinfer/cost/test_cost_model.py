"""The cost model, against figures worked out elsewhere for Llama-3-8B."""

import json

import pytest
from repository import SHAPE_852M

from batchinfer.cost.cost_model import CostModel, Requests
from batchinfer.models.config import parse_model_config

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
