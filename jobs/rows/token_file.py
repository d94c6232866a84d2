"""Tokenized prompts on disk: written a slice at a time, and memory-mapped once they are complete."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.results.durable import naming
from batchinfer.kernels.ragged import ranges

SCHEMA = pa.schema([pa.field("token_ids", pa.large_list(pa.int32()), nullable=False)])


@dataclass(frozen=True, eq=False)
class StoredRequests:
    """n tokenized rows. Row i's prompt is `token_ids[starts[i]:starts[i] + lengths[i]]`, never empty."""

    rows: NDArray[np.int64]  # [n] ordinals in the input, ascending
    token_ids: NDArray[np.int32]  # all prompts; mapped from a file, it also has the file's bytes between them
    starts: NDArray[np.int64]  # [n]
    lengths: NDArray[np.int64]  # [n]
    seeds: NDArray[np.uint64]  # [n]
    params: tuple[SamplingParams, ...]  # without repetitions
    param_index: NDArray[np.int32]  # [n] into params

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(requests: Requests) -> "StoredRequests":
        """Return the same requests, in memory."""
        return StoredRequests(
            requests.rows,
            requests.token_ids,
            requests.offsets[:-1],
            np.diff(requests.offsets),
            requests.seeds,
            requests.params,
            requests.param_index,
        )

    def prompts(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return (token ids, offsets [m + 1]) of the prompts at the indices [m], in this order."""
        tokens, offsets = ranges(self.starts[index], self.lengths[index])
        return self.token_ids[tokens], offsets

    def take(self, index: NDArray[np.int64]) -> Requests:
        """Return the requests at the indices, in this order, in memory."""
        token_ids, offsets = self.prompts(index)
        return Requests(self.rows[index], token_ids, offsets, self.seeds[index], self.params, self.param_index[index])


class TokenFile:
    """Gathers requests: token ids go to an Arrow file, a record batch for each slice; the rest stays in memory."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, as `append` does, if the file cannot be written."""
        self._path = path
        self._writer = pa.ipc.new_file(str(path), SCHEMA)
        self._slices: list[Requests] = []  # without their token ids
        self._params: dict[SamplingParams, int] = {}
        self._param_index: list[NDArray[np.int32]] = []
        self.rows = self.tokens = 0

    def append(self, requests: Requests) -> None:
        """Append a slice of rows, with greater ordinals than all rows before."""
        prompts = pa.LargeListArray.from_arrays(requests.offsets, requests.token_ids)
        with naming(self._path):
            self._writer.write_batch(pa.RecordBatch.from_arrays([prompts], schema=SCHEMA))
        indices = [self._params.setdefault(params, len(self._params)) for params in requests.params]
        self._param_index.append(np.array(indices, np.int32)[requests.param_index])
        self._slices.append(replace(requests, token_ids=np.zeros(0, np.int32)))
        self.rows += len(requests)
        self.tokens += len(requests.token_ids)

    def complete(self) -> StoredRequests:
        """Return all rows; there must be one or more. The file is unlinked: it disappears once its rows are not used
        any
        more, or the process ends."""
        with naming(self._path):
            self._writer.close()
        mapped = pa.memory_map(str(self._path))
        self._path.unlink()
        whole = mapped.read_buffer()
        batches = pa.ipc.open_file(mapped)
        starts = []
        for i, requests in enumerate(self._slices):
            token_ids = batches.get_batch(i).column(0).values
            starts.append((token_ids.buffers()[1].address - whole.address) // 4 + requests.offsets[:-1])
        return StoredRequests(
            np.concatenate([requests.rows for requests in self._slices]),
            np.frombuffer(whole, np.int32, whole.size // 4),
            np.concatenate(starts),
            np.concatenate([np.diff(requests.offsets) for requests in self._slices]),
            np.concatenate([requests.seeds for requests in self._slices]),
            tuple(self._params),
            np.concatenate(self._param_index),
        )

    def close(self) -> None:
        """Remove the file without completing it."""
        with suppress(OSError):  # closing writes the buffered rest, which fails again
            self._writer.close()
        self._path.unlink(missing_ok=True)


def cut(lengths: NDArray[np.int64], most_rows: int, most_tokens: int) -> list[slice]:
    """Cut prompts of these lengths [n] into runs of at most `most_rows` rows and `most_tokens` tokens. A prompt with
    more
    tokens is a run of its own."""
    ends = np.cumsum(lengths)
    runs: list[slice] = []
    first = 0
    while first < len(lengths):
        fit = int(np.searchsorted(ends, ends[first] - lengths[first] + most_tokens, "right"))
        end = max(first + 1, min(fit, first + most_rows))
        runs.append(slice(first, end))
        first = end
    return runs
