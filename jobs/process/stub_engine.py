"""An engine that computes nothing, for tests and measurements of the job layer without an engine."""

from collections import deque

import numpy as np

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.request import Completions, FinishReason, Requests
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.kernels.ragged import ranges
from batchinfer.text.tokenizer import Tokenizer


class StubEngine:
    """Answers a row with the first `max_tokens` tokens of its prompt. Rows that were added together end in one step."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._waiting: deque[Requests] = deque()
        self._stats = EngineStats(device="stub")

    @property
    def unfinished(self) -> int:
        return sum(map(len, self._waiting))

    def add(self, requests: Requests) -> None:
        self._waiting.append(requests)

    def take_admitted(self) -> list[int]:
        """Return no rows, since every row ends in the step in which it begins."""
        return []

    def step(self) -> Completions:
        requests = self._waiting.popleft()
        lengths = np.diff(requests.offsets)
        limits = requests.number("max_tokens")
        taken = np.minimum(lengths, limits)
        indices, offsets = ranges(requests.offsets[:-1], taken)
        self._stats.steps += 1
        self._stats.prompt_tokens += len(requests.token_ids)
        self._stats.completion_tokens += int(offsets[-1])
        return Completions(
            requests.rows,
            requests.token_ids[indices],
            offsets,
            np.where(lengths > limits, FinishReason.LENGTH, FinishReason.STOP).astype(np.int8),
        )

    def stats(self) -> EngineStats:
        self._stats.peak_memory_bytes = peak_memory_bytes()
        return self._stats
