"""What is kept from step to step for a GPU's attention changes no step: each is compared with one planned afresh."""

from collections import Counter

import numpy as np
import pytest
import torch

from batchinfer.engine.admission import Admission
from batchinfer.engine.attention_inputs import RaggedInputs
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.output_lengths import LEAST_ENDED, OutputLengths
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.transfer import tensors_of
from batchinfer.kernels.attention_plan import AttentionPlan, Tile, Tiling
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch, PromptChunk

TILING = Tiling(few=Tile(16, 32), many=Tile(64, 32), same=Tile(64, 32), split=64, least=32)
EOS = 9


class Compared:
    """Builds each step's inputs twice, by inputs that last for the job and by new ones, and compares them."""

    def __init__(self, windows: set[int | None], processors: int | None) -> None:
        self.settings = windows, 8, 2, TILING, processors
        self.lasting = RaggedInputs(*self.settings)
        self.met: Counter[str] = Counter()

    def __call__(
        self, table: SequenceTable, chunks: list[PromptChunk], decoding: Ints, positions: Ints
    ) -> dict[int | None, AttentionBatch]:
        found = self.lasting(table, chunks, decoding, positions)
        fresh = RaggedInputs(*self.settings)(table, chunks, decoding, positions)
        for window, plan in found.items():
            expected = fresh[window]
            assert isinstance(plan, AttentionPlan) and isinstance(expected, AttentionPlan)
            assert [tile for tile, _ in plan.launches] == [tile for tile, _ in expected.launches]
            assert plan.partials == expected.partials
            for ours, theirs in zip(tensors_of(plan), tensors_of(expected), strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        kind = "prompts" if chunks else "drafts" if len(np.unique(decoding)) < len(decoding) else "decoding"
        self.met[kind] += 1
        return found


class SomeDrafts:
    """Drafts up to three tokens, of which none but the first is ever right."""

    def __init__(self, table: SequenceTable) -> None:
        self.table, self.rng = table, np.random.default_rng(0)

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        counts = np.minimum(self.rng.integers(0, 4, len(places)), np.maximum(room, 0))
        counts = np.clip(budget - (np.cumsum(counts) - counts), 0, counts)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            length = int(self.table.length[place])
            self.table.tokens[place, length : length + count] = 5
        return counts


@pytest.mark.parametrize("processors", [None, 4, 132])
@pytest.mark.parametrize("drafting", [False, True])
def test_a_lasting_plan_is_the_plan_of_the_step_alone(processors: int | None, drafting: bool) -> None:
    """Rows that share prompts, end by surprise, are preempted, and whose places are taken again while a step runs."""
    rng = np.random.default_rng(1)
    table, manager = SequenceTable(12, 600, 16), BlockManager(40)
    admission = Admission(table, manager, True, lengths := OutputLengths(600))
    for _ in range(20 * LEAST_ENDED):
        lengths.observe(-1, 4)
    inputs = Compared({None, 40}, processors)
    scheduler = Scheduler(table, manager, admission, inputs, 128, 1, np.array([EOS]))
    template = rng.integers(10, 300, 128).tolist()
    prompts = [[*template, 7, k] for k in range(10, 18)] + [
        rng.integers(10, 300, int(n)).tolist() for n in rng.integers(1, 90, 40)
    ]
    scheduler.add(Requests.of(prompts, SamplingParams(max_tokens=60)))
    drafter, ahead = (SomeDrafts(table), 0) if drafting else (None, 1)
    under_way: list[Batch] = []
    while scheduler.unfinished:
        batch = scheduler.schedule(drafter)
        if batch is not None:
            under_way.append(batch)
        if batch is None or len(under_way) > ahead:
            ended = under_way.pop(0)
            tokens = rng.choice([5, 6, EOS], len(ended.sequences), p=[0.5, 0.48, 0.02])
            new = scheduler.update(ended, tokens)
            newest = table.tokens[new.places, table.length[new.places] - 1]
            for place in new.places[(newest == EOS) | (table.length[new.places] >= table.end[new.places])].tolist():
                scheduler.finish(place)
    assert admission.preemptions > 0 and admission.shared_tokens > 0
    assert inputs.met["prompts"] > 10 and inputs.met["drafts" if drafting else "decoding"] > 50
