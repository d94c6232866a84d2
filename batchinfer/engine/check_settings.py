"""Check an engine's settings against their bounds and the model."""

from batchinfer.engine.config import BLOCK_SIZES, LEAST_BATCHED_TOKENS, LEAST_GPU_SHARE, EngineConfig
from batchinfer.models.config import ModelConfig
from batchinfer.text.tokenizer import Tokenizer


def check_settings(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` naming the setting that is out of its bounds, or that the tokenizer does not fit."""
    if config.block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {config.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if config.prefix_grain % config.block_size:
        raise ValueError(
            f"prefix_grain is {config.prefix_grain}; it must be a multiple of the block size, {config.block_size}"
        )
    if config.max_num_batched_tokens < LEAST_BATCHED_TOKENS:
        raise ValueError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}; it must be at least {LEAST_BATCHED_TOKENS}"
        )
    if not LEAST_GPU_SHARE <= config.gpu_memory_utilization <= 1:
        raise ValueError(
            f"gpu_memory_utilization is {config.gpu_memory_utilization}; it must be from {LEAST_GPU_SHARE} to 1"
        )
    if config.max_num_seqs < 1:
        raise ValueError(f"max_num_seqs is {config.max_num_seqs}; it must be at least 1")
    if not 2 <= config.max_model_len <= model.max_positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}; it must be from 2 to {model.max_positions} for this model"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}: they do not belong "
            "together"
        )
