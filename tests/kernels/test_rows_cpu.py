"""Norms, activations and quantization in C against the plain reference, and each row by itself."""

import ctypes

import pytest
import torch
from compiled import libraries
from torch.nn import functional as F
from true_values import true_values

from batchinfer.kernels import activation as reference
from batchinfer.kernels import rows
from batchinfer.kernels.norm import LayerNorm
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.rows_cpu import ACTIVATIONS, activate, add_norm, quantize_rows

COLUMNS = [1, 16, 63, 500]
KINDS = [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or name != "clamped_swiglu"]


def normed(x: torch.Tensor, norm: torch.Tensor | LayerNorm | None) -> torch.Tensor:
    x = x.double()
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5)
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit if norm is None else unit * norm.double()


def norm_of(kind: str, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | LayerNorm | None:
    weight, bias = torch.randn(2, columns).to(dtype)
    return {"none": None, "rms": weight, "layer": LayerNorm(weight, bias)}[kind]


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("added", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_the_sum_and_its_norm(library: ctypes.CDLL, columns: int, added: bool, scaled: bool, kind: str) -> None:
    x, y, scale = torch.randn(9, columns), torch.randn(9, columns), torch.rand(9, 1)
    norm = norm_of(kind, columns)
    total = x.double() + (y.double() * (scale.double() if scaled else 1) if added else 0)
    given = Rows(y, scale if scaled else None) if added else None
    for takes in (torch.float32, torch.uint8):
        stream = x.clone()
        found = add_norm(library, stream, given, norm, 1e-5, takes)
        torch.testing.assert_close(stream.double(), total, rtol=1e-6, atol=1e-6)
        step = 0.0 if found.scale is None else found.scale.double() * 0.50001
        assert ((true_values(found) - normed(total, norm)).abs() <= step + 1e-5).all()


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS[1:])
def test_a_mean_far_from_zero(library: ctypes.CDLL, columns: int) -> None:
    """A variance that is the mean of squares less the square of the mean would be lost."""
    x, norm = torch.randn(9, columns) + 1000, norm_of("layer", columns)
    found = add_norm(library, x.clone(), None, norm, 1e-5, torch.float32).values
    torch.testing.assert_close(found.double(), normed(x, norm), rtol=0, atol=1e-3)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bfloat16_is_rounded_as_by_torch(library: ctypes.CDLL, columns: int, kind: str) -> None:
    x, y = torch.randn(2, 9, columns).bfloat16()
    stream, norm = x.clone(), norm_of(kind, columns, torch.bfloat16)
    found = add_norm(library, stream, Rows(y), norm, 1e-5, torch.bfloat16).values
    assert stream.equal(x + y)
    if isinstance(norm, torch.Tensor):
        expected = normed(x + y, None).bfloat16() * norm
    else:
        expected = normed(x + y, norm).bfloat16()
    off = (found.float() - expected.float()).abs() > 0  # where float32 and float64 round to different sides
    assert off.float().mean() <= 0.02
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


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
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_an_activation_and_its_rounding(
    library: ctypes.CDLL, columns: int, activation: str, gated: bool, scaled: bool
) -> None:
    x, scale = torch.randn(9, columns * (2 if gated else 1)) * 4, torch.rand(9, 1) * 2
    given = Rows(x.clone(), scale if scaled else None)
    exact = reference.activate(x.double() * (scale.double() if scaled else 1), activation, gated)
    found = activate(library, given, activation, gated, torch.uint8)
    assert found.scale is not None
    assert ((true_values(found) - exact).abs() <= found.scale.double() * 0.5001 + 1e-5).all()
    largest = (found.values.long() - 128).abs().amax(-1)
    assert (largest.eq(127) | (exact.abs().amax(-1) < 1e-5)).all()
    whole = activate(library, given, activation, gated, torch.float32)
    assert whole.scale is None
    torch.testing.assert_close(whole.values.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_an_activation_of_bfloat16_is_rounded_once(
    library: ctypes.CDLL, columns: int, activation: str, gated: bool
) -> None:
    x = (torch.randn(9, columns * (2 if gated else 1)) * 4).bfloat16()
    exact = reference.activate(x.double(), activation, gated)
    found = activate(library, Rows(x), activation, gated, torch.bfloat16).values
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 + 1e-5, atol=1e-5)  # half a unit in the last place
    eight = activate(library, Rows(x), activation, gated, torch.uint8)
    assert eight.scale is not None
    assert ((true_values(eight) - exact).abs() <= eight.scale.double() * 0.5001 + 1e-5).all()


@pytest.mark.parametrize("library", libraries())
def test_activations_far_from_zero(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-200, 200, 1001), torch.tensor([-3e38, 3e38, 1e-30, 0.0])])[:, None]
    for activation in ("silu", "gelu", "gelu_tanh"):
        expected = reference.activate(x.double(), activation, False)
        for takes in (torch.uint8, torch.float32):
            found = activate(library, Rows(x.clone()), activation, False, takes)
            torch.testing.assert_close(true_values(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("columns", [5, 32])
def test_a_row_that_is_not_finite_is_marked_and_alone(library: ctypes.CDLL, bad: float, columns: int) -> None:
    def all_of(x: torch.Tensor) -> list[Rows]:
        made = [add_norm(library, x.clone(), None, norm, 1e-5, torch.uint8) for norm in (None, layer)]
        made += [activate(library, Rows(x.repeat(1, 2)), name, True, torch.uint8) for name in ACTIVATIONS[:4]]
        return [quantize_rows(library, x), *made]

    x, layer = torch.randn(8, columns), norm_of("layer", columns)
    clean = all_of(x)
    x[3, 4] = bad
    for found, was in zip(all_of(x), clean, strict=True):
        assert found.scale is not None and was.scale is not None
        others = [i for i in range(8) if i != 3]
        assert found.values[others].equal(was.values[others]) and found.scale[others].equal(was.scale[others])
        if bad != float("-inf"):  # of which SiLU makes no number, and other activations make 0
            assert not found.scale[3].isfinite()


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("takes", [torch.float32, torch.uint8])
def test_a_rows_bits_are_its_own(library: ctypes.CDLL, takes: torch.dtype) -> None:
    x = torch.randn(400, 200)
    norms = [norm_of(kind, 200) for kind in ("rms", "layer")]

    def all_of(x: torch.Tensor) -> list[torch.Tensor]:
        made = [add_norm(library, x.clone(), None, norm, 1e-5, takes) for norm in norms]
        made += [activate(library, Rows(x), name, True, takes) for name in ACTIVATIONS]
        return [part for rows in made for part in (rows.values, rows.scale) if part is not None]

    together = all_of(x)
    for i in (0, 17, 399):
        assert all(one.equal(part[i : i + 1]) for one, part in zip(all_of(x[i : i + 1]), together, strict=True))
