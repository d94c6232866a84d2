"""Norms, activations and quantization in C against the plain reference, and each row by itself."""

import ctypes

import pytest
import torch
from compiled import libraries
from true_values import true_values

from batchinfer.kernels import rows
from batchinfer.kernels.activation import activate
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.rows_cpu import ACTIVATIONS, activate_quantize, add_norm, quantize_rows

COLUMNS = [1, 16, 63, 500]


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    x = x.double()
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit if weight is None else unit * weight.double()


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("added", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_sum_and_its_norm(library: ctypes.CDLL, columns: int, added: bool, scaled: bool, weighted: bool) -> None:
    x, y, scale = torch.randn(9, columns), torch.randn(9, columns), torch.rand(9, 1)
    weight = torch.randn(columns) if weighted else None
    total = x.double() + (y.double() * (scale.double() if scaled else 1) if added else 0)
    given = Rows(y, scale if scaled else None) if added else None
    for takes in (torch.float32, torch.uint8):
        stream = x.clone()
        found = add_norm(library, stream, given, weight, 1e-5, takes)
        torch.testing.assert_close(stream.double(), total, rtol=1e-6, atol=1e-6)
        step = 0.0 if found.scale is None else found.scale.double() * 0.50001
        assert ((true_values(found) - normed(total, weight)).abs() <= step + 1e-5).all()


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
def test_bfloat16_is_rounded_as_by_torch(library: ctypes.CDLL, columns: int) -> None:
    x, y, weight = (torch.randn(shape).bfloat16() for shape in ((9, columns), (9, columns), (columns,)))
    stream = x.clone()
    found = add_norm(library, stream, Rows(y), weight, 1e-5, torch.bfloat16).values
    assert stream.equal(x + y)
    unit = (normed(x + y, None)).bfloat16()
    off = (found.float() - (unit * weight).float()).abs() > 0  # where float32 and float64 round to different sides
    assert off.float().mean() <= 0.02
    torch.testing.assert_close(found, unit * weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_rounded_as_by_the_reference(library: ctypes.CDLL, columns: int) -> None:
    x = torch.randn(9, columns)
    x[4] = 0
    found, expected = quantize_rows(library, x), rows.quantize_rows(x.clone())
    assert found.scale is not None and expected.scale is not None
    assert found.values.equal(expected.values) and found.scale.equal(expected.scale)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or name != "clamped_swiglu"],
)
def test_an_activation_and_its_rounding(
    library: ctypes.CDLL, columns: int, activation: str, gated: bool, scaled: bool
) -> None:
    x, scale = torch.randn(9, columns * (2 if gated else 1)) * 4, torch.rand(9, 1) * 2
    found = activate_quantize(library, Rows(x.clone(), scale if scaled else None), activation, gated)
    exact = activate(x.double() * (scale.double() if scaled else 1), activation, gated)
    assert found.scale is not None
    assert ((true_values(found) - exact).abs() <= found.scale.double() * 0.5001 + 1e-5).all()
    largest = (found.values.long() - 128).abs().amax(-1)
    assert (largest.eq(127) | (exact.abs().amax(-1) < 1e-5)).all()


@pytest.mark.parametrize("library", libraries())
def test_activations_far_from_zero(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-200, 200, 1001), torch.tensor([-3e38, 3e38, 1e-30, 0.0])])[:, None]
    for activation in ("silu", "gelu_tanh"):
        found = activate_quantize(library, Rows(x.clone()), activation, False)
        torch.testing.assert_close(true_values(found), activate(x.double(), activation, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("columns", [5, 32])
def test_a_row_that_is_not_finite_is_marked_and_alone(library: ctypes.CDLL, bad: float, columns: int) -> None:
    def all_of(x: torch.Tensor) -> list[Rows]:
        made = [quantize_rows(library, x), add_norm(library, x.clone(), None, None, 1e-5, torch.uint8)]
        return made + [activate_quantize(library, Rows(x.repeat(1, 2)), name, True) for name in ACTIVATIONS[:3]]

    x = torch.randn(8, columns)
    clean = all_of(x)
    x[3, 4] = bad
    for found, was in zip(all_of(x), clean, strict=True):
        assert found.scale is not None and was.scale is not None
        others = [i for i in range(8) if i != 3]
        assert found.values[others].equal(was.values[others]) and found.scale[others].equal(was.scale[others])
        if bad != float("-inf"):  # of which SiLU makes no number, and other activations make 0
            assert not found.scale[3].isfinite()


@pytest.mark.parametrize("library", libraries())
def test_a_rows_bits_are_its_own(library: ctypes.CDLL) -> None:
    x, weight = torch.randn(400, 200), torch.randn(100)
    gated = activate_quantize(library, Rows(x), "silu", True)
    norm = add_norm(library, x[:, :100].contiguous(), None, weight, 1e-5, torch.uint8)
    for i in (0, 17, 399):
        one = activate_quantize(library, Rows(x[i : i + 1]), "silu", True)
        assert one.values.equal(gated.values[i : i + 1])
        alone = add_norm(library, x[i : i + 1, :100].contiguous(), None, weight, 1e-5, torch.uint8)
        assert alone.scale is not None and norm.scale is not None
        assert alone.values.equal(norm.values[i : i + 1]) and alone.scale.equal(norm.scale[i : i + 1])
