"""The memory that is left for keys and values; on a GPU, by computing the largest step and looking at what it takes."""

from dataclasses import replace

import torch

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.cuda_graphs import MOST_RECORDINGS, RECORDING_BYTES
from batchinfer.engine.largest_step import largest_step, probe_blocks
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.pool_size import Room


def room_for_keys(model: ModelRunner, runners: list[ModelRunner], config: EngineConfig) -> Room:
    """Return the memory for keys and values; on a GPU, what is left after running the largest possible step."""
    if config.device == "cpu":
        return Room.on_cpu()
    activations = _step_bytes(model, config)
    rows = min(config.max_num_seqs, config.usual_batch, model.steps.most_tokens)
    decoding = replace(config, max_num_seqs=rows, max_num_batched_tokens=rows)  # one token of each sequence
    steps = {r: _step_bytes(r, decoding) * r.steps.most_tokens // rows for r in runners}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    wanted = {r: step_bytes + MOST_RECORDINGS * RECORDING_BYTES for r, step_bytes in steps.items()}
    together = sum(wanted.values())
    room = Room.on_device(total, free, activations, together, config.gpu_memory_utilization)
    for runner, step_bytes in steps.items():
        runner.steps.keep_within(room.recordings * wanted[runner] // together, step_bytes)
    return room


def _step_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    """Return the bytes of a GPU's memory that the largest step takes beside weights, keys and values."""
    runner.allocate(probe_blocks(config), config.block_size)
    batch = largest_step(config, runner.attention_inputs, runner.decoder.row_grain, runner.logits_grain)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.launch(batch).wait()
    peak = torch.cuda.max_memory_allocated() - before
    runner.caches.clear()
    return peak
