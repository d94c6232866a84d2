"""`Engine`: requests in, completions out. Schedule, run, update."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from batchinfer import allocator
from batchinfer.batch import Batch
from batchinfer.block_manager import BlockManager
from batchinfer.config import EngineConfig, EngineStats
from batchinfer.kernels import dispatch
from batchinfer.kernels.attention import TILE
from batchinfer.model_config import ModelConfig, read_model_config
from batchinfer.request import Completions, FinishReason, Requests, RowError
from batchinfer.runner import ModelRunner, bytes_per_token, measure_peak
from batchinfer.scheduler import Scheduler
from batchinfer.sequence import SequenceTable
from batchinfer.tokenizer import Tokenizer

NOT_FINITE = RowError("not_finite", "the model computed values that are not finite for this row")


class Engine:
    """One model on one device. `add()` requests, then `step()` until nothing is `unfinished`."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """Load the model. A `ValueError` says which setting, field or tensor does not fit."""
        started = time.perf_counter()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = read_model_config(config.model)
        _check(config, model, tokenizer)
        self.tokenizer = tokenizer
        allocator.return_freed_memory()
        self.runner = ModelRunner(config, model)
        allocator.keep_freed_memory()
        self._stats = EngineStats(device=f"cpu, {torch.get_num_threads()} threads")
        self._stats.notes += self.runner.notes
        blocks = self._pool_blocks(config, model)
        self.runner.allocate(blocks, config.block_size)
        self.table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
        self.scheduler = Scheduler(
            self.table,
            BlockManager(blocks),
            set(model.windows),
            config.max_num_batched_tokens,
            self.runner.decoder.row_grain,
        )
        self.eos_ids = np.array(tokenizer.eos_ids, np.int64)
        self._stats.load_seconds = time.perf_counter() - started

    def add(self, requests: Requests) -> None:
        """Queue requests. A `ValueError` names a row whose prompt and new tokens do not fit the context."""
        lengths = np.diff(requests.offsets)
        most = np.array([p.max_tokens for p in requests.params], np.int64)[requests.param_index]
        for i in np.flatnonzero((lengths < 1) | (lengths + most > self.table.max_tokens))[:1]:
            raise ValueError(
                f"row {requests.rows[i]} has {lengths[i]} prompt tokens and max_tokens {most[i]}; there must be a "
                f"prompt, and both together must be at most max_model_len {self.table.max_tokens}"
            )
        self.scheduler.add(requests)

    @property
    def unfinished(self) -> int:
        """Rows that wait or run."""
        return self.scheduler.unfinished

    def take_admitted(self) -> list[int]:
        """Rows that began since the last call."""
        admitted, self.scheduler.admitted = self.scheduler.admitted, []
        return admitted

    def step(self) -> Completions:
        """Compute one step; the rows that it finished, often none."""
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        if batch is None:
            return self._completions([], {})
        tokens, finite = self.runner.run(batch)
        self.scheduler.update(batch, tokens)
        done = self._finished(batch.sequences, tokens, finite)
        completions = self._completions(list(done), done)
        for place, reason in done.items():
            blocks = self.scheduler.finish(place)
            if reason is FinishReason.ERROR:
                self.runner.clear_blocks(blocks)
        self._count(batch, time.perf_counter() - started)
        return completions

    def generate(self, requests: Requests) -> Iterator[Completions]:
        """Run requests to the end; completions as they come."""
        self.add(requests)
        while self.unfinished:
            completions = self.step()
            if len(completions):
                yield completions

    def stats(self) -> EngineStats:
        """What was counted so far; the device's peak is measured when all is done, so that no start waits for it."""
        stats = self._stats
        if stats.steps and not self.unfinished and not stats.peak_operations_per_second:
            stats.peak_operations_per_second = measure_peak(self.runner.scheme, self.runner.dtype)
        stats.weight_bytes = self.runner.decoder.weight_bytes
        stats.kv_cache_bytes = self.runner.kv_cache_bytes
        stats.peak_memory_bytes = peak_memory_bytes()
        stats.kernels = dict(dispatch.chosen)
        return stats

    def _pool_blocks(self, config: EngineConfig, model: ModelConfig) -> int:
        """Blocks for what the plan asks, or for one longest sequence; both within the memory that is available."""
        asked = max(config.kv_cache_tokens, config.max_model_len)
        a_token = bytes_per_token(model, self.runner.kv_dtype)
        available = _available_memory() * 9 // 10
        fits = available // a_token
        if fits < config.max_model_len:
            raise ValueError(
                f"max_model_len {config.max_model_len} needs {config.max_model_len * a_token / 1e6:.0f} MB of keys and "
                f"values ({a_token} bytes a token), but {available / 1e6:.0f} MB are available; lower --max-model-len "
                "or take --kv-cache-dtype int8"
            )
        if fits < asked:
            self._stats.notes.append(
                f"memory holds keys and values of {fits} tokens where the plan asks for {asked}: "
                "fewer rows run side by side"
            )
        return min(asked, fits) // config.block_size + 2

    def _finished(
        self, places: NDArray[np.int64], tokens: NDArray[np.int64], finite: NDArray[np.bool_]
    ) -> dict[int, FinishReason]:
        """The sequences that end with these tokens, and why; of several reasons the last named here wins."""
        table = self.table
        ended = np.isin(tokens, self.eos_ids) & ~table.ignore_eos[places]
        done = {int(p): FinishReason.LENGTH for p in places[table.length[places] >= table.end[places]]}
        done |= dict.fromkeys(self._stopped([p for p in places.tolist() if p in table.stop]), FinishReason.STOP)
        done |= {int(p): FinishReason.STOP for p in places[ended]}
        done |= {int(p): FinishReason.ERROR for p in places[~finite]}
        return done

    def _stopped(self, places: list[int]) -> list[int]:
        """Of sequences with stop strings, those whose newest token completes one."""
        table = self.table
        # A token is a byte or more, so a stop string ends within as many tokens; some before them for context.
        longest = [max(len(stop.encode()) for stop in table.stop[p]) + 8 for p in places]
        tails = [table.generated(p)[-most:] for p, most in zip(places, longest, strict=True)]
        if not tails:
            return []
        texts = self.tokenizer.decode_batch(np.concatenate(tails), np.cumsum([0, *map(len, tails)]))
        return [p for p, text in zip(places, texts, strict=True) if any(stop in text for stop in table.stop[p])]

    def _completions(self, places: list[int], done: dict[int, FinishReason]) -> Completions:
        failed = [p for p in places if done[p] is FinishReason.ERROR]
        new = [self.table.generated(p) if p not in failed else np.empty(0, np.int32) for p in places]
        self._stats.completion_tokens += sum(map(len, new))
        return Completions(
            rows=self.table.row[places],
            token_ids=np.concatenate(new) if new else np.empty(0, np.int32),
            offsets=np.cumsum([0, *map(len, new)]),
            finish_reasons=np.array([done[p] for p in places], np.int8),
            errors={int(self.table.row[p]): NOT_FINITE for p in failed},
        )

    def _count(self, batch: Batch, seconds: float) -> None:
        stats, decoder = self._stats, self.runner.decoder
        tokens = batch.prompt_tokens + batch.decode_tokens
        share = batch.prompt_tokens / tokens
        stats.steps += 1
        stats.prompt_tokens += batch.prompt_tokens
        stats.prefill_seconds += seconds * share
        stats.decode_seconds += seconds * (1 - share)
        stats.padded_tokens += len(batch.tokens) - tokens
        stats.step_sizes[len(batch.tokens)] = stats.step_sizes.get(len(batch.tokens), 0) + 1
        stats.operations += tokens * decoder.operations_per_token
        stats.operations += len(batch.sequences) * decoder.head.operations_per_row


def _check(config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.block_size not in (8, 16, 32, 64):
        raise ValueError(f"block_size is {config.block_size}; it must be 8, 16, 32 or 64")
    if config.max_num_batched_tokens < TILE:
        raise ValueError(f"max_num_batched_tokens is {config.max_num_batched_tokens}; it must be at least {TILE}")
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


def _status_bytes(path: str, field: str) -> int:
    """A field of a file in /proc that is given in kB; 0 where the system has none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def peak_memory_bytes() -> int:
    """The most that this process had resident."""
    return _status_bytes("/proc/self/status", "VmHWM")


def _available_memory() -> int:
    return _status_bytes("/proc/meminfo", "MemAvailable") or 1 << 34
