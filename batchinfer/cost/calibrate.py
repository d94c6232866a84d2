"""Time steps of small decoders with random weights, and fit a device's `StepCost` to them."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.cost.memory_speed import measure_memory
from batchinfer.cost.step_cost import (
    KV_CACHES,
    PRODUCTS,
    DeviceCost,
    Floats,
    Products,
    StepCost,
    Weights,
    Work,
    layer_weights,
    quantities,
)
from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Completions, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.step_policy import tiles_of
from batchinfer.formats.compressed_tensors_writer import quantization_config
from batchinfer.formats.scheme import weight_scheme
from batchinfer.kernels.grain import TILE
from batchinfer.models.batch import Batch
from batchinfer.models.hub import read_config
from batchinfer.text.tokenizer import Tokenizer

REPEATS = 2  # least number of timed repeats of each step
REPEAT_SECONDS = 0.1  # each workload is repeated for this long at least

# hidden, intermediate, layers, heads, key heads, head size, vocabulary. The first shape is for attention, and has many
# layers, which tells a layer's time from a step's. The last one is about as large as the caches of processors.
SHAPES = ((256, 768, 6, 8, 4, 32, 2048), (640, 1792, 3, 10, 5, 64, 6144), (1536, 4096, 2, 16, 4, 96, 10240))


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def _drawn(top_k: int, top_p: float) -> SamplingParams:
    return SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.7, top_k=top_k, top_p=top_p)


# A small Qwen3.5, for layers that keep a state. The states are as large as those of its real models, so that they come
# from memory in each layer.
WITH_STATES = {
    "model_type": "qwen3_5_text", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 16,
    "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "vocab_size": 2048, "max_position_embeddings": 2048,
}  # fmt: skip


# Rows that run together: lengths of prompts in tokens, how they are answered, and the name of that kind of sampling.
Workload = tuple[list[int], SamplingParams, str]

BY_ROWS: list[Workload] = [
    *(([length], _greedy(1), "greedy") for length in (8, 16, 32, 64, 128, 256, 512)),
    *(([1] * count, _greedy(4), "greedy") for count in (1, 8, 16, 32, 64)),
]
BY_CONTEXT: list[Workload] = [(lengths, _greedy(4), "greedy") for lengths in ([1000], [480] * 4, [96] * 32)]
STATES: list[Workload] = [
    *((lengths, _greedy(1), "greedy") for lengths in ([8], [64], [256], [512], [64] * 8)),
    *(([1] * count, _greedy(4), "greedy") for count in (1, 8, 24)),
]
# Answers are long enough that in the end all rows decode side by side.
MANY_KEYS: list[Workload] = [([480] * 24, _greedy(26), "greedy")]
# With random weights all tokens are about equally likely. top_k leaves as few as filters leave with a trained model.
BY_SAMPLING: list[Workload] = [([1] * 64, _drawn(0, 1.0), "drawn"), ([1] * 64, _drawn(20, 0.8), "filtered")]


class _NoText(Tokenizer):
    """A tokenizer for rows whose token ids are never turned into text."""

    def __init__(self) -> None:
        self.vocab_size, self.eos_ids = 1, ()


class _TimedEngine(Engine):
    """An engine that ends each step before the next one begins, and keeps the last step's `batch`."""

    def step(self) -> Completions:
        self._begin()
        return self._end(self.steps.popleft())

    def _count(self, batch: Batch, seconds: float) -> None:
        super()._count(batch, seconds)
        self.batch = batch


