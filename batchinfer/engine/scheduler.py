"""`Scheduler`: chooses the tokens that the next step computes; continuous batching with chunked prefill.

Prompts come first, because a job ends soonest if as many sequences as possible decode together. The rest of a step's
token budget goes to sequences that decode, and what these leave goes to drafts. A prompt chunk ends on the grid of
tiles that attention uses, or at the prompt's end.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.engine.admission import Admission
from batchinfer.engine.attention_inputs import AttentionInputs
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.draft_states import DraftStates
from batchinfer.engine.label_scoring import LabelScoring
from batchinfer.engine.logits_changes import logits_changes
from batchinfer.engine.new_tokens import NewTokens, verify_drafts
from batchinfer.engine.request import Requests
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.state_inputs import state_inputs
from batchinfer.engine.step_policy import chunk_end, decoding
from batchinfer.engine.structures import Structures
from batchinfer.engine.token_scoring import TokenScoring
from batchinfer.kernels.grain import padded_logits, padded_size
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.models.batch import Batch, LabelStep, PromptChunk, Queries, as_tensor

NOBODY = np.empty(0, np.int64)


class Drafter(Protocol):
    """Drafts tokens that may follow a sequence's newest token."""

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        """Write drafts behind the newest token of each sequence in the table; return their numbers [n].

        A sequence gets at most `room` [n] drafts, and all get at most `budget` together. The step also computes
        `prompt_tokens` prompt tokens.
        """
        ...


