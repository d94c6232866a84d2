"""Simulated steps beside those of the scheduler that engines run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchinfer.cost.calibrate import _work
from batchinfer.cost.simulate_steps import simulate
from batchinfer.engine.admission import Admission
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable


def no_attention(*_: Any) -> dict[Any, Any]:
    return {}


def scheduled(prompts: list[int], outputs: list[int], config: EngineConfig, *grains: int) -> list[list[int]]:
    """`Work` and what the other fields of `Steps` hold, of each step that a real scheduler makes."""
    table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
    manager = BlockManager(4096)
    admission = Admission(table, manager, False, None)
    budget, nothing = config.max_num_batched_tokens, np.empty(0, np.int64)
    scheduler = Scheduler(table, manager, admission, no_attention, budget, *grains, nothing)
    params = SamplingTable.of([SamplingParams(max_tokens=n, ignore_eos=True) for n in outputs])
    requests = Requests.of([[0] * n for n in prompts], SamplingParams())
    index = np.arange(len(prompts), dtype=np.int32)
    scheduler.add(
        Requests(requests.rows, requests.token_ids, requests.offsets, requests.seeds, params, index),
    )
    steps = []
    while (batch := scheduler.schedule()) is not None:
        waiting = int(admission.waiting_rows > 0)
        steps.append([*_work(batch, config.block_size), batch.prompt_tokens, batch.query_tokens, waiting])
        scheduler.update(batch, np.zeros(len(batch.sequences), np.int64))
        for place in np.flatnonzero(table.active & (table.length >= table.end)).tolist():
            scheduler.finish(place)
    return steps


@pytest.mark.parametrize("seed", range(6))
def test_the_steps_are_those_of_the_scheduler(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    prompts = rng.integers(1, 400, n)
    outputs = rng.integers(1, 40, n)
    config = EngineConfig(
        Path("."),
        max_model_len=512,
        max_num_seqs=int(rng.choice([1, 5, 16, 64])),
        max_num_batched_tokens=int(rng.choice([64, 100, 256, 512])),
        block_size=int(rng.choice([16, 32])),
    )
    grains = [int(rng.choice([1, 8])) for _ in range(2)]
    expected = scheduled(prompts.tolist(), outputs.tolist(), config, *grains)
    steps = simulate(prompts, outputs, config, 0, *grains)
    found = np.stack(
        [*vars(steps.work).values(), steps.prompt_tokens, steps.new_tokens, steps.waiting.astype(np.float64)], 1
    )
    np.testing.assert_array_equal(found, np.array(expected))


def test_tokens_that_are_there_are_not_computed() -> None:
    prompts, outputs = np.full(10, 200), np.full(10, 5)
    config = EngineConfig(Path("."))
    whole, rest = simulate(prompts, outputs, config), simulate(prompts, outputs, config, first=128)
    assert (whole.prompt_tokens.sum(), rest.prompt_tokens.sum()) == (2000, 720)
    assert rest.new_tokens.sum() == whole.new_tokens.sum() == 40
    assert rest.work.tiles.sum() == 20


def test_no_rows_are_no_steps() -> None:
    nothing = np.zeros(0, np.int64)
    assert len(simulate(nothing, nothing, EngineConfig(Path("."))).work) == 0
