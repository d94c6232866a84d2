"""`Scheduler`: which tokens the next step computes. Continuous batching with chunked prefill.

Prompts come first: a job ends soonest when as many sequences as possible decode together. What a step has left after
prompts goes to decoding sequences. Prompt pieces end on the attention's grid of tiles, or at the prompt's end.
"""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.attention_inputs import AttentionInputs
from batchinfer.batch import Batch, Ints, Piece
from batchinfer.block_manager import BlockManager
from batchinfer.kernels.grain import MIN_ROWS, TILE, padded_size
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.request import Requests
from batchinfer.sequence import SequenceTable


class Scheduler:
    """`schedule()` gives the next `Batch`, `update()` takes what it sampled.

    Steps may be scheduled before what earlier ones sampled is known: where tokens stand does not depend on what they
    are. A sequence that turns out to have ended is then computed once or more in vain.
    """

    def __init__(
        self,
        table: SequenceTable,
        manager: BlockManager,
        attention: AttentionInputs,
        max_num_batched_tokens: int,
        row_grain: int = MIN_ROWS,
    ) -> None:
        self.row_grain = row_grain  # of the tokens of a step
        self.table = table
        self.manager = manager
        self.attention = attention
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
        """The next step, counted as computed; None if there is nothing to compute."""
        self._admit()
        pieces = self._prompt_pieces()
        used = sum(p.end - p.start for p in pieces)
        table = self.table
        # The last token of a sequence is sampled and never computed.
        unended = (table.computed >= table.prompt_length) & (table.computed + 1 < table.end)
        decoding = np.flatnonzero(table.active & unended)[: self.budget - used]
        if not pieces and not len(decoding):
            return None
        positions = table.computed[decoding]
        self._take_blocks(pieces, decoding, positions)
        batch = self._batch(pieces, decoding, positions)
        for p in pieces:
            table.computed[p.place] = p.end
        table.computed[decoding] += 1
        self.prefilling = [p for p in self.prefilling if table.computed[p] < table.prompt_length[p]]
        return batch

    def withdraw(self, batch: Batch) -> None:
        """The newest step was not computed after all; its sequences keep their blocks."""
        table = self.table
        for p in batch.pieces:
            table.computed[p.place] = p.start
        self.prefilling = [p.place for p in batch.pieces if p.place not in self.prefilling] + self.prefilling
        table.computed[batch.decoding] -= 1

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
            have = int(table.block_count[p.place])
            need = max(have, table.blocks_for(p.end))  # it has more after a step that was withdrawn
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
        new_positions = np.concatenate([np.array([p.end for p in last], np.int64), positions + 1])
        return Batch(
            tokens=_tensor(np.pad(table.tokens[all_places, all_positions].astype(np.int64), (0, padding))),
            positions=_tensor(np.pad(all_positions, (0, padding))),
            slots=_tensor(np.pad(table.slots(all_places, all_positions), (0, padding))),
            attention=self.attention(table, pieces, decoding, positions),
            sampled=_tensor(np.pad(sampled, (0, -len(sampled) % MIN_ROWS))),
            sampling=self._sampling(sequences, new_positions),
            places=_tensor(sequences),
            pieces=tuple(pieces),
            sequences=sequences,
            rows=table.row[sequences],
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
        )

    def _sampling(self, places: Ints, positions: Ints) -> SamplingBatch | None:
        table = self.table
        if not (table.temperature[places] > 0).any():
            return None
        temperature, top_k, top_p, min_p, seeds = (
            _tensor(column[places]) for column in (table.temperature, table.top_k, table.top_p, table.min_p, table.seed)
        )
        return SamplingBatch(temperature, top_k, top_p, min_p, seeds, _tensor(positions))

    def update(self, batch: Batch, tokens: Ints) -> NDArray[np.bool_]:
        """Append each sampled sequence's token; which of them [r] still ran, for those of the others are dropped."""
        table = self.table
        running: NDArray[np.bool_] = table.active[batch.sequences] & (table.row[batch.sequences] == batch.rows)
        places = batch.sequences[running]
        table.tokens[places, table.length[places]] = tokens[running]
        table.length[places] += 1
        return running

    def finish(self, place: int) -> Ints:
        """Free a sequence's place and blocks; returns the blocks."""
        blocks = self.table.remove(place)
        self.manager.release(blocks, int(self.table.promised[place]))
        return blocks


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
