"""Ways to run a job, compared on devices whose times can be worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured_devices import SHAPE, cost_of
from stub_jobs import make_model, spec, write

from batchinfer.cost.step_cost import StepCost
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.fingerprints import model_digest
from batchinfer.jobs.outlook import Outlook, plan
from batchinfer.jobs.plan.comparison import Better, Comparison, SideBySide, ways
from batchinfer.jobs.plan.device_file import DeviceKey, write_device_cost
from batchinfer.jobs.plan.prediction import JobShape
from batchinfer.jobs.plan.quality_file import Quality, write_quality

ROWS, PROMPT, NEW = 64, 10, 5  # tokens
BLOCK = 16  # tokens; a row takes one
KV_TOKEN = 2 * 2 * 2 * 16  # numbers: keys and values of 2 layers and 2 heads with 16 each
FOUND = Quality(0.0012, 0.987, 12_000, "ORG/NAME", "evaluate")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape and a tokenizer, no weights; on a device where each step takes a second, and half of that in 8 bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "model").mkdir()
    make_model(folder, **SHAPE)
    measured(folder, 0.5)
    return folder


def measured(model: Path, in_8_bits: float) -> None:
    """Let this device take so many seconds for a step in 8 bits."""
    cost = cost_of(model, per_token=0.0)
    step = {"float32": 2.0, "bfloat16": 1.0, "w8a8-int8": in_8_bits, "w4a8": 0.25}
    steps = {name: StepCost(found.seconds | {"step": step[name]}) for name, found in cost.steps.items()}
    write_device_cost(DeviceKey.of("cpu", "reference"), replace(cost, steps=steps))


def planned(model: Path, **fields: Any) -> Outlook:
    """Plan a job of 64 rows, each of which takes all its tokens, 16 of them side by side."""
    path = write(model.parent / "in.parquet", prompt=[f"{i:0{PROMPT}}" for i in range(ROWS)])
    sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
    usual = {"sampling": sampling, "max_num_seqs": 16, "max_num_batched_tokens": 2048, "block_size": BLOCK}
    return plan(spec(model, path, device="cpu", cpu_path="reference", **usual | fields))


def compared(model: Path, **fields: Any) -> Comparison:
    found = planned(model, **fields).comparison
    assert found is not None
    return found


def evaluated(model: Path, **fields: Any) -> None:
    """Let somebody have measured what w8a8-int8 costs."""
    write_quality(model_digest(model), EngineConfig(model, quantization="w8a8-int8", **fields), FOUND)


def test_rows_side_by_side(model: Path) -> None:
    """Each batch takes a step for its prompts and four more; its rows take a block each."""
    found = compared(model)
    seconds = {places: ROWS / places * NEW for places in (4, 8, 16, 32, 64)}
    nbytes = {places: places * BLOCK * KV_TOKEN * 2 for places in seconds}
    assert found.side_by_side == {places: SideBySide(seconds[places], nbytes[places]) for places in seconds}
    assert list(compared(model, max_num_seqs=100).side_by_side) == [25, 50, 64], "there are no more rows"
    assert list(compared(model, max_num_seqs=2).side_by_side) == [1, 2, 4, 8]


def test_the_fastest_is_among_those_of_known_quality(model: Path) -> None:
    found = compared(model)
    assert (found.candidates[0].products, found.candidates[0].quality) == ("w8a8-int8", None)
    own = [c for c in found.candidates if c.quality is not None]
    assert [(c.products, c.kv_cache, c.quality) for c in own] == [("bfloat16", "bfloat16", "as the checkpoint is")]
    assert found.better == Better(["--max-num-seqs", "64"], 5.0, "as the checkpoint is")
    evaluated(model)
    expected = ["--quantization", "w8a8-int8", "--max-num-seqs", "64"]
    better = compared(model).better
    assert better == Better(expected, 2.5, str(FOUND)) and "KL 0.0012 nats a token, top-1 98.7 %" in better.quality
    # Nothing is faster than the job that these flags make.
    assert compared(model, quantization="w8a8-int8", max_num_seqs=64).better is None


def test_a_type_of_keys_is_named_where_it_is_not_the_usual_one(model: Path) -> None:
    evaluated(model, kv_cache_dtype="int8")
    better = compared(model, max_num_seqs=64).better
    assert better is not None
    assert better.flags == ["--quantization", "w8a8-int8", "--kv-cache-dtype", "int8"]


def test_a_way_back_to_the_checkpoint_is_named(model: Path) -> None:
    found = compared(model, quantization="w8a8-int8", kv_cache_dtype="int8", max_num_seqs=64)
    assert found.better is None, "in floating point it would take longer"
    measured(model, 9.0)
    better = compared(model, quantization="w8a8-int8", kv_cache_dtype="int8", max_num_seqs=64).better
    assert better is not None and better.flags == ["--quantization", "auto", "--kv-cache-dtype", "bfloat16"]


def test_a_head_that_is_rounded_too_has_a_quality_of_its_own(model: Path) -> None:
    evaluated(model)
    found = compared(model, quantization="w8a8-int8+head", max_num_seqs=64).candidates
    assert {c.quality for c in found if c.quantization == "w8a8-int8+head"} == {None}
    known = {(c.quantization, c.kv_cache): c.quality for c in found if c.quality is not None}
    assert known == {("auto", "bfloat16"): "as the checkpoint is", ("w8a8-int8", "float32"): str(FOUND)}


def groups(*bits: int) -> dict[str, Any]:
    weights = {str(n): {"weights": {"num_bits": n}} for n in bits}
    return {"quant_method": "compressed-tensors", "config_groups": weights}


@pytest.mark.parametrize(
    ("stored", "in_four_bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, True),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, False),
        (groups(4), True),
        (groups(4, 8), False),
    ],
)
def test_four_bits_are_offered_where_the_checkpoint_has_them(
    model: Path, stored: dict[str, Any], in_four_bits: bool
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    found = {way.quantization for way in ways(EngineConfig(model))}
    assert found == {"auto", "w8a8-int8", *(["w4a8"] if in_four_bits else [])}, "expanded it is as it is without a flag"


def test_no_more_rows_than_memory_holds(model: Path) -> None:
    """Memory for 3 rows: more are not recommended, and the plan says how long 3 side by side take."""
    room = 3 * BLOCK * KV_TOKEN * 2
    found = compared(model, kv_cache_memory_bytes=room + 1)
    assert found.held == 3 and found.side_by_side[3] == SideBySide(22 * NEW, room)
    assert found.better is None
    text = planned(model, kv_cache_memory_bytes=room + 1).text(None)
    assert "memory holds no more at their longest" in text
    assert compared(model, kv_cache_memory_bytes=1).held == 1
    assert compared(model).held == 16


def test_drafts_in_each_step(model: Path) -> None:
    """A step takes a second with drafts or without: four batches of a step of prompts and four of one token each."""
    gains = {share: sum(share**n for n in range(5)) for share in (0.25, 0.5, 0.75)}
    seconds = compared(model).with_drafts
    assert seconds == {f"{share:.0%}": pytest.approx(4 + 16 / gain) for share, gain in gains.items()}


def test_what_a_faster_way_costs_can_be_found_out(model: Path) -> None:
    text = planned(model, max_num_seqs=64).text(None)
    assert "w8a8-int8, KV" in text and "quality not known" in text and "fastest known" not in text
    asked = f"batchinfer evaluate {model} --reference {model} --quantization w8a8-int8 --kv-cache-dtype "
    assert asked in text and f"--data {model.parent / 'in.parquet'} --column prompt measures it" in text
    for kv_cache in ("float32", "bfloat16", "fp8", "int8"):
        evaluated(model, kv_cache_dtype=kv_cache)
    text = planned(model, max_num_seqs=64).text(None)
    assert "batchinfer evaluate" not in text and "2.50 s of generating with --quantization w8a8-int8" in text


def test_answers_that_are_cut() -> None:
    """NumPy draws lognormal lengths with the mean and deviation of usual ones."""
    variance = np.log(1 + (244 / 322) ** 2)
    drawn = np.random.default_rng(0).lognormal(np.log(322) - variance / 2, variance**0.5, 200_000)
    lengths = np.bincount([10] * 3 + [900])
    shape = JobShape(lengths, SamplingParams(max_tokens=300), 1000)
    assert shape.share_cut == pytest.approx((3 * np.mean(drawn > 300) + np.mean(drawn > 100)) / 4, abs=0.005)
    assert shape.short_of_context == 1, "100 tokens are left behind 900"
    assert JobShape(lengths, SamplingParams(max_tokens=100), 1000).short_of_context == 0
    assert JobShape(lengths, SamplingParams(max_tokens=991), 1000).short_of_context == 4
