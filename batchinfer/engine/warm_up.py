"""`warm_up`: runs steps of the sizes at which kernels take other tiles, so that none is compiled in mid-job."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.largest_step import largest_step, probe_blocks
from batchinfer.engine.model_runner import ModelRunner


def warm_up(runner: ModelRunner, config: EngineConfig, sizes: tuple[int, ...]) -> None:
    """Compute steps of `sizes` tokens on `runner`, whose KV cache is allocated and holds nothing yet.

    Compiling a kernel takes the host a second or more, and the GPU waits for it. The steps use the first blocks of the
    pool and wipe them again.
    """
    for smaller in warm_up_sizes(config, sizes):
        grains = runner.decoder.row_grain, runner.logits_grain
        runner.launch(largest_step(smaller, runner.attention_inputs, *grains)).wait()
        runner.clear_blocks(np.arange(1, probe_blocks(smaller)))


def warm_up_sizes(config: EngineConfig, sizes: tuple[int, ...]) -> Iterator[EngineConfig]:
    """Yield configs whose largest steps are those to compute: as many rows, and as few, as have so many tokens."""
    for tokens in sorted(
        {min(size, config.max_num_batched_tokens) for size in sizes} | {config.max_num_batched_tokens}
    ):
        most = min(tokens, config.max_num_seqs, config.usual_batch)
        for rows in sorted({1, most}):
            yield replace(config, max_num_seqs=rows, max_num_batched_tokens=tokens, expected_batch=rows)
