"""The engine on tiny models: right by transformers, and the same bytes however the rows come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compiled import paths
from engines import (
    EDGES,
    IdsAsText,
    assert_blocks_are_free,
    assert_logits_of_transformers,
    compare_logits,
    engine_of,
    prompts_of,
    run,
    tokens,
)

from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True},
    "llama-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "qwen2-mixed": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
}

PLAIN = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_that_of_transformers(make_model: Callable[..., Path], variant: str) -> None:
    model = make_model(variant.partition("-")[0], **VARIANTS[variant])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = prompts_of(64, 200)
    ours = tokens(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=16, ignore_eos=True)))
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + ours[row]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ours[row], f"row {row}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(make_model: Callable[..., Path], variant: str) -> None:
    assert_logits_of_transformers(make_model(variant.partition("-")[0], **VARIANTS[variant]))


@pytest.mark.parametrize(
    ("dtype", "quantization", "bound"),
    [
        ("bfloat16", "none", 0.03),
        ("float32", "w8a8-int8", 0.05),
        ("bfloat16", "w8a8-int8", 0.05),
        ("bfloat16", "w8a8-int8+head", 0.05),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fewer_bits_stay_near(
    make_model: Callable[..., Path], family: str, dtype: str, quantization: str, bound: float
) -> None:
    model = make_model(family)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = list(compare_logits(engine_of(model, dtype=dtype, quantization=quantization), oracle, EDGES))
    ours, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
    assert 0 < (ours - expected).norm() / expected.norm() < bound


KV_TYPES = [("bfloat16", torch.bfloat16), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)]
SETTINGS = {
    "alone": {"max_num_seqs": 1},
    "small chunks": {"max_num_batched_tokens": 64},
    "uneven chunks": {"max_num_batched_tokens": 150, "max_num_seqs": 5},
    "large chunks": {"max_num_batched_tokens": 2048, "max_num_seqs": 40},
}


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("float32", "none"),
        ("float32", "w8a8-int8"),
        ("bfloat16", "w8a8-int8"),
        ("bfloat16", "w8a8-int8+head"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_depends_on_nothing_but_itself(
    make_model: Callable[..., Path], dtype: str, quantization: str, temperature: float
) -> None:
    model = make_model("mistral", sliding_window=100)
    prompts = prompts_of(40, 250)
    params = SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True, top_p=0.95)
    requests = Requests.of(prompts, params, seeds=range(100, 140))
    common = {"dtype": dtype, "quantization": quantization}
    together = tokens(engine_of(model, **common), requests)
    assert len({tuple(t) for t in together.values()}) > 30, "rows that all say the same prove nothing"
    for name, setting in SETTINGS.items():
        assert tokens(engine_of(model, **common, **setting), requests) == together, name
    shuffled = np.random.default_rng(1).permutation(40)
    assert tokens(engine_of(model, **common), requests.take(shuffled)) == together
    shards = [tokens(engine_of(model, **common), requests.take(np.arange(i, 40, 3))) for i in range(3)]
    assert shards[0] | shards[1] | shards[2] == together


@pytest.mark.parametrize(("kv_cache_dtype", "stored"), KV_TYPES)
def test_a_smaller_kv_cache_changes_little_and_depends_on_no_batch(
    make_model: Callable[..., Path], kv_cache_dtype: str, stored: torch.dtype
) -> None:
    model = make_model("llama")
    requests = Requests.of(prompts_of(30, 200), SamplingParams(max_tokens=8, ignore_eos=True))
    exact = tokens(engine_of(model), requests)
    engine = engine_of(model, kv_cache_dtype=kv_cache_dtype)
    assert engine.runner.caches[0].key.dtype == stored
    small = tokens(engine, requests)
    assert small == tokens(engine_of(model, kv_cache_dtype=kv_cache_dtype, max_num_seqs=3), requests)
    first = [exact[row][0] == small[row][0] for row in exact]
    assert sum(first) >= 27  # logits of this model are far apart


def test_ends_at_end_of_text_of_any_id_unless_ignored(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    prompts = prompts_of(20, 60)
    free = tokens(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=20, ignore_eos=True)))
    eos = (free[0][3], free[1][5])
    ended = run(engine_of(model, IdsAsText(eos_ids=eos)), Requests.of(prompts, SamplingParams(max_tokens=20)))
    stopped = 0
    for row, (new, reason) in ended.items():
        first = next((i for i, t in enumerate(free[row]) if t in eos), None)
        assert new == (free[row] if first is None else free[row][: first + 1])
        assert reason is (FinishReason.LENGTH if first is None else FinishReason.STOP)
        stopped += first is not None
    assert stopped >= 2


def test_ends_at_a_stop_string_across_tokens(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    prompts = prompts_of(6, 60)
    free = tokens(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=20, ignore_eos=True)))
    stop = "".join(chr(256 + t) for t in free[2][4:7])
    ended = run(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop,))))
    text = "".join(chr(256 + t) for t in free[2])
    assert ended[2] == (free[2][: text.index(stop) + len(stop)], FinishReason.STOP)
    assert sum(reason is FinishReason.STOP for _, reason in ended.values()) < 6


@pytest.mark.parametrize(("longest", "block_size"), [(12, 16), (70, 64), (88, 32), (100, 16)])
def test_a_context_need_not_be_a_multiple_of_anything(
    make_model: Callable[..., Path], longest: int, block_size: int
) -> None:
    prompts = [list(range(2, longest - 2)), [5]]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    model = make_model("llama")
    found = tokens(engine_of(model, max_model_len=longest, block_size=block_size), Requests.of(prompts, params))
    assert found == tokens(engine_of(model), Requests.of(prompts, params))


def test_a_pool_that_is_too_small_for_all_admits_fewer_and_loses_none(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    requests = Requests.of(prompts_of(40, 250), SamplingParams(max_tokens=12, ignore_eos=True))
    engine = engine_of(model, kv_cache_tokens=512)
    assert tokens(engine, requests) == tokens(engine_of(model), requests)
    assert engine.stats().preemptions == 0


def test_values_that_are_not_finite_end_as_an_error_and_spoil_no_other_row(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    prompts = prompts_of(12, 100)
    for prompt in prompts:
        prompt[:] = [t if t != 7 else 8 for t in prompt]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    clean = run(engine_of(model), Requests.of(prompts, params))
    clean = {row: done for row, done in clean.items() if 7 not in done[0]}
    prompts[3][0] = 7
    engine = engine_of(model, max_num_seqs=4)
    engine.runner.decoder.embedding[7] = float("nan")
    engine.add(Requests.of(prompts, params))
    errors = {}
    poisoned: dict[int, tuple[list[int], FinishReason]] = {}
    while engine.unfinished:
        c = engine.step()
        errors |= c.errors
        for i, row in enumerate(c.rows.tolist()):
            poisoned[row] = (c.tokens_of(i), FinishReason(c.finish_reasons[i]))
    assert poisoned[3] == ([], FinishReason.ERROR)
    assert errors[3].code == "not_finite"
    assert len(clean) > 6
    assert all(poisoned[row] == done for row, done in clean.items() if row != 3)


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_rows_that_are_dropped_leave_nothing_behind(make_model: Callable[..., Path], steps: int) -> None:
    """Neither places nor blocks, nor values that are not finite: nobody has looked at what they computed."""
    model = make_model("qwen3")
    common = prompts_of(1, 200)[0]
    requests = Requests.of([*prompts_of(8, 300), *(common + prompt for prompt in prompts_of(8, 100))], PLAIN)
    expected = tokens(engine_of(model), requests)
    engine = engine_of(model, max_num_seqs=6, max_num_batched_tokens=64)
    engine.add(requests)
    for _ in range(steps):
        engine.step()
    assert engine.scheduler.prefilling and engine.unfinished
    used = np.unique(np.concatenate([engine.table.blocks[place] for place in np.flatnonzero(engine.table.active)]))
    for cache in engine.runner.caches:
        cache.key[used[used > 0]] = float("nan")
    engine.drop()
    assert not engine.unfinished
    assert_blocks_are_free(engine)
    assert tokens(engine, requests.take(np.array([0]))) == {0: expected[0]}
    assert tokens(engine, requests) == expected


def test_stats_count_what_was_done(make_model: Callable[..., Path]) -> None:
    prompts = prompts_of(20, 100)
    engine = engine_of(make_model("qwen3"), quantization="w8a8-int8")
    done = tokens(engine, Requests.of(prompts, SamplingParams(max_tokens=5)))
    stats = engine.stats()
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.completion_tokens == sum(map(len, done.values()))
    assert sum(size * steps for size, steps in stats.step_sizes.items()) >= stats.prompt_tokens + stats.padded_tokens
    assert stats.steps == sum(stats.step_sizes.values())
    assert stats.operations > 0 and stats.peak_operations_per_second > 0 and stats.weight_bytes > 0
    assert "linear_w8a8" in stats.kernels


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_engines_side_by_side_tell_their_own_kernels(
    make_model: Callable[..., Path], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", path)
    model = make_model("llama")
    settings = {"cpu_path": "reference"}
    plain, quantized = engine_of(model, **settings), engine_of(model, quantization="w8a8-int8", **settings)
    assert plain.stats().kernels == {"linear": "cpu"}
    used = {op: used.partition(",")[0] for op, used in quantized.stats().kernels.items()}
    assert used == {"linear": "cpu", "linear_w8a8": path}


@pytest.mark.parametrize("path", paths())
def test_an_engine_tells_its_kernels_in_c(make_model: Callable[..., Path], path: str) -> None:
    engine = engine_of(make_model("llama"), quantization="w8a8-int8", cpu_path=path)
    tokens(engine, Requests.of([[5, 6]], SamplingParams(max_tokens=2)))
    in_c = dict.fromkeys(["attention", "activation", "norm", "rotate_and_store", "linear_w8a8", "sampling"], path)
    assert engine.stats().kernels == {"linear": "cpu", **in_c}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"quantization": "w3a3"}, "quantization is 'w3a3'"),
        ({"quantization": "none+head"}, "quantization is 'none+head'"),
        ({"quantization": "w8a8-fp8"}, "the CPU multiplies no fp8: float8 needs a GPU"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype is 'fp4'"),
        ({"device": "tpu"}, "device is 'tpu'; it must be cpu or cuda"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization is 1.2; it must be from 0.05 to 1"),
        ({"max_model_len": 1024}, "max_model_len is 1024; it must be from 2 to 512"),
        ({"max_num_batched_tokens": 32}, "max_num_batched_tokens is 32; it must be at least 64"),
        ({"block_size": 24}, "block_size is 24"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ],
)
def test_settings_out_of_bounds_are_named(make_model: Callable[..., Path], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        engine_of(make_model("llama"), **changes)
    assert words in str(error.value)


def test_a_row_that_does_not_fit_is_named(make_model: Callable[..., Path]) -> None:
    engine = engine_of(make_model("llama"))
    with pytest.raises(ValueError, match="row 1 has 500 prompt tokens and max_tokens 13"):
        engine.add(Requests.of([[2] * 499, [2] * 500], SamplingParams(max_tokens=13)))


def test_a_tokenizer_of_another_model_is_refused(make_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="tokenizer has 321 tokens, the model only 320"):
        engine_of(make_model("llama"), IdsAsText(vocab_size=321))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sharded_bf16_checkpoints_load_alike(make_model: Callable[..., Path], family: str, tmp_path: Path) -> None:
    model = make_model(family, dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="100KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    requests = Requests.of(prompts_of(5, 50), SamplingParams(max_tokens=4))
    assert tokens(engine_of(tmp_path), requests) == tokens(engine_of(model), requests)
