"""A draft model's steps on a GPU follow each other on the device; in the interpreter, with the CPU as the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import engine_of, prompts_of, run

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts.draft_model import DraftModel
from batchinfer.engine.drafts.lookup import Proposals
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.transfer import Sampled
from batchinfer.kernels.ragged import Ints

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
DEPTH = 3


@pytest.mark.parametrize(
    ("options", "waits_each_step"),
    [({}, False), ({"temperature": 0.9}, False), ({"repetition_penalty": 1.3}, True)],
)
def test_a_round_of_drafts_waits_once_and_drafts_the_same(
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    waits_each_step: bool,
) -> None:
    """Prompts longer than a step, and penalties, which the host works out from the tokens of the step before."""
    target, draft = make_model("llama", **SHAPE), make_model("qwen2", **SHAPE)
    requests = Requests.of(prompts_of(2, 80), SamplingParams(max_tokens=7, **options), seeds=range(2))
    waits, rounds = [0], list[tuple[int, list[int], list[list[int]]]]()
    wait, propose = Sampled.wait, DraftModel.draft

    def counted(sampled: Sampled) -> Any:
        waits[0] += 1
        return wait(sampled)

    def recorded(model: DraftModel, places: Ints, most: Ints) -> Proposals:
        before = waits[0]
        found = propose(model, places, most)
        drafts = [row[:n].tolist() for row, n in zip(found.tokens, found.counts, strict=True)]
        rounds.append((waits[0] - before, places.tolist(), drafts))
        return found

    monkeypatch.setattr(Sampled, "wait", counted)
    monkeypatch.setattr(DraftModel, "draft", recorded)

    def answers() -> Any:
        speculation = Speculation("draft_model", DEPTH, model=draft, gate=False)
        sizes = {"max_model_len": 128, "max_num_batched_tokens": 64, "max_num_seqs": 2, "kv_cache_tokens": 1024}
        rounds.clear()
        return run(engine_of(target, speculation=speculation, **sizes), requests), rounds.copy()

    expected, on_cpu = answers()
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    found, on_gpu = answers()
    assert found == expected
    assert [drafts for _, *drafts in on_gpu] == [drafts for _, *drafts in on_cpu]
    drafting = [(ours, theirs) for (ours, _, drafts), (theirs, *_) in zip(on_gpu, on_cpu, strict=True) if any(drafts)]
    assert len(drafting) > 1 and max(theirs for _, theirs in drafting) > DEPTH
    assert all(ours == (theirs if waits_each_step else 1) for ours, theirs in drafting)
    assert np.mean([theirs for _, theirs in drafting]) > 1
