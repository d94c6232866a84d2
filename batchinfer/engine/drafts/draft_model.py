"""`DraftModel`: a smaller model of the same tokenizer says what may follow.

It samples with the target's parameters and the target's noise, so that it is right wherever the two agree about the
likely tokens, and not only where it draws the same by chance. Its own keys and values may come about in any way: they
decide what is tried, never what comes out.
"""

import time
from dataclasses import replace

import numpy as np

from batchinfer.engine.admission import Admission
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.drafts.lookup import Proposals
from batchinfer.engine.drafts.step_times import StepTimes
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints
from batchinfer.models.config import read_model_config

LEAST_SHARE = 0.3  # of a step of the target, however much smaller the model is: of launching, not of computing
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def load_draft_model(config: EngineConfig) -> ModelRunner | None:
    """The model that `config.speculation` names, if it does. A `ValueError` says what does not fit."""
    if config.speculation.model is None or config.speculation.method not in ("auto", "draft_model"):
        return None
    own = replace(config, model=config.speculation.model, quantization="auto", kv_cache_dtype="auto")
    return ModelRunner(own, read_model_config(own.model))


class DraftModel:
    """The sequences of `table`, a little further on, in a table and in blocks of its own."""

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, table: SequenceTable, blocks: int, target: ModelRunner
    ) -> None:
        """Of the engine of `config`, with so many blocks for its keys and values."""
        self._vocabulary, self._target_vocabulary = (r.decoder.config.vocab_size for r in (runner, target))
        self.share = max(LEAST_SHARE, runner.decoder.weight_bytes / target.decoder.weight_bytes)
        self.runner = runner
        runner.allocate(blocks, config.block_size)
        self.target = table
        self.table = SequenceTable(len(table.active), table.max_tokens, table.block_size)
        for column in SAMPLING:
            setattr(self.table, column, getattr(table, column))
        self.table.epoch[:] = -1
        self.manager = BlockManager(blocks)
        admission = Admission(self.table, self.manager, False, None)
        inputs, grain = self.runner.attention_inputs, self.runner.decoder.row_grain
        budget = config.max_num_batched_tokens
        self.scheduler = Scheduler(self.table, self.manager, admission, inputs, budget, grain, np.empty(0, np.int64))
        self._times = StepTimes()

    def seconds(self, sequences: int, target_seconds: float) -> float:
        """Of one more draft for each of so many, where the target's step takes so long."""
        return float(self._times.of(np.array([sequences]))[0]) or self.share * target_seconds

    def behind(self, places: Ints) -> int:
        """Tokens of these sequences that it has not read."""
        known = np.where(self.table.epoch[places] == self.target.epoch[places], self.table.computed[places], 0)
        return int(np.maximum(self.target.length[places] - known, 0).sum())

    def draft(self, places: Ints, most: Ints) -> Proposals:
        """Drafts [n, K] for sequences at these places [n], `most` [n] for each, or none where memory has no blocks."""
        started = time.perf_counter()
        self._release_ended()
        drafting = self._catch_up(places, most)
        table, scheduler = self.table, self.scheduler
        while (batch := scheduler.schedule()) is not None:
            scheduler.update(batch, self.runner.launch(batch).wait()[0])
        table.active[:] = False
        known = self.target.length[places]
        counts = np.where(drafting, most, 0)
        o_k = np.minimum(np.arange(most.max(initial=0)), np.maximum(counts - 1, 0)[:, None])
        tokens = np.minimum(table.tokens[places[:, None], known[:, None] + o_k], self._target_vocabulary - 1)
        if drafting.any():
            self._times.observe(len(places), (time.perf_counter() - started) / o_k.shape[1])
        return Proposals(counts, tokens, np.zeros_like(counts), np.zeros(len(places), np.bool_))

    def _release_ended(self) -> None:
        """Blocks of sequences that are no more."""
        table = self.table
        gone = (table.epoch >= 0) & ((table.epoch != self.target.epoch) | ~self.target.active)
        for place in np.flatnonzero(gone).tolist():
            promised = int(table.promised[place])
            self.manager.release(table.remove(place), promised)
            table.promised[place] = table.computed[place] = table.length[place] = 0
            table.epoch[place] = -1

    def _catch_up(self, places: Ints, most: Ints) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Take over what the target has by now; which of the sequences [n] are drafted for."""
        table, target = self.table, self.target
        drafting = most > 0
        for i in np.flatnonzero(drafting).tolist():
            place, length = int(places[i]), int(target.length[places[i]])
            need = table.blocks_for(length + int(most[i])) - int(table.promised[place])
            if need > 0 and not self.manager.promise(need):
                drafting[i] = False
                continue
            table.promised[place] += max(need, 0)
            # What it had drafted may not be what followed: keys and values are good up to the first other token.
            had = min(int(table.computed[place]), length - 1)
            first = min(int(table.prompt_length[place]), had)
            differs = np.flatnonzero(table.tokens[place, first:had] != target.tokens[place, first:had])
            good = first + int(differs[0]) if len(differs) else had
            # Embeddings may be padded, to more in one model than in the other.
            table.tokens[place, good:length] = np.minimum(target.tokens[place, good:length], self._vocabulary - 1)
            table.epoch[place] = target.epoch[place]
            table.active[place] = True
            table.length[place], table.end[place] = length, length + int(most[i])
            table.computed[place] = table.prompt_length[place] = good
            if length - good > TILE:  # much is new: in tiles, but for the last tokens
                table.computed[place] = good // TILE * TILE
                table.prompt_length[place] = (length - 1) // TILE * TILE
                self.scheduler.prefilling.append(place)
        return drafting
