"""Build a step's inputs to attention on the host, in the form that each backend takes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.shared_prefixes import SharedPrefixes
from batchinfer.kernels.attention import BlockUsers, DecodeBlocks, PromptTiles, TiledBatch
from batchinfer.kernels.attention_cpu import WindowedBatch
from batchinfer.kernels.attention_plan import AttentionPlan, Tiling, plan_attention
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints, offsets_of, ranges
from batchinfer.kernels.ragged_attention import RaggedBatch
from batchinfer.models.batch import PromptChunk, as_tensor


class AttentionInputs(Protocol):
    """Builds a step's inputs to attention, one for each shape of attention that a layer has."""

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[AttentionShape, AttentionBatch]:
        """Return the inputs by shape, for prompt chunks and for the decoding sequences behind them.

        `decoding` [n] holds the place, and `positions` [n] the position, of each token after the prompts; the tokens of
        one sequence are neighbours.
        """
        ...


class TiledInputs:
    """Builds inputs for the CPU: prompts in tiles, and each later token as a query with the blocks that it reads.

    Tiles at the same position in their sequences form a group, because they see the same number of keys. Shapes with
    the same window have the same inputs.
    """

    def __init__(self, shapes: Iterable[AttentionShape]) -> None:
        self.shapes = tuple(shapes)

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[AttentionShape, AttentionBatch]:
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for c in chunks:
            for start in range(c.start, c.end, TILE):
                tile = (c.place, c.row + start - c.start, min(TILE, c.end - start))
                groups.setdefault(start // TILE, []).append(tile)
        tiles = tuple(_tile_group(table, index, tiles) for index, tiles in sorted(groups.items()))
        prompt_tokens = sum(c.end - c.start for c in chunks)

        def decode(window: int | None) -> DecodeBlocks | None:
            return _decode_blocks(table, decoding, positions, prompt_tokens, window) if len(decoding) else None

        windows = {shape.window for shape in self.shapes}
        by_window = {window: TiledBatch(window, tiles, decode(window)) for window in windows}
        return {shape: by_window[shape.window] for shape in self.shapes}


class WindowedInputs:
    """Builds inputs for the CPU's kernel in C, which takes all sequences, with one new token or many."""

    def __init__(self, shapes: Iterable[AttentionShape]) -> None:
        self.batches = RaggedBatches({shape: SharedPrefixes.on_cpu(_group(shape), shape.head_dim) for shape in shapes})

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[AttentionShape, AttentionBatch]:
        batches = self.batches(table, chunks, decoding, positions)
        return {shape: WindowedBatch(batch, shape.window) for shape, batch in batches.items()}


class RaggedInputs:
    """Builds inputs for a GPU: one kernel takes all sequences, with one new token or many."""

    def __init__(self, tilings: Mapping[AttentionShape, Tiling], processors: int | None) -> None:
        """Take the tiles of each shape.

        `processors` is how many the GPU has; None keeps a token's bits free of the batch.
        """
        self.tilings, self.processors = tilings, processors
        fixed = processors is None
        self.batches = RaggedBatches(
            {shape: SharedPrefixes.on_gpu(_group(shape), tiling, fixed) for shape, tiling in tilings.items()}
        )

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[AttentionShape, AttentionBatch]:
        def plan(shape: AttentionShape, batch: RaggedBatch) -> AttentionPlan:
            tiling = self.tilings[shape]
            return plan_attention(batch, shape.heads, shape.kv_heads, shape.window, tiling, self.processors)

        batches = self.batches(table, chunks, decoding, positions)
        return {shape: plan(shape, batch) for shape, batch in batches.items()}


class RaggedBatches:
    """Makes a step's ragged batch for each shape; they differ in the prefixes that sequences read together."""

    def __init__(self, prefixes: Mapping[AttentionShape, SharedPrefixes]) -> None:
        self.shapes = tuple(prefixes)
        # Layers with a window share no prefix: its sequences would see different keys of it.
        self.prefixes = {shape: shared for shape, shared in prefixes.items() if shape.window is None}

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[AttentionShape, RaggedBatch]:
        prompts = np.array([(c.place, c.end - c.start, c.end) for c in chunks], np.int64).reshape(-1, 3)
        first = np.flatnonzero(np.diff(decoding, prepend=-1))  # queries of one sequence are neighbours
        counts = np.diff(np.append(first, len(decoding)))
        queries = np.stack([decoding[first], counts, positions[first] + counts], 1)
        places, lengths, contexts = np.ascontiguousarray(np.concatenate([prompts, queries]).T)
        most = table.blocks_for(int(contexts.max()))
        blocks = torch.from_numpy(table.blocks[places, :most].astype(np.int32))
        apart = RaggedBatch(offsets_of(lengths), contexts, blocks)

        def batch(shape: AttentionShape) -> RaggedBatch:
            shared = self.prefixes.get(shape)
            return apart if shared is None else replace(apart, prefixes=shared.of(table, places, lengths, contexts))

        return {shape: batch(shape) for shape in self.shapes}


def _group(shape: AttentionShape) -> int:
    """Return how many query heads share a key head."""
    return shape.heads // shape.kv_heads


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
