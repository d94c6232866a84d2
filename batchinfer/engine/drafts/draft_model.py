"""`DraftModel`: a smaller model with the same tokenizer drafts what may follow.

The target is the model that the job runs. The draft model samples with the target's parameters and the target's noise.
So its drafts are accepted wherever the two models agree about the likely tokens, and not only where both draw the same
token by chance. The bits of the draft model's keys and values do not matter: they decide which drafts are tried, never
what the job writes.
"""

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.admission import Admission
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.drafts.lookup import Proposals
from batchinfer.engine.drafts.step_times import StepTimes
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.transfer import Sampled
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch
from batchinfer.models.config import read_model_config

LEAST_SHARE = 0.3  # of a target step's time: a draft step takes at least that, because launching it costs the same
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "seed", "prompt_length", "params", "changes_logits", "bans",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def load_draft_model(config: EngineConfig) -> ModelRunner | None:
    """Load the draft model that `config.speculation` names; None if it names none or does not use it.

    Raises `ValueError` if the model does not fit the configuration.
    """
    if config.speculation.model is None or config.speculation.method not in ("auto", "draft_model"):
        return None
    own = replace(config, model=config.speculation.model, quantization="auto", kv_cache_dtype="auto")
    return ModelRunner(own, read_model_config(own.model))


class DraftModel:
    """Runs the sequences of the target's `table` a few tokens ahead, in a table and in KV cache blocks of its own."""

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, table: SequenceTable, blocks: int, target: ModelRunner
    ) -> None:
        """Set up `runner`, whose KV cache has `blocks` blocks, as the draft model of an engine with this `config`."""
        self._vocabulary, self._target_vocabulary = (r.decoder.config.vocab_size for r in (runner, target))
        self.share = max(LEAST_SHARE, runner.decoder.weight_bytes / target.decoder.weight_bytes)
        self.runner = runner
        self.target = table
        self.table = SequenceTable(len(table.active), table.max_tokens, table.block_size)
        for column in SAMPLING:
            setattr(self.table, column, getattr(table, column))
        self.table.epoch[:] = -1
        self._taken = np.zeros_like(
            table.length
        )  # [capacity] each sequence's tokens that are known to equal the target's
        self.manager = BlockManager(blocks)
        admission = Admission(self.table, self.manager, False, None)
        inputs, grains = self.runner.attention_inputs, (self.runner.decoder.row_grain, self.runner.logits_grain)
        budget = config.max_num_batched_tokens
        self.scheduler = Scheduler(self.table, self.manager, admission, inputs, budget, *grains, np.empty(0, np.int64))
        self._times = StepTimes()

    def seconds(self, sequences: int, target_seconds: float) -> float:
        """Return the expected seconds to draft one more token for each of `sequences` sequences.

        Before any was timed, this is a share of `target_seconds`, the time of a step of the target.
        """
        return float(self._times.of(np.array([sequences]))[0]) or self.share * target_seconds

    def behind(self, places: Ints) -> int:
        """Return how many tokens of these sequences the draft model has not computed yet."""
        known = np.where(self.table.epoch[places] == self.target.epoch[places], self.table.computed[places], 0)
        return int(np.maximum(self.target.length[places] - known, 0).sum())

    def draft(self, places: Ints, most: Ints) -> Proposals:
        """Draft `most` [n] tokens for the sequences in `places` [n]; none for those that no blocks are left for."""
        started = time.perf_counter()
        self._release_ended()
        drafting = self._catch_up(places, most)
        table = self.table
        # On a GPU a step's new tokens are there for the next step, unless the host must look at them in between.
        self._compute(ahead=self.runner.late > 0 and not self.target.reads_tokens[places].any())
        table.active[:] = False
        known = self.target.length[places]
        counts = np.where(drafting, most, 0)
        o_k = np.minimum(np.arange(most.max(initial=0)), np.maximum(counts - 1, 0)[:, None])
        tokens = np.minimum(table.tokens[places[:, None], known[:, None] + o_k], self._target_vocabulary - 1)
        if drafting.any():
            self._times.observe(len(places), (time.perf_counter() - started) / o_k.shape[1])
        return Proposals(counts, tokens, np.zeros_like(counts), np.zeros(len(places), np.bool_))

    def _compute(self, ahead: bool) -> None:
        """Compute all that is left of the active sequences; wait for each step, or with `ahead` only for the last."""
        launched: list[tuple[Batch, Sampled]] = []
        while (batch := self.scheduler.schedule()) is not None:
            launched.append((batch, self.runner.launch(batch)))
            if not ahead:
                self._take(launched)
        self._take(launched)

    def _take(self, launched: list[tuple[Batch, Sampled]]) -> None:
        """Append what these steps have sampled, and empty the list. They end in order, so the last is waited for."""
        if launched:
            launched[-1][1].wait()
        for batch, sampled in launched:
            self.scheduler.update(batch, sampled.tokens.numpy())
        launched.clear()

    def _release_ended(self) -> None:
        """Free the blocks of sequences that the target has ended."""
        table = self.table
        gone = (table.epoch >= 0) & ((table.epoch != self.target.epoch) | ~self.target.active)
        for place in np.flatnonzero(gone).tolist():
            promised = int(table.promised[place])
            self.manager.release(table.remove(place), promised)
            table.promised[place] = table.computed[place] = table.length[place] = 0
            table.epoch[place] = -1

    def _catch_up(self, places: Ints, most: Ints) -> NDArray[np.bool_]:
        """Copy the tokens that the target has by now. Return bool [n]: which of the sequences get drafts."""
        table, target = self.table, self.target
        drafting = most > 0
        for i in np.flatnonzero(drafting).tolist():
            place, length = int(places[i]), int(target.length[places[i]])
            drafting[i] = self._promise(place, length + int(most[i]))
            if not drafting[i]:
                continue
            agreed = self._agreed(place, length)
            # Vocabularies may be padded to different sizes: the target may sample an id that this model lacks.
            table.tokens[place, agreed:length] = np.minimum(target.tokens[place, agreed:length], self._vocabulary - 1)
            table.epoch[place] = target.epoch[place]
            table.active[place] = True
            table.length[place], table.end[place] = length, length + int(most[i])
            table.computed[place] = self._taken[place] = table.prefill_end[place] = agreed
            if length - agreed > TILE:  # many tokens are new: compute them in tiles, all but the last ones
                table.computed[place] = agreed // TILE * TILE
                table.prefill_end[place] = self._taken[place] = (length - 1) // TILE * TILE
                self.scheduler.prefilling.append(place)
        return drafting

    def _promise(self, place: int, tokens: int) -> bool:
        """Promise the sequence blocks for `tokens` tokens in all; return False if too few are left."""
        need = max(0, self.table.blocks_for(tokens) - int(self.table.promised[place]))
        if not self.manager.promise(need):
            return False
        self.table.promised[place] += need
        return True

    def _agreed(self, place: int, length: int) -> int:
        """Return how many of the sequence's first tokens have valid keys and values here.

        They end before the first token that differs from the target's: a draft that was not accepted.
        """
        had = min(int(self.table.computed[place]), length - 1)
        first = min(int(self._taken[place]), had)
        differs = np.flatnonzero(self.table.tokens[place, first:had] != self.target.tokens[place, first:had])
        return first + int(differs[0]) if len(differs) else had
