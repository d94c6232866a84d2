"""Banning what grammars do not allow, in Triton's interpreter and by the plain implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

import pytest
import torch

from batchinfer.kernels import logits as plain
from batchinfer.kernels import logits_triton


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 520, 5000])
def test_only_tokens_whose_bit_is_set_stay(vocab: int) -> None:
    logits = torch.randn(3, vocab)
    logits[0, 0] = float("nan")
    words = -(-vocab // 32)
    bits = torch.randint(-(2**31), 2**31, (3, words), dtype=torch.int32)
    bits[1], bits[2] = -1, 0
    expected = logits.clone()
    for row in range(3):
        for token in range(vocab):
            if not int(bits[row, token // 32]) >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    for module in (plain, logits_triton):
        found = logits.clone()
        module.allow_tokens(found, bits)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert expected[1].equal(logits[1]) and expected[2].isinf().all()
