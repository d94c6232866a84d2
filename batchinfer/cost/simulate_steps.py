"""Simulate the steps that an engine takes for rows of known lengths, without computing them.

The simulation follows the scheduler's rules (`engine/step_policy.py`): prompts first, in the order of the rows and on
the grid of tiles, then one token of each sequence that decodes. Steps between two events (a row begins or ends) differ
only in their context lengths, and are counted together. Two things are simplified: rows wait for a place in the
sequence table, never for memory, and attention windows are as long as the whole context.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.cost.step_cost import Floats, Work
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.step_policy import chunk_end, decoding, tiles_of
from batchinfer.kernels.grain import MIN_ROWS, TILE, padded_logits, padded_size
from batchinfer.kernels.ragged import Ints

MOST_TOGETHER = 1024  # steps counted at once; each has a row in a matrix of context lengths


@dataclass(frozen=True, eq=False)
class Steps:
    """The work of n steps, their numbers of prompt tokens and new tokens, and whether rows still waited."""

    work: Work
    prompt_tokens: Floats  # [n]
    new_tokens: Floats  # [n] new tokens of decoding sequences; a row's first one comes with its prompt instead
    waiting: NDArray[np.bool_]  # [n] True if rows were still waiting to begin, so that all places were taken


def simulate(
    prompts: Ints,
    outputs: Ints,
    config: EngineConfig,
    first: int = 0,
    row_grain: int = MIN_ROWS,
    logits_grain: int = MIN_ROWS,
) -> Steps:
    """Return the steps for rows with `prompts` [r] prompt tokens and `outputs` [r] new tokens, run in this order.

    The first `first` tokens of each prompt are shared with another row, which computes them. A step's tokens are padded
    to a multiple of `row_grain`, and its rows of logits to one of `logits_grain`.
    """
    return _Simulation(prompts, outputs, config, first, row_grain, logits_grain).run()


class _Simulation:
    """The state of each place of the sequence table, as arrays like the engine's own."""

    def __init__(
        self, prompts: Ints, outputs: Ints, config: EngineConfig, first: int, row_grain: int, logits_grain: int
    ) -> None:
        self.config, self.first, self.row_grain, self.logits_grain = config, first, row_grain, logits_grain
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
        return np.flatnonzero(decoding(self.computed, self.prompt, self.end))

    def _admit(self) -> None:
        for place in np.flatnonzero(self.computed + 1 >= self.end) if self.rows else ():
            if not self.rows:
                break
            prompt, output = self.rows.popleft()
            self.prompt[place], self.end[place] = prompt, prompt + output
            self.computed[place] = min(self.first, prompt - 1)
            self.prefilling.append(int(place))

    def _mixed_step(self) -> None:
        """Count one step of prompt chunks and of the sequences that decode beside them."""
        budget = self.config.max_num_batched_tokens
        tokens, ended, tiles = 0, 0, list[int]()
        beside = self._decoding()
        for place in self.prefilling:
            start, stop = int(self.computed[place]), int(self.prompt[place])
            end = chunk_end(start, stop, budget - tokens)
            if end > start:
                tiles += tiles_of(start, end)
                tokens += end - start
                ended += end == stop
                self.computed[place] = end
            if tokens == budget:
                break
        self.prefilling = [place for place in self.prefilling if self.computed[place] < self.prompt[place]]
        counts = len(tiles), (sum(tiles) + len(tiles)) * TILE, len(set(tiles))
        self._count(1, tokens, ended, beside[: budget - tokens], counts)

    def _decoding_steps(self) -> None:
        """Count the steps up to the next end of a row, at most MOST_TOGETHER."""
        places = self._decoding()[: self.config.max_num_batched_tokens]
        steps = min(int((self.end[places] - self.computed[places] - 1).min()), MOST_TOGETHER)
        self._count(steps, 0, 0, places, (0, 0, 0))

    def _count(self, n: int, prompt_tokens: int, ended: int, places: Ints, tiles: tuple[int, int, int]) -> None:
        """Count `n` steps in which the sequences at `places` decode beside `prompt_tokens` prompt tokens.

        In each of them `ended` prompts end; `tiles` are the fields of `Work` about tiles.
        """
        block = self.config.block_size
        seen = self.computed[places] + 1 + np.arange(n)[:, None]
        self.computed[places] += n
        values = (
            padded_size(prompt_tokens + len(places), self.row_grain),
            padded_logits(ended + len(places), self.logits_grain),
            len(places),
            (-(-seen // block) * block).sum(1),
            *tiles,
            prompt_tokens,
            len(places),
            bool(self.rows),
        )
        self.counted.append(tuple(np.full(n, value, np.float64) for value in values))
