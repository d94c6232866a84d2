"""Matrix products against integers and float64."""

from collections.abc import Sequence
from itertools import product

import torch
from gpu_check.compare import Errors, poisoned
from gpu_check.session import Session, name_of
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
FP8_SUMS = 1e-3  # results in float32: Hopper adds products of float8 in some 14 bits, a turn of the loop long
F8 = torch.float8_e4m3fn
ROWS = (1, 3, 16, 64, 300, 2000)
SIZES = [(4096, 4096), (257, 512), (63, 100)]
SMALL = [(17, 36)]


def run_floating(session: Session) -> None:
    """Floating point in tiles of one shape."""
    errors = Errors(session)
    cases = product(session.dtypes, session.pick(SIZES, SMALL), session.pick(ROWS, (1, 17)))
    for dtype, (n, k), rows in session.within_time(cases):
        with session.case(f"linear, {rows} x [{n}, {k}] in {name_of(dtype)}"), poisoned():
            _floating(session, errors, dtype, n, k, rows)
    errors.write()


def run_eight_bits(session: Session) -> None:
    """int8, to the bit; float8 by the library and by ours."""
    errors = Errors(session)
    sizes = session.pick(SIZES, SMALL)
    for (n, k), rows in session.within_time(product(sizes, session.pick((*ROWS, 17, 65, 257), (1, 17)))):
        with session.case(f"int8 product, {rows} x [{n}, {k}]"), poisoned():
            _integers(session, errors, n, k, rows)
    session.say("int8")
    for (n, k), rows in session.within_time(product(sizes, session.pick(ROWS, (1, 17)))):
        if not session.gpu.has_float8:
            session.findings.note("float8 products were not run: the device multiplies none")
            break
        for out in dict.fromkeys((session.dtype, torch.float32)):
            with session.case(f"fp8 product, {rows} x [{n}, {k}] to {name_of(out)}"), poisoned():
                _fp8(session, errors, n, k, rows, out)
    errors.write()


