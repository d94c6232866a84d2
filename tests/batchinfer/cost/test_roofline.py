"""The cost model, against figures worked out elsewhere for Llama-3-8B."""

import json
from dataclasses import replace

import pytest
from repository import SHAPE_852M

from batchinfer.cost.roofline import CostModel, Device, Requests
from batchinfer.models.config import parse_model_config

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
MODEL = CostModel.of(parse_model_config(LLAMA_3_8B), weight_bytes=2, kv_bytes=2)
H100 = Device(989e12, 3.0e12)
POOL = 65e9


def test_the_shape_of_llama_3_8b() -> None:
    assert MODEL.linear_parameters == pytest.approx(6.98e9, rel=1e-3)
    assert MODEL.attention_operations == 524_288
    assert MODEL.kv_bytes_per_token == 128 << 10


@pytest.mark.parametrize(
    ("prompt", "output", "batch", "rate"), [(1024, 128, 456, 7640), (161, 338, 1503, 45300), (8192, 256, 60, 1850)]
)
def test_batches_and_bounds_of_an_h100(prompt: int, output: int, batch: int, rate: float) -> None:
    """Bound by computing, all three; new tokens a second, to the digits that are given."""
    requests = Requests(prompt, output)
    assert MODEL.largest_batch(requests, POOL) == pytest.approx(batch, abs=0.7)
    assert output / (MODEL.operations(requests) / H100.operations_per_second) == pytest.approx(rate, rel=2e-3)
    assert MODEL.bound_seconds(requests, batch, H100) <= MODEL.serial_seconds(requests, batch, H100)


def test_what_is_shared_is_computed_once_and_read_once() -> None:
    alone, shared = Requests(8192, 256), Requests(8192, 256, 7168)
    saved = MODEL.operations(alone) - MODEL.operations(shared)
    seen = MODEL.attention_operations
    assert saved == pytest.approx(7168 * (2 * MODEL.linear_parameters + seen * 7168 / 2))
    assert MODEL.bytes_read(shared, 1) == pytest.approx(MODEL.bytes_read(alone, 1))
    assert MODEL.bytes_read(shared, 424) < 0.15 * MODEL.bytes_read(alone, 424)
    assert MODEL.largest_batch(shared, POOL) == pytest.approx(424, abs=1)


def test_weights_count_where_few_rows_run_side_by_side() -> None:
    requests = Requests(16, 256)
    one = MODEL.bound_seconds(requests, 1, H100)
    weights = (MODEL.linear_parameters + MODEL.head_parameters) * 2 * 256 / H100.bytes_per_second
    assert one == pytest.approx(weights, rel=0.01)
    assert MODEL.bound_seconds(requests, 64, H100) < one / 30
    quarter = replace(MODEL, weight_bytes=0.5)
    assert quarter.bound_seconds(requests, 1, H100) == pytest.approx(one / 4, rel=0.02)


def test_the_852m_shape() -> None:
    path = SHAPE_852M
    model = CostModel.of(parse_model_config(json.loads(path.read_text())), 1, 2)
    assert model.linear_parameters + 2 * model.head_parameters == pytest.approx(852e6, rel=2e-3)
