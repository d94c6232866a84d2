"""Make an engine that has its process to itself."""

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.host import allocator
from batchinfer.host.own_process import own_process
from batchinfer.text.tokenizer import Tokenizer


def own_engine(config: EngineConfig, tokenizer: Tokenizer) -> Engine:
    """Set up this process for an engine alone, and return the engine. Raises `ValueError` saying what does not fit."""
    own_process()
    engine = Engine(config, tokenizer)
    allocator.keep_freed_memory()
    return engine
