"""Models whose layers keep a state: every row has its own result, however states are shared, copied and taken back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from drafters import Adversary, Poisoner
from engines import IdsAsText, assert_blocks_are_free, engine_of, prompts_of, run, tokens
from families import made
from safetensors.torch import load_file, save_file

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.prefix_tree import Likeness, likeness
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.formats.scheme import weight_scheme
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.state_pool import StateTiles
from batchinfer.models.mixer import state_bytes
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
PLAIN = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(params=["lfm2", "qwen3_5_text"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return made(make_model, request.param, **SMALL)


def tree_of_prompts() -> list[list[int]]:
    """In depth-first order: rows that branch after one tile, after three, and after five; twins; and others."""
    rng = np.random.default_rng(0)

    def text(n: int) -> list[int]:
        return rng.integers(2, 320, n).tolist()

    stem = text(5 * TILE)
    prompts = [text(40), *(stem + text(n) for n in (1, 30, 64, 70))]
    prompts += [stem[: 3 * TILE] + text(n) for n in (20, 90)]
    prompts += [stem[:TILE] + text(n) for n in (5, 100)]
    return [*prompts, prompts[-1], prompts[-1], text(TILE), text(3)]


def alone(model: Path, requests: Requests, **settings: Any) -> dict[int, list[int]]:
    """Each row computed by itself, whole prompts first."""
    engine = engine_of(model, max_num_seqs=1, prefix_sharing=False, speculation=Speculation("off"), **settings)
    return tokens(engine, requests)


def with_states(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Give engines as many states, state 0 among them."""
    monkeypatch.setattr("batchinfer.engine.engine.pool_states", lambda *_: (count, None))


def test_greedy_text_is_that_of_transformers(model: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = prompts_of(24, 200)
    ours = tokens(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=16, ignore_eos=True)))
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + ours[row]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ours[row], f"row {row}"


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 64}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 1024, "block_size": 16}],
)
@pytest.mark.parametrize("quantization", ["none", "w8a8-int8"])
def test_rows_that_branch_begin_from_snapshots(model: Path, quantization: str, settings: dict[str, Any]) -> None:
    requests = Requests.of(tree_of_prompts(), PLAIN)
    expected = alone(model, requests, quantization=quantization)
    engine = engine_of(model, quantization=quantization, **settings)
    assert tokens(engine, requests) == expected
    shared = TILE * int(likeness(requests).tiles.sum())
    stats = engine.stats()
    assert stats.shared_tokens >= shared > 1500, "no tile is computed again"
    assert stats.prompt_tokens == len(requests.token_ids) - stats.shared_tokens


