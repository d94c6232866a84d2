"""Drafters that know the truth, and tell it as they like."""

import numpy as np

from batchinfer.engine.engine import Engine
from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.request import Completions, FinishReason
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch

Done = dict[int, tuple[list[int], FinishReason]]


class Adversary:
    """Drafts without thinking: the truth, or nonsense, in lengths of its own choice."""

    wanted = True

    def __init__(self, engine: Engine, truth: Done, share_right: float, longest: int, shortest: int = 0) -> None:
        self.table, self.truth, self.share_right = engine.table, truth, share_right
        self.shortest, self.longest = shortest, longest
        self.rng = np.random.default_rng(0)

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        counts = np.minimum(self.rng.integers(self.shortest, self.longest + 1, len(places)), np.maximum(room, 0))
        counts = np.clip(budget - (np.cumsum(counts) - counts), 0, counts)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            length = int(self.table.length[place])
            known = self.truth[int(self.table.row[place])][0][length - int(self.table.prompt_length[place]) :][:count]
            drafts = np.array([*known, *[5] * (count - len(known))], np.int32)
            wrong = self.rng.random(count) >= self.share_right
            drafts[wrong] = (drafts[wrong] + 1) % 320
            self.table.tokens[place, length : length + count] = drafts
        return counts

    def settle(self, batch: Batch, new_tokens: NewTokens, seconds: float) -> None:
        pass

    def remember(self, done: Completions) -> None:
        pass


class Poisoner(Adversary):
    """Drafts as `Adversary`, and makes token 7, whose embedding the test spoils, the last of each draft."""

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        counts = super().draft(places, room, prompt_tokens, budget)
        last = self.table.length[places] + counts - 1
        self.table.tokens[places[counts > 0], last[counts > 0]] = 7
        return counts
