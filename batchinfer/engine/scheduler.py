"""`Scheduler`: which tokens the next step computes. Continuous batching with chunked prefill.

Prompts come first: a job ends soonest when as many sequences as possible decode together. What a step has left after
prompts goes to sequences that decode, and what they leave to drafts of what may follow. Prompt chunks end on the
attention's grid of tiles, or at the prompt's end.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.admission import Admission
from batchinfer.engine.attention_inputs import AttentionInputs
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.new_tokens import NewTokens, verify_drafts
from batchinfer.engine.request import Requests
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.step_policy import chunk_end, decoding, padded_logits
from batchinfer.kernels.grain import TILE, padded_size
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.models.batch import Batch, PromptChunk, Queries, as_tensor

NOBODY = np.empty(0, np.int64)


class Drafter(Protocol):
    """Proposes what may follow a sequence's newest token."""

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        """How many drafts each sequence has, at most `room` [n] and `budget` in all.

        They are written behind its newest token in the sequence table. The step computes so many prompt tokens too.
        """
        ...


class Scheduler:
    """`schedule()` gives the next `Batch`, `update()` takes what it sampled.

    Steps may be scheduled before what earlier ones sampled is known: where tokens stand does not depend on what they
    are. A sequence that turns out to have ended is then computed once or more in vain. Nothing is drafted then.
    """

    def __init__(
        self,
        table: SequenceTable,
        manager: BlockManager,
        admission: Admission,
        attention: AttentionInputs,
        max_num_batched_tokens: int,
        row_grain: int,
        eos_ids: Ints,
    ) -> None:
        self.row_grain = row_grain  # of the tokens of a step
        self.table = table
        self.manager = manager
        self.admission = admission
        self.attention = attention
        self.eos_ids = eos_ids
        self.budget = max_num_batched_tokens
        self.prefilling: list[int] = []  # places, in order of admission

    @property
    def unfinished(self) -> int:
        """Rows that wait or run."""
        return self.admission.waiting_rows + int(self.table.active.sum())

    def add(self, requests: Requests) -> None:
        """Queue requests, in their order."""
        self.admission.add(requests)

    def schedule(self, drafter: Drafter | None = None) -> Batch | None:
        """The next step, counted as computed; None if there is nothing to compute.

        With a drafter all that earlier steps sampled is known.
        """
        self.prefilling += self.admission.admit()
        chunks = self._prompt_chunks()
        queries = self._queries(sum(c.end - c.start for c in chunks), drafter)
        if not chunks and not len(queries):
            return None
        self._take_blocks(chunks, queries)
        batch = self._batch(chunks, queries)
        for c in chunks:
            self._computed(c, True)
        self.table.computed[queries.places] += queries.counts - queries.drafts
        self.prefilling = [
            place for place in self.prefilling if self.table.computed[place] < self.table.prefill_end[place]
        ]
        return batch

    def withdraw(self, batch: Batch) -> None:
        """The newest step was not computed after all; its sequences keep their blocks."""
        for c in batch.chunks:
            self._computed(c, False)
        withdrawn = [place for c in batch.chunks for place in (c.place, *c.twins)]
        self.prefilling = [place for place in withdrawn if place not in self.prefilling] + self.prefilling
        self.table.computed[batch.queries.places] = batch.queries.first

    def _computed(self, chunk: PromptChunk, done: bool) -> None:
        table = self.table
        table.computed[chunk.place] = chunk.end if done else chunk.start
        for twin in chunk.twins:
            table.computed[twin] = chunk.end if done else table.own_from[twin] * table.block_size
        for tile in table.tiles[chunk.place][chunk.start // TILE : chunk.end // TILE]:
            tile.computed = done

    def _queries(self, used: int, drafter: Drafter | None) -> Queries:
        """Sequences that decode; those that were preempted have several tokens to be computed once more."""
        table = self.table
        running = table.active & decoding(table.computed, table.prefill_end, table.end)
        places = np.flatnonzero(running)[: self.budget - used]
        more = np.maximum(table.length[places] - table.computed[places], 1) - 1
        room = self.budget - used - len(places)
        counts = 1 + np.clip(room - (np.cumsum(more) - more), 0, more)
        kept = self.admission.extend(places, table.computed[places] + counts - 1)
        places, counts = places[kept], counts[kept]
        drafts = np.zeros_like(counts)
        if drafter is not None and len(places):
            newest = table.computed[places] + counts
            promised = (table.own_from[places] + table.promised[places]) * table.block_size
            room = np.minimum(table.end[places] - 1, promised) - newest
            room[(newest < table.length[places]) | table.undrafted[places]] = 0
            drafts = drafter.draft(places, room, used, self.budget - used - int(counts.sum()))
        return Queries(places, table.computed[places], counts + drafts, drafts)

    def _prompt_chunks(self) -> list[PromptChunk]:
        chunks: list[PromptChunk] = []
        row, computed = 0, set[int]()
        twins: dict[int, list[int]] = {}
        for place in self.prefilling:
            twins.setdefault(int(self.table.twin_of[place]), []).append(place)
        for place in twins.get(-1, []):
            start, stop = int(self.table.computed[place]), int(self.table.prefill_end[place])
            end = chunk_end(start, stop, self.budget - row)
            tiles = self.table.tiles[place]
            # What it shares may be in this very step: keys and values of all its tokens are stored before any is read.
            ready = all(tile.computed or id(tile) in computed for tile in tiles[: start // TILE])
            if end > start and ready:
                chunks.append(PromptChunk(place, start, end, row, tuple(twins.get(place, ())) if end == stop else ()))
                computed.update(map(id, tiles[start // TILE : end // TILE]))
                row += end - start
            if row == self.budget:
                break
        return chunks

    def _take_blocks(self, chunks: list[PromptChunk], queries: Queries) -> None:
        table = self.table
        for c in chunks:
            for place in (c.place, *c.twins):
                self._grow(place, c.end)
        ends = queries.first + queries.counts
        for i in np.flatnonzero(ends > table.block_count[queries.places] * table.block_size).tolist():
            self._grow(int(queries.places[i]), int(ends[i]))

    def _grow(self, place: int, tokens: int) -> None:
        table, have = self.table, int(self.table.block_count[place])
        need = max(have, table.blocks_for(tokens))  # it has more after a step that was withdrawn
        table.blocks[place, have:need] = self.manager.take(need - have)
        table.block_count[place] = need

    def _batch(self, chunks: list[PromptChunk], queries: Queries) -> Batch:
        table = self.table
        spans = [np.arange(c.start, c.end) for c in chunks]
        prompt_places = np.repeat([c.place for c in chunks], [len(s) for s in spans]).astype(np.int64)
        prompt_tokens = len(prompt_places)
        query_places, query_positions = queries.all_places, queries.positions
        places = np.concatenate([prompt_places, query_places])
        positions = np.concatenate([*spans, query_positions])
        count = len(places)
        padding = padded_size(count, self.row_grain) - count
        last = [c for c in chunks if c.end == table.prefill_end[c.place] == table.length[c.place]]
        # Of a sequence that is computed once more, what followed each token is known, but for the newest.
        newest = np.flatnonzero(query_positions >= table.length[query_places] - 1)
        first_sampled = [c.row + c.end - c.start - 1 for c in last for _ in (c.place, *c.twins)]
        sampled = np.concatenate([np.array(first_sampled, np.int64), prompt_tokens + newest])
        late = np.flatnonzero(query_positions >= table.length[query_places])
        if queries.drafts.any():
            late = NOBODY
        first_places = [place for c in last for place in (c.place, *c.twins)]
        sequences = np.concatenate([np.array(first_places, np.int64), query_places[newest]])
        copied, copies = self._copies(chunks)
        return Batch(
            tokens=as_tensor(np.pad(table.tokens[places, positions].astype(np.int64), (0, padding))),
            positions=as_tensor(np.pad(positions, (0, padding))),
            slots=as_tensor(np.pad(table.slots(places, positions), (0, padding))),
            attention=self.attention(table, chunks, query_places, query_positions),
            sampled=as_tensor(np.pad(sampled, (0, padded_logits(len(sampled)) - len(sampled)))),
            sampling=self._sampling(sequences, positions[sampled] + 1),
            places=as_tensor(sequences),
            copied=as_tensor(copied),
            copies=as_tensor(copies),
            late_rows=as_tensor(prompt_tokens + late),
            late_places=as_tensor(query_places[late]),
            chunks=tuple(chunks),
            queries=queries,
            sequences=sequences,
            epochs=table.epoch[sequences],
            prompt_tokens=prompt_tokens,
        )

    def _copies(self, chunks: list[PromptChunk]) -> tuple[Ints, Ints]:
        """Blocks of prompts' ends, and those of twins that they are copied to."""
        table, pairs = self.table, [(NOBODY, NOBODY)]
        for c in chunks:
            for twin in c.twins:
                own = slice(int(table.own_from[twin]), table.blocks_for(c.end))
                pairs.append((table.blocks[c.place, own], table.blocks[twin, own]))
        copied, copies = zip(*pairs, strict=True)
        return np.concatenate(copied), np.concatenate(copies)

    def _sampling(self, places: Ints, positions: Ints) -> SamplingBatch | None:
        table = self.table
        if not (table.temperature[places] > 0).any():
            return None
        temperature, top_k, top_p, min_p, seeds = (
            as_tensor(column[places])
            for column in (table.temperature, table.top_k, table.top_p, table.min_p, table.seed)
        )
        return SamplingBatch(temperature, top_k, top_p, min_p, seeds, as_tensor(positions))

    def update(self, batch: Batch, tokens: Ints, finite: NDArray[np.bool_] | None = None) -> NewTokens:
        """Append what was sampled [r] to the sequences that still run; what the others got is dropped.

        `finite` [r] tells where the logits were; None: everywhere.
        """
        table = self.table
        finite = np.ones(len(tokens), np.bool_) if finite is None else finite
        running: NDArray[np.bool_] = table.active[batch.sequences] & (table.epoch[batch.sequences] == batch.epochs)
        if batch.drafted:
            assert running.all(), "a step with drafts ends before the next one begins"
            return verify_drafts(table, batch, tokens, finite, self.eos_ids)
        places = batch.sequences[running]
        table.tokens[places, table.length[places]] = tokens[running]
        table.length[places] += 1
        return NewTokens(places, np.ones_like(places), finite[running])

    def drop(self) -> None:
        """Forget all rows, those that wait and those that run."""
        self.prefilling = []
        self.admission.drop()

    def finish(self, place: int, spoiled: bool = False) -> None:
        """Free a sequence's place and blocks; `spoiled` where what it has computed is not finite."""
        self.admission.finish(place, spoiled)
