"""Tokenized prompts on disk: written a slice at a time, and memory-mapped once they are complete."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.request import Choices, Requests, params_of_all
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.jobs.results.durable import naming
from batchinfer.kernels.ragged import Ints, offsets_of, ranges

LABEL = pa.struct([pa.field("token_ids", pa.list_(pa.int32())), pa.field("text", pa.string())])
GRAMMAR_BYTES = 1024  # what a row's own params take beside their grammar's text
SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(LABEL)),  # null if rows do not choose
    ]
)


@dataclass(frozen=True, eq=False)
class StoredRequests:
    """n tokenized rows. Row i's prompt is `token_ids[starts[i]:starts[i] + lengths[i]]`, never empty."""

    rows: NDArray[np.int64]  # [n] ordinals in the input, ascending
    token_ids: NDArray[np.int32]  # all prompts; mapped from a file, it also has the file's bytes between them
    starts: NDArray[np.int64]  # [n]
    lengths: NDArray[np.int64]  # [n]
    seeds: NDArray[np.uint64]  # [n]
    params: SamplingTable  # without repetitions
    param_index: NDArray[np.int32]  # [n] into params
    labels: pa.ChunkedArray | None = None  # [n] lists of `LABEL`, mapped from a file; None if rows do not choose
    samples: NDArray[np.int32] | None = None  # [n] answers wanted of each row; None: one
    # Holds the columns `scored_from` and `scored_bytes` of `Requests`, [n] each; () if no text is scored.
    scored: tuple[Ints, ...] = ()

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
            None if requests.choices is None else pa.chunked_array([in_arrow(requests.choices)]),
            requests.samples,
            _scored([requests]),
        )

    @property
    def max_tokens(self) -> Ints:
        """Most tokens of each row's answer [n]."""
        most: Ints = self.params.numbers["max_tokens"][self.param_index].astype(np.int64)
        return most

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """Whether each row's tokens are drawn at random [n]."""
        drawn: NDArray[np.bool_] = self.params.numbers["temperature"][self.param_index] > 0
        return drawn

    @property
    def wanted(self) -> Ints:
        """Number of samples that each row asks for [n]."""
        return np.ones(len(self), np.int64) if self.samples is None else self.samples.astype(np.int64)

    @property
    def sequences(self) -> Ints:
        """Number of samples that are computed of each row [n]: one at temperature 0, since all are the same then."""
        return np.where(self.drawn, self.wanted, 1)

    def prompts(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return (token ids, offsets [m + 1]) of the prompts at the indices [m], in this order."""
        tokens, offsets = ranges(self.starts[index], self.lengths[index])
        return self.token_ids[tokens], offsets

    def take(self, index: NDArray[np.int64]) -> Requests:
        """Return the requests at the indices, in this order, in memory."""
        token_ids, offsets = self.prompts(index)
        choices = None if self.labels is None else from_arrow(self.labels.take(pa.array(index)).combine_chunks())
        samples = None if self.samples is None else self.samples[index]
        # Only the params that these rows have: each row may have its own.
        used, where = np.unique(self.param_index[index], return_inverse=True)
        params, param_index = self.params.take(used.astype(np.int64)), where.astype(np.int32)
        scored = (column[index] for column in self.scored)
        return Requests(
            self.rows[index], token_ids, offsets, self.seeds[index], params, param_index, choices, samples, *scored
        )

    def most_blocks(self, index: Ints, size: int) -> Ints:
        """Return the most blocks of `size` tokens that the rows at the indices [m] may need [m]."""
        if self.scored:
            return _in_blocks(self.lengths[index], size)
        if self.labels is None:
            return _in_blocks(self.lengths[index] + self.max_tokens[index], size)
        labels = self.labels.take(pa.array(index)).combine_chunks()
        longest = pc.max(pc.list_value_length(pc.struct_field(labels.flatten(), 0))).as_py()
        forks: Ints = pc.list_value_length(labels).to_numpy() - 1
        # A fork has a copy of the block that its label begins in.
        return _in_blocks(self.lengths[index] + longest, size) + forks * (1 + int(-(-(longest - 1) // size)))

    def label_tokens(self, index: Ints) -> int:
        """Return the number of tokens of all labels of the rows at the indices."""
        if self.labels is None or not len(index):
            return 0
        labels = self.labels.take(pa.array(index)).combine_chunks()
        return int(pc.sum(pc.list_value_length(pc.struct_field(labels.flatten(), 0))).as_py())

    def label_sets(self) -> Ints:
        """Return a number for each row [n]; rows with the same number choose from the same texts, in the same order."""
        if self.labels is None:
            return np.zeros(len(self), np.int64)
        # No text holds a NUL character.
        joined = [_joined(chunk) for chunk in self.labels.chunks]
        sets: Ints = pa.chunked_array(joined).combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        return sets


class TokenFile:
    """Gathers requests: token ids go to an Arrow file, a record batch for each slice; the rest stays in memory."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, as `append` does, if the file cannot be written."""
        self._path = path
        self._writer = pa.ipc.new_file(str(path), SCHEMA)
        self._slices: list[Requests] = []  # without their token ids
        self._chooses = False
        self._grammars: set[tuple[str, str]] = set()
        self.rows = self.tokens = 0
        self.grammar_bytes = 0  # of the grammars of all rows, each counted once; they are in memory

    def append(self, requests: Requests) -> None:
        """Append a slice of rows, with greater ordinals than all rows before."""
        prompts = pa.LargeListArray.from_arrays(requests.offsets, requests.token_ids)
        choices = requests.choices
        labels = pa.nulls(len(requests), SCHEMA.field(1).type) if choices is None else in_arrow(choices)
        with naming(self._path):
            self._writer.write_batch(pa.RecordBatch.from_arrays([prompts, labels], schema=SCHEMA))
        new = {params.structure for params in requests.params.others if params.structure is not None} - self._grammars
        self.grammar_bytes += sum(GRAMMAR_BYTES + len(text) for _, text in new)
        self._grammars |= new
        self._chooses = choices is not None
        self._slices.append(replace(requests, token_ids=np.zeros(0, np.int32), choices=None))
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
        starts, labels = [], []
        for i, requests in enumerate(self._slices):
            batch = batches.get_batch(i)
            token_ids = batch.column(0).values
            labels.append(batch.column(1))
            starts.append((token_ids.buffers()[1].address - whole.address) // 4 + requests.offsets[:-1])
        samples = [requests.samples for requests in self._slices if requests.samples is not None]
        return StoredRequests(
            np.concatenate([requests.rows for requests in self._slices]),
            np.frombuffer(whole, np.int32, whole.size // 4),
            np.concatenate(starts),
            np.concatenate([np.diff(requests.offsets) for requests in self._slices]),
            np.concatenate([requests.seeds for requests in self._slices]),
            *params_of_all(self._slices),
            pa.chunked_array(labels) if self._chooses else None,
            np.concatenate(samples) if samples else None,
            _scored(self._slices),
        )

    def close(self) -> None:
        """Remove the file without completing it."""
        with suppress(OSError):  # closing writes the buffered rest, which fails again
            self._writer.close()
        self._path.unlink(missing_ok=True)


def _scored(slices: list[Requests]) -> tuple[Ints, ...]:
    """Return which tokens of all rows are scored; () if none are."""
    columns = [
        (each.scored_from, each.scored_bytes)
        for each in slices
        if each.scored_from is not None and each.scored_bytes is not None
    ]
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def in_arrow(choices: Choices) -> pa.ListArray:
    """Return the choices of n rows as lists [n] of `LABEL`."""
    ids = pa.ListArray.from_arrays(choices.offsets.astype(np.int32), choices.token_ids)
    bounds, texts = choices.text_offsets.astype(np.int32), choices.texts
    named = pa.StringArray.from_buffers(len(ids), pa.py_buffer(bounds), pa.py_buffer(texts.tobytes()))
    return pa.ListArray.from_arrays(
        choices.rows.astype(np.int32), pa.StructArray.from_arrays([ids, named], fields=list(LABEL))
    )


def from_arrow(labels: pa.ListArray) -> Choices:
    """Return lists [n] of `LABEL` as choices, in memory."""
    ids, texts = labels.flatten().flatten()
    lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    return Choices(
        ids.flatten().to_numpy(),
        offsets_of(pc.list_value_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)),
        offsets_of(pc.list_value_length(labels).to_numpy(zero_copy_only=False).astype(np.int64)),
        np.frombuffer("".join(texts.to_pylist()).encode(), np.uint8),
        offsets_of(lengths),
    )


def _in_blocks(tokens: Ints, size: int) -> Ints:
    blocks: Ints = -(-tokens // size)
    return blocks


def _joined(labels: pa.ListArray) -> pa.StringArray:
    """Return the texts of each list as one."""
    texts = pa.ListArray.from_arrays(labels.offsets, pc.struct_field(labels.values, 1))
    return pc.binary_join(texts, "\0")


def cut(lengths: Ints, most_rows: int, most_tokens: int, copies: Ints | None = None) -> list[slice]:
    """Cut prompts of these lengths [n] into runs of at most `most_rows` rows and `most_tokens` tokens.

    Each prompt counts once, or as often as `copies` [n] says. A prompt with more is a run of its own.
    """
    copies = np.ones(len(lengths), np.int64) if copies is None else copies
    tokens, rows = offsets_of(lengths * copies), offsets_of(copies)
    runs: list[slice] = []
    first = 0
    while first < len(lengths):
        fit = int(np.searchsorted(tokens, tokens[first] + most_tokens, "right"))
        fit = min(fit, int(np.searchsorted(rows, rows[first] + most_rows, "right")))
        end = max(first + 1, fit - 1)
        runs.append(slice(first, end))
        first = end
    return runs
