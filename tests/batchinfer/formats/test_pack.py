"""Packing of small integers into 32-bit words, against arithmetic on one number at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.formats.pack import pack, unpack


def test_by_hand() -> None:
    word = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)
    assert unpack(word, 4, 1).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [15] * 8]
    assert unpack(word, 8, 1).tolist() == [[0x10, 0x32, 0x54, 0x76], [255] * 4]
    assert unpack(word.t(), 4, 0).tolist() == [[i, 15] for i in range(8)]
    assert pack(torch.tensor([[15] * 7 + [7], [1] + [0] * 7]), 4, 1).tolist() == [[0x7FFFFFFF], [1]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
@given(data=st.data())
def test_numbers_come_back_and_words_are_sums_of_shifted_numbers(bits: int, dim: int, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    numbers = rng.integers(0, 1 << bits, (rows, columns))
    words = pack(torch.from_numpy(numbers if dim else numbers.T), bits, dim)
    a_word = 32 // bits
    for r in range(rows):
        for w in range(-(-columns // a_word)):
            expected = sum(int(n) << (bits * i) for i, n in enumerate(numbers[r, w * a_word : (w + 1) * a_word]))
            got = int(words[r, w] if dim else words[w, r])
            assert got % 2**32 == expected
    back = unpack(words, bits, dim)
    back = back[:, :columns] if dim else back[:columns].t()
    assert back.equal(torch.from_numpy(numbers).to(torch.uint8))
