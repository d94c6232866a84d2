"""Choose which states the tokens of a step go on from, and which ones they leave."""

from collections.abc import Iterator

import numpy as np

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints, offsets_of
from batchinfer.kernels.state_pool import PromptTile, StateBatch, StateTokens, by_index
from batchinfer.models.batch import LabelStep, PromptChunk, Queries, as_tensor


def state_inputs(
    table: SequenceTable, chunks: list[PromptChunk], queries: Queries, prompt_tokens: int, labels: LabelStep | None
) -> StateBatch:
    """Return the states of a step: `chunks` of prompts, then the tokens of `queries` behind `prompt_tokens` others."""
    twins = [(table.state[c.place], table.state[twin]) for c in chunks for twin in c.twins]
    copied, copies = np.array(twins, np.int64).reshape(-1, 2).T
    if labels is not None:
        copied = np.concatenate([copied, labels.copies.states])
        copies = np.concatenate([copies, labels.copies.into_states])
    return StateBatch(
        by_index(tile for c in chunks for tile in _tiles(table, c)),
        tuple(_tokens(table, queries, prompt_tokens)),
        as_tensor(copied),
        as_tensor(copies),
    )


def _tiles(table: SequenceTable, chunk: PromptChunk) -> Iterator[PromptTile]:
    """Yield the tiles of a chunk. The first one of a sequence goes on from the snapshot that it shares, or from 0."""
    place, shared = chunk.place, table.tiles[chunk.place]
    own, origin = int(table.state[place]), table.origin[place]
    for start in range(chunk.start, chunk.end, TILE):
        index = start // TILE
        before = own
        if start == table.begins[place]:
            before = 0 if origin is None else origin.snapshot
        snapshot = shared[index].snapshot if index < len(shared) else 0
        yield PromptTile(index, chunk.row + start - chunk.start, min(TILE, chunk.end - start), before, own, snapshot)


def _tokens(table: SequenceTable, queries: Queries, first_row: int) -> Iterator[StateTokens]:
    """Yield the first token of each sequence, then the second of those that have more, and so on."""
    assert queries.left is not None
    offsets = offsets_of(queries.counts)
    for i in range(int(queries.counts.max(initial=0))):
        more = np.flatnonzero(queries.counts > i)
        at: Ints = offsets[more] + i
        before = table.state[queries.places[more]] if i == 0 else queries.left[at - 1]
        yield StateTokens(as_tensor(first_row + at), as_tensor(before), as_tensor(queries.left[at]))