class Scheduler:
    """Makes each step: `schedule()` returns its `Batch`, and `update()` takes the tokens that it sampled.

    A step may be scheduled before the tokens of earlier steps are known, because positions do not depend on tokens. A
    sequence that turns out to have ended is then computed in vain, and no drafts are made.
    """

    def __init__(
        self,
        table: SequenceTable,
        manager: BlockManager,
        admission: Admission,
        attention: AttentionInputs,
        max_num_batched_tokens: int,
        row_grain: int,
        logits_grain: int,
        eos_ids: Ints,
        states: BlockManager | None = None,
    ) -> None:
        self.row_grain = row_grain  # a step's number of tokens is padded to a multiple of this
        self.logits_grain = logits_grain  # and its number of rows of logits to a multiple of this
        self.table = table
        self.manager = manager
        self.states = states  # None if the model has none
        self.draft_states = None if states is None else DraftStates(table, states)
        self.admission = admission
        self.labels: LabelScoring = admission.labels
        self.scores = TokenScoring(table)
        self.structures: Structures | None = None  # set where answers may follow grammars
        self.attention = attention
        self.eos_ids = eos_ids
        self.budget = max_num_batched_tokens
        self.prefilling: list[int] = []  # places, in order of admission

    @property
    def unfinished(self) -> int:
        """Number of rows that wait or run."""
        return self.admission.waiting_rows + self.running

    @property
    def running(self) -> int:
        """Number of rows that run."""
        return int(self.table.active.sum()) - self.labels.forks_running

    def add(self, requests: Requests) -> None:
        """Queue requests, in their order."""
        self.admission.add(requests)

    def schedule(self, drafter: Drafter | None = None) -> Batch | None:
        """Return the next step and mark its tokens as computed; None if there is nothing to compute.

        A drafter may be passed only if all tokens of earlier steps are known.
        """
        self.prefilling += self.admission.admit()
        chunks = self._prompt_chunks()
        queries = self._queries(sum(c.end - c.start for c in chunks), drafter)
        if not chunks and not len(queries):
            return None
        self._take_blocks(chunks, queries)
        labels = self.labels.step(chunks, queries, sum(c.end - c.start for c in chunks))
        batch = self._batch(chunks, queries, labels)
        for c in chunks:
            self._computed(c, True)
        self.table.computed[queries.places] += queries.counts - queries.drafts
        self.labels.go_on()
        self.prefilling = [
            place for place in self.prefilling if self.table.computed[place] < self.table.prefill_end[place]
        ]
        return batch

    def withdraw(self, batch: Batch) -> None:
        """Take back the newest step, which was not computed after all; its sequences keep their blocks."""
        self.labels.withdraw()
        for c in batch.chunks:
            self._computed(c, False)
        withdrawn = [place for c in batch.chunks for place in (c.place, *c.twins)]
        self.prefilling = [place for place in withdrawn if place not in self.prefilling] + self.prefilling
        self.table.computed[batch.queries.places] = batch.queries.first
        if self.draft_states is not None:
            # The step may have changed the states of some layers and not of others.
            for c in batch.chunks:
                self.table.computed[c.place] = self.table.begins[c.place]
            for place in batch.queries.places[batch.queries.drafts == 0].tolist():
                if self.table.active[place]:  # with a row, its forks end
                    self.admission.preempt(self.labels.begin_again(place) if self.table.scored[place] else place)
            self.draft_states.drop()

    def _computed(self, chunk: PromptChunk, done: bool) -> None:
        table = self.table
        table.computed[chunk.place] = chunk.end if done else chunk.start
        for twin in chunk.twins:
            table.computed[twin] = chunk.end if done else table.begins[twin]
        for tile in table.tiles[chunk.place][chunk.start // table.grain : chunk.end // table.grain]:
            tile.computed = done

    def _queries(self, used: int, drafter: Drafter | None) -> Queries:
        """Choose the decoding tokens and drafts. A sequence that was preempted may recompute several tokens at once."""
        table = self.table
        running = np.flatnonzero(table.active & decoding(table.computed, table.prefill_end, table.end))
        # In order of admission: sequences that begin alike are neighbours, as `SharedPrefixes` needs them.
        running = running[: self.budget - used]
        places = running[np.argsort(table.epoch[running], kind="stable")]
        more = np.maximum(table.length[places] - table.computed[places], 1) - 1
        room = self.budget - used - len(places)
        counts = np.ones_like(places)
        if more.any():
            counts += np.clip(room - (np.cumsum(more) - more), 0, more)
        kept = self.admission.extend(places, table.computed[places] + counts - 1)
        if not kept.all():
            places, counts = places[kept], counts[kept]
        drafts = np.zeros_like(counts)
        if drafter is not None and len(places):
            newest = table.computed[places] + counts
            promised = (table.own_from[places] + table.promised[places]) * table.block_size
            room = np.minimum(table.end[places] - 1, promised) - newest
            room[(newest < table.length[places]) | table.undrafted[places]] = 0
            budget = self.budget - used - int(counts.sum())
            if self.draft_states is not None:
                budget = min(budget, self.draft_states.most_drafts)
            drafts = drafter.draft(places, room, used, budget)
            if self.structures is not None:
                drafts = self.structures.within(places, drafts)
        counts = counts + drafts
        left = None if self.draft_states is None else self.draft_states.lend(places, counts, drafts)
        return Queries(places, table.computed[places], counts, drafts, left)

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
            # Shared tiles may be computed in this very step: it stores all keys and values before it reads any.
            ready = all(tile.computed or id(tile) in computed for tile in tiles[: start // self.table.grain])
            if end > start and ready:
                chunks.append(PromptChunk(place, start, end, row, tuple(twins.get(place, ())) if end == stop else ()))
                computed.update(map(id, tiles[start // self.table.grain : end // self.table.grain]))
                row += end - start
            if row == self.budget:
                break
        return chunks

    def _take_blocks(self, chunks: list[PromptChunk], queries: Queries) -> None:
        for c in chunks:
            for place in (c.place, *c.twins):
                self._grow(np.array([place]), np.array([c.end]))
        self._grow(queries.places, queries.first + queries.counts)

    def _grow(self, places: Ints, ends: Ints) -> None:
        """Take blocks for the tokens before `ends` [n] of the sequences at `places` [n], in this order."""
        table = self.table
        have = table.block_count[places]
        growing = np.flatnonzero(ends > have * table.block_size)  # after a withdrawn step some have more
        if len(growing):
            places, have = places[growing], have[growing]
            need = -(-ends[growing] // table.block_size)
            index, offsets = ranges(have, need - have)
            table.blocks[np.repeat(places, need - have), index] = self.manager.take(int(offsets[-1]))
            table.block_count[places] = need

    def _batch(self, chunks: list[PromptChunk], queries: Queries, labels: LabelStep | None) -> Batch:
        table = self.table
        query_places, query_positions = queries.all_places, queries.positions
        places, positions = query_places, query_positions
        if chunks:
            places = np.concatenate([*(np.full(c.end - c.start, c.place) for c in chunks), query_places])
            positions = np.concatenate([*(np.arange(c.start, c.end) for c in chunks), query_positions])
        prompt_tokens = len(places) - len(query_places)
        size = padded_size(len(places), self.row_grain)
        last = [c for c in chunks if c.end == table.prefill_end[c.place] == table.length[c.place]]
        # A sequence that is recomputed knows the token after each of its tokens, except after the newest.
        known = table.length[query_places]
        newest = np.flatnonzero((query_positions >= known - 1) & ~table.scored[query_places])
        first = [(c, place) for c in last for place in (c.place, *c.twins) if not table.scored[place]]
        first_sampled = [c.row + c.end - c.start - 1 for c, _ in first]
        scored = NOBODY if labels is None else labels.rows
        wanted = np.concatenate([np.array(first_sampled, np.int64), prompt_tokens + newest, scored])
        sampled = _padded(wanted, padded_logits(len(wanted), self.logits_grain))
        late = np.flatnonzero(query_positions >= known)
        if queries.drafts.any():
            late = NOBODY
        sequences = np.concatenate([np.array([place for _, place in first], np.int64), query_places[newest]])
        copied, copies = self._copies(chunks, labels)
        if (scoring := self.scores.step(chunks, sequences)) is not None:
            rows = padded_logits(len(scoring.rows), self.logits_grain)
            sampled = torch.cat([sampled, _padded(scoring.rows, rows)])
        next_positions = positions[wanted[: len(sequences)]] + 1
        return Batch(
            tokens=_padded(table.tokens[places, positions], size),
            positions=_padded(positions, size),
            slots=_padded(table.slots(places, positions), size),
            attention=self.attention(table, chunks, query_places, query_positions),
            sampled=sampled,
            sampling=self._sampling(sequences, next_positions),
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
            states=None if self.states is None else state_inputs(table, chunks, queries, prompt_tokens, labels),
            changes=logits_changes(table, sequences, next_positions, self.eos_ids),
            allowed=None if self.structures is None else self.structures.allowed(sequences),
            labels=labels,
            scoring=scoring,
            logits_grain=self.logits_grain,
        )

    def _copies(self, chunks: list[PromptChunk], labels: LabelStep | None) -> tuple[Ints, Ints]:
        """Return (last blocks, blocks of twins and forks that they are copied to)."""
        table, pairs = self.table, [(NOBODY, NOBODY)]
        for c in chunks:
            for twin in c.twins:
                own = slice(int(table.own_from[twin]), table.blocks_for(c.end))
                pairs.append((table.blocks[c.place, own], table.blocks[twin, own]))
        if labels is not None:
            pairs.append((labels.copies.blocks, labels.copies.into))
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
        """Append the sampled `tokens` [r] to the sequences that still run; tokens of ended sequences are dropped.

        `finite` [r] tells which logits were finite; None means all.
        """
        table = self.table
        finite = np.ones(len(tokens), np.bool_) if finite is None else finite
        running: NDArray[np.bool_] = table.active[batch.sequences] & (table.epoch[batch.sequences] == batch.epochs)
        if batch.drafted:
            assert running.all(), "a step with drafts ends before the next one begins"
            new = verify_drafts(table, batch, tokens, finite, self.eos_ids)
            if self.draft_states is not None:
                self.draft_states.keep(batch.queries, new)
            return new
        rows = np.flatnonzero(running)
        places, tokens, finite = batch.sequences[rows], tokens[rows], finite[rows]
        table.tokens[places, table.length[places]] = tokens
        table.length[places] += 1
        return NewTokens(places, np.ones_like(places), finite, rows=rows)

    def drop(self) -> None:
        """Forget all rows, waiting and running."""
        self.prefilling = []
        self.scores.drop()
        if self.draft_states is not None:
            self.draft_states.drop()
        self.admission.drop()

    def finish(self, place: int, spoiled: bool = False) -> None:
        """Free a sequence's place and blocks; `spoiled` if it computed values that are not finite."""
        self.scores.end(place)
        self.admission.finish(place, spoiled)


def _padded(values: NDArray[np.integer], size: int) -> Tensor:
    """Return `values` as int64 [size], padded with zeros."""
    padded = np.zeros(size, np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
