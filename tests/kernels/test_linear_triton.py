"""Matrix products in Triton's interpreter, against plain torch in integers or float64.

The interpreter has no arithmetic in bfloat16, so types here are float32 and float16. It runs programs one after the
other, so these tests cannot find races.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batchinfer.kernels import linear_triton, linear_w4a16_triton, linear_w8a8_triton, products_triton
from batchinfer.kernels.four_bits_triton import FourBits, repack
from batchinfer.kernels.gpu import INTERPRETED, Gpu
from batchinfer.kernels.linear_triton import linear
from batchinfer.kernels.linear_w4a16_triton import EXPAND_ROWS, SLAB, at_once, expand, linear_w4a16, splits
from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
from batchinfer.kernels.rows import Rows

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}  # of the largest number
HOPPER = replace(INTERPRETED, processors=132)
ADA = replace(HOPPER, capability=(8, 9), shared_bytes=99 << 10)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What torch allocates and nobody has written is NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 256, 257, 1025])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 300), (130, 256)])
def test_int8_is_the_exact_integer_product(rows: int, n: int, k: int, bias: bool) -> None:
    x = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    x_scale = 2.0 ** torch.randint(-6, 3, (rows, 1)).float()  # powers of two: every product is exact
    scale = 2.0 ** torch.randint(-6, 3, (n,)).float() * torch.randn(n).sign()
    added = torch.randint(-5, 6, (n,)).float() if bias else None
    found = linear_w8a8(Rows(x, x_scale), weight, scale, added, torch.float32, HOPPER)
    exact = (x.long() @ weight.t().long()).double() * x_scale * scale + (0 if added is None else added)
    assert found.double().equal(exact)


@pytest.mark.parametrize(("out", "gpu"), [(torch.float32, HOPPER), (torch.float16, HOPPER), (torch.float32, ADA)])
@pytest.mark.parametrize("rows", [1, 17, 65, 257])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 300), (130, 256)])
def test_fp8_is_the_product_of_its_numbers(rows: int, n: int, k: int, out: torch.dtype, gpu: Gpu) -> None:
    x, weight = torch.randn(rows, k).to(torch.float8_e4m3fn), torch.randn(n, k).to(torch.float8_e4m3fn)
    x_scale, scale, bias = torch.rand(rows, 1) + 0.5, torch.rand(n) - 0.5, torch.randn(n).to(out)
    found = linear_w8a8(Rows(x, x_scale), weight, scale, bias, out, gpu)
    assert found.dtype == out
    check(found, x.double() @ weight.double().t() * x_scale * scale + bias)


def test_each_number_of_rows_has_its_tile_and_all_are_taken() -> None:
    rows = (1, 16, 17, 64, 65, 256, 257, 1024, 1025, 10**6)
    first, second, third, last = linear_w8a8_triton.TILES.values()
    wide, float8, tile_for = linear_w8a8_triton.WIDE, torch.float8_e4m3fn, linear_w8a8_triton.tile_for
    by_rows = [first, first, second, second, third, third, last, last]
    assert [tile_for(m, 4096, torch.int8, HOPPER) for m in rows] == [*by_rows, wide, wide]
    assert [tile_for(m, 4096, torch.int8, ADA) for m in rows] == [*by_rows, last, last], "99 KiB do not hold the wide"
    assert [tile_for(m, 4096, float8, ADA) for m in rows] == [*by_rows, last, last]
    assert [tile_for(m, 4096, float8, HOPPER) for m in rows] == [second, second, *by_rows[2:], last, last]
    assert {tile_for(m, 4096, float8, gpu, True) for m in rows for gpu in (HOPPER, ADA)} == {second}
    first, last = linear_w4a16_triton.TILES.values()
    tile_for_four = linear_w4a16_triton.tile_for
    assert [tile_for_four(m, torch.bfloat16, False) for m in rows] == [first] * 2 + [last] * 8
    assert {tile_for_four(m, torch.bfloat16, True) for m in rows} == {last}
    always = {tile_for_four(m, torch.float32, fixed) for m in rows for fixed in (False, True)}
    assert always == {linear_w4a16_triton.FLOAT32_TILE}


def test_row_steps_meet_every_tile_and_every_way_to_split() -> None:
    """What each number of rows up to the weights' expansion launches, a launch with one of the steps has had."""
    steps = products_triton.row_steps()
    assert steps == (1, 17, 65, 257, 1024, 1025, EXPAND_ROWS)
    everything = range(1, EXPAND_ROWS + 300, 7)
    for gpu in (HOPPER, ADA):
        for dtype in (torch.int8, torch.float8_e4m3fn):
            warm = {linear_w8a8_triton.tile_for(m, 1000, dtype, gpu) for m in steps}
            assert warm == {linear_w8a8_triton.tile_for(m, 1000, dtype, gpu) for m in everything}
        for n in (64, 512, 4096, 28672):
            weight = repack(torch.zeros(n, 1024, dtype=torch.int8), torch.ones(n, 8), None, torch.float16, gpu)
            warm = {program for m in steps for program in four_bit_programs(m, weight, gpu)}
            assert warm == {program for m in everything for program in four_bit_programs(m, weight, gpu)}, (gpu, n)


