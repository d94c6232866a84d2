"""Engines on tiny models, and runs of them to the end."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""The shape of a model that Triton's interpreter runs in reasonable time."""


class IdsAsText(Tokenizer):
    """Token i is the i-th character from U+0100 on."""

    def __init__(self, vocab_size: int = 320, eos_ids: tuple[int, ...] = (1,)) -> None:
        self.vocab_size, self.eos_ids = vocab_size, eos_ids

    def decode_batch(self, token_ids: Any, offsets: Any) -> list[str]:
        return ["".join(chr(256 + t) for t in token_ids[a:b]) for a, b in pairwise(offsets)]


def prompts_of(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 320, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def engine_of(model: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Engine:
    base = EngineConfig(model, max_model_len=512, max_num_seqs=16, max_num_batched_tokens=256, kv_cache_tokens=8192)
    return Engine(replace(base, **changes), tokenizer or IdsAsText())


def run(engine: Engine, requests: Requests) -> dict[int, tuple[list[int], FinishReason]]:
    done: dict[int, tuple[list[int], FinishReason]] = {}
    for c in engine.generate(requests):
        for i, row in enumerate(c.rows.tolist()):
            assert row not in done
            done[row] = (c.tokens_of(i), FinishReason(c.finish_reasons[i]))
    assert_blocks_are_free(engine)
    return done


def assert_blocks_are_free(engine: Engine) -> None:
    """Check that no block and no state is in use or promised, once no sequence is left."""
    for manager in (engine.scheduler.manager, engine.scheduler.states):
        if manager is not None:
            free = manager._free[1:]
            assert free.all() and manager._unpromised == len(free)


def tokens(engine: Engine, requests: Requests) -> dict[int, list[int]]:
    return {row: new for row, (new, _) in run(engine, requests).items()}


# Prompts with lengths around the edges of blocks and tiles.
EDGES = [np.random.default_rng(n).integers(2, 320, n).tolist() for n in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 400)]


def assert_logits_of_transformers(model: Path) -> None:
    """A checkpoint in float32 gives the logits that transformers computes, for the prompts of `EDGES`."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = list(compare_logits(engine_of(model), oracle, EDGES))
    assert len(pairs) == 2 * len(EDGES)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def compare_logits(engine: Engine, oracle: Any, prompts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, the oracle's) logits [V] of the first and the second new token of each prompt."""
    for known, ours in logits_of(engine, prompts):
        with torch.no_grad():
            yield ours, oracle(torch.from_numpy(known)[None]).logits[0, -1]


def logits_of(engine: Engine, prompts: list[list[int]]) -> Iterator[tuple[Any, Tensor]]:
    """(known tokens, logits [V] of the next one), for the first and the second new token of each prompt."""
    engine.add(Requests.of(prompts, SamplingParams(max_tokens=2, ignore_eos=True)))
    while (batch := engine.scheduler.schedule()) is not None:
        with torch.inference_mode():
            logits = engine.runner.decoder.forward(batch, engine.runner.caches)[: len(batch.sequences)]
        for place, ours in zip(batch.sequences.tolist(), logits, strict=True):
            yield engine.table.tokens[place, : engine.table.length[place]].astype(np.int64), ours
        engine.scheduler.update(batch, logits.argmax(-1).numpy())
        for place in batch.sequences.tolist():
            if engine.table.length[place] == engine.table.end[place]:
                engine.scheduler.finish(place)
