"""Packers of checkpoint formats that handle one number at a time, from the formats' definitions alone."""

import json

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


def bitsandbytes_tensors(
    places: np.ndarray,
    absmax: Tensor,
    book: Tensor,
    block: int,
    nested: tuple[Tensor, Tensor, int, float] | None = None,
) -> dict[str, Tensor]:
    """Places [N, K] in a code book, 4 bits each, and the scale of each `block` of them.

    `nested` has the code book of 256 scales, the largest scale of each so many (the third), and what is to be added;
    then `absmax` are places in that code book.
    """
    row = places.flatten().tolist()
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(places.shape)}
    tensors = {"weight.absmax": absmax, "weight.quant_map": book.clone()}
    if nested is not None:
        tensors |= {"weight.nested_quant_map": nested[0], "weight.nested_absmax": nested[1]}
        state |= {"nested_blocksize": nested[2], "nested_dtype": "float32", "nested_offset": nested[3]}
    octets = [16 * row[i] + row[i + 1] for i in range(0, len(row), 2)]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    weight = torch.tensor(octets, dtype=torch.uint8)[:, None]
    return {"weight": weight, "weight.quant_state.bitsandbytes__nf4": text, **tensors}


def one_by_one(q: np.ndarray, z: np.ndarray, scales: np.ndarray, group_of: list[int]) -> Tensor:
    weight = torch.zeros(len(q), q.shape[1], dtype=torch.float64)
    for n in range(len(q)):
        for k in range(q.shape[1]):
            g = group_of[k]
            weight[n, k] = (int(q[n, k]) - int(z[n, g])) * float(scales[n, g])
    return weight
