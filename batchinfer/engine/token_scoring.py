"""`TokenScoring`: the log-probabilities of tokens, those of prompts and those that are sampled.

A step finds the log-probability of the token behind each wanted position. Those of a row's own tokens are kept with the
row, and it has them still after it was preempted. Those of a shared tile are kept with the tile, for all rows that read
it (`ScoreDemand` says how the tile's maker knows what they want).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.prefix_tree import TileScores
from batchinfer.engine.request import FinishReason, TokenScores
from batchinfer.engine.sampling_params import MOST_LOGPROBS
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.grain import padded_logits
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.kernels.scores import LogProbabilities, ScoredTokens, StepScores
from batchinfer.models.batch import PromptChunk, PromptSpan, ScoringStep, as_tensor


@dataclass(frozen=True)
class _Piece:
    """The log-probabilities of neighbouring tokens of a row, the first of them at position `first`."""

    first: int
    values: NDArray[np.float32]  # [m]
    top_ids: NDArray[np.int32]  # [m, k]
    top_values: NDArray[np.float32]  # [m, k]

    @staticmethod
    def of_step(found: LogProbabilities) -> "_Piece":
        """Return all that a step has found, whose tokens are no neighbours yet."""
        return _Piece(0, found.values.numpy(), found.top_ids.numpy(), found.top_values.numpy())

    def part(self, first: int, begin: int, end: int) -> "_Piece":
        """Return a copy of [begin, end), whose first token is at `first`: the whole step's arrays are not kept."""
        mine = slice(begin, end)
        return _Piece(first, self.values[mine].copy(), self.top_ids[mine].copy(), self.top_values[mine].copy())


