"""Print the most int8 operations per second that exact products at hand reach, torch's and ours: the ceiling of int8
engines."""

import time
from collections.abc import Callable

import torch

from batchinfer.kernels.backends import choose_backend
from batchinfer.kernels.rows import Rows

ROWS, COLUMNS, DEPTH = 512, 4096, 2048
REPEATS = 20


def main() -> None:
    left = torch.randint(-127, 128, (ROWS, DEPTH), dtype=torch.int8)
    right = torch.randint(-127, 128, (COLUMNS, DEPTH), dtype=torch.int8)
    unsigned_left = (left.to(torch.int16) + 128).to(torch.uint8)
    packed_right = torch.ops.onednn.qlinear_prepack(right, None)
    scales, zero_points = torch.ones(COLUMNS), torch.zeros(COLUMNS, dtype=torch.int64)

    def signed() -> torch.Tensor:
        return torch._int_mm(left, right.t())

    def prepacked() -> torch.Tensor:
        weights = (packed_right, scales, zero_points, None)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned_left, 1.0, 128, *weights, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    own = choose_backend("cpu", True, "auto").linear_w8a8(right, scales)

    def ours() -> torch.Tensor:
        return own(Rows(unsigned_left)).values

    # Without VNNI oneDNN adds pairs of products in 16 bits, which saturate: a wrong product is no ceiling.
    exact = left.double() @ right.double().t()
    right_ones = [product for product in (signed, prepacked, ours) if torch.equal(product().double(), exact)]
    print(2 * ROWS * COLUMNS * DEPTH / min(map(_fastest, right_ones)))


def _fastest(product: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest of many calls."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
