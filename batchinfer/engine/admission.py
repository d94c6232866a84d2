"""`Admission`: which rows run, and the blocks that they have.

A row is admitted when the blocks that it is expected to need are promised: those of its prompt, and of as many new
tokens as rows like it took. Where it needs more, more are promised. Where none are left, the row that was admitted
last gives its blocks back and waits to be computed again; that is counted, and more is expected of rows from then on.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.output_lengths import OutputLengths
from batchinfer.engine.prefix_tree import Likeness, PrefixTree, SharedTile, likeness
from batchinfer.engine.request import Requests
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints


@dataclass(frozen=True)
class _Row:
    requests: Requests
    i: int
    template: int
    generated: NDArray[np.int32]


class Admission:
    """Rows wait in the order in which they are added; those that were preempted come before all others."""

    def __init__(self, table: SequenceTable, manager: BlockManager, share: bool, lengths: OutputLengths | None) -> None:
        """With `share`, what neighbours begin with is computed once. `lengths` None: all blocks that a row may ever
        need are promised, and nothing is preempted."""
        self._table, self._manager, self.lengths = table, manager, lengths
        self._tree = PrefixTree(manager, table.block_size)
        self._share = share
        self._waiting: deque[tuple[Requests, Likeness, int]] = deque()  # and how many are admitted
        self._preempted: deque[_Row] = deque()
        self._template = -1  # of the row that was admitted last
        self._last = -1, -1  # its place and epoch
        self._templates = self._epochs = 0
        self.waiting_rows = 0
        self.admitted: list[int] = []  # rows, since the owner last emptied it
        self.wiped: list[Ints] = []  # blocks that hold values that are not finite and are free, as above
        self.preemptions = self.shared_tokens = 0

    def add(self, requests: Requests) -> None:
        """Queue requests, in their order."""
        if len(requests):
            alike = likeness(requests) if self._share else Likeness.none(len(requests))
            self._waiting.append((requests, alike, 0))
            self.waiting_rows += len(requests)

    def drop(self) -> None:
        """Forget all rows, those that wait and those that run; whether what these computed is finite is not known."""
        self._waiting.clear()
        self._preempted.clear()
        for place in np.flatnonzero(self._table.active).tolist():
            self.finish(place, spoiled=True)
        self.wiped.append(self._tree.drop())
        self.waiting_rows, self.admitted = 0, []

    def admit(self) -> list[int]:
        """The places of the rows that begin now."""
        places: list[int] = []
        for place in np.flatnonzero(~self._table.active).tolist():
            began = bool(self._preempted) and self._readmit(place)
            # Where nobody runs who would free blocks, those that are held for the next row are only freed by it.
            if not began and (not self._preempted or not self._table.active.any()):
                began = self._admit_next(place)
            if not began:
                break
            places.append(place)
            self.waiting_rows -= 1
        return places

    def _admit_next(self, place: int) -> bool:
        if not self._waiting:
            return False
        requests, alike, i = self._waiting[0]
        before, after = int(alike.tiles[i]), int(alike.tiles[i + 1 :][:1].sum())
        template = self._template if before else self._templates if after else -1
        per_tile = TILE // self._table.block_size
        need = self._need(requests, i, template, 0) - before * per_tile
        if not self._manager.promise(need):
            return False
        tiles = self._tree.enter(before, after)
        own = need - max(after - before, 0) * per_tile
        self._begin(place, _Row(requests, i, template, np.empty(0, np.int32)), tiles, own)
        self._table.computed[place] = before * TILE
        twin = self._table.twin_of[place] = self._computing_twin() if alike.twins[i] else -1
        self._last = place, int(self._table.epoch[place])
        self._template = template
        self._templates += template == self._templates
        self.shared_tokens += before * TILE if twin < 0 else int(self._table.prompt_length[place])
        self.admitted.append(int(requests.rows[i]))
        self._waiting[0] = (requests, alike, i + 1)
        if i + 1 == len(requests):
            self._waiting.popleft()
        return True

    def _computing_twin(self) -> int:
        """The place of the sequence that computes the prompt of the row that was admitted last; -1 if that is done."""
        table, (place, epoch) = self._table, self._last
        runs = table.active[place] and table.epoch[place] == epoch
        if not runs or table.computed[place] >= table.prompt_length[place]:
            return -1
        return place if table.twin_of[place] < 0 else int(table.twin_of[place])

    def _readmit(self, place: int) -> bool:
        """What it shared may be gone: its whole prompt is its own."""
        row = self._preempted[0]
        need = self._need(row.requests, row.i, row.template, len(row.generated))
        if not self._manager.promise(need):
            return False
        self._begin(place, self._preempted.popleft(), [], need)
        return True

    def _begin(self, place: int, row: _Row, tiles: list[SharedTile], own: int) -> None:
        table = self._table
        table.add(place, row.requests, row.i, row.generated)
        table.share(place, tiles)
        table.promised[place] = own
        table.template[place] = row.template
        table.epoch[place] = self._epochs
        self._epochs += 1

    def _need(self, requests: Requests, i: int, template: int, generated: int) -> int:
        """Blocks of a row's whole sequence, as far as it is expected to come."""
        most = requests.params[requests.param_index[i]].max_tokens
        prompt = int(requests.offsets[i + 1] - requests.offsets[i])
        return self._table.blocks_for(prompt + self._expected(template, generated, most))

    def _expected(self, template: int, generated: int, most: int) -> int:
        if self.lengths is None:
            return most
        table, template = self._table, self.lengths.known(template)
        alike = table.active if template < 0 else table.active & (table.template == template)
        running = (table.length - table.prompt_length)[alike]
        return self.lengths.expected(template, generated, most, running)

    def extend(self, decoding: Ints, positions: Ints) -> NDArray[np.bool_]:
        """Promise the blocks that these sequences need up to these positions; which of them [n] still run after that.

        Where none are left, those are preempted that were admitted last.
        """
        table = self._table
        blocks = positions // table.block_size + 1
        for i in np.flatnonzero(blocks > table.own_from[decoding] + table.promised[decoding]).tolist():
            place = int(decoding[i])
            while table.active[place] and not self._promise_more(place, int(blocks[i])):
                running = decoding[table.active[decoding]]
                self._preempt(int(running[table.epoch[running].argmax()]))
        return table.active[decoding]

    def _promise_more(self, place: int, blocks: int) -> bool:
        table = self._table
        generated = int(table.length[place] - table.prompt_length[place])
        expected = self._expected(
            int(table.template[place]), generated, int(table.end[place] - table.prompt_length[place])
        )
        have = int(table.own_from[place] + table.promised[place])
        least = blocks - have
        for count in (max(least, table.blocks_for(int(table.prompt_length[place]) + expected) - have), least):
            if self._manager.promise(count):
                table.promised[place] += count
                return True
        return False

    def _preempt(self, place: int) -> None:
        table = self._table
        request = table.request[place]
        assert request is not None
        self._preempted.appendleft(_Row(*request, int(table.template[place]), table.generated(place).copy()))
        self._release(place)
        self.waiting_rows += 1
        self.preemptions += 1
        if self.lengths is not None:
            self.lengths.grow()

    def finish(self, place: int, spoiled: bool) -> None:
        """A sequence has ended; `spoiled` where what it has computed is not finite."""
        table = self._table
        if spoiled:
            for tile in table.tiles[place]:
                tile.spoiled = True
            self.wiped.append(table.blocks[place, table.own_from[place] : table.block_count[place]].copy())
        elif self.lengths is not None:
            new = int(table.length[place] - table.prompt_length[place])
            self.lengths.observe(int(table.template[place]), new)
        self._release(place)

    def _release(self, place: int) -> None:
        tiles, promised = self._table.tiles[place], int(self._table.promised[place])
        self._manager.release(self._table.remove(place), promised)
        if len(blocks := self._tree.leave(tiles)):
            self.wiped.append(blocks)