class TokenScoring:
    """Follows all rows that want log-probabilities of tokens."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._pieces: dict[int, list[_Piece]] = {}  # by row; what is computed again comes again, with the same bits

    def step(self, chunks: list[PromptChunk], sequences: Ints) -> ScoringStep | None:
        """Return what a step finds: of these chunks of prompts, and of the tokens that `sequences` [r] sample.

        None if nothing. Changes nothing.
        """
        table = self._table
        sampled = np.flatnonzero(table.logprobs[sequences] >= 0)
        spans = list(self._spans(chunks))
        if not len(sampled) and not spans:
            return None
        counts = np.array([span.end - span.first for span in spans], np.int64)
        positions, _ = ranges(np.array([span.first for span in spans], np.int64), counts)
        places = np.repeat(np.array([span.chunk.place for span in spans], np.int64), counts)
        starts = np.array([span.chunk.row - span.chunk.start for span in spans], np.int64)
        rows = np.repeat(starts, counts) + positions - 1
        of_tiles = [
            (self._row_of(span, tile), table.tiles[span.chunk.place][tile].continuations)
            for span in spans
            for tile, begin, end in span.tiles
            if end > begin
        ]
        known_rows = [np.arange(len(rows)), *(np.full(len(tokens), row) for row, tokens in of_tiles)]
        known = [
            table.tokens[places, positions].astype(np.int64),
            *(np.array(tokens, np.int64) for _, tokens in of_tiles),
        ]
        wants = (table.logprobs[sequences[sampled]] > 0).any() or any(table.likeliest[s.chunk.place] for s in spans)
        padding = np.zeros(padded_logits(len(sampled)) - len(sampled), np.int64)
        return ScoringStep(
            sampled,
            as_tensor(np.concatenate([sampled, padding])),
            rows,
            ScoredTokens(as_tensor(np.concatenate(known_rows)), as_tensor(np.concatenate(known))),
            MOST_LOGPROBS if wants else 0,
            tuple(spans),
        )

    def _row_of(self, span: PromptSpan, tile: int) -> int:
        """Return the number of the wanted row that is the tile's last position."""
        return span.row + (tile + 1) * self._table.grain - span.first

    def _spans(self, chunks: list[PromptChunk]) -> Iterator[PromptSpan]:
        """Yield what is found of each chunk."""
        table, row = self._table, 0
        found: list[tuple[PromptChunk, int, int, int]] = []
        for c in chunks if (table.finds_from < table.prompt_length).any() else ():
            first = max(c.start + 1, int(table.finds_from[c.place]))
            end = max(first, min(c.end + 1, int(table.prompt_length[c.place])))
            ends = any(self._ends(c, place) for place in (c.place, *c.twins))
            if end > first or ends:
                found.append((c, first, end, row))
            row += end - first
        extra = row
        for c, first, end, row in found:
            tiles = []
            for index in self._made(c):
                count = len(table.tiles[c.place][index].continuations) if (index + 1) * table.grain >= first else 0
                tiles.append((index, extra, extra + count))
                extra += count
            yield PromptSpan(c, first, end, row, tuple(tiles))

    def _made(self, c: PromptChunk) -> Iterator[int]:
        """Yield the indices of the shared tiles that a chunk computes for all."""
        table = self._table
        for index, tile in enumerate(table.tiles[c.place][: c.end // table.grain]):
            if index * table.grain >= c.start and tile.maker == table.epoch[c.place]:
                yield index

    def _ends(self, c: PromptChunk, place: int) -> bool:
        """Return whether the sequence at `place`, whose chunk this is, ends with it."""
        return bool(self._table.ends_with_prompt[place]) and c.end == self._table.prompt_length[place]

    def update(self, step: ScoringStep, new: NewTokens, found: StepScores) -> dict[int, FinishReason]:
        """Take what a step has found, and the tokens that it has sampled.

        Return the places of the rows that end with their prompts, and whether their log-probabilities are finite.
        """
        done = {}
        known = None if found.known is None else _Piece.of_step(found.known)
        for span in step.spans:
            places = (span.chunk.place, *span.chunk.twins)
            if known is not None:
                own = known.part(span.first, span.row, span.row + span.end - span.first)
                for place in places:
                    self._keep(place, own)
                self._keep_tiles(span, own, known.values, step.known.tokens.numpy())
            for place in places:
                if self._ends(span.chunk, place):
                    finite = np.isfinite(self.of(place).values).all()
                    done[place] = FinishReason.STOP if finite else FinishReason.ERROR
        if found.sampled is not None:
            self._keep_sampled(step, new, _Piece.of_step(found.sampled))
        return done

    def _keep(self, place: int, piece: _Piece) -> None:
        if len(piece.values):
            self._pieces.setdefault(int(self._table.row[place]), []).append(piece)

    def _keep_tiles(self, span: PromptSpan, own: _Piece, values: NDArray[np.float32], tokens: Ints) -> None:
        """Give the shared tiles of a span their log-probabilities: `own`, and those of the tokens behind them."""
        grain = self._table.grain
        for index, first, end in span.tiles:
            begin = max(index * grain + 1 - own.first, 0)
            mine = slice(begin, max(begin, (index + 1) * grain + 1 - own.first))
            behind = dict(zip(tokens[first:end].tolist(), values[first:end], strict=True))
            tile = self._table.tiles[span.chunk.place][index]
            tile.scores = TileScores(own.values[mine], own.top_ids[mine], own.top_values[mine], behind)

    def _keep_sampled(self, step: ScoringStep, new: NewTokens, found: _Piece) -> None:
        table = self._table
        at = np.searchsorted(step.sampled, new.rows)
        for place, count, row in zip(new.places.tolist(), new.counts.tolist(), at.tolist(), strict=True):
            if table.logprobs[place] >= 0:
                self._keep(place, found.part(int(table.length[place]) - count, row, row + count))

    def of(self, place: int) -> TokenScores:
        """Return the log-probabilities of the answer of the row at `place`, or of the tokens of its prompt if it ends
        with that; none if it wants none."""
        table = self._table
        count = int(table.logprobs[place])
        if table.ends_with_prompt[place]:
            return self._between(place, int(table.scored_from[place]), int(table.length[place]), count)
        if count < 0 or table.scored[place]:
            return TokenScores.none()
        return self._between(place, int(table.prompt_length[place]), int(table.length[place]), count)

    def of_prompt(self, place: int) -> TokenScores:
        """Return the log-probabilities of the prompt's tokens but the first; none if the row wants none."""
        table = self._table
        count = table.params[place].prompt_logprobs
        if count < 0 or table.ends_with_prompt[place]:
            return TokenScores.none()
        return self._between(place, 1, int(table.prompt_length[place]), count)

    def _between(self, place: int, first: int, end: int, likeliest: int) -> TokenScores:
        """Return the log-probabilities of the tokens [first, end)."""
        size, table = end - first, self._table
        values = np.full(size, np.nan, np.float32)
        top_ids, top_values = np.full((size, likeliest), -1, np.int32), np.zeros((size, likeliest), np.float32)
        for piece in (*self._of_tiles(place, first), *self._pieces.get(int(table.row[place]), ())):
            begin = max(first - piece.first, 0)
            stop = min(end - piece.first, len(piece.values))
            if begin < stop:
                into = slice(piece.first + begin - first, piece.first + stop - first)
                values[into] = piece.values[begin:stop]
                wide = min(likeliest, piece.top_ids.shape[1])
                top_ids[into, :wide] = piece.top_ids[begin:stop, :wide]
                top_values[into, :wide] = piece.top_values[begin:stop, :wide]
        tokens = table.tokens[place, first:end].copy()
        return TokenScores(tokens, values, top_ids, top_values, np.array([0, size], np.int64))

    def _of_tiles(self, place: int, first: int) -> Iterator[_Piece]:
        """Yield what was found of the tiles that the sequence reads and did not compute, from position `first` on."""
        table = self._table
        for index, tile in enumerate(table.tiles[place][: int(table.begins[place]) // table.grain]):
            behind = (index + 1) * table.grain  # position of the token behind the tile
            if first <= behind:
                assert tile.scores is not None, "the maker of a tile finds what its readers want"
                values, token = tile.scores.values.copy(), int(table.tokens[place, behind])
                values[-1] = tile.scores.behind.get(token, values[-1])  # else the maker goes on with this token too
                yield _Piece(behind + 1 - len(values), values, tile.scores.top_ids, tile.scores.top_values)

    def end(self, place: int) -> None:
        """Forget the row at `place`, which ends."""
        self._pieces.pop(int(self._table.row[place]), None)

    def drop(self) -> None:
        """Forget all rows."""
        self._pieces.clear()
