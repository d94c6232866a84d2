"""What a step is made of, and the constants that are fitted to steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import engine_of

from batchinfer.cost.step_cost import (
    CONVOLVED,
    PRODUCTS,
    ROWS,
    StepCost,
    Weights,
    Work,
    experts_touched,
    nonnegative_least_squares,
    quantities,
)
from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.grain import padded_size
from batchinfer.kernels.rows import Rows
from batchinfer.models.config import parse_model_config
from batchinfer.models.feed_forward_weights import ExpertsWeights

SHAPES = [(256, 768, 2, 8, 4, 32, 2048), (640, 1728, 4, 10, 5, 64, 6144), (1536, 4096, 3, 16, 4, 96, 10240)]
MODELS = [
    parse_model_config(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
        }
    )
    for hidden, inner, layers, heads, kv_heads, size, vocabulary in SHAPES
]  # fmt: skip
WEIGHTS = Weights(layer_bytes=1, head_bytes=2, cache_bytes=32 << 20)


def random_work(n: int, seed: int = 0) -> Work:
    rng = np.random.default_rng(seed)
    decoding = rng.integers(0, 65, n)
    tiles = rng.integers(0, 9, n)
    return Work(
        tokens=-(-(decoding + 64 * tiles + 1) // 8) * 8.0,
        sampled=-(-(decoding + tiles // 2) // 8) * 8.0,
        decoding=decoding * 1.0,
        decode_keys=decoding * 32.0 * rng.integers(1, 30, n),
        tiles=tiles * 1.0,
        tile_keys=tiles * 64.0 * rng.integers(1, 12, n),
        tile_positions=np.minimum(tiles, rng.integers(1, 9, n)) * 1.0,
    )


def test_products_are_counted_by_their_rows() -> None:
    """The last layer's behind attention see sampled rows; between two numbers of rows both count in part."""
    model = MODELS[0]
    qkv, other = 256 * 16 * 32, 256 * 256 + 3 * 256 * 768
    zero = np.zeros(3)
    work = Work(np.array([8.0, 48.0, 1024.0]), np.array([8.0, 8.0, 0.0]), zero, zero, zero, zero, zero)
    counted = quantities(work, model, WEIGHTS, "float32", "greedy")
    products = {rows: counted[f"weight by {rows} rows"].tolist() for rows in ROWS}
    assert products[8] == [2 * (qkv + other), other, 0]
    assert products[32] == products[64] == [0, (2 * qkv + other) / 2, 0]
    assert products[512] == [0, 0, 2 * (2 * qkv + other)]
    assert products[16] == products[128] == products[256] == [0, 0, 0]
    assert counted["head"].tolist() == [256 * 2048, 256 * 2048, 0]


def test_only_weights_beyond_the_cache_come_from_memory() -> None:
    assert [WEIGHTS.streamed(model) for model in MODELS] == [0.0, pytest.approx(0.2764, abs=1e-4), 1.0]


def test_a_fit_finds_the_constants_again() -> None:
    rng = np.random.default_rng(1)
    steps = [quantities(random_work(120, seed), model, WEIGHTS, "int8", "drawn") for seed, model in enumerate(MODELS)]
    # As long as about a millisecond each, in a step of the first model.
    truth = {name: rng.uniform(0.5, 2) * 1e-3 / max(steps[0][name].max(), 1.0) for name in steps[0]}
    truth["tile score"] = 0.0
    seconds = [StepCost(truth).of(s) for s in steps]
    fitted = StepCost.fit(list(zip(steps, seconds, strict=True)), 1e18, 0.0)
    assert fitted.seconds["tile score"] == pytest.approx(0, abs=1e-12)
    unseen = quantities(random_work(50, 99), MODELS[1], WEIGHTS, "int8", "drawn")
    np.testing.assert_allclose(fitted.of(unseen), StepCost(truth).of(unseen), rtol=1e-4)
    assert fitted.error < 1e-6
    noisy = StepCost.fit([(s, t * rng.normal(1, 0.05, len(t))) for s, t in zip(steps, seconds, strict=True)], 1e18, 0.0)
    np.testing.assert_allclose(noisy.of(unseen), StepCost(truth).of(unseen), rtol=0.15)
    assert 0.02 < noisy.error < 0.05


def test_no_product_is_faster_than_the_fastest() -> None:
    """Of one shape, in which all that grows with the tokens grows alike, nothing else tells products apart."""
    steps = quantities(random_work(120), MODELS[0], WEIGHTS, "int8", "greedy")
    seconds = steps["stored key in int8"] * 4e-7
    fitted = StepCost.fit([(steps, seconds)], 1e12, 0.0).seconds
    assert all(fitted[f"weight by {rows} rows"] >= 2 * rows / 1e12 for rows in ROWS)
    assert fitted["stored key in int8"] < 4e-7 and StepCost(fitted).of(steps) == pytest.approx(seconds, rel=0.3)


def test_a_byte_from_memory_costs_what_was_measured() -> None:
    """Of models that a cache holds, nothing else tells what it costs."""
    steps = quantities(random_work(120), MODELS[0], WEIGHTS, "int8", "greedy")
    fitted = StepCost.fit([(steps, steps["stored key in int8"] * 4e-7)], 1e12, 3e-11).seconds
    assert fitted["weight from memory"] == fitted["head from memory"] == pytest.approx(3e-11)


