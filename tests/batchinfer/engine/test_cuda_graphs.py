"""What a step on a device needs besides kernels: tensors in one copy, sizes that come again, memory that ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of, prompts_of, tokens

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.cuda_graphs import padded_count, padded_step, shape_of
from batchinfer.engine.pool_size import Room, bytes_per_token, pool_blocks
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.transfer import Transfer, tensors_of
from batchinfer.kernels.attention_plan import Tile, Tiling, plan_attention
from batchinfer.kernels.ragged_attention import RaggedBatch
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.models.batch import Batch, PromptChunk, Queries
from batchinfer.models.config import read_model_config

TILING = Tiling(few=Tile(16, 32), many=Tile(64, 32), same=Tile(64, 32), split=64, least=32)


def decoding(contexts: list[int]) -> Batch:
    """A decoding step of sequences with so many positions, in blocks of 16."""
    rows = len(contexts)
    table = torch.arange(rows * (max(contexts) // 16 + 1), dtype=torch.int32).view(rows, -1)
    ragged = RaggedBatch(np.arange(rows + 1), np.array(contexts), table)
    columns = {name: torch.rand(rows) for name in ("temperature", "top_p", "min_p")}
    columns |= {name: torch.arange(rows) for name in ("top_k", "seeds", "positions")}
    return Batch(
        tokens=torch.arange(rows),
        positions=torch.tensor(contexts) - 1,
        slots=torch.arange(rows) + 100,
        attention={w: plan_attention(ragged, 4, 2, w, TILING, 8) for w in (None, 20)},
        sampled=torch.arange(-(-rows // 8) * 8) % rows,
        sampling=SamplingBatch(**columns),
        places=torch.arange(rows) + 3,
        chunks=(),
        sequences=np.arange(rows) + 3,
        copied=torch.empty(0, dtype=torch.int64),
        copies=torch.empty(0, dtype=torch.int64),
        late_rows=torch.arange(rows),
        late_places=torch.arange(rows) + 3,
        queries=Queries(np.arange(rows) + 3, np.array(contexts) - 1, np.ones(rows, np.int64), np.zeros(rows, np.int64)),
        epochs=np.arange(rows),
        prompt_tokens=0,
    )


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


def test_a_batch_can_be_sent_to_the_same_place_again() -> None:
    batch, place = decoding([5, 90]), torch.empty(1 << 14, dtype=torch.uint8)
    transfer = Transfer(torch.device("cpu"))
    first = transfer.send(batch, place)
    again = transfer.send(replace(batch, slots=batch.slots + 1), place)
    assert first.slots.equal(batch.slots + 1), "a view of the same bytes"
    assert [t.data_ptr() for t in tensors_of(first)] == [t.data_ptr() for t in tensors_of(again)]


def test_sizes_are_few_and_never_a_third_more_than_asked() -> None:
    sizes = [padded_count(n) for n in range(1, 2000)]
    assert all(n <= size and (size <= 8 or 3 * size <= 4 * n) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(padded_count(size) == size for size in set(sizes))


def test_steps_that_differ_only_in_their_numbers_have_one_shape() -> None:
    one = padded_step(decoding([70, 75, 80, 72, 66, 79, 65, 77, 71]))
    assert len(one.tokens) == len(one.places) == len(one.sampled) == len(one.late_rows) == 10
    assert one.places[-1] == -1 and one.slots[-1] == 0, "what is added writes to nobody's block"
    alike = padded_step(decoding([75, 70, 66, 72, 80, 77, 71, 79, 65, 78]))
    assert shape_of(alike) == shape_of(one)
    assert shape_of(padded_step(decoding([70] * 12))) != shape_of(one)
    assert shape_of(padded_step(decoding([500] * 9))) != shape_of(one), "another split of keys"
    assert shape_of(padded_step(replace(decoding([70] * 9), sampling=None))) != shape_of(one)


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
    room = Room.on_device(total=80_000_000_000, free=62_000_000_000, activations=3_000_000_000, utilization=0.9)
    assert room.nbytes == 72_000_000_000 - 18_000_000_000 - 3_000_000_000
    assert room.reason == (
        "72.00 GB by --gpu-memory-utilization 0.9 of 80.00 GB, less 18.00 GB in use (weights, and other processes), "
        "less 3.00 GB for a step"
    )
    assert Room.on_device(10, 1, 5, 0.5).nbytes == 0


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
