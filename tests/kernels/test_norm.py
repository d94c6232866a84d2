"""RMSNorm and LayerNorm against torch's; both and activation with quantization against the plain ones."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from true_values import true_values

from batchinfer.kernels.activation import activate, activate_quantize
from batchinfer.kernels.norm import LayerNorm, NormWeights, norm, norm_quantize, rms_norm
from batchinfer.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 2, 63).to(dtype), torch.rand(63).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    expected = torch.nn.functional.rms_norm(x.double(), (63,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=tolerance, atol=tolerance)


def in_float64(x: torch.Tensor, weights: NormWeights, eps: float) -> torch.Tensor:
    """The norm by its definition."""
    x = x.double()
    if isinstance(weights, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights.weight.double() + weights.bias.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights.double()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(63,), (2, 63)], ids=["one weight", "a weight for each head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_norms_are_what_they_are_defined_as(dtype: torch.dtype, shape: tuple[int, ...], centered: bool) -> None:
    """The numbers lie around 3, or a mean that was not subtracted would not show."""
    x, weight, bias = (torch.randn(8, 2, 63) + 3).to(dtype), torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    weights = LayerNorm(weight, bias) if centered else weight
    found, tolerance = norm(x, weights, 1e-2), {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert found.dtype == dtype
    expected = in_float64(x, weights, 1e-2)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance * 4, atol=tolerance * 4)


@pytest.mark.parametrize("centered", [False, True])
def test_a_norm_with_quantization_is_the_plain_one_rounded(centered: bool) -> None:
    x, weight = torch.randn(8, 500) + 1, torch.rand(500) + 0.5
    weights = LayerNorm(weight, torch.randn(500)) if centered else weight
    expected, got = in_float64(x, weights, 1e-5), norm_quantize(x.clone(), weights, 1e-5)
    assert got.scale is not None
    assert ((true_values(got) - expected).abs() <= got.scale.double() * 0.501).all()


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.special.ndtr(x)


def relu2(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) ** 2


FUNCTIONS = {"silu": torch.nn.functional.silu, "gelu": exact_gelu, "gelu_tanh": gelu, "relu2": relu2}


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
