"""Sampling on the CPU: distributions, filters, and noise that depends only on its key."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from batchinfer.kernels.sampling import CANDIDATES, SamplingBatch, _gumbel, greedy, gumbel, gumbel_of, philox, sample


def batch(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> SamplingBatch:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype)

    return SamplingBatch(
        column(temperature, torch.float32),
        column(top_k, torch.int64),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.arange(rows) + seed * 1_000_003,
        torch.arange(rows) % 17,
    )


def counts(logits: Sequence[float], draws: int = 100_000, **params: float) -> Tensor:
    tokens, finite = sample(torch.tensor(logits).expand(draws, -1), batch(draws, **params))  # type: ignore[arg-type]
    assert finite.all()
    return torch.bincount(tokens, minlength=len(logits))


def chi_squared(observed: Tensor, expected: Tensor) -> float:
    inside = expected > 0
    assert observed[~inside].sum() == 0
    e = expected[inside] * observed.sum()
    return float(((observed[inside] - e) ** 2 / e).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = [0.0, 1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 0.1]
    expected = (torch.tensor(logits).double() / temperature).softmax(-1)
    # 24.3 is the 99.9 % point of chi-squared with 7 degrees of freedom.
    assert chi_squared(counts(logits, temperature=temperature), expected) < 24.3


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [3]),
        ({"top_p": 0.6}, [1, 3]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"min_p": 0.7}, [1, 3]),
        ({"min_p": 0.4}, [1, 2, 3]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # of three, 0.444 + 0.333 are enough
        ({"top_p": 0.95, "min_p": 0.7}, [1, 3]),
    ],
)
def test_filters_keep_what_they_should(params: dict[str, float], kept: list[int]) -> None:
    p = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    observed = counts(p.log().float().tolist(), **params)
    assert chi_squared(observed, expected) < 16.3  # the 99.9 % point with 3 degrees of freedom


def test_top_p_takes_the_mass_of_all_tokens_that_a_large_top_k_leaves() -> None:
    """Against transformers' filters: of a flat row, top-p of more candidates than are looked at first."""
    logits = torch.randn(1, 2000) / 10
    kept = TopPLogitsWarper(0.5)(None, TopKLogitsWarper(3 * CANDIDATES)(None, logits))[0] > float("-inf")
    assert kept.sum() > CANDIDATES, "more than half of the candidates, which were all the mass once"
    tokens, _ = sample(logits.expand(20_000, -1), batch(20_000, top_k=3 * CANDIDATES, top_p=0.5))
    drawn = torch.bincount(tokens, minlength=2000) > 0
    assert drawn.equal(kept)


def test_rows_with_different_parameters_do_not_mix() -> None:
    logits = torch.randn(6, 50)
    mixed = SamplingBatch(
        torch.tensor([0.0, 1.0, 1.0, 1.0, 0.7, 1.0]),
        torch.tensor([0, 0, 5, 0, 0, 3]),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2, 0.1]),
        torch.arange(6),
        torch.arange(6),
    )
    together, _ = sample(logits, mixed)
    assert together[0] == logits[0].argmax()
    for i in range(6):
        assert sample(logits[i : i + 1], mixed.of(torch.tensor([i])))[0] == together[i]


def test_among_many_tokens_the_kept_ones_are_those_of_numpy_whatever_way_a_row_takes() -> None:
    """Half of the rows are settled among the likeliest tokens, half only by all of them; alone and together."""
    rng = np.random.default_rng(0)
    rows, vocab = 120, 3000
    logits = rng.normal(size=(rows, vocab)) * np.where(np.arange(rows) % 2, 6.0, 0.3)[:, None]
    logits[:, 100:110] = logits[:, 100:101]  # ties
    parameters = batch(rows, temperature=0.8)
    parameters.top_k[rng.random(rows) < 0.3] = 20
    parameters.top_k[rng.random(rows) < 0.2] = CANDIDATES + 50
    parameters.top_p[rng.random(rows) < 0.5] = 0.9
    parameters.min_p[rng.random(rows) < 0.3] = 0.05
    tensor = torch.from_numpy(logits).float()
    together, finite = sample(tensor, parameters)
    assert finite.all()
    noise = gumbel(parameters.seeds, parameters.positions, vocab).numpy()
    for i in range(rows):
        top_k, top_p, min_p = (float(c[i]) for c in (parameters.top_k, parameters.top_p, parameters.min_p))
        x = tensor[i].numpy().astype(np.float64) / np.float32(0.8)
        ordered = np.sort(x)[::-1]
        ordered = ordered[: int(top_k)] if top_k else ordered
        p = np.exp(ordered - ordered[0]) / np.exp(ordered - ordered[0]).sum()
        inside = ordered[np.cumsum(p) - p < top_p]
        floor = max(inside[-1], ordered[0] + np.log(min_p) if min_p else -np.inf)
        expected = np.where(x >= floor - 1e-9, x + noise[i], -np.inf).argmax()
        assert together[i] == expected, (i, top_k, top_p, min_p)
        assert sample(tensor[i : i + 1], parameters.of(torch.tensor([i])))[0] == together[i]


def test_noise_of_some_tokens_is_that_of_all() -> None:
    seeds, positions = torch.arange(7) * 7919, torch.arange(7) * 3
    ids = torch.randint(0, 1003, (7, 40))
    assert gumbel_of(seeds, positions, ids).equal(gumbel(seeds, positions, 1003).gather(1, ids))


def test_noise_is_the_same_bits_wherever_its_row_stands() -> None:
    seeds, positions = torch.arange(40) * 7919, torch.arange(40) * 3
    whole = gumbel(seeds, positions, 1003)
    for i in (0, 1, 13, 39):
        assert gumbel(seeds[i : i + 1], positions[i : i + 1], 1003).equal(whole[i : i + 1])
    assert gumbel(seeds, positions, 500).equal(whole[:, :500])
    assert not gumbel(seeds, positions + 1, 1003).equal(whole)
    assert not gumbel(seeds + 1, positions, 1003).equal(whole)
    assert not gumbel(seeds + (1 << 40), positions, 1003).equal(whole)


def test_philox_is_philox() -> None:
    """The known answers of the paper's own library (Random123, kat_vectors), philox4x32 with 10 rounds."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [f"{int(w):08x}" for w in philox(zero, zero, zero)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_noise_has_the_moments_of_gumbel() -> None:
    noise = gumbel(torch.arange(100), torch.zeros(100, dtype=torch.int64), 10_000)
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)


def test_the_extreme_words_are_noise_too() -> None:
    """A uniform number of exactly 0 would make a token impossible, or certain."""
    least, most = _gumbel(torch.tensor([0, (1 << 32) - 1])).tolist()
    assert -4 < least < -3 and 22 < most < 23


def test_logits_stay_as_they_were() -> None:
    """A step's rows are drawn from more than once: by twins, and where drafts are verified."""
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(0))
    before, parameters = logits.clone(), batch(12, temperature=0.8)
    parameters.top_k[3:6], parameters.top_p[5:9], parameters.min_p[8:11] = 20, 0.9, 0.1
    first = sample(logits, parameters)[0]
    assert logits.equal(before)
    assert sample(logits, parameters)[0].equal(first)


def test_rows_that_are_not_finite_are_flagged() -> None:
    logits = torch.zeros(5, 9)
    logits[1, 3], logits[2, 3], logits[3, 3] = float("nan"), float("inf"), float("-inf")
    logits[4] = float("-inf")
    assert greedy(logits)[1].tolist() == [True, False, False, True, False]
    assert sample(logits, batch(5))[1].tolist() == [True, False, False, True, False]
