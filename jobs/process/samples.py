"""Several samples of a row: each is a row of its own for the engine, and one of the row's answers for the job."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import EngineStats
from batchinfer.engine.request import Completions, Requests, RowError
from batchinfer.jobs.sampling_flags import MAX_SAMPLES
from batchinfer.kernels.ragged import Ints, offsets_of, ranges

if TYPE_CHECKING:
    from batchinfer.jobs.process.messages import Engine


@dataclass(frozen=True)
class _Sample:
    token_ids: NDArray[np.int32]
    finish_reason: int
    error: RowError | None


class SampledEngine:
    """Answers every row as often as it asks for, with an engine that answers each row once.

    Sample s of row r is row `MAX_SAMPLES * r + s` of that engine. A row ends when its last sample ends; samples that
    end earlier are kept until then. The completions then hold the row once for each sample that was computed, in
    succession and in the order of its samples.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._kept: dict[int, dict[int, _Sample]] = {}  # row -> sample's index -> sample
        self._missing: dict[int, int] = {}  # row -> samples that have not ended

    @property
    def unfinished(self) -> int:
        """Number of samples that wait or run."""
        return self._engine.unfinished

    def add(self, requests: Requests) -> None:
        """Queue rows."""
        self._missing |= dict(zip(requests.rows.tolist(), sequences(requests).tolist(), strict=True))
        self._engine.add(sampled(requests))

    def take_admitted(self) -> list[int]:
        """Return the rows of which a sample began since the last call."""
        return list(dict.fromkeys(sample // MAX_SAMPLES for sample in self._engine.take_admitted()))

    def step(self) -> Completions:
        """Take a step. Returns the rows whose last sample ended in it."""
        done = self._engine.step()
        whole = []
        for i, (number, reason) in enumerate(zip(done.rows.tolist(), done.finish_reasons.tolist(), strict=True)):
            row, index = divmod(number, MAX_SAMPLES)
            # Copy the tokens, so that the array of the whole step is not kept alive.
            token_ids = done.token_ids[done.offsets[i] : done.offsets[i + 1]].copy()
            self._kept.setdefault(row, {})[index] = _Sample(token_ids, reason, done.errors.get(number))
            self._missing[row] -= 1
            if not self._missing[row]:
                whole.append(row)
        return self._take(whole)

    def stats(self) -> EngineStats:
        """Return the statistics of the engine."""
        return self._engine.stats()

    def _take(self, rows: list[int]) -> Completions:
        """Remove these rows and return their completions. A row's error is that of its first sample with an error."""
        samples, errors, counts = [], {}, []
        for row in rows:
            del self._missing[row]
            mine = [sample for _, sample in sorted(self._kept.pop(row).items())]
            samples += mine
            counts.append(len(mine))
            if (error := next((sample.error for sample in mine if sample.error is not None), None)) is not None:
                errors[row] = error
        return Completions(
            np.repeat(np.array(rows, np.int64), np.array(counts, np.int64)),
            np.concatenate([np.empty(0, np.int32), *(sample.token_ids for sample in samples)]),
            offsets_of(np.array([len(sample.token_ids) for sample in samples], np.int64)),
            np.array([sample.finish_reason for sample in samples], np.int8),
            errors,
        )


def sequences(requests: Requests) -> Ints:
    """Return the number of samples to compute of each row [n]: one at temperature 0, since all are the same then."""
    wanted = np.ones(len(requests), np.int32) if requests.samples is None else requests.samples
    return np.where(requests.number("temperature") > 0, wanted, 1).astype(np.int64)


def sampled(requests: Requests) -> Requests:
    """Return a request for each sample: sample s of row r is row `MAX_SAMPLES * r + s`. Sample 0 has the row's seed."""
    index, offsets = ranges(np.zeros(len(requests), np.int64), sequences(requests))
    repeated = requests.take(np.repeat(np.arange(len(requests)), np.diff(offsets)))
    digests = b"".join(map(_seed, repeated.seeds.tolist(), index.tolist()))
    seeds = np.where(index == 0, repeated.seeds, np.frombuffer(digests, "<u8"))
    return replace(repeated, rows=repeated.rows * MAX_SAMPLES + index, seeds=seeds, samples=None)


def _seed(row_seed: int, index: int) -> bytes:
    return hashlib.blake2b(f"{row_seed}/{index}".encode(), digest_size=8).digest()
