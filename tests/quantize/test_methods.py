"""Quantization methods against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import weight_scheme
from batchinfer.quantize.gptq import DAMPING, gptq
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.methods import METHODS, method
from batchinfer.quantize.rounding import Grid
from batchinfer.quantize.rtn import round_to_nearest
from batchinfer.quantize.scaling import search_scale


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs as layers have them: some channels loud, and channels that go together."""
    mixing = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    return torch.randn(tokens, columns) * torch.rand(columns) ** 3 @ mixing


def inputs_of(x: Tensor) -> Inputs:
    return Inputs(x.split(100), len(x), x.shape[1], hessian=True)


def test_inputs_are_summed_over_chunks() -> None:
    x = torch.randn(1300, 600)
    inputs = inputs_of(x)
    order = torch.randperm(600)
    found = inputs.hessian(order)
    torch.testing.assert_close(found, (x.t() @ x)[order][:, order].double(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(inputs.mean_square, x.square().mean(0))
    assert inputs.most.equal(x.abs().amax(0)) and inputs.sample.equal(x[::2])
    assert found.equal(found.t())
    with pytest.raises(ValueError, match="not finite on the calibration's rows"):
        Inputs([x / 0], len(x), 600, hessian=False)


@pytest.mark.parametrize("group_size", [0, 8, 24])
def test_gptq_is_optimal_brain_quantization_column_by_column(group_size: int) -> None:
    """The paper's recursion as it is first stated: invert what is left of the Hessian anew after each column."""
    weight, x = torch.randn(5, 48), correlated(400, 48)
    scheme = weight_scheme("w4a16", group_size)
    inputs, size = inputs_of(x), group_size or 48
    hessian = inputs.hessian(torch.arange(48))
    hessian += DAMPING[0] * hessian.diagonal().mean() * torch.eye(48)
    energy = inputs.mean_square.view(-1, size)
    order = [
        g * size + c
        for g in np.argsort(-energy.sum(1).numpy(), kind="stable").tolist()
        for c in np.argsort(-energy[g].numpy(), kind="stable").tolist()
    ]
    left, values, grid = weight.double(), torch.zeros(5, 48), Grid(4)
    costs = [1 / torch.linalg.inv(hessian[order[i:]][:, order[i:]])[0, 0] for i in range(48)]
    for i, column in enumerate(order):
        if i % size == 0:
            group = order[i : i + size]
            scale = grid.scales(left[:, group].float(), torch.stack(costs[i : i + size]).float())[:, 0]
        rest = order[i:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        values[:, column] = grid.round(left[:, column].float(), scale)
        error = left[:, column] - (values[:, column] * scale).double()
        left[:, rest] -= torch.outer(error, inverse[0] / inverse[0, 0])
    found = gptq(weight, scheme, inputs)
    same = (found.values.float() == values).float().mean()
    assert same > 0.99, "single precision may tip a number that lies between two"
    assert (found.values.float() - values).abs().max() <= 1


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 128), ("w4a16", 32), ("w4a16", 0), ("w8a8-int8", None)])
def test_each_method_errs_less_on_its_inputs_than_the_one_before(scheme: str, group_size: int | None) -> None:
    weight, x = torch.randn(64, 256), correlated(2000, 256)
    held_out, inputs, chosen = x[1000:], inputs_of(x[:1000]), weight_scheme(scheme, group_size)

    def error(name: str) -> float:
        matrix = method(name).quantize(weight, chosen, inputs if method(name).calibrated else None)
        return float((held_out @ (matrix.dequantize() - weight).t()).square().sum())

    errors = [error(name) for name in ("rtn", "rtn-mse", "rtn-importance", "gptq")]
    assert min(errors[:3]) > 2 * errors[3], errors
    # In 8 bits hardly anything is cut, and the first three are about the same.
    assert chosen.bits == 8 or errors[0] > errors[1] > errors[2], errors


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = torch.randn(16, 64), correlated(200, 64)
    x[:, 10:40] = 0
    matrix = gptq(weight, weight_scheme("w4a16", 16), inputs_of(x))
    plain = round_to_nearest(weight, weight_scheme("w4a16", 16))

    def error(found: QuantizedMatrix) -> float:
        return float((x @ (found.dequantize() - weight).t()).square().sum())

    assert bool(matrix.scale.isfinite().all()) and error(matrix) < error(plain)
    silent = gptq(weight, weight_scheme("w4a16", 16), inputs_of(torch.zeros(50, 64)))
    assert bool(silent.scale.isfinite().all())


