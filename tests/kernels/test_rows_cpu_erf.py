"""The error function in C, which GELU takes, against torch's in float64."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from compile_kernels import FLAGS, KERNELS, SETS, architecture, system_compiler
from compiled import paths

SOURCE = """
#include "vector_cpu.h"
void error_function(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        numbers_store_upto(FLOAT32, y, i, count - i, vec_erf(numbers_load_upto(FLOAT32, x, i, count - i)));
}
"""


@pytest.mark.parametrize("path", paths())
def test_erf_is_within_six_units_in_the_last_place(path: str, tmp_path: Path) -> None:
    compiler = system_compiler()
    if compiler is None:
        assert "CI" not in os.environ, "this system has no C compiler"
        pytest.skip("this system has no C compiler")
    (tmp_path / "erf.c").write_text(SOURCE)
    flags = [*FLAGS.split(), *SETS[architecture()][path].split(), f"-I{KERNELS}"]
    subprocess.run([*compiler, *flags, "erf.c", "-o", "erf.so"], cwd=tmp_path, check=True)
    large, small = torch.linspace(-6, 6, 1_200_001), torch.logspace(-37, 0, 100_001)
    x = torch.cat([large, small, -small, torch.tensor([0.0, 1e38, float("inf"), -float("inf")])])
    y, exact = torch.empty_like(x), torch.erf(x.double())
    ctypes.CDLL(str(tmp_path / "erf.so")).error_function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)), ctypes.c_int64(len(x))
    )
    ulp = 2.0 ** (torch.frexp(exact)[1].clamp(min=-125) - 24).double()
    assert ((y.double() - exact).abs() / ulp).max() < 6
