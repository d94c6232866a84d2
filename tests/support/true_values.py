"""The numbers that rows in 8 bits stand for."""

import torch
from torch import Tensor

from batchinfer.kernels.rows import Rows


def true_values(rows: Rows) -> Tensor:
    values = rows.values.double() - 128 if rows.values.dtype == torch.uint8 else rows.values.double()
    return values if rows.scale is None else values * rows.scale.double()
