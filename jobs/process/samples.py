"""Several samples of a row: to the engine each is a row of its own, to the job they are answers of one row."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import EngineStats
from batchinfer.engine.request import Completions, Requests, RowError
from batchinfer.kernels.ragged import offsets_of

if TYPE_CHECKING:
    from batchinfer.jobs.process.messages import Engine


@dataclass(frozen=True)
class _Sample:
    token_ids: NDArray[np.int32]
    finish_reason: int
    error: RowError | None


class SampledEngine:
    """Answers every row `n` times, by an engine that answers a row once.

    Sample s of row r is row `n * r + s` there; those of a row are neighbours, in order. A row ends when all its samples
    have, and is then in the completions n times, in their order; what has ended before is kept until then.
    """

    def __init__(self, engine: "Engine", n: int) -> None:
        self._engine, self._n = engine, n
        self._kept: dict[int, dict[int, _Sample]] = {}  # row -> sample's index -> sample

    @property
    def unfinished(self) -> int:
        """Samples that wait or run."""
        return self._engine.unfinished

    def add(self, requests: Requests) -> None:
        """Queue rows."""
        self._engine.add(sampled(requests, self._n))

    def take_admitted(self) -> list[int]:
        """Rows of which a sample began since the last call."""
        return list(dict.fromkeys(sample // self._n for sample in self._engine.take_admitted()))

    def step(self) -> Completions:
        """The rows of which the last sample ended in this step."""
        done = self._engine.step()
        whole = []
        for i, (number, reason) in enumerate(zip(done.rows.tolist(), done.finish_reasons.tolist(), strict=True)):
            row, index = divmod(number, self._n)
            token_ids = done.token_ids[done.offsets[i] : done.offsets[i + 1]].copy()  # not the whole step's
            kept = self._kept.setdefault(row, {})
            kept[index] = _Sample(token_ids, reason, done.errors.get(number))
            if len(kept) == self._n:
                whole.append(row)
        return self._take(whole)

    def stats(self) -> EngineStats:
        """The engine's."""
        return self._engine.stats()

    def _take(self, rows: list[int]) -> Completions:
        """The completions of these rows; the error of one is that of its first sample that has any."""
        samples, errors = [], {}
        for row in rows:
            kept = self._kept.pop(row)
            mine = [kept[index] for index in range(self._n)]
            samples += mine
            if (error := next((sample.error for sample in mine if sample.error is not None), None)) is not None:
                errors[row] = error
        return Completions(
            np.repeat(np.array(rows, np.int64), self._n),
            np.concatenate([np.empty(0, np.int32), *(sample.token_ids for sample in samples)]),
            offsets_of(np.array([len(sample.token_ids) for sample in samples], np.int64)),
            np.array([sample.finish_reason for sample in samples], np.int8),
            errors,
        )


def sampled(requests: Requests, n: int) -> Requests:
    """A request a sample: sample s of row r is row `n * r + s`. The first one of a row has the row's own seed."""
    repeated = requests.take(np.repeat(np.arange(len(requests)), n))
    index = np.tile(np.arange(n), len(requests))
    digests = b"".join(map(_seed, repeated.seeds.tolist(), index.tolist()))
    seeds = np.where(index == 0, repeated.seeds, np.frombuffer(digests, "<u8"))
    return replace(repeated, rows=repeated.rows * n + index, seeds=seeds)


def _seed(row_seed: int, index: int) -> bytes:
    return hashlib.blake2b(f"{row_seed}/{index}".encode(), digest_size=8).digest()