def test_a_wrong_snapshot_would_show(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests.of(tree_of_prompts(), PLAIN)
    expected = alone(model, requests)
    engine = engine_of(model)

    def leave(part: StateTiles, pool: torch.Tensor, states: torch.Tensor) -> None:
        pool[part.after] = states

    monkeypatch.setattr(StateTiles, "leave", leave)
    found = tokens(engine, requests)
    wrong = {row for row in found if found[row] != expected[row]}
    assert wrong and wrong <= {2, 3, 4, 5, 6, 7, 8, 9, 10}, "rows that begin from snapshots"


@pytest.mark.parametrize("states", [3, 4, 5])
def test_without_states_for_snapshots_tiles_are_computed_again(
    model: Path, monkeypatch: pytest.MonkeyPatch, states: int
) -> None:
    requests = Requests.of(tree_of_prompts(), PLAIN)
    expected = alone(model, requests)
    with_states(monkeypatch, states)
    engine = engine_of(model)
    assert tokens(engine, requests) == expected
    stats = engine.stats()
    assert stats.prompt_tokens == len(requests.token_ids) - stats.shared_tokens
    assert (stats.shared_tokens < TILE * int(likeness(requests).tiles.sum())) == (states < 5)


def test_the_depths_at_which_later_rows_branch() -> None:
    tiles = np.array([0, 5, 5, 3, 5, 1, 1, 0, 2])
    assert Likeness(tiles, np.zeros(9, np.bool_)).branches == {0: {5: 2, 3: 1, 1: 2}, 3: {5: 1}, 7: {2: 1}}


def test_twins_get_the_state_of_the_row_that_computes_their_prompt(model: Path) -> None:
    prompt = prompts_of(1, 200, seed=4)[0] + prompts_of(1, 100, seed=5)[0]
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
    requests = Requests.of([prompt] * 5, params, seeds=range(5))
    expected = alone(model, requests)
    for rows in (5, 2):
        engine = engine_of(model, max_num_seqs=rows)
        assert tokens(engine, requests) == expected
    assert len(set(map(tuple, expected.values()))) == 5


@pytest.mark.parametrize("share_right", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("states", [None, 11])
def test_drafts_change_no_row(
    model: Path, monkeypatch: pytest.MonkeyPatch, share_right: float, states: int | None
) -> None:
    requests = Requests.of(prompts_of(12, 150), SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True))
    truth = run(engine_of(model, speculation=Speculation("off")), requests)
    if states is not None:
        with_states(monkeypatch, states)
    engine = engine_of(model, max_num_seqs=4)
    engine.drafter = Adversary(engine, truth, share_right, 6)  # type: ignore[assignment]
    assert run(engine, requests) == truth
    assert engine.stats().drafted > 50 and (engine.stats().accepted > 50) == (share_right > 0)


def test_a_draft_that_is_not_finite_is_taken_back(model: Path) -> None:
    prompts = [[t if t != 7 else 8 for t in prompt] for prompt in prompts_of(10, 80)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
    truth = {row: done for row, done in run(engine_of(model), requests).items() if 7 not in done[0]}
    assert len(truth) > 5

    engine = engine_of(model)
    engine.runner.decoder.embedding[7] = float("nan")
    engine.drafter = Poisoner(engine, truth, 1.0, 9)  # type: ignore[assignment]
    assert run(engine, requests.take(np.array(sorted(truth)))) == truth
    assert engine.stats().drafted > 10


def test_rows_that_are_preempted_come_to_the_same_end(model: Path) -> None:
    """The first rows end early, so that little is expected of the others, which then need more than there is."""
    prompts = prompts_of(44, 100)
    params = SamplingTable.of(
        [SamplingParams(max_tokens=100, temperature=1.0, ignore_eos=ignore) for ignore in (False, True)]
    )
    plain = Requests.of(prompts, params[1], seeds=range(44))
    free = tokens(engine_of(model), plain)
    ends = IdsAsText(eos_ids=tuple({free[row][3] for row in range(32)}))
    index = np.array([0] * 32 + [1] * 12, np.int32)
    requests = Requests(plain.rows, plain.token_ids, plain.offsets, plain.seeds, params, index)
    expected = run(engine_of(model, ends, learned_admission=False), requests)
    engine = engine_of(model, ends, kv_cache_tokens=512 + 64, speculation=Speculation("suffix", gate=False))
    assert run(engine, requests) == expected
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("speculation", [Speculation("off"), Speculation("suffix", gate=False)])
def test_a_step_that_is_withdrawn_is_computed_again(
    model: Path, monkeypatch: pytest.MonkeyPatch, speculation: Speculation
) -> None:
    """Some steps run out of memory in their last layer, when states of the first ones are changed already."""
    prompts = [[5, 6, 7] * 30 + prompt for prompt in tree_of_prompts()]
    requests = Requests.of(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    expected = alone(model, requests, max_num_batched_tokens=1024)
    engine = engine_of(model, speculation=speculation, max_num_batched_tokens=1024)
    logits, steps = engine.runner.decoder.logits, iter(range(1000))

    def scarce(*args: Any) -> torch.Tensor:
        if next(steps) in (0, 1, 3, 6, 9):
            raise MemoryError
        return logits(*args)

    monkeypatch.setattr(engine.runner.decoder, "logits", scarce)
    monkeypatch.setattr(engine, "_shrink", lambda *_: None)
    assert tokens(engine, requests) == expected
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_rows_that_are_dropped_leave_nothing_behind(model: Path, steps: int) -> None:
    requests = Requests.of(tree_of_prompts(), PLAIN)
    expected = alone(model, requests)
    engine = engine_of(model, max_num_seqs=4, speculation=Speculation("ngram", gate=False))
    engine.add(requests)
    for _ in range(steps):
        engine.step()
    engine.scheduler.schedule()  # a step that is never computed
    engine.drop()
    assert_blocks_are_free(engine)
    assert tokens(engine, requests) == expected


@pytest.mark.parametrize(
    ("settings", "number"), [({}, 4), ({"dtype": "bfloat16"}, 2), ({"quantization": "w8a8-int8"}, 4)]
)
def test_a_state_takes_what_plans_count(model: Path, settings: dict[str, Any], number: int) -> None:
    runner = engine_of(model, **settings).runner
    assert runner.bytes_per_state == sum(state_bytes(mixer, number) for mixer in runner.decoder.config.recurrent) > 0


def test_memory_for_states_is_counted(make_model: Callable[..., Path]) -> None:
    model = made(make_model, "qwen3_5_text", **SMALL)
    whole = engine_of(model)
    a_state, a_token = whole.runner.bytes_per_state, whole.runner.bytes_per_token
    pools = [cache for cache in whole.runner.caches if cache not in whole.runner.kv_caches]
    assert sum(pool.nbytes for pool in pools) == a_state * len(pools[0].inputs)
    room = 16 * a_state + 512 * a_token
    engine = engine_of(model, kv_cache_memory_bytes=room)
    assert engine.runner.kv_cache_bytes <= room + 2 * 32 * a_token
    requests = Requests.of(prompts_of(20, 100), PLAIN)
    assert tokens(engine, requests) == tokens(whole, requests)
    assert any(f"{a_state / 1e6:.1f} MB each" in note for note in engine.stats().notes)


def states_in_use(engine: Engine) -> int:
    assert engine.scheduler.states is not None
    return int((~engine.scheduler.states._free[1:]).sum())


def test_a_snapshot_is_freed_with_its_last_reader(model: Path) -> None:
    stem = prompts_of(1, 400, seed=3)[0] * 3
    rows = [stem[: 2 * TILE] + prompt for prompt in prompts_of(6, 60)]
    engine = engine_of(model, max_num_seqs=2, speculation=Speculation("off"))
    engine.add(Requests.of([*rows, [3, 4]], PLAIN))
    held = []
    while engine.unfinished:
        engine.step()
        held.append(states_in_use(engine) - int(engine.table.active.sum()))
    assert max(held) == 1 and held[-1] == 0
    assert_blocks_are_free(engine)


def quantized(model: Path, output: Path, scheme: str) -> Path:
    quantizer = Quantizer(model, output, weight_scheme(scheme, 32 if scheme == "w4a16" else None), method("rtn"))
    list(quantizer.run())
    quantizer.finish("# A card\n")
    return output


def first_logits(engine: Engine) -> torch.Tensor:
    """The logits [prompts, V] of the first two new tokens of prompts, the second of which is the same for all."""
    engine.add(Requests.of(prompts_of(8, 150), SamplingParams(max_tokens=2, ignore_eos=True)))
    found = []
    while (batch := engine.scheduler.schedule()) is not None:
        with torch.inference_mode():
            logits = engine.runner.decoder.forward(batch, engine.runner.caches)[: len(batch.sequences)]
        found.append(logits.float()[np.argsort(engine.table.row[batch.sequences])])
        engine.scheduler.update(batch, np.full(len(logits), 9))
        for place in batch.sequences[engine.table.length[batch.sequences] == engine.table.end[batch.sequences]]:
            engine.scheduler.finish(int(place))
    return torch.cat(found)


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def test_four_bits_are_multiplied_as_if_they_were_expanded(model: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "out", "w4a16")
    settings: dict[str, Any] = {"dtype": "bfloat16", "expected_batch": 1, "max_num_batched_tokens": 2048}
    ours, expanded = engine_of(packed, **settings), engine_of(packed, **settings, quantization="none")
    exact = first_logits(engine_of(packed, quantization="none", max_num_batched_tokens=2048))
    assert "linear_w4a16" in ours.runner.backend.kernels
    assert difference(first_logits(ours), exact) < 1.5 * difference(first_logits(expanded), exact) < 0.1


def test_rates_may_stay_in_floating_point_beside_eight_bits(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Published checkpoints do that; the products of one input then take rows of two types."""
    original = made(make_model, "qwen3_5_text", **SMALL)
    model = quantized(original, tmp_path / "out", "w8a8-int8")
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(("in_proj_a.weight", "in_proj_b.weight"))]:
            tensors[name] = load_file(original / "model.safetensors")[name]
            del tensors[name + "_scale"]
        save_file(tensors, path, {"format": "pt"})
    for name in ("SHA256SUMS", "model.safetensors.index.json"):
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["re:.*in_proj_[ab]$"]
    (model / "config.json").write_text(json.dumps(config))
    engine = engine_of(model)
    kinds = {layer.qkv.takes for layer in engine.runner.decoder.layers if layer.rates is not None}
    assert kinds == {torch.uint8} and engine.runner.decoder.layers[0].rates.takes == torch.float32  # type: ignore[union-attr]
    assert 0 < difference(first_logits(engine), first_logits(engine_of(model, quantization="none"))) < 0.1
    requests = Requests.of(tree_of_prompts(), PLAIN)
    assert tokens(engine_of(model), requests) == alone(model, requests)
