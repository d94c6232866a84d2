"""Build a step's inputs to attention on the host, in the form that each backend takes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.attention import BlockUsers, DecodeBlocks, PromptTiles, TiledBatch
from batchinfer.kernels.attention_plan import AttentionPlanner, Tiling
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints, offsets_of, ranges
from batchinfer.kernels.ragged_attention import RaggedBatch
from batchinfer.models.batch import PromptChunk, as_tensor


class AttentionInputs(Protocol):
    """Builds a step's inputs to attention, one for each attention window that a layer has."""

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[int | None, AttentionBatch]:
        """Return the inputs by window, for prompt chunks and for the decoding sequences behind them.

        `decoding` [n] holds the place, and `positions` [n] the position, of each token after the prompts; the tokens of
        one sequence are neighbours.
        """
        ...


class TiledInputs:
    """Builds inputs for the CPU: prompts in tiles, and each later token as a query with the blocks that it reads.

    Tiles at the same position in their sequences form a group, because they see the same number of keys.
    """

    def __init__(self, windows: set[int | None]) -> None:
        self.windows = windows

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[int | None, AttentionBatch]:
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for c in chunks:
            for start in range(c.start, c.end, TILE):
                tile = (c.place, c.row + start - c.start, min(TILE, c.end - start))
                groups.setdefault(start // TILE, []).append(tile)
        tiles = tuple(_tile_group(table, index, tiles) for index, tiles in sorted(groups.items()))
        prompt_tokens = sum(c.end - c.start for c in chunks)

        def decode(window: int | None) -> DecodeBlocks | None:
            return _decode_blocks(table, decoding, positions, prompt_tokens, window) if len(decoding) else None

        return {window: TiledBatch(window, tiles, decode(window)) for window in self.windows}


class RaggedInputs:
    """Builds inputs for a GPU: one kernel takes all sequences, with one new token or many."""

    def __init__(
        self, windows: set[int | None], heads: int, kv_heads: int, tiling: Tiling, processors: int | None
    ) -> None:
        """Take the model's shape. `processors` is how many the GPU has; None keeps a token's bits free of the batch."""
        self.planners = {window: AttentionPlanner(heads, kv_heads, window, tiling, processors) for window in windows}
        self._last: _Blocks | None = None

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[int | None, AttentionBatch]:
        places, lengths, contexts = _sequences(decoding, positions)
        if chunks:
            prompts = np.array([(c.place, c.end - c.start, c.end) for c in chunks], np.int64).T
            queries = (places, lengths, contexts)
            places, lengths, contexts = (np.concatenate(pair) for pair in zip(prompts, queries, strict=True))
        batch = RaggedBatch(offsets_of(lengths), contexts, torch.from_numpy(self._blocks(table, places, contexts)))
        return {window: planner.plan(batch) for window, planner in self.planners.items()}

    def _blocks(self, table: SequenceTable, places: Ints, contexts: Ints) -> NDArray[np.int32]:
        """Return the blocks [n, most] of the sequences up to their `contexts` [n]."""
        epochs, most, size = table.epoch[places], table.blocks_for(int(contexts.max())), table.block_size
        last = self._last
        if last is not None and last.serves(table, places, epochs, contexts, most):
            # Each has at most one block more: the one that its newest token is in.
            blocks, newest = last.blocks.copy(), (contexts - 1) // size
            blocks[np.arange(len(places)), newest] = table.blocks[places, newest]
        else:
            blocks = table.blocks[places, :most].astype(np.int32)
        self._last = _Blocks(table, places, epochs, contexts, blocks)
        return blocks


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a step's sequences."""

    table: SequenceTable
    places: Ints  # [n]
    epochs: Ints  # [n]
    contexts: Ints  # [n]
    blocks: NDArray[np.int32]  # [n, most]

    def serves(self, table: SequenceTable, places: Ints, epochs: Ints, contexts: Ints, most: int) -> bool:
        """True if these are the same sequences, and none has grown by more than a block's tokens."""
        same = self.table is table and self.blocks.shape[1] == most
        same = same and np.array_equal(self.places, places) and np.array_equal(self.epochs, epochs)
        return same and bool((contexts - self.contexts <= table.block_size).all())


def _sequences(decoding: Ints, positions: Ints) -> tuple[Ints, Ints, Ints]:
    """Return (place, number of tokens, position after the last token) of each sequence that decodes, [n] each.

    `decoding` and `positions` hold the place and position of each token; tokens of one sequence are neighbours.
    """
    again = decoding[1:] == decoding[:-1]
    if not again.any():
        return decoding, np.ones_like(decoding), positions + 1
    first = np.flatnonzero(np.concatenate([[True], ~again]))
    counts = np.diff(np.append(first, len(decoding)))
    return decoding[first], counts, positions[first] + counts


def _tile_group(table: SequenceTable, index: int, tiles: list[tuple[int, int, int]]) -> PromptTiles:
    place, row, size = (np.array(column, np.int64)[:, None] for column in zip(*tiles, strict=True))
    within = np.arange(TILE)
    real = within < size
    blocks = table.blocks[place[:, 0], : (index + 1) * TILE // table.block_size]
    return PromptTiles(
        index, as_tensor(np.where(real, row + within, row)), as_tensor(blocks), as_tensor(np.flatnonzero(real))
    )


def _decode_blocks(
    table: SequenceTable, places: Ints, positions: Ints, first_row: int, window: int | None
) -> DecodeBlocks:
    """Return the blocks that each single query reads; several queries may belong to one sequence."""
    size = table.block_size
    start = np.zeros_like(positions) if window is None else np.maximum(positions + 1 - window, 0)
    counts = positions // size + 1 - start // size
    query = np.repeat(np.arange(len(places)), counts)
    index, offsets = ranges(start // size, counts)  # index of each block in its sequence
    pool = table.blocks[places[query], index]
    key_positions = index[:, None] * size + np.arange(size)
    hidden = (key_positions > positions[query, None]) | (key_positions < start[query, None])
    edges = np.flatnonzero(hidden.any(1))

    users, entry = _group_by_users(pool, query)
    most = np.arange(int(counts.max()))
    padded = np.where(most < counts[:, None], most, 0) + offsets[:-1, None]
    return DecodeBlocks(
        rows=slice(first_row, first_row + len(places)),
        users=users,
        owner=torch.cat([u.queries.flatten() for u in users]),
        edges=as_tensor(entry[edges]),
        hidden=as_tensor(hidden[edges, None]),
        table=as_tensor(entry[padded]),
        order=as_tensor(entry),
        offsets=as_tensor(offsets),
    )


def _group_by_users(pool: Ints, query: Ints) -> tuple[tuple[BlockUsers, ...], Ints]:
    """Group pairs of a block and a query by how many queries use the block.

    `pool` [n] and `query` [n] are the pairs. Returns the groups, and the index [n] of each pair in them.
    """
    uses = np.bincount(pool)[pool]
    groups: list[BlockUsers] = []
    entry, base = np.empty_like(pool), 0
    for u in np.unique(uses).tolist():
        used = np.flatnonzero(uses == u)
        pairs = used[np.argsort(pool[used], kind="stable")].reshape(-1, u)
        ids = pool[pairs[:, 0]]
        low, span = int(ids[0]), int(ids[-1] - ids[0]) + 1
        # Blocks are read as one slice of the pool if they lie close enough; shared blocks only without any gap.
        in_place = span <= (2 * len(ids) if u == 1 else len(ids))
        at = ids - low if in_place else np.arange(len(ids))
        queries = np.zeros((span if in_place else len(ids), u), np.int64)
        queries[at] = query[pairs]
        entry[pairs] = base + at[:, None] * u + np.arange(u)
        base += queries.size
        groups.append(BlockUsers(slice(low, low + span) if in_place else as_tensor(ids), as_tensor(queries)))
    return tuple(groups), entry
