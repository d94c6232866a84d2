"""Sampling in C against the reference, whose noise it computes in float32."""

import ctypes

import pytest
import torch
from compiled import libraries

from batchinfer.kernels import sampling
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.sampling_cpu import sample

VOCABULARIES = [1, 5, 64, 1000, 32003]


def batch_of(rows: int, temperature: float = 0.8, top_p: float = 1.0, top_k: int = 0) -> SamplingBatch:
    seeds = torch.randint(-(2**62), 2**62, (rows,))
    positions = torch.randint(0, 1 << 20, (rows,))
    return SamplingBatch(
        *(torch.full((rows,), temperature), torch.full((rows,), top_k), torch.full((rows,), top_p), torch.zeros(rows)),
        *(seeds, positions),
    )


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_most_likely_token_is_the_references(library: ctypes.CDLL, vocabulary: int) -> None:
    logits = torch.randn(40, vocabulary)
    logits[3] = logits[3].round()  # ties: the first one
    tokens, finite = sample(library, logits, None)
    assert finite.all() and tokens.equal(torch.tensor([row.tolist().index(row.max()) for row in logits]))


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_drawn_tokens_are_the_references(library: ctypes.CDLL, vocabulary: int, temperature: float) -> None:
    """Scores that differ by less than float32 tells may change places; none do here."""
    logits, batch = torch.randn(60, vocabulary) * 3, batch_of(60, temperature)
    tokens, _ = sample(library, logits, batch)
    noise = sampling.gumbel(batch.seeds, batch.positions, vocabulary)
    scores = logits.double() / temperature + noise
    lost = scores.amax(-1) - scores.gather(1, tokens[:, None])[:, 0]
    assert lost.max() < 3e-5
    assert tokens.equal(sampling.sample(logits, batch)[0])


@pytest.mark.parametrize("library", libraries())
def test_a_mixed_batch_and_filters(library: ctypes.CDLL) -> None:
    logits = torch.randn(30, 500) * 3
    batch = batch_of(30)
    batch.temperature[::3] = 0
    batch.top_k[1::3] = 10
    batch.top_p[2::6] = 0.7
    found, expected = sample(library, logits, batch), sampling.sample(logits, batch)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


@pytest.mark.parametrize("library", libraries())
def test_a_row_is_drawn_as_alone(library: ctypes.CDLL) -> None:
    logits, batch = torch.randn(9, 777), batch_of(9)
    tokens, _ = sample(library, logits, batch)
    for i in range(9):
        assert sample(library, logits[i : i + 1], batch.of(torch.tensor([i])))[0].equal(tokens[i : i + 1])


@pytest.mark.parametrize("library", libraries())
def test_banned_tokens_are_never_drawn(library: ctypes.CDLL) -> None:
    logits = torch.full((200, 100), float("-inf"))
    logits[:, 37], logits[:, 99] = -1000.0, -1000.0
    tokens, finite = sample(library, logits, batch_of(200))
    assert finite.all() and set(tokens.tolist()) == {37, 99}


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("drawn", [False, True])
def test_rows_that_are_not_finite_are_told(library: ctypes.CDLL, drawn: bool) -> None:
    logits = torch.randn(6, 50)
    logits[1, 49], logits[2, 0], logits[3, 20] = float("nan"), float("inf"), float("-inf")
    logits[4] = float("-inf")
    tokens, finite = sample(library, logits, batch_of(6) if drawn else None)
    assert finite.tolist() == [True, False, False, True, False, True]
    assert (tokens >= 0).all() and (tokens < 50).all()


@pytest.mark.parametrize("library", libraries())
def test_the_whole_range_of_noise(library: ctypes.CDLL) -> None:
    """The largest noise decides among 65,536 equal tokens; noise of 24 bits would often be equal there."""
    rows, vocabulary = 60, 1 << 16
    batch = batch_of(rows, 1.0)
    largest = sampling.gumbel(batch.seeds, batch.positions, vocabulary).max(-1)
    tokens, _ = sample(library, torch.zeros(rows, vocabulary), batch)
    assert largest.values.max() > 13
    assert (tokens == largest.indices).float().mean() > 0.99
