"""Packers of checkpoint formats that handle one number at a time, from the formats' definitions alone."""

import numpy as np
import torch
from torch import Tensor


def words_of(numbers: list[int], bits: int) -> list[int]:
    """32-bit words, as signed numbers, of a row of numbers; the first lowest."""
    words = []
    for start in range(0, len(numbers), 32 // bits):
        word = 0
        for i, number in enumerate(numbers[start : start + 32 // bits]):
            assert 0 <= number < 1 << bits
            word |= number << (bits * i)
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def gptq_tensors(
    q: np.ndarray, z: np.ndarray, scales: np.ndarray, group_of: list[int], bits: int, version: str
) -> dict[str, Tensor]:
    """q [N, K], z and scales [N, G]; version "gptq" stores zeros less one."""
    n, groups = scales.shape
    stored_z = [[(int(z[i, g]) - (version == "gptq")) % (1 << bits) for i in range(n)] for g in range(groups)]
    return {
        "qweight": int32([words_of(row.tolist(), bits) for row in q]).t().contiguous(),
        "qzeros": int32([words_of(row, bits) for row in stored_z]),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.tensor(group_of, dtype=torch.int32),
    }


def awq_tensors(q: np.ndarray, z: np.ndarray, scales: np.ndarray) -> dict[str, Tensor]:
    """q [N, K], z and scales [N, G]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each number of a word holds

    def packed(columns: list[int]) -> list[int]:
        return words_of([columns[c + i] for c in range(0, len(columns), 8) for i in order], 4)

    return {
        "qweight": int32([packed(column.tolist()) for column in q.T]),
        "qzeros": int32([packed(column.tolist()) for column in z.T]),
        "scales": torch.from_numpy(scales.T.copy()),
    }


def one_by_one(q: np.ndarray, z: np.ndarray, scales: np.ndarray, group_of: list[int]) -> Tensor:
    weight = torch.zeros(len(q), q.shape[1], dtype=torch.float64)
    for n in range(len(q)):
        for k in range(q.shape[1]):
            g = group_of[k]
            weight[n, k] = (int(q[n, k]) - int(z[n, g])) * float(scales[n, g])
    return weight
