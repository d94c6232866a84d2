"""What a run is held to: the times that a device's ceilings allow."""

from dataclasses import replace

import pytest
from gpu_check.roofline import Device, Roofline

from batchinfer.cost.cost_model import CostModel, Requests

LLAMA_3_8B = CostModel(6_979_321_856, 525_336_576, 32 * 4096, 2 * 32 * 2048, 2 * 32 * 2048)
ROOFLINE = Roofline(LLAMA_3_8B, 2, Device(989e12, 3.0e12))


@pytest.mark.parametrize(("prompt", "output", "batch"), [(1024, 128, 456), (161, 338, 1503), (8192, 256, 60)])
def test_taking_turns_takes_no_less_than_the_bound(prompt: int, output: int, batch: int) -> None:
    requests = Requests(prompt, output)
    computing = LLAMA_3_8B.operations(requests) / 989e12
    assert computing <= ROOFLINE.bound_seconds(requests, batch) <= ROOFLINE.serial_seconds(requests, batch)


def test_weights_count_where_few_rows_run_side_by_side() -> None:
    requests = Requests(16, 256)
    one = ROOFLINE.bound_seconds(requests, 1)
    weights = (LLAMA_3_8B.linear_parameters + LLAMA_3_8B.head_parameters) * 2 * 256 / 3.0e12
    assert one == pytest.approx(weights, rel=0.01)
    assert ROOFLINE.bound_seconds(requests, 64) < one / 30
    assert replace(ROOFLINE, weight_bytes=0.5).bound_seconds(requests, 1) == pytest.approx(one / 4, rel=0.02)
