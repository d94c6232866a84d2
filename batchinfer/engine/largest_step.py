"""`largest_step`: the step that takes the most memory, which an engine runs before it allocates the KV cache."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.admission import Admission
from batchinfer.engine.attention_inputs import AttentionInputs
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.models.batch import Batch


class _SameBlocks(BlockManager):
    """Gives all sequences the same blocks.

    What is in them does not matter when memory is measured, so the pool need hold only one sequence, and a model that
    fits is not refused for the keys and values of rows that the job does not have.
    """

    def promise(self, count: int) -> bool:
        return True

    def take(self, count: int) -> NDArray[np.int64]:
        return np.arange(1, count + 1)


def largest_step(config: EngineConfig, inputs: AttentionInputs, row_grain: int, logits_grain: int) -> Batch:
    """Return a step with as many sequences as the job can run side by side, and as many prompt tokens as fit.

    Its keys and values go to the first `probe_blocks(config)` blocks.
    """
    sequences, length = _sequences_and_length(config)
    table = SequenceTable(sequences, config.max_model_len, config.block_size)
    manager = _SameBlocks(1)
    admission = Admission(table, manager, share=False, lengths=None)
    budget, eos_ids = config.max_num_batched_tokens, np.empty(0, np.int64)
    scheduler = Scheduler(table, manager, admission, inputs, budget, row_grain, logits_grain, eos_ids)
    scheduler.add(Requests.of([[0] * length] * sequences, SamplingParams(max_tokens=1, temperature=1.0)))
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def probe_blocks(config: EngineConfig) -> int:
    """Return the number of blocks that `largest_step` needs: those of one sequence, and block 0."""
    return _sequences_and_length(config)[1] // config.block_size + 2


def _sequences_and_length(config: EngineConfig) -> tuple[int, int]:
    sequences = min(config.max_num_seqs, config.usual_batch, config.max_num_batched_tokens)
    return sequences, max(1, min(config.max_num_batched_tokens // sequences, config.max_model_len - 1))