def measure(device: str, say: Callable[[str], None], path: str = "auto") -> DeviceCost:
    """Time steps on the device and fit the constants to them; takes some minutes on a CPU.

    `say` is called with a line of text at each stage; `path` is that of a CPU's kernels. The constants are fitted to
    the fastest repeats, because other programs on the machine only ever add time. They are then multiplied by the usual
    ratio of the median repeat to the fastest, because a job takes the usual time and not the best. Raises `ValueError`
    if the device lacks something.
    """
    costs: dict[str, StepCost] = {}
    load_seconds, operations = {}, {}
    say("timing reads of memory")
    memory = measure_memory(device, path)
    with tempfile.TemporaryDirectory() as folder:
        models = [_write_shape(Path(folder) / str(i), _plain_shape(shape)) for i, shape in enumerate(SHAPES)]
        with_states = _write_shape(Path(folder) / "states", WITH_STATES)
        for name, products in PRODUCTS.items():
            for model in (*models, with_states):
                _store_in(model, products)
            say(f"timing steps in {name}")
            measured, longer = [], list[float]()
            automatic = products.kv_cache(device)
            states = [(with_states, automatic, STATES)] if device == "cpu" else []  # a GPU has no kernels for them
            for model, kv_cache, workloads in [*states, *_plan(models, automatic)]:
                engine = _engine(model, device, path, products, kv_cache)
                shape = engine.runner.decoder.config
                weights = Weights(products.layer_bytes, products.head_bytes, memory.cache_bytes)
                for lengths, params, sampling in workloads:
                    work, seconds, middle = _timed(engine, lengths, params)
                    longer += (middle / seconds).tolist()
                    measured.append((quantities(work, shape, weights, kv_cache, sampling), seconds))
            stats = engine.stats()  # the engine of the largest model comes last
            load_seconds[name] = stats.load_seconds / layer_weights(shape)
            operations[name] = stats.peak_operations_per_second
            fitted = StepCost.fit(measured, operations[name], memory.byte_seconds[name])
            costs[name] = fitted.times(float(np.median(longer)))
    return DeviceCost(costs, load_seconds, _start_seconds(), operations, memory.bytes_per_second, memory.cache_bytes)


def _plan(models: list[Path], automatic: str) -> Iterator[tuple[Path, str, list[Workload]]]:
    """Yield (model, type of keys and values, workloads), the largest model last.

    `automatic` is the type of keys and values that a job has if its user names none.
    """
    for kv_cache in KV_CACHES:
        if kv_cache != automatic:
            yield models[0], kv_cache, BY_CONTEXT
    for model in models[:-1]:
        keys = MANY_KEYS if model == models[0] else []
        yield model, automatic, [*BY_ROWS, *BY_CONTEXT, *keys, *BY_SAMPLING]
    yield models[-1], automatic, BY_ROWS


def _plain_shape(shape: tuple[int, ...]) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = shape
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


def _write_shape(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _store_in(model: Path, products: Products) -> None:
    """Let the random weights of a shape be those of a checkpoint that these products take."""
    config = read_config(model)
    config.pop("quantization_config", None)
    if products.quantization == "w4a8":
        config["quantization_config"] = quantization_config(weight_scheme("w4a8", None), ["lm_head"])
    (model / "config.json").write_text(json.dumps(config))


def _engine(model: Path, device: str, path: str, products: Products, kv_cache: str) -> _TimedEngine:
    config = EngineConfig(
        model=model,
        device=device,
        cpu_path=path,
        dtype=products.dtype,
        quantization=products.quantization,
        kv_cache_dtype=kv_cache,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        kv_cache_tokens=64 * 1024,
        random_weights=True,
        speculation=Speculation("off"),
        prefix_sharing=False,
        learned_admission=False,
    )
    return _TimedEngine(config, _NoText())


def _timed(engine: _TimedEngine, lengths: list[int], params: SamplingParams) -> tuple[Work, Floats, Floats]:
    """Run these rows several times; return the work [n] of their n steps, and each one's least and median seconds [n].

    The first run is left out.
    """
    runs: list[list[float]] = []
    until = time.perf_counter() + REPEAT_SECONDS
    while len(runs) <= REPEATS or time.perf_counter() < until:
        engine.add(Requests.of([[0] * length for length in lengths], params))
        batches, seconds = [], []
        while engine.unfinished:
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
            batches.append(engine.batch)
        runs.append(seconds)
    work = [_work(batch, engine.table.block_size) for batch in batches]
    return Work(*np.array(work).T), np.min(runs[1:], axis=0), np.median(runs[1:], axis=0)


def _work(batch: Batch, block: int) -> list[int]:
    """Return the fields of `Work` for one step."""
    contexts = batch.positions[batch.prompt_tokens : batch.prompt_tokens + batch.query_tokens] + 1
    tiles = [index for chunk in batch.chunks for index in tiles_of(chunk.start, chunk.end)]
    return [
        len(batch.tokens),
        len(batch.sampled),
        batch.query_tokens,
        int((-(-contexts // block) * block).sum()),
        len(tiles),
        sum(index + 1 for index in tiles) * TILE,
        len(set(tiles)),
    ]


def _start_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import batchinfer.engine.engine"], check=True, env={**os.environ})
    return time.perf_counter() - started
