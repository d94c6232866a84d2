"""`LabelScoring`: rows that choose from labels get the log-probability of each, and generate nothing.

A row's labels form a tree (`LabelTree`). Once the prompt is computed, a fork is made for each segment that follows but
the first: a sequence that reads the blocks of the prompt and has a copy of its last block, if that is not full. The row
itself goes on with the first segment. All their tokens are known, so that each segment takes one step. Where segments
part again, further forks are made. Admission promises a row the places, blocks and states of all its forks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.label_tree import LabelTree, Segment
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.scores import ScoredTokens
from batchinfer.models.batch import Copies, LabelStep, PromptChunk, Queries, as_tensor

NONE = np.empty(0, np.int64)


@dataclass
class _Row:
    """A row that is being scored."""

    tree: LabelTree
    found: NDArray[np.float32]  # [m] log-probabilities of the tree's targets
    missing: int  # of the targets
    forks: list[int]  # places
    unmade: int  # forks that are promised and still to be made


@dataclass(frozen=True)
class _Part:
    """A sequence, of the row at place `row`, and the segment that it computes."""

    row: int
    segment: Segment


class LabelScoring:
    """Follows all rows with choices from their admission to their last score."""

    def __init__(
        self, table: SequenceTable, manager: BlockManager, states: BlockManager | None, ends: tuple[int, ...]
    ) -> None:
        """Score the rows of `table`; any of the tokens `ends` may end an answer."""
        self._table, self._manager, self._states, self._ends = table, manager, states, ends
        self._rows: dict[int, _Row] = {}  # by place
        self._parts: dict[int, _Part] = {}  # by place
        self.unmade = 0  # forks of all rows that are promised and still to be made
        self._parted: list[tuple[int, Segment]] = []  # places whose segments the newest step ends, with these
        self._made: list[int] = []  # places of the forks that were made for the newest step

    @property
    def forks_running(self) -> int:
        """Number of sequences that are forks of a row."""
        return len(self._parts) - len(self._rows)

    def refuse_unfit(self, requests: Requests) -> None:
        """Raise `ValueError` naming a row whose labels need more places, blocks or states than there are."""
        for i in range(len(requests)) if requests.choices is not None else ():
            places = self.places(requests, i)
            kinds = [("sequences side by side (max_num_seqs)", places, len(self._table.active))]
            kinds.append(("blocks of the KV cache", self.blocks(requests, i), self._manager.blocks))
            if self._states is not None:
                kinds.append(("states", places, self._states.blocks))
            for what, needed, there in kinds:
                if needed > there:
                    raise ValueError(
                        f"row {requests.rows[i]} chooses from labels that need {needed} {what}, and there are {there}: "
                        "give it fewer labels, or raise --max-num-seqs or --kv-cache-memory-bytes"
                    )

    def tree(self, requests: Requests, i: int) -> LabelTree:
        """Return the tree of row i's labels."""
        assert requests.choices is not None
        return LabelTree.of(requests.choices.of_row(i), self._ends)

    def places(self, requests: Requests, i: int) -> int:
        """Return how many places row i takes."""
        return 1 if requests.choices is None else self.tree(requests, i).root.places

    def blocks(self, requests: Requests, i: int) -> int:
        """Return how many blocks row i, which has choices, needs: with its prompt, and for all forks."""
        root = self.tree(requests, i).root
        prompt = int(requests.offsets[i + 1] - requests.offsets[i])
        return self._table.blocks_for(prompt + root.longest) + root.fork_blocks(prompt, self._table.block_size)

    def begin(self, place: int, requests: Requests, i: int) -> None:
        """Begin to score row i, which was admitted to `place`."""
        tree, table = self.tree(requests, i), self._table
        forks = tree.root.places - 1
        self._rows[place] = _Row(tree, np.zeros(len(tree.targets), np.float32), len(tree.targets), [], forks)
        self._parts[place] = _Part(place, tree.root)
        self.unmade += forks
        table.scored[place] = table.undrafted[place] = True
        table.end[place] = table.length[place] + 1

    def __contains__(self, place: int) -> bool:
        """Return whether the sequence at `place` is that of a row with choices."""
        return place in self._rows

    def forks(self, place: int) -> list[int]:
        """Return the places of the forks of the row at `place`; none if it has no choices."""
        return self._rows[place].forks if place in self._rows else []

    def end(self, place: int) -> list[int]:
        """End the scoring of the row at `place`; return the places of its forks, whose sequences are still to end."""
        row = self._rows.pop(place, None)
        if row is None:
            return []
        for part in (place, *row.forks):
            del self._parts[part]
        self.unmade -= row.unmade
        if self._states is not None:
            self._states.release(NONE, row.unmade)
        return row.forks

    def begin_again(self, place: int) -> int:
        """Let a row forget what it has computed behind its prompt; return the row's place.

        `place` is that of the row or of one of its forks.
        """
        at = self._parts[place].row
        row, table = self._rows[at], self._table
        for fork in row.forks.copy():
            self._undo_fork(fork)
        self._parts[at] = _Part(at, row.tree.root)
        table.length[at] = table.prompt_length[at]
        return at

    def step(self, chunks: list[PromptChunk], queries: Queries, prompt_tokens: int) -> LabelStep | None:
        """Return what a step finds out, of these chunks of prompts and of these tokens behind them; None if nothing.

        Makes the forks that go on from what the step computes. Nothing else changes before `go_on`.
        """
        self._parted, self._made = [], []
        computed = list(self._computed(chunks, queries, prompt_tokens)) if self._rows else []
        if not computed:
            return None
        places = np.array([place for place, _, _, _ in computed], np.int64)
        owners = np.array([self._parts[place].row for place in places.tolist()], np.int64)
        targets = [self._parts[place].segment.targets[index] for place, _, _, index in computed]
        tokens = [self._rows[owner].tree.targets[some] for owner, some in zip(owners.tolist(), targets, strict=True)]
        counts = np.array([len(some) for some in targets], np.int64)
        sources = []
        for place, source, _, index in computed:
            segment = self._parts[place].segment
            if index + 1 == len(segment.targets) and segment.next:
                self._parted.append((place, segment))
                self._made += [self._fork(place, following) for following in segment.next[1:]]
                sources += [source] * (len(segment.next) - 1)
        return LabelStep(
            rows=np.array([row for _, _, row, _ in computed], np.int64),
            scored=ScoredTokens(
                as_tensor(np.repeat(np.arange(len(computed)), counts)), as_tensor(np.concatenate(tokens))
            ),
            owners=np.repeat(owners, counts),
            epochs=self._table.epoch[np.repeat(owners, counts)],
            targets=np.concatenate(targets),
            copies=self._copies(sources, self._made),
        )

    def _computed(
        self, chunks: list[PromptChunk], queries: Queries, prompt_tokens: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield (place, place whose blocks hold what was computed, row in the step, index in the segment) for each row
        whose logits are wanted."""
        table = self._table
        for c in chunks:
            if c.end == table.prefill_end[c.place]:
                for place in (c.place, *c.twins):
                    if place in self._parts:
                        yield place, c.place, c.row + c.end - c.start - 1, 0
        places, positions = queries.all_places, queries.positions
        for i in np.flatnonzero(table.scored[places]).tolist():
            place = int(places[i])
            start = table.prompt_length[place] + self._parts[place].segment.start
            yield place, place, prompt_tokens + i, int(positions[i] - start)

    def _fork(self, place: int, segment: Segment) -> int:
        """Make a sequence that goes on from that at `place` with `segment`; return its place."""
        table, owner = self._table, self._parts[place].row
        fork = int(np.flatnonzero(~table.active)[0])
        prompt = int(table.prompt_length[place])
        start, end = prompt + segment.start, prompt + segment.end
        table.fork(fork, place, start)
        table.tokens[fork, start:end] = segment.tokens
        table.length[fork], table.end[fork] = end, end + 1
        own, needed = start // table.block_size, table.blocks_for(end)
        table.promised[fork] = table.blocks_for(prompt + segment.longest) - own
        table.promised[owner] -= table.promised[fork]
        table.blocks[fork, own:needed] = self._manager.take(needed - own)
        table.block_count[fork] = needed
        if self._states is not None:
            table.state[fork] = self._states.take(1)[0]
        row = self._rows[owner]
        row.forks.append(fork)
        row.unmade -= 1
        self.unmade -= 1
        self._parts[fork] = _Part(owner, segment)
        return fork

    def _copies(self, sources: list[int], forks: list[int]) -> Copies:
        """Return what forks need copies of after the step: unfilled last blocks, and states."""
        table, at = self._table, np.array(forks, np.int64)
        start = table.computed[at]
        unfilled = start % table.block_size > 0
        column = (start // table.block_size)[unfilled]
        source = np.array(sources, np.int64)
        return Copies(
            table.blocks[source[unfilled], column],
            table.blocks[at[unfilled], column],
            table.state[source],
            table.state[at],
        )

    def go_on(self) -> None:
        """Let the sequences whose segment the newest step ends go on with the first segment that follows."""
        for place, segment in self._parted:
            self._set(place, segment.next[0])

    def _set(self, place: int, segment: Segment) -> None:
        table = self._table
        start, end = (int(table.prompt_length[place]) + at for at in (segment.start, segment.end))
        table.tokens[place, start:end] = segment.tokens
        table.length[place], table.end[place] = end, end + 1
        self._parts[place] = _Part(self._parts[place].row, segment)

    def withdraw(self) -> None:
        """Take back `step` and `go_on`: the newest step was not computed after all."""
        for fork in self._made:
            self._undo_fork(fork)
        for place, segment in self._parted:
            self._set(place, segment)

    def _undo_fork(self, fork: int) -> None:
        table, owner = self._table, self._parts.pop(fork).row
        row = self._rows[owner]
        table.promised[owner] += table.promised[fork]
        if self._states is not None:
            self._states.release(table.state[[fork]], 0)
        self._manager.release(table.remove(fork), 0)
        row.forks.remove(fork)
        row.unmade += 1
        self.unmade += 1

    def update(self, step: LabelStep, scores: NDArray[np.float32]) -> dict[int, FinishReason]:
        """Take a step's log-probabilities [m]; return the places of the rows that have all of theirs, and whether these
        are finite."""
        table, done = self._table, {}
        for place in np.unique(step.owners).tolist():
            mine = step.owners == place
            if table.active[place] and table.epoch[place] == step.epochs[mine][0]:
                row = self._rows[place]
                row.found[step.targets[mine]] = scores[mine]
                row.missing -= int(mine.sum())
                if not row.missing:
                    done[place] = FinishReason.STOP if np.isfinite(row.found).all() else FinishReason.ERROR
        return done

    def result(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the likeliest label of a row that has all scores, as token ids, and the scores of all its labels.

        Of labels that are equally likely, the first is taken.
        """
        row = self._rows[place]
        scores = row.tree.scores(row.found)
        return np.array(row.tree.labels[int(scores.argmax())], np.int32), scores
