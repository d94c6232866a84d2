"""Sampling against the plain sampler on the CPU."""

from typing import Any

import torch
from gpu_check.compare import poisoned
from gpu_check.session import Session
from torch import Tensor

TITLE = "Sampled tokens that are those of the reference"
GAP = 1e-4
"""Scores are float32 on the device and float64 in the reference: two best ones that are nearer may change places."""
BORDER = 0.01
"""The share of rows that may differ where sums of probabilities are compared with a bound, for the same reason."""
FILTERS: dict[str, dict[str, list[float]]] = {
    "greedy": {"temperature": [0.0]},
    "temperature": {"temperature": [0.0, 0.3, 1.0, 1.7]},
    "top-k": {"temperature": [0.7, 1.0], "top_k": [1, 2, 5, 50, 400]},
    "top-p": {"temperature": [0.7, 1.0], "top_p": [0.05, 0.5, 0.9, 0.999]},
    "min-p": {"temperature": [0.7, 2.0], "min_p": [0.01, 0.3, 0.9]},
    "all": {"temperature": [0.7, 1.0], "top_k": [3, 50], "top_p": [0.7, 0.95, 1.0], "min_p": [0.0, 0.02]},
}


def run(session: Session) -> None:
    """Filters, flags, greedy."""
    for vocab, rows in session.within_time(session.pick([(320, 240), (1000, 240), (128256, 24)], [(100, 5)])):
        for name, columns in FILTERS.items():
            with session.case(f"sampling, {name}, {vocab} tokens"):
                _filters(session, name, columns, vocab, rows)
        session.say(f"{vocab} tokens")
    with session.case("logits of no use"):
        _no_use(session)


def _filters(session: Session, name: str, columns: dict[str, list[float]], vocab: int, rows: int) -> None:
    from batchinfer.kernels import sampling
    from batchinfer.kernels.sampling_triton import sample

    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
    batch = sampling_batch(rows, columns, torch.device("cpu"))
    expected, finite = sampling.sample(logits, batch)
    with poisoned():
        found, found_finite = sample(
            logits.to(session.device), sampling_batch(rows, columns, session.device), session.gpu
        )
    found, found_finite = found.cpu(), found_finite.cpu()
    assert found_finite.equal(finite) and bool(finite.all()) and bool(((found >= 0) & (found < vocab)).all())
    different = (found != expected).nonzero().flatten().tolist()
    tied = [row for row in different if abs(_gap(logits, batch, row, int(found[row]), int(expected[row]))) < GAP]
    session.row(TITLE, filters=name, vocabulary=vocab, rows=rows, equal=rows - len(different), tied=len(tied))
    bordering = "top_p" in columns or "min_p" in columns
    wrong = len(different) - len(tied)
    assert wrong <= (BORDER * rows if bordering else 0), f"{wrong} of {rows} tokens are others: rows {different[:9]}"


def _gap(logits: Tensor, batch: Any, row: int, one: int, other: int) -> float:
    """How far apart the scores of two tokens are."""
    from batchinfer.kernels.sampling import gumbel_of

    ids, temperature = torch.tensor([[one, other]]), float(batch.temperature[row])
    values = logits[row][ids].double()
    if temperature > 0:
        values = values / temperature + gumbel_of(batch.seeds[row : row + 1], batch.positions[row : row + 1], ids)
    return float(values[0, 0] - values[0, 1])


def sampling_batch(rows: int, columns: dict[str, list[float]], device: torch.device) -> Any:
    """Parameters of rows: the numbers of each column in turn."""
    from batchinfer.kernels.sampling import SamplingBatch

    def column(name: str, value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor((columns.get(name, [value]) * rows)[:rows], dtype=dtype, device=device)

    return SamplingBatch(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        torch.arange(rows, device=device) * 7_919_000_000_000 - 5,
        torch.arange(rows, device=device) * 31,
    )


def _no_use(session: Session) -> None:
    from batchinfer.kernels.sampling import greedy
    from batchinfer.kernels.sampling_triton import sample

    logits = torch.randn(5, 40, generator=session.generator(), device=session.device)
    logits[1, 3], logits[2, 39], logits[3] = float("nan"), float("inf"), float("-inf")
    _, finite = sample(logits, sampling_batch(5, {}, session.device), session.gpu)
    assert finite.tolist() == [True, False, False, False, True]
    tokens, finite = greedy(logits)
    assert finite.tolist() == [True, False, False, False, True]
    assert int(tokens[0]) == int(logits[0].argmax())
