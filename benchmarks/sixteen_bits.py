"""Products in bfloat16, float16 and float32 on one core: torch's own, and widened to float32 piece by piece.

    python benchmarks/sixteen_bits.py [--write]

The product of rows with a weight of 2,048 x 2,048, in GFLOP/s. Torch's own and the widened product of a type take
turns, so that a slow second falls on both. `--write` puts the page into benchmarks/results.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import conditions
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels import linear as kernel
from batchinfer.kernels.processor import multiplied_in

RESULT = Path(__file__).parent / "results" / "sixteen_bits.md"
SIZE, ROWS, TURNS, SECONDS = 2048, (8, 16, 64, 512), 7, 0.2


def rate(product: Callable[[], Tensor], rows: int) -> float:
    """Return GFLOP/s over SECONDS."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        product()
        count += 1
    return 2 * rows * SIZE * SIZE * count / (time.perf_counter() - begin) / 1e9


def shown(rates: list[float]) -> str:
    """Return the median, with the least and the most."""
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def measure(dtype: torch.dtype, rows: int) -> tuple[str, str]:
    """Return the rates of torch's own product and of the widened one."""
    x, weight = torch.randn(rows, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    products = (lambda: F.linear(x, weight), lambda: kernel.linear(x, weight))
    for product in products:
        product()
    turns = [[rate(product, rows) for product in products] for _ in range(TURNS)]
    own, widened = zip(*turns, strict=True)
    return shown(list(own)), shown(list(widened))


def page() -> str:
    """Return the page."""
    ran = conditions()
    torch.set_num_threads(1)
    lines = ["| rows | type | torch, GFLOP/s | widened, GFLOP/s |", "|---:|---|---:|---:|"]
    kernel.multiplied_in = lambda dtype: torch.float32  # so that the widened product is measured on any processor
    for rows in ROWS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            own, widened = measure(dtype, rows)
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {rows} | {name} | {own} | {'-' if dtype == torch.float32 else widened} |")
    taken = ", ".join(str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float16) if multiplied_in(d) != d)
    return (
        "# Products of 16 bits\n\nPrinted by `python benchmarks/sixteen_bits.py`: one core; medians of "
        f"{TURNS} turns (least to most). {ran['machine']}; {ran['versions']}; {ran['commit']}; {ran['date']}.\n\n"
        f"Widened on this processor: {taken or 'none'}.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = page()
    print(made)
    if parser.parse_args().write:
        RESULT.write_text(made)
