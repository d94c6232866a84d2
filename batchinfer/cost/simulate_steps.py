"""The steps that an engine will take for rows of known lengths, counted without computing one.

It goes by the scheduler's own rules: prompts first, in the order of the rows and on the grid of tiles, then one token
of each sequence that decodes. Steps between two events, a row's beginning or its end, differ only in their contexts,
and are counted together. What it leaves out: rows wait for a place, never for memory, and windows of attention are
taken to be the whole context.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.cost.step_cost import Floats, Work
from batchinfer.engine.config import EngineConfig
from batchinfer.kernels.grain import MIN_ROWS, TILE, padded_size
from batchinfer.kernels.ragged import Ints

MOST_TOGETHER = 1024  # steps, for their contexts are a row of a matrix each


@dataclass(frozen=True, eq=False)
class Steps:
    """n steps: what they compute, how many prompt tokens and new tokens, and whether rows still waited."""

    work: Work
    prompt_tokens: Floats  # [n]
    new_tokens: Floats  # [n] of decoding sequences; a row's first one comes with its prompt
    waiting: NDArray[np.bool_]  # [n] rows were still to begin, so that no place stayed empty


def simulate(prompts: Ints, outputs: Ints, config: EngineConfig, first: int = 0) -> Steps:
    """The steps for rows of `prompts` [r] and `outputs` [r] tokens, in this order.

    `first` tokens of each prompt are there already, computed for another row.
    """
    return _Simulation(prompts, outputs, config, first).run()


class _Simulation:
    """Places of the sequence table as arrays, like the engine's own."""

    def __init__(self, prompts: Ints, outputs: Ints, config: EngineConfig, first: int) -> None:
        self.config, self.first = config, first
        self.rows = deque(zip(prompts.tolist(), outputs.tolist(), strict=True))
        places = min(config.max_num_seqs, len(prompts))
        self.prompt, self.computed, self.end = (np.zeros(places, np.int64) for _ in range(3))
        self.prefilling: list[int] = []
        self.counted: list[tuple[Floats, ...]] = []

    def run(self) -> Steps:
        while self.rows or self.prefilling or self._decoding().size:
            self._admit()
            if self.prefilling:
                self._mixed_step()
            else:
                self._decoding_steps()
        columns = [np.concatenate(column) for column in zip(*self.counted, strict=True)] or [np.zeros(0)] * 10
        return Steps(Work(*columns[:7]), columns[7], columns[8], columns[9] > 0)

    def _decoding(self) -> Ints:
        return np.flatnonzero((self.computed >= self.prompt) & (self.computed + 1 < self.end))

    def _admit(self) -> None:
        for place in np.flatnonzero(self.computed + 1 >= self.end) if self.rows else ():
            if not self.rows:
                break
            prompt, output = self.rows.popleft()
            self.prompt[place], self.end[place] = prompt, prompt + output
            self.computed[place] = min(self.first, prompt - 1)
            self.prefilling.append(int(place))

    def _mixed_step(self) -> None:
        """Pieces of prompts, and what decodes beside them."""
        budget = self.config.max_num_batched_tokens
        tokens, ended, tiles = 0, 0, []
        decoding = self._decoding()
        for place in self.prefilling:
            start, stop = int(self.computed[place]), int(self.prompt[place])
            end = min(stop, start + budget - tokens)
            if end < stop:
                end -= end % TILE
            if end > start:
                tiles.append(np.arange(start // TILE, (end - 1) // TILE + 1))
                tokens += end - start
                ended += end == stop
                self.computed[place] = end
            if tokens == budget:
                break
        self.prefilling = [place for place in self.prefilling if self.computed[place] < self.prompt[place]]
        decoding = decoding[: budget - tokens]
        places = np.concatenate(tiles)
        self._count(
            np.array([tokens]),
            np.array([ended]),
            decoding,
            (len(places), (places + 1).sum() * TILE, len(np.unique(places))),
        )

    def _decoding_steps(self) -> None:
        """All steps up to the first end, some at a time."""
        decoding = self._decoding()[: self.config.max_num_batched_tokens]
        steps = min(int((self.end[decoding] - self.computed[decoding] - 1).min()), MOST_TOGETHER)
        nothing = np.zeros(steps, np.int64)
        self._count(nothing, nothing, decoding, (0, 0, 0))

    def _count(self, prompt_tokens: Ints, ended: Ints, decoding: Ints, tiles: tuple[int, int, int]) -> None:
        """Steps with these prompt tokens and prompts that end [n], in which the same sequences decode."""
        n, block = len(prompt_tokens), self.config.block_size
        seen = self.computed[decoding] + 1 + np.arange(n)[:, None]
        self.computed[decoding] += n
        tokens = prompt_tokens + len(decoding)
        values = (
            np.array([padded_size(int(t), MIN_ROWS) for t in tokens[:1]]).repeat(n),
            -(-(ended + len(decoding)) // MIN_ROWS) * MIN_ROWS,
            np.full(n, len(decoding)),
            (-(-seen // block) * block).sum(1),
            *(np.full(n, count) for count in tiles),
            prompt_tokens,
            np.full(n, len(decoding)),
            np.full(n, bool(self.rows)),
        )
        self.counted.append(tuple(np.asarray(value, np.float64) for value in values))
