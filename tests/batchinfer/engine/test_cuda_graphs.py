"""What a step on a device needs besides kernels: tensors in one copy, sizes that come again, memory that ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of, prompts_of, tokens
from replay import JOBS, simulate

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.cuda_graphs import MOST_RECORDINGS, OFTEN, RECORDING_BYTES, CudaGraphs, Found, most_recorded
from batchinfer.engine.pool_size import Room, bytes_per_token, pool_blocks
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import PlanShape, StepShape, largest_count, padded_count, plans_of
from batchinfer.engine.transfer import Transfer, tensors_of
from batchinfer.kernels.attention_plan import Tile, Tiling, plan_attention
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.attention_triton import paged_attention
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.ragged import offsets_of
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.models.batch import Batch, PromptChunk, Queries
from batchinfer.models.config import read_model_config

TILING = Tiling(few=Tile(16, 32), many=Tile(64, 32), same=Tile(64, 32), split=64, least=32)


def decoding(
    contexts: list[int],
    counts: list[int] | None = None,
    prefixes: tuple[SharedPrefix, ...] = (),
    windows: tuple[int | None, ...] = (None, 20),
    processors: int | None = 8,
) -> Batch:
    """A step of sequences with so many positions, in blocks of 16; the last `counts` of each are new: one and drafts.

    Sequences of a prefix have the same blocks for its keys.
    """
    rows, counts = len(contexts), counts or [1] * len(contexts)
    table = 1 + torch.arange(rows * (max(contexts) // 16 + 1), dtype=torch.int32).view(rows, -1)
    for p in prefixes:
        table[p.first : p.first + p.count, : p.keys // 16] = table[p.first, : p.keys // 16]
    ragged = RaggedBatch(offsets_of(np.array(counts)), np.array(contexts), table, prefixes)
    places = np.repeat(np.arange(rows) + 3, counts)
    positions = np.concatenate([np.arange(c - n, c) for c, n in zip(contexts, counts, strict=True)])
    n = len(places)
    columns = {name: torch.rand(n) for name in ("temperature", "top_p", "min_p")}
    columns |= {name: torch.arange(n) for name in ("top_k", "seeds", "positions")}
    return Batch(
        tokens=torch.arange(n),
        positions=torch.from_numpy(positions),
        slots=table.long()[torch.from_numpy(places - 3), torch.from_numpy(positions // 16)] * 16
        + torch.from_numpy(positions % 16),
        attention={AttentionShape(w, 4, 2, 16): plan_attention(ragged, 4, 2, w, TILING, processors) for w in windows},
        sampled=torch.arange(-(-n // 8) * 8) % n,
        sampling=SamplingBatch(**columns),
        places=torch.from_numpy(places),
        chunks=(),
        sequences=places,
        copied=torch.empty(0, dtype=torch.int64),
        copies=torch.empty(0, dtype=torch.int64),
        late_rows=torch.arange(n)[::2].clone(),
        late_places=torch.from_numpy(places[::2].copy()),
        queries=Queries(np.arange(rows) + 3, np.array(contexts) - counts, np.array(counts), np.array(counts) - 1),
        epochs=np.zeros(n, np.int64),
        prompt_tokens=0,
    )


def written(batch: Batch, shape: StepShape) -> Batch:
    """The step as a recording of `shape` gets it, in a buffer that held something else."""
    inputs = StepBuffer(shape)
    host = np.full(inputs.nbytes, 0x55, np.uint8)
    inputs.write(batch, host)
    return inputs.batch(torch.from_numpy(host))


def test_a_batch_arrives_as_it_was_sent_each_tensor_once() -> None:
    batch = decoding([5, 90, 200])
    assert len(tensors_of(batch)) == 9 + 6 + 1 + 2 * 3, "the table is both windows' own"
    transfer = Transfer(torch.device("cpu"))
    first, second = transfer.send(batch), transfer.send(replace(batch, tokens=batch.tokens + 9))
    for sent, there in zip(tensors_of(batch), tensors_of(first), strict=True):
        assert there.equal(sent) and there.dtype == sent.dtype and there.data_ptr() % 16 == 0
    assert second.tokens.equal(batch.tokens + 9)
    plans = list(first.attention.values())
    assert plans[0].table.data_ptr() == plans[1].table.data_ptr()
    assert first.sequences is batch.sequences


def test_sizes_are_few_and_never_a_third_more_than_asked() -> None:
    sizes = [padded_count(n) for n in range(1, 2000)]
    assert all(n <= size and (size <= 8 or 3 * size <= 4 * n) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(padded_count(size) == size for size in set(sizes))
    assert [largest_count(n) for n in (0, 1, 9, 10, 1023, 1024)] == [0, 1, 8, 10, 896, 1024]


def test_one_token_of_each_of_as_many_sequences_is_one_shape_whatever_their_lengths() -> None:
    rng = np.random.default_rng(0)

    def shape(contexts: list[int], **changes: Any) -> StepShape:
        return StepShape.of(decoding(contexts, **changes), 48)

    expected = shape([70] * 48)
    for rows, longest in ((48, 1000), (41, 300), (45, 2), (43, 40)):
        assert shape(rng.integers(1, longest, rows).tolist()) == expected
    assert shape([1000] + [1] * 44) == expected, "all the splitting is for one sequence"
    assert shape([1100] * 40) != expected, "a wider table"
    assert StepShape.of(replace(decoding([70] * 48), sampling=None), 48) != expected
    assert shape([60] * 45, processors=None) == shape([5] * 41, processors=None)


@pytest.mark.parametrize("processors", [1, 3, 8, 132])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_however_keys_are_split_the_shapes_are_few(processors: int, kv_heads: int) -> None:
    rng = np.random.default_rng(processors)
    for rows in (1, 2, 7, 60, 300):
        shapes = set()
        for longest in np.repeat((30, 200, 3000), 10).tolist():
            contexts = rng.integers(1, 1 + longest, rows)
            table = torch.zeros(rows, longest // 16 + 1, dtype=torch.int32)
            batch = RaggedBatch(np.arange(rows + 1), contexts, table)
            plan = plan_attention(batch, 4, kv_heads, None, TILING, processors)
            shapes.add(PlanShape.of(AttentionShape(None, 4, kv_heads, 16), plan, rows))
        assert len(shapes) <= 3
    assert plan_attention(batch, 4, kv_heads, None, TILING, None).spare == 0


def test_a_step_is_written_with_padding_that_nobody_reads() -> None:
    batch = decoding([70, 75, 300], counts=[1, 3, 2], windows=(None,))
    there = written(batch, StepShape.of(batch, 8))
    for name in ("tokens", "positions", "slots", "sampled", "places"):
        assert getattr(there, name)[:6].equal(getattr(batch, name)[:6])
    for name in SamplingBatch.__dataclass_fields__:
        column = getattr(there.sampling, name)
        assert column[:6].equal(getattr(batch.sampling, name)) and not column[6:].any()
    assert there.places[6:].tolist() == [-1, -1] and there.slots[6:].tolist() == [0, 0]
    assert there.late_rows.tolist() == list(range(8))
    assert there.late_places.tolist() == [3, -1, 4, -1, 5, -1, -1, -1], "the others' tokens are known"
    (plan,) = plans_of(there)
    assert plan.table[:3, :19].equal(plans_of(batch)[0].table) and not plan.table[3:].any()
    assert plan.first[7:].tolist() == [plan.first[6]] * 2


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ({"contexts": [70, 300, 1, 33]}, 1),
        ({"contexts": [40, 75, 100], "counts": [1, 9, 3], "windows": (None,)}, 2),
        (
            {
                "contexts": [70, 75, 66, 80, 67, 20],
                "counts": [1, 2, 1, 9, 1, 4],
                "prefixes": (SharedPrefix(0, 5, 64),),
                "windows": (None,),
            },
            0,
        ),
        ({"contexts": [70, 150], "processors": None}, 1),
    ],
    ids=["one token each", "drafts", "a shared prefix", "deterministic"],
)
def test_attention_of_a_padded_step_has_the_bits_of_the_step(step: dict[str, Any], more: int) -> None:
    """Few tokens and many in a tile, keys split and not, a prefix shared by hand; with `more` tokens of padding."""
    batch = decoding(**step)
    n = batch.query_tokens
    there = written(batch, StepShape.of(batch, n + more))
    rng = torch.Generator().manual_seed(0)
    cache = KVCache(1 + 8 * 51, 2, 16, 16, torch.float32, torch.device("cpu"))
    for pool in (cache.key, cache.value):
        pool.copy_(torch.randn(pool.shape, generator=rng))
    query = torch.randn(n + more, 4, 16, generator=rng)
    for expected, padded in zip(plans_of(batch), plans_of(there), strict=True):
        assert padded.tokens == n + more
        out = paged_attention(query, cache, padded, 0.25)
        assert out[:n].equal(paged_attention(query[:n], cache, expected, 0.25)) and out.isfinite().all()


def counting(most_tokens: int) -> tuple[CudaGraphs, list[int]]:
    """Steps that sample the places of their rows, and the sizes of those that were computed."""
    sizes: list[int] = []

    def compute(batch: Batch) -> Found:
        sizes.append(len(batch.tokens))
        return batch.places + 0, batch.places >= 0, None

    return CudaGraphs(compute, torch.device("cpu"), most_tokens, []), sizes


def test_a_shape_is_recorded_when_it_first_comes_and_those_replayed_last_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchinfer.engine.cuda_graphs.MOST_RECORDINGS", 2)
    graphs, sizes = counting(1024)
    for rows in (9, 10, 3, 10, 20, 4, 9):
        tokens, finite, _ = graphs.run(decoding([70] * rows))
        assert tokens.tolist() == list(range(3, 3 + rows)) and finite.all()
        assert len(graphs.recordings) <= 2
    assert sizes == [16, 16, 4, 16, 32, 4, 16]
    assert (graphs.recorded, graphs.replays, graphs.launched) == (5, 2, 0), "4 had to go for 32, and 16 for 4"


def test_a_size_that_comes_often_is_recorded_itself() -> None:
    graphs, sizes = counting(24)
    for rows in (*[9] * (OFTEN + 1), 17):
        graphs.run(decoding([70] * rows))
    assert sizes == [16] * (OFTEN - 1) + [10, 10, 24]
    assert (graphs.recorded, graphs.replays) == (3, OFTEN - 1)


def test_steps_with_drafts_have_one_shape_however_many_tokens_each_sequence_has() -> None:
    shapes = {
        StepShape.of(decoding([90] * len(counts), counts=counts, windows=(None,)), 48)
        for counts in ([9] * 5, [9, 1, 9, 1, 9, 2, 9], [9] * 4 + [2] * 2, [1] * 20 + [9, 9])
    }
    assert len(shapes) == 1


def test_steps_that_are_not_recorded_are_counted_and_named() -> None:
    graphs, sizes = counting(16)
    assert graphs.run(decoding([70] * 17))[0].tolist() == list(range(3, 20))
    graphs.run(decoding([70] * 30))
    graphs.run(replace(decoding([70] * 3), prompt_tokens=4))
    graphs.recording = False
    graphs.run(decoding([70] * 4))
    assert (graphs.recorded, graphs.replays, graphs.launched) == (0, 0, 3) and sizes == [17, 30, 3, 4]
    [note] = graphs.notes
    assert note.startswith("decoding steps of more than 16 tokens were launched kernel by kernel")


def test_recorded_steps_are_as_large_as_the_memory_kept_for_them() -> None:
    beside = MOST_RECORDINGS * RECORDING_BYTES
    for nbytes, most in ((beside + 1_000_000, 1024), (beside + 500_000, 512), (beside + 499_000, 448), (beside, 0)):
        graphs, _ = counting(1024)
        graphs.keep_within(nbytes, 1_000_000)
        assert graphs.most_tokens == most


def test_a_recorded_step_has_a_token_of_each_row_and_its_drafts() -> None:
    config = EngineConfig(Path(), max_num_seqs=100, max_num_batched_tokens=8192, expected_batch=20)
    assert most_recorded(replace(config, speculation=Speculation("off"))) == 20
    assert most_recorded(replace(config, speculation=Speculation("ngram", num_speculative_tokens=4))) == 112
    assert most_recorded(replace(config, expected_batch=90)) == 896
    assert most_recorded(EngineConfig(Path(), max_num_seqs=4096, max_num_batched_tokens=8192)) == 1024


@pytest.mark.parametrize(("job", "share"), [("64 ragged", 0.95), ("64 ragged, drafts", 0.85)])
def test_most_decoding_steps_of_a_ragged_job_are_replayed(job: str, share: float) -> None:
    """The smallest of the simulated jobs; benchmarks/replay.py prints all of them. That with drafts has 82 steps."""
    counts = simulate(JOBS[job])
    assert counts.share >= share and counts.launched == 0
    assert counts.recordings == counts.recorded <= MOST_RECORDINGS


def device_is_full() -> None:
    raise torch.OutOfMemoryError("out of memory")


def host_is_full() -> None:
    torch.empty(1 << 46, dtype=torch.uint8)


@pytest.mark.parametrize("full", [device_is_full, host_is_full])
def test_a_step_that_memory_does_not_hold_is_halved_and_no_row_is_lost(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, full: Callable[[], None]
) -> None:
    model = make_model("llama")
    requests = Requests.of(prompts_of(20, 200), SamplingParams(max_tokens=6, ignore_eos=True))
    engine = engine_of(model, max_num_batched_tokens=512)
    launch, sizes = engine.runner.launch, []

    def short_of_memory(batch: Batch) -> Any:
        if batch.prompt_tokens + batch.query_tokens > 250:
            full()
        sizes.append(batch.prompt_tokens + batch.query_tokens)
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", short_of_memory)
    assert tokens(engine, requests) == tokens(engine_of(model), requests)
    assert 128 < max(sizes) <= engine.scheduler.budget <= 250
    [note] = engine.stats().notes
    assert note.startswith("a step of ") and f"steps have at most {engine.scheduler.budget} from then on" in note


def test_memory_for_no_step_at_all_ends_with_the_flags_that_help(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(make_model("llama"))

    def never(batch: Batch) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(engine.runner, "launch", never)
    engine.add(Requests.of([[3] * 40], SamplingParams(max_tokens=2)))
    with pytest.raises(MemoryError, match=r"a step of 40 tokens .tried to allocate 2 GiB.; lower --max-num-seqs"):
        engine.step()


def test_a_withdrawn_step_comes_again(make_model: Callable[..., Path]) -> None:
    engine = engine_of(make_model("llama"), max_num_batched_tokens=128, max_num_seqs=3)
    engine.add(Requests.of([[5] * 100, [6] * 60, [7] * 30], SamplingParams(max_tokens=4)))
    first = engine.scheduler.schedule()
    assert first is not None and [p.end for p in first.chunks] == [100]
    engine.scheduler.withdraw(first)
    assert engine.scheduler.prefilling == [0, 1, 2]
    engine.scheduler.budget = 64
    smaller = engine.scheduler.schedule()
    assert smaller is not None and smaller.chunks == (PromptChunk(0, 0, 64, 0),)


def test_memory_of_a_device_is_its_share_less_what_is_in_use() -> None:
    room = Room.on_device(80_000_000_000, 62_000_000_000, 3_000_000_000, recordings=1_000_000_000, utilization=0.9)
    assert room.nbytes == 72_000_000_000 - 18_000_000_000 - 3_000_000_000 - 1_000_000_000
    assert room.recordings == room.limited(10).recordings == 1_000_000_000
    assert room.reason == (
        "72.00 GB by --gpu-memory-utilization 0.9 of 80.00 GB, less 18.00 GB in use (weights, and other processes), "
        "less 3.00 GB for a step and 1.00 GB for recorded ones"
    )
    assert Room.on_device(10, 1, 5, 3, 0.5).nbytes == 0
    little = Room.on_device(total=1000, free=500, activations=100, recordings=200, utilization=0.9)
    assert (little.nbytes, little.recordings) == (263, 37), "an eighth of the 300 that are left"


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_pool_is_what_the_plan_asks_or_what_fits(make_model: Callable[..., Path], kv_dtype: torch.dtype) -> None:
    folder = make_model("llama")
    model = read_model_config(folder)
    a_token = bytes_per_token(model, kv_dtype)
    assert a_token == 2 * 3 * 2 * (16 * kv_dtype.itemsize + (0 if kv_dtype == torch.bfloat16 else 4))
    config = EngineConfig(folder, device="cuda", max_model_len=512, block_size=16, kv_cache_tokens=4096)
    assert pool_blocks(config, a_token, kv_dtype, Room(a_token * 5000, "much")) == (4096 // 16 + 2, None)
    blocks, note = pool_blocks(config, a_token, kv_dtype, Room(a_token * 1000, "little"))
    assert blocks == 1000 // 16 + 2 and note is not None and "of 1000 tokens where the plan asks for 4096" in note
    with pytest.raises(ValueError) as error:
        pool_blocks(config, a_token, kv_dtype, Room(a_token * 511, "of 8 GB all but this"))
    for words in (f"{a_token} bytes a token", "of 8 GB all but this", "--max-model-len", "--gpu-memory-utilization"):
        assert words in str(error.value)
    assert ("--kv-cache-dtype int8" in str(error.value)) == (kv_dtype == torch.bfloat16)
