"""`Scheduler`: which tokens the next step computes. Continuous batching with chunked prefill.

Prompts come first: a job ends soonest when as many sequences as possible decode together. What a step has left after
prompts goes to decoding sequences. Prompt pieces end on the attention's grid of tiles, or at the prompt's end.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.batch import Batch
from batchinfer.block_manager import BlockManager
from batchinfer.kernels.attention import TILE, DecodeBlocks, PromptTiles
from batchinfer.kernels.linear import MIN_ROWS
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.request import Requests
from batchinfer.sequence import SequenceTable

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Prompt tokens [start, end) of a sequence, at `row` of the step's tokens."""

    place: int
    start: int
    end: int
    row: int


class Scheduler:
    """`schedule()` gives the next `Batch`, `update()` takes what it sampled."""

    def __init__(
        self,
        table: SequenceTable,
        manager: BlockManager,
        windows: set[int | None],
        max_num_batched_tokens: int,
        row_grain: int = MIN_ROWS,
    ) -> None:
        self.row_grain = row_grain  # of the tokens of a step
        self.table = table
        self.manager = manager
        self.windows = windows
        self.budget = max_num_batched_tokens
        self.waiting: deque[tuple[Requests, int]] = deque()  # requests and how many of them are admitted
        self.waiting_rows = 0
        self.prefilling: list[int] = []  # places, in order of admission
        self.admitted: list[int] = []  # rows, since the owner last emptied it

    @property
    def unfinished(self) -> int:
        """Rows that wait or run."""
        return self.waiting_rows + int(self.table.active.sum())

    def add(self, requests: Requests) -> None:
        """Queue requests, in their order."""
        if len(requests):
            self.waiting.append((requests, 0))
            self.waiting_rows += len(requests)

    def schedule(self) -> Batch | None:
        """The next step; None if nothing is left."""
        self._admit()
        pieces = self._prompt_pieces()
        used = sum(p.end - p.start for p in pieces)
        table = self.table
        decoding = np.flatnonzero(table.active & (table.computed >= table.prompt_length))[: self.budget - used]
        if not pieces and not len(decoding):
            return None
        positions = table.computed[decoding]
        self._take_blocks(pieces, decoding, positions)
        return self._batch(pieces, decoding, positions)

    def _admit(self) -> None:
        free = deque(np.flatnonzero(~self.table.active).tolist())
        while self.waiting and free:
            requests, i = self.waiting[0]
            length = int(requests.offsets[i + 1] - requests.offsets[i])
            need = self.table.blocks_for(length + requests.params[requests.param_index[i]].max_tokens)
            if not self.manager.promise(need):
                break
            place = free.popleft()
            self.table.add(place, requests, i, need)
            self.prefilling.append(place)
            self.admitted.append(int(requests.rows[i]))
            self.waiting_rows -= 1
            self.waiting[0] = (requests, i + 1)
            if i + 1 == len(requests):
                self.waiting.popleft()

    def _prompt_pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        row = 0
        for place in self.prefilling:
            start, stop = int(self.table.computed[place]), int(self.table.prompt_length[place])
            end = min(stop, start + self.budget - row)
            if end < stop:
                end -= end % TILE
            if end > start:
                pieces.append(Piece(place, start, end, row))
                row += end - start
            if row == self.budget:
                break
        return pieces

    def _take_blocks(self, pieces: list[Piece], decoding: Ints, positions: Ints) -> None:
        table = self.table
        for p in pieces:
            have, need = int(table.block_count[p.place]), table.blocks_for(p.end)
            table.blocks[p.place, have:need] = self.manager.take(need - have)
            table.block_count[p.place] = need
        growing = decoding[positions // table.block_size >= table.block_count[decoding]]
        if len(growing):
            table.blocks[growing, table.block_count[growing]] = self.manager.take(len(growing))
            table.block_count[growing] += 1

    def _batch(self, pieces: list[Piece], decoding: Ints, positions: Ints) -> Batch:
        table = self.table
        spans = [np.arange(p.start, p.end) for p in pieces]
        places = np.repeat([p.place for p in pieces], [len(s) for s in spans]).astype(np.int64)
        prompt_tokens, decode_tokens = len(places), len(decoding)
        all_places = np.concatenate([places, decoding])
        all_positions = np.concatenate([*spans, positions])
        count = len(all_places)
        padding = padded_size(count, self.row_grain) - count
        last = [p for p in pieces if p.end == table.prompt_length[p.place]]
        sampled = np.concatenate(
            [np.array([p.row + p.end - p.start - 1 for p in last], np.int64), np.arange(prompt_tokens, count)]
        )
        sequences = np.concatenate([np.array([p.place for p in last], np.int64), decoding])
        return Batch(
            tokens=_tensor(np.pad(table.tokens[all_places, all_positions].astype(np.int64), (0, padding))),
            positions=_tensor(np.pad(all_positions, (0, padding))),
            slots=_tensor(np.pad(table.slots(all_places, all_positions), (0, padding))),
            tiles=self._tiles(pieces),
            decode={w: self._decode_blocks(decoding, positions, prompt_tokens, w) for w in self.windows}
            if decode_tokens
            else {},
            sampled=_tensor(np.pad(sampled, (0, -len(sampled) % MIN_ROWS))),
            sampling=self._sampling(sequences),
            sequences=sequences,
            computed=np.array([(p.place, p.end) for p in pieces], np.int64).reshape(-1, 2),
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
        )

    def _tiles(self, pieces: list[Piece]) -> tuple[PromptTiles, ...]:
        """The pieces cut into tiles, tiles of the same place in their sequences together."""
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for p in pieces:
            for start in range(p.start, p.end, TILE):
                tile = (p.place, p.row + start - p.start, min(TILE, p.end - start))
                groups.setdefault(start // TILE, []).append(tile)
        return tuple(self._tile_group(index, tiles) for index, tiles in sorted(groups.items()))

    def _tile_group(self, index: int, tiles: list[tuple[int, int, int]]) -> PromptTiles:
        place, row, size = (np.array(column, np.int64)[:, None] for column in zip(*tiles, strict=True))
        within = np.arange(TILE)
        real = within < size
        blocks = self.table.blocks[place[:, 0], : (index + 1) * TILE // self.table.block_size]
        return PromptTiles(
            index, _tensor(np.where(real, row + within, row)), _tensor(blocks), _tensor(np.flatnonzero(real))
        )

    def _decode_blocks(self, places: Ints, positions: Ints, first_row: int, window: int | None) -> DecodeBlocks:
        size = self.table.block_size
        start = np.zeros_like(positions) if window is None else np.maximum(positions + 1 - window, 0)
        counts = positions // size + 1 - start // size
        offsets = np.concatenate([[0], np.cumsum(counts)])
        query = np.repeat(np.arange(len(places)), counts)
        index = np.arange(offsets[-1]) - offsets[query] + (start // size)[query]  # of the block in its sequence
        pool = self.table.blocks[places[query], index]
        key_positions = index[:, None] * size + np.arange(size)
        hidden = (key_positions > positions[query, None]) | (key_positions < start[query, None])
        edges = np.flatnonzero(hidden.any(1))

        low, high = int(pool.min()), int(pool.max()) + 1
        if 2 * len(pool) >= high - low:  # crowded enough to read the pool where it lies
            blocks: slice | Tensor = slice(low, high)
            order, total = pool - low, high - low
        else:
            blocks, order, total = _tensor(pool), np.arange(len(pool)), len(pool)
        owner = np.zeros(total, np.int64)
        owner[order] = query
        most = np.arange(int(counts.max()))
        padded = np.where(most < counts[:, None], most, 0) + offsets[:-1, None]
        return DecodeBlocks(
            rows=torch.arange(first_row, first_row + len(places)),
            blocks=blocks,
            owner=_tensor(owner),
            edges=_tensor(order[edges]),
            hidden=_tensor(hidden[edges, None]),
            table=_tensor(order[padded]),
            order=_tensor(order),
            offsets=_tensor(offsets),
        )

    def _sampling(self, places: Ints) -> SamplingBatch | None:
        table = self.table
        if not (table.temperature[places] > 0).any():
            return None
        columns = (table.temperature, table.top_k, table.top_p, table.min_p, table.seed, table.length)
        return SamplingBatch(*(_tensor(column[places]) for column in columns))

    def update(self, batch: Batch, tokens: Ints) -> None:
        """Book what the step computed, and append each sampled sequence's token."""
        table = self.table
        table.computed[batch.computed[:, 0]] = batch.computed[:, 1]
        decoded = batch.sequences[len(batch.sequences) - batch.decode_tokens :]
        table.computed[decoded] += 1
        if len(batch.computed):
            self.prefilling = [p for p in self.prefilling if table.computed[p] < table.prompt_length[p]]
        table.tokens[batch.sequences, table.length[batch.sequences]] = tokens
        table.length[batch.sequences] += 1

    def finish(self, place: int) -> Ints:
        """Free a sequence's place and blocks; returns the blocks."""
        blocks = self.table.remove(place)
        self.manager.release(blocks, int(self.table.promised[place]))
        return blocks


def padded_size(tokens: int, row_grain: int) -> int:
    """Tokens of a step with padding: few different sizes, for each costs oneDNN a new kernel.

    Products that take any number of rows do not come from there.
    """
    grain = row_grain if tokens <= 128 or row_grain == 1 else 32
    return -(-tokens // grain) * grain


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
