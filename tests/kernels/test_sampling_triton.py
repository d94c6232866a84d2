"""Sampling in Triton's interpreter against the plain implementation; others test that against the distributions."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

import pytest
import torch

from batchinfer.kernels import noise_triton, sampling, sampling_triton
from batchinfer.kernels.gpu import INTERPRETED
from batchinfer.kernels.sampling import SamplingBatch


def batch_of(rows: int, **changes: list[float]) -> SamplingBatch:
    def column(name: str, value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor((changes.get(name, [value]) * rows)[:rows], dtype=dtype)

    return SamplingBatch(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        torch.arange(rows) * 7_919_000_000_000 - 5,
        torch.arange(rows) * 31,
    )


def compare(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    # Scores are float32 here and float64 there, 1e-5 apart at most. As small a gap between the two best ones, which
    # could turn them around, comes once in 100,000 rows, and never below.
    expected, finite = sampling.sample(logits, batch)
    found, found_finite = sampling_triton.sample(logits, batch, INTERPRETED)
    assert found_finite.equal(finite)
    assert found[finite].equal(expected[finite])
    return found


@pytest.mark.parametrize("vocab", [1, 15, 63, 320, 1000])
def test_draws_are_those_of_the_plain_sampler(vocab: int) -> None:
    logits = 4 * torch.randn(24, vocab)
    temperatures = [0.0, 0.3, 1.0, 1.7]
    found = compare(logits, batch_of(24, temperature=temperatures))
    assert found[::4].equal(logits[::4].argmax(-1))
    assert vocab < 15 or not found.equal(logits.argmax(-1))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": [1, 2, 5, 400]},
        {"top_p": [0.05, 0.5, 0.9, 0.999]},
        {"min_p": [0.01, 0.3, 0.9, 1.0]},
        {"top_k": [3, 50], "top_p": [0.7, 0.95, 1.0], "min_p": [0.0, 0.02]},
    ],
)
def test_filters_are_those_of_the_plain_sampler(filters: dict[str, list[float]]) -> None:
    compare(3 * torch.randn(24, 350), batch_of(24, temperature=[0.7, 1.0, 2.0], **filters))


def test_ties_at_a_filters_border_all_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(60, -1).contiguous()
    found = compare(logits, batch_of(60, top_k=[2]))
    assert found.unique().tolist() == [0, 1, 2, 3]
    found = compare(torch.tensor([[0.0, -0.0, -1.0]]).expand(40, -1).contiguous(), batch_of(40, top_k=[1]))
    assert found.unique().tolist() == [0, 1], "0 and -0 are tied"


def test_logits_of_no_use_are_flagged_and_others_are_not() -> None:
    logits = torch.randn(5, 40)
    logits[1, 3], logits[2, 39], logits[3] = float("nan"), float("inf"), float("-inf")
    logits[4, :39] = float("-inf")
    found, finite = sampling_triton.sample(logits, batch_of(5), INTERPRETED)
    assert finite.tolist() == [True, False, False, False, True] and found[4] == 39
    compare(logits, batch_of(5, temperature=[0.0]))


def test_noise_is_exact_at_both_ends() -> None:
    """The largest and smallest of 2^32 words, where float32 would give infinities."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p_words, p_out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.arange(0, COUNT)
        words = tl.load(p_words + o).to(tl.uint32)
        tl.store(p_out + o, noise_triton.minus_log_uniform(words))

    words = torch.tensor([0, 1, 2, 1 << 31, (1 << 31) - 1, (1 << 32) - 3, (1 << 32) - 2, (1 << 32) - 1])
    found = torch.full((8,), float("nan"))
    kernel[(1,)](words, found, COUNT=8)
    expected = -torch.log((words.double() + 0.5) / 2**32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


FLAT = torch.randn(1, 60_000, generator=torch.Generator().manual_seed(3))
"""More tokens pass than lanes list: 48,000 are 90 % of the mass."""


@pytest.mark.parametrize(
    ("logits", "params", "passes"),
    [
        (6 * FLAT, {"temperature": [0.0]}, 1),
        (FLAT, {}, 1),
        (6 * FLAT, {"top_k": [50]}, 1),
        (6 * FLAT, {"top_p": [0.9]}, 2),
        (6 * FLAT, {"top_k": [50], "top_p": [0.9], "min_p": [0.01]}, 1),
        (6 * FLAT, {"min_p": [0.05]}, 1),
        (FLAT, {"top_k": [20_000]}, 4),
        (FLAT, {"top_p": [0.9]}, 5),
        (FLAT, {"top_k": [20_000], "top_p": [0.9]}, 7),
        (0 * FLAT, {"top_k": [5], "top_p": [0.5]}, 3),
        (FLAT.bfloat16().float(), {"top_p": [0.5]}, 5),
        (FLAT.round(), {"top_k": [20_000], "top_p": [0.9]}, 9),
        (torch.where(torch.arange(60_000) == 17, 13.0, FLAT), {"top_k": [20_000], "top_p": [0.9]}, 9),
        (FLAT.where(torch.arange(60_000) % 2 == 0, float("-inf")), {"top_k": [20_000], "top_p": [0.9]}, 9),
    ],
)
def test_passes_over_the_vocabulary(
    logits: torch.Tensor, params: dict[str, list[float]], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the logits that are loaded, but for samples; the token is that of the plain sampler."""
    from triton.runtime.interpreter import InterpreterBuilder

    loaded = 0
    load = InterpreterBuilder.create_masked_load

    def counted(self: object, pointers: object, mask: object, *rest: object) -> object:
        nonlocal loaded
        loaded += int(mask.data.sum())  # type: ignore[attr-defined]
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    compare(logits, batch_of(1, **params))
    assert int(loaded / logits.shape[1] + 0.8) <= passes
