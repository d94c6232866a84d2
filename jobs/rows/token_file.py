"""Prompts that were tokenized, on disk: written a slice at a time, memory-mapped once they are complete."""

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
    token_ids: NDArray[np.int32]  # of a file: all that is in it, prompts and what is between them
    starts: NDArray[np.int64]  # [n]
    lengths: NDArray[np.int64]  # [n]
    seeds: NDArray[np.uint64]  # [n]
    params: tuple[SamplingParams, ...]  # the distinct ones
    param_index: NDArray[np.int32]  # [n] into params

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(requests: Requests) -> "StoredRequests":
        """The same requests, in memory."""
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
        """(token ids, offsets [m + 1]) of the prompts at these places [m], in this order."""
        places, offsets = ranges(self.starts[index], self.lengths[index])
        return self.token_ids[places], offsets

    def take(self, index: NDArray[np.int64]) -> Requests:
        """The requests at these places, in this order, in memory."""
        token_ids, offsets = self.prompts(index)
        return Requests(self.rows[index], token_ids, offsets, self.seeds[index], self.params, self.param_index[index])


class TokenFile:
    """Requests that are appended: their token ids go to an Arrow file, a batch a slice; the rest stays in memory."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, as `append` does, where the file cannot be written."""
        self._path = path
        self._writer = pa.ipc.new_file(str(path), SCHEMA)
        self._slices: list[Requests] = []  # without their token ids
        self._params: dict[SamplingParams, int] = {}
        self._param_index: list[NDArray[np.int32]] = []
        self.rows = self.tokens = 0

    def append(self, requests: Requests) -> None:
        """More rows, later ones than all before."""
        prompts = pa.LargeListArray.from_arrays(requests.offsets, requests.token_ids)
        with naming(self._path):
            self._writer.write_batch(pa.RecordBatch.from_arrays([prompts], schema=SCHEMA))
        places = [self._params.setdefault(params, len(self._params)) for params in requests.params]
        self._param_index.append(np.array(places, np.int32)[requests.param_index])
        self._slices.append(replace(requests, token_ids=np.zeros(0, np.int32)))
        self.rows += len(requests)
        self.tokens += len(requests.token_ids)

    def complete(self) -> StoredRequests:
        """All rows, one at least. The file loses its name: it is gone with the last use of its rows, or the process."""
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
        """Remove a file that nobody will complete."""
        with suppress(OSError):  # it would write what is left, and fail again
            self._writer.close()
        self._path.unlink(missing_ok=True)


def cut(lengths: NDArray[np.int64], most_rows: int, most_tokens: int) -> list[slice]:
    """Neighbouring prompts of these lengths [n], one or more at a time: so many rows or tokens at most, where more than
    one."""
    ends = np.cumsum(lengths)
    pieces: list[slice] = []
    first = 0
    while first < len(lengths):
        fit = int(np.searchsorted(ends, ends[first] - lengths[first] + most_tokens, "right"))
        end = max(first + 1, min(fit, first + most_rows))
        pieces.append(slice(first, end))
        first = end
    return pieces
