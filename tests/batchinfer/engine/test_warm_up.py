"""A job compiles next to nothing after the warm-up: counted without a GPU, by the keys that Triton makes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of
from torch import Tensor
from triton_programs import programs

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.engine.warm_up import warm_up_sizes

MOST = 8
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 8}


def test_steps_have_as_many_tokens_in_few_rows_and_in_many() -> None:
    config = EngineConfig(Path(), max_num_seqs=100, max_num_batched_tokens=512)
    sizes = [(c.max_num_batched_tokens, c.max_num_seqs) for c in warm_up_sizes(config, (1, 16, 256, 1024))]
    assert sizes == [(1, 1), (16, 1), (16, 16), (256, 1), (256, 100), (512, 1), (512, 100)]


@pytest.mark.parametrize(
    "settings",
    [{"quantization": "w8a8-int8"}, {"quantization": "w8a8-fp8", "kv_cache_dtype": "int8"}, {"deterministic": True}],
)
def test_a_ragged_job_compiles_next_to_nothing(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Drawn and greedy rows, of 1 to 300 tokens, with up to 40 side by side, which end one by one."""
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 40, "kv_cache_tokens": 16384}
    engine = engine_of(make_model("llama", **SHAPE), speculation=Speculation("off"), **sizes, **settings)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 300, int(n)).tolist() for n in rng.integers(1, 300, 60)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.7))
    greedy = replace(requests.params[0], temperature=0.0)
    params = SamplingTable.of([replace(p, max_tokens=n) for n in range(1, 61) for p in (requests.params[0], greedy)])
    requests = replace(requests, params=params, param_index=rng.integers(0, len(params), 60).astype(np.int32))
    assert_next_to_nothing_is_compiled(engine, EngineConfig(Path(), **sizes, **settings), requests, monkeypatch)


def test_nor_does_its_draft_model(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model has another size than the target: its norms, products and activations are five programs more."""
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 6, "kv_cache_tokens": 8192}
    draft = make_model("qwen2", **SHAPE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})
    speculation = Speculation("draft_model", 4, draft, gate=False)
    engine = engine_of(make_model("llama", **SHAPE), speculation=speculation, deterministic=True, **sizes)
    prompts = [[3] * n for n in range(1, 300, 40)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7))
    config = EngineConfig(Path(), deterministic=True, **sizes)
    assert_next_to_nothing_is_compiled(engine, config, requests, monkeypatch, most=1)
    assert engine._stats.accepted  # stats() would measure the peak, in the interpreter


def assert_next_to_nothing_is_compiled(
    engine: Engine, config: EngineConfig, requests: Requests, monkeypatch: pytest.MonkeyPatch, most: int = MOST
) -> None:
    """Warm up, then run the job; every row samples the same token at once."""

    def same_token(sample: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
        tokens, finite = sample(*args)
        return torch.full_like(tokens, 7), torch.ones_like(finite)

    with programs() as compiled:
        for runner in engine._runners:
            monkeypatch.setattr(runner.backend, "sample", partial(same_token, runner.backend.sample))
        engine._warm_up(config)
        warmed = len(compiled.new)
        compiled.new.clear()
        engine.add(requests)
        while engine.unfinished:
            engine.step()
    assert warmed > 5
    assert len(compiled.new) <= most, "\n".join(compiled.new)
