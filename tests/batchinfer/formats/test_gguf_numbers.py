"""Dequantized GGUF tensors against the format's own library, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from batchinfer.formats.gguf_file import TYPES
from batchinfer.formats.gguf_numbers import dequantize

# Places of the fp16 scales in a block. Random bytes there may be infinite, or no numbers.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
QUANTIZED_BY_THE_LIBRARY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]


def test_every_type_is_as_the_library_describes_it() -> None:
    assert {Q[name]: gguf.GGML_QUANT_SIZES[Q[name]] for name, _, _ in TYPES.values()} == {
        number: (elements, nbytes) for number, (_, elements, nbytes) in TYPES.items()
    }
    assert {name for name, _, _ in TYPES.values()} == {*SCALES, "F32", "F16", "BF16"}


def compare(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(data, Q[kind]))
    got = dequantize(data.flatten(), kind, shape).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got.isfinite().any()


@pytest.mark.parametrize("scales", ["any", "finite"])
@pytest.mark.parametrize("kind", [*SCALES, "F16", "BF16", "F32"])
def test_random_bytes_are_the_numbers_that_the_library_reads(kind: str, scales: str) -> None:
    """Read 1.5 million elements, which is more than is read at once, and no multiple of it."""
    rng = np.random.default_rng(0)
    elements, nbytes = gguf.GGML_QUANT_SIZES[Q[kind]]
    data = rng.integers(0, 256, (3072, 512 // elements * nbytes), np.uint8)
    if scales == "finite":
        blocks = data.reshape(-1, nbytes)
        for at in SCALES.get(kind, []):
            blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    compare(data, kind, (3072, 512))


@pytest.mark.parametrize("kind", QUANTIZED_BY_THE_LIBRARY)
def test_what_the_library_quantized_is_what_it_reads(kind: str) -> None:
    weights = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32) * 0.02
    data = gguf.quants.quantize(weights, Q[kind])
    compare(data, kind, weights.shape)
    assert np.abs(dequantize(data.flatten(), kind, weights.shape).numpy() - weights).max() < 0.02


def test_mapped_bytes_are_read_without_a_change_of_them() -> None:
    data = np.random.default_rng(2).integers(0, 256, 34 * 64, np.uint8)
    data.setflags(write=False)
    before = data.copy()
    dequantize(data, "Q8_0", (64, 32)).zero_()
    assert (data == before).all()