def _floating(session: Session, errors: Errors, dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    from batchinfer.kernels.linear_triton import linear

    x, weight, bias = (_random(session, dtype, *shape) for shape in ((rows, k), (n, k), (n,)))
    expected = x.double() @ weight.double().t()
    errors.close("linear", name_of(dtype), linear(x, weight), expected, TOLERANCE[dtype])
    found = linear(x, weight, bias)
    errors.close("linear, bias", name_of(dtype), found, expected + bias.double(), TOLERANCE[dtype])


def _integers(session: Session, errors: Errors, n: int, k: int, rows: int) -> None:
    from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
    from batchinfer.kernels.rows import Rows

    x, weight = _whole(session, -128, 128, rows, k, seed=1), _whole(session, -128, 128, n, k, seed=2)
    # Scales that are powers of two, and a whole bias: every step is exact in float32 as long as sums are below 2^24.
    x, weight = (x // 8, weight // 8) if k > 512 else (x, weight)
    x_scale = 2.0 ** _whole(session, -6, 3, rows, 1, seed=3).float()
    scale = 2.0 ** _whole(session, -6, 3, n, seed=4).float()
    found = linear_w8a8(Rows(x, x_scale), weight, scale, None, torch.float32, session.gpu)
    exact = (x.double() @ weight.double().t()) * x_scale.double() * scale.double()  # whole numbers below 2^53
    errors.same("int8 product", "int8", found.double(), exact)
    if k % 8 == 0 and n % 8 == 0 and rows > 16 and not session.smoke:  # what the library takes
        errors.same("int8 product of the library", "int8", torch._int_mm(x, weight.t()).double(), _sums(x, weight))


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


def _fp8(session: Session, errors: Errors, n: int, k: int, rows: int, out: torch.dtype) -> None:
    from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
    from batchinfer.kernels.products_triton import EightBitProduct
    from batchinfer.kernels.rows import Rows

    x, weight = (_random(session, torch.float32, *shape).to(F8) for shape in ((rows, k), (n, k)))
    x_scale = torch.rand(rows, 1, generator=session.generator(3), device=session.device) + 0.5
    scale = torch.rand(n, generator=session.generator(4), device=session.device) + 0.5
    bias = _random(session, out, n)
    expected = _sums(x.float(), weight.float()) * x_scale.double() * scale.double() + bias.double()
    tolerance = FP8_SUMS if out == torch.float32 else TOLERANCE[out]
    tolerance = TOLERANCE[out] if session.smoke else tolerance
    for deterministic in (False, True):
        found = linear_w8a8(Rows(x, x_scale), weight, scale, bias, out, session.gpu, deterministic)
        errors.close("fp8 product", f"fp8 to {name_of(out)}", found, expected, tolerance)
    used = EightBitProduct(weight, scale, bias, out, session.gpu, deterministic=False)
    found = used(Rows(x, x_scale)).values
    path = "the library" if used.by_library else "ours"
    errors.close(f"fp8 product as it is chosen, by {path}", f"fp8 to {name_of(out)}", found, expected, tolerance)


def run_four_bits(session: Session) -> None:
    """Weights in 4 bits: few rows, many, so many that they are expanded; groups of every kind."""
    sizes = session.pick(
        [(4096, 4096, 128), (63, 512, 32), (130, 384, 64), (257, 1000, 1000), (65, 1664, 64)], [(33, 160, 32)]
    )
    _four_bits_of(session, session.dtypes[:1], sizes, session.pick(ROWS, (1, 17)))


def run_four_bits_of_other_types(session: Session) -> None:
    """The same for the other types of rows, in fewer sizes: each is a kernel to compile."""
    sizes = session.pick([(130, 384, 128), (257, 1000, 1000)], [(33, 160, 32)])
    _four_bits_of(session, session.dtypes[1:], sizes, session.pick((1, 64, 300, 2000), (1, 17)))


def _four_bits_of(
    session: Session, dtypes: Sequence[torch.dtype], sizes: Sequence[tuple[int, int, int]], rows: Sequence[int]
) -> None:
    errors = Errors(session)
    for dtype, (n, k, group), zeros in session.within_time(product(dtypes, sizes, (False, True))):
        with session.case(f"4-bit product [{n}, {k}], groups of {group}, zero points {zeros}, {name_of(dtype)}"):
            _four_bits(session, errors, dtype, (n, k, group), zeros, rows)
        session.say(f"[{n}, {k}] in groups of {group}, {name_of(dtype)}")
    errors.write()


def _four_bits(
    session: Session,
    errors: Errors,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    zeros: bool,
    all_rows: Sequence[int],
) -> None:
    from batchinfer.kernels.four_bits_triton import repack
    from batchinfer.kernels.linear_w4a16_triton import EXPAND_ROWS, expand, linear_w4a16

    n, k, group = size
    values = _whole(session, -8, 8, n, k, seed=1)
    scale = (0.01 * (torch.rand(n, k // group, generator=session.generator(2), device=session.device) + 0.5)).to(dtype)
    zero_point = _whole(session, -8, 9, n, k // group, seed=3).float() if zeros else None
    exact = values.double() - (0 if zero_point is None else zero_point.double().repeat_interleave(group, 1))
    exact = exact * scale.double().repeat_interleave(group, 1)
    weight = repack(values, scale.float(), zero_point, dtype, session.gpu)
    with poisoned():
        errors.same("4-bit weights expanded", name_of(dtype), expand(weight), exact.float().to(dtype))
    bias = _random(session, dtype, n)
    for rows in all_rows:
        x = _random(session, dtype, rows, k)
        for added, deterministic in ((None, False), (bias, False), (bias, True)):
            with poisoned():
                found = linear_w4a16(x, weight, added, session.gpu, deterministic)
            expected = x.double() @ exact.t() + (0 if added is None else added.double())
            # Expanded weights are rounded to the type of the rows; sums of splits are not rounded before the end.
            tolerance = (2 if rows >= EXPAND_ROWS and not deterministic else 1) * TOLERANCE[dtype]
            kernel = "4-bit product, deterministic" if deterministic else "4-bit product"
            errors.close(kernel, name_of(dtype), found, expected, tolerance)


def _random(session: Session, dtype: torch.dtype, *shape: int) -> Tensor:
    seed = sum(shape) + len(shape)
    return torch.randn(*shape, generator=session.generator(seed), device=session.device).to(dtype)


def _whole(session: Session, low: int, high: int, *shape: int, seed: int) -> Tensor:
    generator = session.generator(seed)
    return torch.randint(low, high, shape, generator=generator, device=session.device, dtype=torch.int8)
