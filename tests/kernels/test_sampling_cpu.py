"""Sampling in C against the reference, whose noise it computes in float32, and with filters against NumPy."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from compiled import libraries

from batchinfer.kernels import sampling
from batchinfer.kernels.cpu_library import use_torch_threads
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.sampling_cpu import sample

VOCABULARIES = [1, 5, 64, 1000, 32003]


def batch_of(rows: int, temperature: float = 0.8) -> SamplingBatch:
    seeds = torch.randint(-(2**62), 2**62, (rows,))
    positions = torch.randint(0, 1 << 20, (rows,))
    return SamplingBatch(
        *(torch.full((rows,), temperature), torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.zeros(rows)),
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


def filtered_batch(rows: int) -> SamplingBatch:
    """Return rows with all filters, some and none; every seventh is greedy."""
    batch, rng = batch_of(rows), np.random.default_rng(rows)
    batch.top_k[:] = torch.from_numpy(rng.choice([0, 0, 0, 1, 5, 50, 300, 3000, 1 << 40], rows))
    batch.top_p[:] = torch.from_numpy(rng.choice([1, 1, 0.999, 0.9, 0.5, 1e-6], rows))
    batch.min_p[:] = torch.from_numpy(rng.choice([0, 0, 0, 1e-42, 0.05, 0.5, 1], rows))
    batch.temperature[::7] = 0
    return batch


def draw(x: np.ndarray, noise: np.ndarray, top_k: int, top_p: float, min_p: float) -> int:
    """Return the token of one row with noise, by the definitions, from sorted numbers in float64."""
    ordered = np.sort(x)[::-1][: top_k or None]
    weights = np.exp(ordered - ordered[0])
    before = np.cumsum(weights) - weights
    least = ordered[before < top_p * weights.sum()][-1] if top_p < 1 else ordered[-1]
    least = max(least, ordered[0] + np.log(min_p) if min_p else -np.inf)
    return int(np.where(x >= least, x + noise, -np.inf).argmax())


def hard_rows(rows: int, vocabulary: int) -> Iterator[torch.Tensor]:
    """Yield logits of which few tokens pass, thousands, or all; with ties, likely neighbours, and banned tokens."""
    normal = torch.randn(rows, vocabulary)
    yield normal * 3
    yield normal / 10
    yield (normal * 2).round()
    yield torch.full_like(normal, -7.5)
    yield (normal * 3).sort(-1, descending=True).values
    likely = normal.clone()
    likely[:, vocabulary // 2 :: 1000] += 20
    yield likely
    banned = normal * 4
    banned[torch.rand(rows, vocabulary) < 0.99] = float("-inf")
    banned[:, -1] = 0
    yield banned


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 1000, 20_011])
def test_filters_leave_what_they_leave_by_the_reference_and_by_numpy(library: ctypes.CDLL, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)  # scores closer than float32 tells are rare, but may come
    rows = 40
    batch = filtered_batch(rows)
    noise = sampling.gumbel(batch.seeds, batch.positions, vocabulary).numpy()
    parameters = list(zip(batch.top_k.tolist(), batch.top_p.tolist(), batch.min_p.tolist(), strict=True))
    for logits in hard_rows(rows, vocabulary):
        tokens, finite = sample(library, logits, batch)
        assert finite.all() and tokens.equal(sampling.sample(logits, batch)[0])
        tempered = (logits / 0.8).double().numpy()
        drawn = [draw(tempered[i], noise[i], *parameters[i]) if i % 7 else logits[i].argmax() for i in range(rows)]
        assert tokens.tolist() == drawn


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("vocabulary", [777, 20_011])
def test_a_row_is_drawn_as_alone_on_any_number_of_threads(library: ctypes.CDLL, vocabulary: int) -> None:
    rows, before = 20, torch.get_num_threads()
    batch = filtered_batch(rows)
    try:
        for logits in hard_rows(rows, vocabulary):
            torch.set_num_threads(3)
            use_torch_threads(library)
            tokens, _ = sample(library, logits, batch)
            torch.set_num_threads(1)
            use_torch_threads(library)
            for i in range(rows):
                alone, _ = sample(library, logits[i : i + 1], batch.of(torch.tensor([i])))
                assert alone.equal(tokens[i : i + 1])
    finally:
        torch.set_num_threads(before)
        library.set_threads(None, 1)


@pytest.mark.parametrize("library", libraries())
def test_banned_tokens_are_never_drawn(library: ctypes.CDLL) -> None:
    logits = torch.full((200, 100), float("-inf"))
    logits[:, 37], logits[:, 99] = -1000.0, -1000.0
    tokens, finite = sample(library, logits, batch_of(200))
    assert finite.all() and set(tokens.tolist()) == {37, 99}


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize(("drawn", "filtered"), [(False, False), (True, False), (True, True)])
def test_rows_that_are_not_finite_are_told(library: ctypes.CDLL, drawn: bool, filtered: bool) -> None:
    logits = torch.randn(6, 50)
    logits[1, 49], logits[2, 0], logits[3, 20] = float("nan"), float("inf"), float("-inf")
    logits[4] = float("-inf")
    batch = batch_of(6)
    if filtered:
        batch.top_k[:], batch.top_p[:], batch.min_p[:] = 5, 0.9, 0.1
    tokens, finite = sample(library, logits, batch if drawn else None)
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