def test_a_hessian_that_rounding_spoiled_is_damped_more_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = torch.randn(16, 64), inputs_of(correlated(200, 64))
    spoiled = inputs.hessian(torch.arange(64))
    least = float(torch.linalg.eigvalsh(spoiled)[0])
    spoiled -= (least + 0.05 * spoiled.diagonal().mean()) * torch.eye(64)
    monkeypatch.setattr(inputs, "hessian", lambda order: spoiled[order][:, order])
    matrix = gptq(weight, weight_scheme("w4a16", 16), inputs)
    assert bool(matrix.scale.isfinite().all())
    assert inputs.notes == ["its inputs' Hessian is not positive definite with damping 0.01; more was added"]
    spoiled -= 1e6 * torch.eye(64)
    with pytest.raises(ValueError, match="not positive definite: calibrate with more or other rows"):
        gptq(weight, weight_scheme("w4a16", 16), inputs)


@pytest.mark.parametrize("integer_inputs", [False, True])
def test_searched_scales_err_less_where_inputs_are_uneven(integer_inputs: bool) -> None:
    weight, x = torch.randn(32, 64), torch.randn(600, 64)
    # Loud inputs with small weights: a finer step for those alone, which no clip can give.
    x[:, 5::8] *= 20
    weight[:, 5::8] /= 10
    scheme, alone = weight_scheme("w8a8-int8" if integer_inputs else "w4a16", None), torch.arange(64)
    if not integer_inputs:
        scheme = weight_scheme("w4a16", 64)

    inputs = inputs_of(x)

    def error(scale: Tensor) -> float:
        y = x / scale
        if integer_inputs:
            step = y.abs().amax(1, keepdim=True) / 127
            y = (y / step).round() * step
        back = round_to_nearest(weight * scale, scheme, inputs.mean_square / scale.square()).dequantize()
        return float((y @ back.t() - x @ weight.t()).square().sum())

    scale = search_scale(weight, inputs, scheme, alone)
    assert error(scale) < 0.8 * error(torch.ones(64)), (error(scale), error(torch.ones(64)))
    assert scale[5::8].min() > 1.5 * scale.median()
    tied = search_scale(weight, inputs, scheme, alone // 2)
    assert tied[4::8].equal(tied[5::8]) and tied[0] == tied[1] and tied[4] > 1.3 * tied.median()
    even = search_scale(torch.ones(32, 64), inputs_of(torch.ones(20, 64)), scheme, alone)
    assert (even == 1).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_numbers_are_rounded_with_the_scales_that_will_be_read(kind: str) -> None:
    weight = torch.randn(8, 64) * torch.logspace(-6, 0, 8)[:, None]
    weight[0] = 0
    for name in METHODS:
        scheme = replace(weight_scheme("w8a8-int8" if name == "smoothquant" else "w8a16", 0), scale_type=kind)
        matrix = method(name).quantize(weight, scheme, inputs_of(correlated(300, 64)))
        assert matrix.scale.equal(matrix.scale.to(getattr(torch, kind)).float()) and bool((matrix.scale > 0).all())
        assert bool(matrix.dequantize().isfinite().all()) and not matrix.dequantize()[0].any()


def test_methods_that_have_nothing_to_do_in_a_scheme_are_refused() -> None:
    for name, scheme, message in (
        ("gptq", "w8a8-fp8", "w8a8-fp8 takes only rtn"),
        ("awq", "w8a8-int8", "take smoothquant"),
        ("smoothquant", "w4a16", "take awq"),
    ):
        with pytest.raises(ValueError, match=message):
            method(name).check(weight_scheme(scheme, None))
    with pytest.raises(ValueError, match="method is 'magic'; it must be one of rtn, rtn-mse, rtn-importance, gptq"):
        method("magic")
