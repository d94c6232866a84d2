"""`Admission`: decides which rows run, and promises them blocks of the KV cache.

A row is admitted when the blocks that it is expected to need can be promised: those of its prompt, and of as many new
tokens as similar rows took. A row that needs more gets more promised. If none are left, the row that was admitted last
is preempted: it gives its blocks back and waits to be computed again. Preemptions are counted, and each raises the
number of tokens that rows are expected to take.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.label_scoring import LabelScoring
from batchinfer.engine.output_lengths import OutputLengths
from batchinfer.engine.prefix_tree import Likeness, PrefixTree, SharedTile, likeness
from batchinfer.engine.request import Requests
from batchinfer.engine.score_demand import ScoreDemand, score_demand
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints


@dataclass(frozen=True)
class _Row:
    """Row `i` of `requests`, the template that its prompt begins with, and the tokens it has generated so far."""

    requests: Requests
    i: int
    template: int
    generated: NDArray[np.int32]


class Admission:
    """A queue of rows in the order in which they are added; preempted rows come before all others."""

    def __init__(
        self,
        table: SequenceTable,
        manager: BlockManager,
        share: bool,
        lengths: OutputLengths | None,
        states: BlockManager | None = None,
        ends: tuple[int, ...] = (),
    ) -> None:
        """Make an empty queue for the sequences of `table`; any of the tokens `ends` may end an answer.

        With `share`, the common start of neighbouring rows' prompts is computed once. If `lengths` is None, all blocks
        that a row may ever need are promised, and no row is preempted. `states` manages the states of sequences, if the
        model has them.
        """
        self._table, self._manager, self.lengths, self._states = table, manager, lengths, states
        self.labels = LabelScoring(table, manager, states, ends)
        self._tree = PrefixTree(manager, table.grain // table.block_size, states)
        self._share = share
        # The last number is that of the rows admitted.
        self._waiting: deque[tuple[Requests, Likeness, ScoreDemand | None, int]] = deque()
        self._preempted: deque[_Row] = deque()
        self._template = -1  # of the row that was admitted last
        self._last = -1, -1  # place and epoch of that row
        self._templates = self._epochs = 0
        self.waiting_rows = 0
        self.admitted: list[int] = []  # rows admitted since the owner of this object last emptied the list
        self.wiped: list[Ints] = []  # free blocks with values that are not finite, as above
        self.preemptions = self.shared_tokens = 0

    def add(self, requests: Requests) -> None:
        """Queue requests, in their order."""
        if len(requests):
            alike = likeness(requests, self._table.grain) if self._share else Likeness.none(len(requests))
            self._waiting.append((requests, alike, score_demand(requests, alike, self._table.grain), 0))
            self.waiting_rows += len(requests)

    def drop(self) -> None:
        """Forget all rows, waiting and running. Their blocks are wiped, because some values may not be finite."""
        self._waiting.clear()
        self._preempted.clear()
        for place in np.flatnonzero(self._table.active).tolist():
            if self._table.request[place] is not None:  # its forks end with a row
                self.finish(place, spoiled=True)
        self.wiped.append(self._tree.drop())
        self.waiting_rows, self.admitted = 0, []

    def admit(self) -> list[int]:
        """Admit waiting rows while there are free places, blocks and states; return their places."""
        if self._states is not None:
            for place in np.flatnonzero(self._table.computed >= self._table.prefill_end).tolist():
                self._let_go(place)
        places: list[int] = []
        for place in np.flatnonzero(~self._table.active).tolist():
            began = bool(self._preempted) and self._readmit(place)
            # If no row runs, none frees blocks: those held for the next waiting row are freed only by it.
            if not began and (not self._preempted or not self._table.active.any()):
                began = self._admit_next(place)
            if not began:
                break
            places.append(place)
            self.waiting_rows -= 1
        return places

    def _has_places(self, count: int) -> bool:
        """Return whether so many places are free, beside those that are promised to forks."""
        return len(self._table.active) - int(self._table.active.sum()) - self.labels.unmade >= count

    def _admit_next(self, place: int) -> bool:
        if not self._waiting:
            return False
        requests, alike, demand, i = self._waiting[0]
        sequences = self.labels.places(requests, i)
        if not self._has_places(sequences):
            return False
        before, after = int(alike.tiles[i]), int(alike.tiles[i + 1 :][:1].sum())
        template = self._template if before else self._templates if after else -1
        grain, per_tile = self._table.grain, self._table.grain // self._table.block_size
        need = self._need(requests, i, template, 0) - before * per_tile
        if not self._manager.promise(need):
            return False
        branches = self._promise_states({} if self._states is None else alike.branches.get(i, {}), sequences)
        if branches is None:
            self._manager.release(np.empty(0, np.int64), need)
            return False
        tiles = self._tree.enter(before, after, branches)
        own = need - max(after - before, 0) * per_tile
        self._begin(place, _Row(requests, i, template, np.empty(0, np.int32)), tiles, own)
        for tile in tiles[before:]:
            tile.maker = int(self._table.epoch[place])
        if demand is not None:
            self._table.finds_from[place], self._table.likeliest[place] = demand.first[i], demand.likeliest
            for depth, tokens in demand.continuations.get(i, {}).items():
                tiles[depth - 1].continuations = tokens
        if self._states is not None:
            before = self._go_on(place, before)
        self._table.computed[place] = self._table.begins[place] = before * grain
        twin = self._table.twin_of[place] = self._computing_twin() if alike.twins[i] else -1
        self._last = place, int(self._table.epoch[place])
        self._template = template
        self._templates += template == self._templates
        self.shared_tokens += before * grain if twin < 0 else int(self._table.prompt_length[place])
        self.admitted.append(int(requests.rows[i]))
        self._waiting[0] = (requests, alike, demand, i + 1)
        if i + 1 == len(requests):
            self._waiting.popleft()
        return True

    def _promise_states(self, branches: dict[int, int], sequences: int) -> dict[int, int] | None:
        """Promise a row's sequences a state each, and snapshots at these `branches`; return those that get one.

        None: it must wait. If no row runs, none frees states: the row then takes no snapshots.
        """
        if self._states is None or self._states.promise(sequences + len(branches)):
            return branches
        return {} if not self._table.active.any() and self._states.promise(sequences) else None

    def _go_on(self, place: int, shared: int) -> int:
        """Let a row that shares so many tiles begin from the last snapshot among them; return the tiles before that."""
        tiles = self._table.tiles[place]
        depth = next((depth for depth in range(shared, 0, -1) if tiles[depth - 1].snapshot), 0)
        if depth:
            self._table.origin[place] = tiles[depth - 1]
            tiles[depth - 1].readers += depth < shared  # it is counted at the end of all the tiles that it shares
        return depth

    def _let_go(self, place: int) -> None:
        """Let a row, whose prompt is computed or which ends, go of the snapshot that it began from."""
        tile, self._table.origin[place] = self._table.origin[place], None
        if tile is not None:
            self._tree.let_go(tile)

    def _computing_twin(self) -> int:
        """Return the place of the sequence that computes the prompt of the last admitted row; -1 if that is done."""
        table, (place, epoch) = self._table, self._last
        runs = table.active[place] and table.epoch[place] == epoch
        if not runs or table.computed[place] >= table.prompt_length[place]:
            return -1
        return place if table.twin_of[place] < 0 else int(table.twin_of[place])

    def _readmit(self, place: int) -> bool:
        """Admit the first preempted row. Tiles that it shared may be gone, so it computes its whole prompt itself."""
        row = self._preempted[0]
        sequences = self.labels.places(row.requests, row.i)
        if not self._has_places(sequences):
            return False
        need = self._need(row.requests, row.i, row.template, len(row.generated))
        if not self._manager.promise(need):
            return False
        if self._states is not None and not self._states.promise(sequences):
            self._manager.release(np.empty(0, np.int64), need)
            return False
        self._begin(place, self._preempted.popleft(), [], need)
        return True

    def _begin(self, place: int, row: _Row, tiles: list[SharedTile], own: int) -> None:
        table = self._table
        table.add(place, row.requests, row.i, row.generated)
        table.share(place, tiles)
        table.promised[place] = own
        table.template[place] = row.template
        if self._states is not None:
            table.state[place] = self._states.take(1)[0]
        table.epoch[place] = self._epochs
        self._epochs += 1
        if row.requests.choices is not None:
            self.labels.begin(place, row.requests, row.i)

    def _need(self, requests: Requests, i: int, template: int, generated: int) -> int:
        """Return the blocks that a row is expected to need for its prompt and all new tokens."""
        if requests.choices is not None:
            return self.labels.blocks(requests, i)
        if requests.scored_from is not None:
            return self._table.blocks_for(int(requests.offsets[i + 1] - requests.offsets[i]))
        most = int(requests.params.numbers["max_tokens"][requests.param_index[i]])
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
        """Promise each sequence in `decoding` [n] the blocks up to its position in `positions` [n].

        If too few blocks are left, the sequences that were admitted last are preempted. Returns bool [n]: which
        sequences still run.
        """
        table = self._table
        blocks = positions // table.block_size + 1
        for i in np.flatnonzero(blocks > table.own_from[decoding] + table.promised[decoding]).tolist():
            place = int(decoding[i])
            while table.active[place] and not self._promise_more(place, int(blocks[i])):
                running = decoding[table.active[decoding] & ~table.scored[decoding]]
                self.preempt(int(running[table.epoch[running].argmax()]))
                if self.lengths is not None:
                    self.lengths.grow()
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

    def preempt(self, place: int) -> None:
        """Let a sequence give back what it holds and wait to be computed again."""
        table = self._table
        request = table.request[place]
        assert request is not None
        self._preempted.appendleft(_Row(*request, int(table.template[place]), table.generated(place).copy()))
        self._release(place)
        self.waiting_rows += 1
        self.preemptions += 1

    def finish(self, place: int, spoiled: bool) -> None:
        """End a sequence and free its place and blocks; `spoiled` if it computed values that are not finite."""
        table = self._table
        if spoiled:
            for tile in table.tiles[place]:
                tile.spoiled = True
            for part in (place, *self.labels.forks(place)):
                self.wiped.append(table.blocks[part, table.own_from[part] : table.block_count[part]].copy())
        elif self.lengths is not None and not table.scored[place]:
            new = int(table.length[place] - table.prompt_length[place])
            self.lengths.observe(int(table.template[place]), new)
        self._release(place)

    def _release(self, place: int) -> None:
        for fork in self.labels.end(place):
            if self._states is not None:
                self._states.release(self._table.state[[fork]], 1)
            promised = int(self._table.promised[fork])
            self._manager.release(self._table.remove(fork), promised)
        tiles, promised = self._table.tiles[place], int(self._table.promised[place])
        if self._states is not None:
            self._let_go(place)
            self._states.release(self._table.state[[place]], 1)
        self._manager.release(self._table.remove(place), promised)
        if len(blocks := self._tree.leave(tiles)):
            self.wiped.append(blocks)
