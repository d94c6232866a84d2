"""The products in C by the number of rows: 8-bit rows with 8-bit and with 4-bit weights that come from memory.

    python benchmarks/cpu_products.py [--write]

Multiplies rows with many different weights of 4096 x 2048, one after the other, so that no cache holds them; the two
kinds in turns, best of 7 passes. Beside them stands the rate at which torch reads memory. `--write` puts the page into
`benchmarks/results/cpu_products.md`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import conditions

from batchinfer.host.own_process import own_process
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_products.md"
OUTPUTS, COLUMNS, WEIGHTS, PASSES = 4096, 2048, 24, 7
ROWS = (1, 2, 4, 8, 16, 64, 512)


def main() -> None:
    """Time the products and reads of memory; print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if (path := cpu_path()) == REFERENCE:
        parser.error("no kernels in C run here")
    own_process()
    ran, backend = conditions(), CompiledBackend(path)
    products = {"8 bits": make(backend, 8), "4 bits": make(backend, 4)}
    memory = torch.ones(1 << 26, dtype=torch.int64)
    rate = memory.nbytes / fastest([memory.sum])[0] / 1e9
    lines = [line(rows, products) for rows in ROWS]
    page = f"""# Products in C by the number of rows

{OUTPUTS} x {COLUMNS}, {path}, {torch.get_num_threads()} threads, {WEIGHTS} weights of each kind; groups of 128 columns
in 4 bits. Milliseconds of a product, GB/s of weights read, and billions of operations a second. torch's sum reads
{rate:.1f} GB/s.

| rows | 8 bits: ms | GB/s | GOP/s | 4 bits: ms | GB/s | GOP/s | ratio |
|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

Printed by `python benchmarks/cpu_products.py`. {ran["machine"]}; {ran["versions"]}; {ran["commit"]}; {ran["date"]}.
"""
    print(page)
    if args.write:
        RESULTS.write_text(page)


def make(backend: CompiledBackend, bits: int) -> list[Product]:
    """Return products of random weights of so many bits."""
    low, groups = -(1 << bits - 1), COLUMNS // 128
    values = [torch.randint(low, -low, (OUTPUTS, COLUMNS), dtype=torch.int8) for _ in range(WEIGHTS)]
    if bits == 8:
        return [backend.linear_w8a8(each, torch.ones(OUTPUTS)) for each in values]
    scale, zero_point = torch.ones(OUTPUTS, groups), torch.zeros(OUTPUTS, groups)
    return [backend.linear_w4a8(each, scale, zero_point, None) for each in values]


def line(rows: int, products: dict[str, list[Product]]) -> str:
    """Time both kinds with so many rows; return their line of the page."""
    x = torch.randint(1, 256, (rows, COLUMNS), dtype=torch.uint8)

    def call(kind: str) -> Callable[[], object]:
        return lambda: [product(Rows(x)) for product in products[kind]]

    seconds = [each / WEIGHTS for each in fastest([call(kind) for kind in products])]
    cells = list[str]()
    for each, of in zip(seconds, products.values(), strict=True):
        cells += [f"{1e3 * each:.2f}", f"{of[0].nbytes / each / 1e9:.1f}"]
        cells += [f"{of[0].operations_per_row * rows / each / 1e9:.0f}"]
    return f"| {rows} | {' | '.join(cells)} | {seconds[0] / seconds[1]:.2f} |"


def fastest(calls: list[Callable[[], object]]) -> list[float]:
    """Return the least seconds of each call, in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(PASSES):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
