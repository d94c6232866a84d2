"""The 8-bit product against the exact integer product, on each path, and the kernel that ran."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.rows import Rows


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 500), (96, 64), (320, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_is_the_exact_integer_product(
    path: str, n: int, k: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", path)
    x = torch.randint(1, 256, (40, k), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    # Powers of two: every product is exact.
    scale = 2.0 ** torch.randint(-6, 3, (n,)).float() * torch.randn(n).sign()
    row_scale = 2.0 ** torch.randint(-6, 3, (40, 1)).float()
    added = torch.randint(-5, 6, (n,)).float() if bias else None
    product = LinearW8A8(weight, scale, added)
    assert product.path.partition(",")[0] == path
    exact = ((x.long() - 128) @ weight.t().long()).double() * scale * row_scale + (0 if added is None else added)
    for rows in (1, 7, 40):
        got = product(Rows(x[:rows], row_scale[:rows])).dense()
        assert got.double().equal(exact[:rows])


def test_w8a8_runs_the_vector_kernel() -> None:
    """oneDNN says which kernel it ran: a scalar reference would be thousands of times slower, and just as right."""
    code = (
        "import torch; from batchinfer.kernels.linear_w8a8 import LinearW8A8; from batchinfer.kernels.rows import Rows;"
        "p = LinearW8A8(torch.ones(96, 64, dtype=torch.int8), torch.ones(96));"
        "p(Rows(torch.ones(40, 64, dtype=torch.uint8), torch.ones(40, 1)))"
    )
    env = {**os.environ, "ONEDNN_VERBOSE": "1", "BATCHINFER_KERNELS": "auto"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    products = [line for line in out.splitlines() if ",exec,cpu,matmul," in line]
    assert products, out
    flags = Path("/proc/cpuinfo").read_text()
    kernels = {
        "amx_int8": r"brg_matmul\S*amx",
        "avx512_vnni": r"brg_matmul\S*avx512_core_vnni",
        "avx_vnni": r"brg_matmul\S*avx2",
        "avx512bw": r"brg_matmul\S*avx512_core",
        "": "gemm:jit",
    }
    expected = next(kernel for flag, kernel in kernels.items() if flag in flags)
    assert all(re.search(expected, line) for line in products), products


EXTREMES = """
import torch
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.rows import Rows

x = torch.tensor([1, 128, 255], dtype=torch.uint8)[torch.randint(3, (40, 500))]
weight = torch.tensor([-127, 0, 127], dtype=torch.int8)[torch.randint(3, (63, 500))]
product = LinearW8A8(weight, torch.ones(63))
found = product(Rows(x, torch.ones(40, 1))).dense()
assert found.double().equal(((x.long() - 128) @ weight.t().long()).double())
print(product.path)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "DEFAULT"])
def test_a_processor_without_vnni_loses_no_sum(instructions: str) -> None:
    """oneDNN adds two products in 16 bits there; `ONEDNN_MAX_CPU_ISA` takes a processor's newer instructions away."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "BATCHINFER_KERNELS": "auto"}
    done = subprocess.run([sys.executable, "-c", EXTREMES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert instructions == "DEFAULT" or done.stdout == "cpu, in 7 bits\n"
