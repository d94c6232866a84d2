"""Every path of the CPU's kernels that runs here: the model's logits, and rows that are their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compiled import paths
from engines import compare_logits, engine_of, prompts_of, tokens

from batchinfer.engine.config import Speculation
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path

EVERY_PATH = pytest.mark.parametrize("path", [REFERENCE, *paths()])


@EVERY_PATH
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "gpt_oss", "stablelm"])
def test_logits_are_those_of_transformers(make_model: Callable[..., Path], model_type: str, path: str) -> None:
    """Softcaps and windows, norms of heads, sinks and clamped activations, LayerNorm."""
    model = make_model(model_type)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for found, expected in compare_logits(engine_of(model, cpu_path=path), oracle, prompts_of(6, 200)):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@EVERY_PATH
@pytest.mark.parametrize("quantization", ["none", "w8a8-int8+head"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_row_is_its_own(make_model: Callable[..., Path], quantization: str, kv_cache_dtype: str, path: str) -> None:
    model = make_model("llama")
    common = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype, "cpu_path": path}
    params = SamplingParams(max_tokens=24, temperature=0.8, ignore_eos=True)
    requests = Requests.of(prompts_of(14, 180), params, seeds=range(14))
    engine = engine_of(model, **common)
    padded = path == REFERENCE or quantization == "none"
    assert (engine.runner.decoder.row_grain, engine.runner.logits_grain) == ((8, 8) if padded else (1, 1))
    together = tokens(engine, requests)
    changes: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "max_num_batched_tokens": 64},
        {"max_num_seqs": 5, "speculation": Speculation("ngram", gate=False)},
    ]
    for settings in changes:
        assert tokens(engine_of(model, **common, **settings), requests) == together


@pytest.mark.parametrize("path", paths())
def test_most_answers_are_those_of_the_reference(make_model: Callable[..., Path], path: str) -> None:
    """They differ in the last bits alone, which few greedy answers show."""
    requests = Requests.of(prompts_of(30, 100), SamplingParams(max_tokens=20, ignore_eos=True))
    for settings in ({}, {"quantization": "w8a8-int8"}):
        found, expected = (
            tokens(engine_of(make_model("llama"), cpu_path=each, **settings), requests) for each in (path, REFERENCE)
        )
        assert sum(found[row] == expected[row] for row in range(30)) >= 27


def test_a_path_that_does_not_run_here_is_refused() -> None:
    every = "auto, reference, avx2, avx512bw, avx512, neon"
    with pytest.raises(ValueError, match=f"cpu_path is 'sse2'; it must be one of {every}"):
        cpu_path("sse2")
    foreign = next(path for path in ("neon", "avx2") if path not in paths())
    with pytest.raises(ValueError, match=rf"cpu_path is '{foreign}', and .*; take '{cpu_path()}' or 'auto'"):
        cpu_path(foreign)