def four_bit_programs(rows: int, weight: FourBits, gpu: Gpu) -> set[object]:
    """Those that a product with so many rows launches: by tile, and whether sums of splits follow."""
    if rows >= EXPAND_ROWS:
        return {"expanded"}
    found: set[object] = set()
    for slab in [SLAB] * (rows // SLAB) + [rows % SLAB] * (rows % SLAB > 0):
        tile = linear_w4a16_triton.tile_for(slab, weight.dtype, False)
        found.add((tile, splits(slab, weight, tile, gpu, False) > 1))
    return found


def test_a_row_that_is_not_finite_stays_marked_and_alone() -> None:
    x = torch.randint(-128, 128, (17, 40), dtype=torch.int8)
    scale = torch.ones(17, 1)
    scale[3] = float("nan")
    found = linear_w8a8(Rows(x, scale), torch.ones(5, 40, dtype=torch.int8), torch.ones(5), None, torch.float32, HOPPER)
    assert found.isfinite().all(1).tolist() == [row != 3 for row in range(17)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 100), (130, 128), (257, 65)])
def test_linear_is_the_product_and_a_row_does_not_depend_on_the_rows_beside_it(
    n: int, k: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, added = torch.randn(200, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    whole = linear(x, weight, added if bias else None)
    assert whole.dtype == dtype
    check(whole, x.double() @ weight.double().t() + (added.double() if bias else 0))
    for rows in (1, 15, 16, 17, 63, 64, 65):
        assert linear(x[:rows], weight, added if bias else None).equal(whole[:rows]), rows


def four_bits(
    n: int, k: int, group: int, zeros: bool, dtype: torch.dtype, gpu: Gpu = HOPPER
) -> tuple[FourBits, Tensor]:
    """Repacked, and what they stand for in float64."""
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (0.01 * (torch.rand(n, k // group) + 0.5)).to(dtype)
    zero_point = torch.randint(-8, 9, scale.shape) if zeros else None
    exact = values.double() - (0 if zero_point is None else zero_point.repeat_interleave(group, 1))
    return repack(values, scale.float(), zero_point, dtype, gpu), exact * scale.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("gpu", [HOPPER, ADA])
@pytest.mark.parametrize(("groups", "depth"), [(5, 32), (1, 128)])
def test_words_hold_the_numbers_where_they_say(groups: int, depth: int, gpu: Gpu) -> None:
    values = torch.randint(-8, 8, (5, 160), dtype=torch.int8)
    weight = repack(values, torch.ones(5, groups), None, torch.float32, gpu)
    spans = -(-160 // depth)
    assert weight.words.shape == (spans, 5, depth // 8) and weight.pairs.shape == (groups, 5)
    assert weight.nbytes == spans * 5 * depth // 2 + groups * 5 * 8
    assert (weight.rows, weight.columns, weight.spans, weight.depth) == (5, 160, spans, depth)
    assert weight.group == (32 if groups == 5 else 256)
    assert weight.near == (2 if gpu is HOPPER else 4)
    for column in range(160):
        block, rest = column % depth // 32, column % 32
        part, thread, beside = rest // (4 * weight.near), rest // weight.near % 4, rest % weight.near
        number = part * weight.near + beside
        word = weight.words[column // depth, :, thread * (depth // 32) + block]
        found = (word >> 4 * (number // 2) + 16 * (number % 2) & 15) - 8
        assert found.equal(values[:, column].int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
def test_pairs_hold_what_is_subtracted_and_the_scale(zeros: bool, dtype: torch.dtype) -> None:
    scale, zero_point = torch.randn(3, 4), torch.randint(-16, 17, (3, 4))
    weight = repack(torch.zeros(3, 128, dtype=torch.int8), scale, zero_point if zeros else None, dtype, HOPPER)
    found = weight.pairs.unsqueeze(-1).view(dtype)
    magic = {torch.bfloat16: 0x4300, torch.float16: 0x6400, torch.float32: 0}[dtype]
    bits = torch.tensor([magic], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    assert (found[..., 0] - bits - 8).equal((zero_point if zeros else zero_point * 0).t().to(dtype))
    assert found[..., 1].equal(scale.t().to(dtype))


SIZES = [(63, 96, 32), (65, 320, 64), (130, 384, 128), (1, 512, 256), (16, 1, 1), (63, 33, 33), (65, 200, 200)]


@pytest.mark.parametrize("gpu", [HOPPER, ADA])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), SIZES)
def test_w4a16_is_the_product_of_what_the_weights_stand_for(
    n: int, k: int, group: int, zeros: bool, dtype: torch.dtype, gpu: Gpu
) -> None:
    weight, exact = four_bits(n, k, group, zeros, dtype, gpu)
    x, bias = torch.randn(65, k).to(dtype), torch.randn(n).to(dtype)
    for rows in (1, 15, 16, 17, 63, 64, 65):
        found = linear_w4a16(x[:rows], weight, bias if rows % 2 else None, gpu)
        assert found.dtype == dtype
        check(found, x[:rows].double() @ exact.t() + (bias.double() if rows % 2 else 0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("k", "group", "expected"), [(896, 32, 1), (1024, 128, 2), (1664, 64, 3)])
def test_w4a16_in_splits(k: int, group: int, expected: int, dtype: torch.dtype) -> None:
    """Columns: too few for two splits; as many in both; 9, 9 and 8 spans of 64."""
    weight, exact = four_bits(65, k, group, True, dtype)
    x, bias = torch.randn(17, k).to(dtype), torch.randn(65).to(dtype)
    for rows in (1, 17):
        tile = linear_w4a16_triton.tile_for(rows, dtype, False)
        assert splits(rows, weight, tile, HOPPER, False) == expected
        for gpu in (replace(INTERPRETED, processors=1), HOPPER):
            found = linear_w4a16(x[:rows], weight, bias if rows == 1 else None, gpu)
            check(found, x[:rows].double() @ exact.t() + (bias.double() if rows == 1 else 0))


def test_w4a16_by_itself_splits_by_the_number_of_rows_and_for_deterministic_jobs_does_not() -> None:
    weight = repack(torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096, 1), None, torch.float16, HOPPER)
    rows, tile = (1, 64, 65, 192, 256, 1024), linear_w4a16_triton.TILES[None]
    assert at_once(tile, 2, HOPPER) == 3
    assert [splits(m, weight, tile, HOPPER, False) for m in rows] == [6, 6, 3, 2, 1, 1]
    assert [splits(m, weight, tile, HOPPER, True) for m in rows] == [6] * 6
    assert splits(1, weight, tile, replace(HOPPER, processors=1), False) == 1


@pytest.mark.parametrize(
    ("gpu", "few", "many"),
    [(HOPPER, 5, 3), (ADA, 3, 2), (replace(HOPPER, capability=(8, 0), shared_bytes=163 << 10), 5, 3)],
)
def test_as_many_programs_run_at_once_as_registers_and_shared_memory_hold(gpu: Gpu, few: int, many: int) -> None:
    """The numbers follow from what the compiler says: 96 and 168 registers; 25.5 and 41 KiB with two and three stages
    in shared memory of which a program takes 1 KiB more."""
    assert [at_once(tile, 2, gpu) for tile in linear_w4a16_triton.TILES.values()] == [few, many]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_w4a16_of_a_deterministic_job_has_rows_that_do_not_depend_on_their_number(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_w4a16_triton, "SLAB", 128)  # instead of 1,024: the interpreter takes its time
    monkeypatch.setattr(linear_w4a16_triton, "EXPAND_ROWS", 150)
    weight, exact = four_bits(65, 1152, 128, True, dtype)
    x = torch.randn(200, 1152).to(dtype)
    whole = linear_w4a16(x, weight, None, HOPPER, deterministic=True)
    check(whole, x.double() @ exact.t())
    for rows in (1, 15, 17, 63, 64, 65, 129):
        assert linear_w4a16(x[:rows], weight, None, HOPPER, deterministic=True).equal(whole[:rows]), rows


@pytest.mark.parametrize("rows", [EXPAND_ROWS - 1, EXPAND_ROWS])
def test_w4a16_of_many_rows_expands_the_weights(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(linear_w4a16_triton, "expand", lambda *args: calls.append(args) or expand(*args))
    weight, exact = four_bits(63, 96, 32, True, torch.float32)
    x, bias = torch.randn(rows, 96), torch.randn(63)
    assert rows > SLAB, "the last rows come in a slab of their own"
    check(linear_w4a16(x, weight, bias, HOPPER), x.double() @ exact.t() + bias)
    assert len(calls) == (rows >= EXPAND_ROWS)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), SIZES)
def test_expanded_weights_are_the_numbers_times_their_scale(
    n: int, k: int, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    weight, exact = four_bits(n, k, group, zeros, dtype)
    assert expand(weight).equal(exact.float().to(dtype))


@pytest.mark.parametrize("zeros", [False, True])
def test_w4a16_takes_scales_of_both_signs_within_a_row(zeros: bool) -> None:
    values, scale = torch.randint(-8, 8, (65, 320), dtype=torch.int8), torch.randn(65, 5)
    zero_point = torch.randint(-8, 9, (65, 5)) if zeros else None
    exact = values.double() - (0 if zero_point is None else zero_point.repeat_interleave(64, 1))
    exact *= scale.double().repeat_interleave(64, 1)
    weight, x = repack(values, scale, zero_point, torch.float32, HOPPER), torch.randn(17, 320)
    check(linear_w4a16(x, weight, None, HOPPER), x.double() @ exact.t())
    assert expand(weight).equal(exact.float())


@pytest.mark.parametrize(("k", "groups"), [(64, 4), (96, 2), (100, 3), (384, 2)])
def test_groups_that_no_span_holds_are_refused(k: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"4-bit weights \[3, {k}\] with {groups} scales a row"):
        repack(torch.zeros(3, k, dtype=torch.int8), torch.ones(3, groups), None, torch.float32, HOPPER)


def test_zero_points_that_16_bits_do_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="zero points beyond -16 to 16"):
        repack(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1), torch.full((3, 1), 17), torch.float32, HOPPER)


@pytest.mark.parametrize("module", [linear_triton, linear_w8a8_triton, linear_w4a16_triton])
def test_what_is_shipped_names_every_argument(module: object) -> None:
    kernels = module.shipped(INTERPRETED)  # type: ignore[attr-defined]
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert [*kernel.types, *kernel.constants] == kernel.kernel.arg_names
