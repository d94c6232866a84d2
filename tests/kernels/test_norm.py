"""RMSNorm against torch's; norm and activation with quantization against the plain ones."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from true_values import true_values

from batchinfer.kernels.activation import activate, activate_quantize
from batchinfer.kernels.norm import rms_norm, rms_norm_quantize
from batchinfer.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 2, 63).to(dtype), torch.rand(63).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    expected = torch.nn.functional.rms_norm(x.double(), (63,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_and_activation_with_quantization_are_the_plain_ones_rounded() -> None:
    x, weight = torch.randn(8, 500), torch.rand(500) + 0.5
    expected = torch.nn.functional.rms_norm(x.double(), (500,), weight.double(), 1e-5)
    got = rms_norm_quantize(x.clone(), weight, 1e-5)
    assert got.scale is not None
    assert ((true_values(got) - expected).abs() <= got.scale.double() * 0.501).all()


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


FUNCTIONS = {"silu": torch.nn.functional.silu, "gelu_tanh": gelu, "relu2": lambda x: x.clamp(min=0) ** 2}


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_an_activation_with_quantization_is_the_plain_one_rounded(activation: str, gated: bool) -> None:
    h, scale = torch.randn(8, 126), torch.rand(8, 1) + 0.1
    gate, up = (h * scale).double().chunk(2, -1) if gated else ((h * scale).double(), torch.ones(()))
    expected = FUNCTIONS[activation](gate) * up
    for given in (Rows(h.clone(), scale), Rows(h * scale)):
        rows = activate_quantize(given, activation, gated)
        assert rows.scale is not None
        assert ((true_values(rows) - expected).abs() <= rows.scale.double() * 0.501).all()
    torch.testing.assert_close(activate(h * scale, activation, gated).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_clamped_activation_is_that_of_gpt_oss() -> None:
    config = AutoConfig.for_model("gpt_oss", hidden_size=8, intermediate_size=63, num_local_experts=1)
    h, scale = 6 * torch.randn(8, 126), torch.rand(8, 1) + 0.5
    by_turns = torch.stack((h * scale).chunk(2, -1), -1).flatten(1)
    expected = GptOssExperts(config)._apply_gate(by_turns.double())
    assert (h * scale).abs().max() > 7
    torch.testing.assert_close(activate(h * scale, "clamped_swiglu", True).double(), expected, rtol=1e-5, atol=1e-6)
    rows = activate_quantize(Rows(h, scale), "clamped_swiglu", True)
    assert rows.scale is not None
    assert ((true_values(rows) - expected).abs() <= rows.scale.double() * 0.501).all()