def test_what_was_not_measured_is_named() -> None:
    steps = quantities(random_work(3), MODELS[0], WEIGHTS, "fp8", "greedy")
    measured = quantities(random_work(3), MODELS[0], WEIGHTS, "int8", "greedy")
    with pytest.raises(KeyError, match="fp8"):
        StepCost(dict.fromkeys(measured, 1.0)).of(steps)


def test_nonnegative_least_squares_meets_its_conditions() -> None:
    """At the least, the gradient is 0 along each free number, and no lower along each that is held at 0."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        a, b = rng.normal(size=(30, 12)), rng.normal(size=30)
        x = nonnegative_least_squares(a, b)
        gradient = a.T @ (b - a @ x)
        assert (x >= 0).all()
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8
        assert gradient[x == 0].max(initial=0) < 1e-6


def test_products_have_the_bytes_of_their_types() -> None:
    layer_bytes = {name: kind.layer_bytes for name, kind in PRODUCTS.items()}
    assert layer_bytes == {"float32": 4, "bfloat16": 2, "w8a8-int8": 1, "w4a8": 0.5 + 4 / 128}


def test_of_a_mixture_those_experts_count_that_are_touched() -> None:
    dense = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64}  # fmt: skip
    mixture = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
    model = parse_model_config({"model_type": "qwen3_moe", **dense, **mixture})
    zero, rows = np.zeros(2), np.array([1.0, 4096.0])
    work = Work(rows, rows, zero, zero, zero, zero, zero)
    always = Weights(layer_bytes=1, head_bytes=1, cache_bytes=1)
    counted = quantities(work, model, always, "float32", "greedy")
    expert, router, attention = 3 * 64 * 48, 32 * 64, 64 * (64 + 2 * 32) + 64 * 64
    other = 3 * attention + 3 * 64 * 96 + 2 * router
    assert counted["weight from memory"].tolist() == pytest.approx(
        [other + 2 * 4 * expert, other + 2 * 32 * expert]  # one token reads its own experts, very many read all
    )
    by_rows = np.array([counted[f"weight by {n} rows"] for n in ROWS])
    assert by_rows[:, 0].tolist() == pytest.approx([other + 2 * 4 * expert, 0, 0, 0, 0, 0, 0])
    assert by_rows[-1, 1] == pytest.approx(8 * other + 2 * 32 * expert)  # 4,096 rows, and 512 for each expert


@pytest.mark.parametrize("tokens", [1, 4, 16, 60, 200])
def test_random_tokens_touch_as_many_experts_as_are_expected(make_model: Callable[..., Path], tokens: int) -> None:
    """Count what a block of 32 experts, of which each token takes 4, computes of random tokens and of padding."""
    engine = engine_of(make_model("qwen3_moe", num_experts=32, num_experts_per_tok=4, moe_intermediate_size=16))
    block, counts = engine.runner.decoder.layers[0].feed_forward, engine.runner.backend
    assert isinstance(block, ExpertsWeights) and isinstance(counts, CpuBackend)
    for _ in range(40):
        block(counts, Rows(torch.randn(padded_size(tokens, 8), 96)), tokens)
    expected = experts_touched(block.shape, np.array([float(tokens)]))[0]
    assert counts.expert_layers == 40
    assert counts.experts_touched / 40 == pytest.approx(expected, rel=0.04)


LINEAR = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
}  # fmt: skip


def test_states_are_counted_by_tiles_and_by_decoding_sequences() -> None:
    model = parse_model_config({"model_type": "qwen3_5_text", **LINEAR, **DELTA})
    none, some = np.zeros(2), np.array([0.0, 3.0])
    work = Work(np.array([128.0, 8.0]), np.ones(2), some, some * 32, 3 - some, none, np.array([2.0, 0.0]))
    counted = quantities(work, model, WEIGHTS, "float32", "greedy")
    # Three layers: 4 heads of 16 x 32. Of 64 tokens: 3 products with the state, and triangles of keys, scores, values.
    assert counted["decoding state number"].tolist() == [0, 3 * 3 * 4 * 16 * 32]
    assert counted["part of states"].tolist() == [3 * 2, 3 * 1]
    a_tile = 4 * (3 * 64 * 16 * 32 + 64 * 64 * 16 * 2 + 64 * 64 * 32 * 3 // 2)
    assert counted["tile's multiplication with states"].tolist() == [3 * 3 * a_tile, 0]


def test_a_model_without_states_asks_for_no_constants_of_them() -> None:
    """A device that was measured without them goes on predicting."""
    plain = quantities(random_work(2), MODELS[0], WEIGHTS, "float32", "greedy")
    short = parse_model_config({"model_type": "lfm2", **LINEAR, "full_attn_idxs": [0], "head_dim": None})
    assert quantities(random_work(2), short, WEIGHTS, "float32", "greedy").keys() == plain.keys()


def test_a_convolution_passes_numbers_of_whole_tiles_and_of_decoding_sequences() -> None:
    short = parse_model_config({"model_type": "lfm2", **LINEAR, "full_attn_idxs": [0], "conv_L_cache": 3})
    zero, tiles, decoding = np.zeros(2), np.array([2.0, 0.0]), np.array([0.0, 5.0])
    with_them = Work(zero, zero, decoding, zero, tiles, zero, zero)
    moved = quantities(with_them, short, WEIGHTS, "float32", "greedy")["number"]
    assert moved.tolist() == [3 * 2 * CONVOLVED * 3 * 64 * 64, 3 * 5 * CONVOLVED * 3 * 64]
