"""What `plan` tells of a table whose rows begin alike or are equal, against counts made by hand from its texts."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from measured_devices import SHAPE, cost_of
from stub_jobs import make_model, spec, write

from batchinfer.cost.step_cost import DeviceCost, StepCost
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.outlook import Outlook, plan
from batchinfer.jobs.plan.device_file import DeviceKey, write_device_cost
from batchinfer.jobs.plan.prediction import Prediction
from batchinfer.jobs.rows.windows import Limits, Windows

TILE = 64  # tokens; each sign of these texts is one
FORMS = ["A" * 3 * TILE, "B" * 3 * TILE]
FILLED = [form + f"{i:08}" for i in range(3) for form in FORMS]  # 6 rows of 200 tokens, of two templates in turn
APART = [f"{i:08}" + FORMS[0] for i in range(6)]  # as long, and none begins like another
KV_TOKEN = 2 * 2 * 2 * 16  # numbers: keys and values of 2 layers and 2 heads with 16 each


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape and a tokenizer, no weights; and a cache of measured devices that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "model").mkdir()
    return make_model(folder, **SHAPE | {"max_position_embeddings": 512})


def planned(model: Path, texts: list[str], max_tokens: int = 5, temperature: float = 0.0, **fields: Any) -> Outlook:
    """Plan a job on the CPU, by torch's operations, whose rows take all tokens that they may."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
    path = write(model.parent / "in.parquet", prompt=texts)
    return plan(spec(model, path, device="cpu", cpu_path="reference", sampling=sampling, **fields))


def shared_tokens(texts: list[str]) -> int:
    """Of equal beginnings in whole tiles all but one are shared; a row's last tile is its own."""
    begins = Counter(text[:end] for text in set(texts) for end in range(TILE, len(text), TILE))
    return TILE * sum(count - 1 for count in begins.values())


def test_rows_of_two_templates_are_groups_that_share(model: Path) -> None:
    """The first row of each template computes it, two more take 3 tiles from there; what is left is one step."""
    found = planned(model, FILLED)
    assert (found.prompt_tokens, found.shared_tokens, found.duplicates) == (6 * 200, shared_tokens(FILLED), 0)
    assert found.shared_tokens == 2 * 2 * 3 * TILE
    assert (found.groups, found.grouped_rows) == (2, 6)
    # 1,200 - 768 = 432 tokens, padded to a multiple of 32; then each row's other 4, 6 rows padded to 8.
    assert found.step_sizes == {"448": 1, "8": 4}
    assert re.search(r"\nsteps +5\n +tokens: steps", found.text(None))
    assert "768 tokens; 6 rows in 2 groups begin alike" in found.text(None)


def test_a_single_tile_that_all_rows_share(model: Path) -> None:
    """15 of 16 rows take it from the first one: 60 tokens of each on average, which is less than a tile."""
    texts = ["A" * 100 + f"{i:04}" for i in range(16)]
    found = planned(model, texts, max_num_batched_tokens=2048)
    assert (found.shared_tokens, found.groups, found.grouped_rows) == (shared_tokens(texts), 1, 16)
    assert found.step_sizes == {str(16 * 104 - 15 * TILE): 1, "16": 4}


def test_what_is_not_shared_takes_the_steps_that_its_tokens_need(model: Path) -> None:
    found = planned(model, APART, max_num_batched_tokens=2048)
    assert (found.shared_tokens, found.groups, found.grouped_rows) == (0, 0, 0)
    assert found.step_sizes == {"1216": 1, "8": 4}


def test_steps_by_budget_and_places(model: Path) -> None:
    """Prompts are cut at tiles to fill a step's budget; what it leaves is for rows that decode, and a row waits for a
    place."""
    by_places = planned(model, APART, max_num_seqs=3, max_num_batched_tokens=2048)
    assert by_places.step_sizes == {"608": 2, "8": 2 * 4}
    # Of 200 + 64: 136 + 128 and 72 + 192 after that, then 8 + 200 with 3 that decode, 200 with 5, and the last row.
    cut = planned(model, APART, max_num_batched_tokens=200 + TILE)
    assert cut.step_sizes == {"288": 3, "224": 2, "8": 4}
    # One prompt a step, beside which up to 4 rows decode: 192, then from 193 on.
    beside = planned(model, [text[:192] for text in APART], max_num_batched_tokens=200)
    assert beside.step_sizes == {"192": 1, "224": 5, "8": 4}
    # Prompts that fill a step leave nothing: all 6 rows decode behind the last one.
    full = planned(model, [text + "X" * 56 for text in APART], max_num_batched_tokens=256)
    assert full.step_sizes == {"256": 6, "8": 4}


def test_samples_of_a_row_share_its_prompt(model: Path) -> None:
    """Two samples of each row: twice the rows that decode, and no more prompt tokens than of one."""
    found = planned(model, FILLED, n=2, temperature=1.0)
    assert found.step_sizes == {"448": 1, "16": 4} and found.most_new_tokens == 2 * 6 * 5


def test_duplicates_are_no_part_of_groups_and_steps(model: Path) -> None:
    """Exact duplicates of rows of both templates, and of one that begins like no other."""
    texts = [*FILLED, FILLED[4], "C" * 50, FILLED[1], "C" * 50, FILLED[4], FILLED[4]]
    found = planned(model, texts)
    again = Counter(texts) - Counter(set(texts))
    assert (found.rows_to_run, found.prompt_tokens) == (12, sum(map(len, texts)))
    assert (found.duplicates, found.duplicate_tokens) == (again.total(), sum(map(len, again.elements())))
    assert (found.duplicates, found.duplicate_tokens) == (5, 4 * 200 + 50)
    assert (found.shared_tokens, found.groups, found.grouped_rows) == (shared_tokens(texts), 2, 6)
    own = sum(map(len, set(texts)))
    tokens = sum(int(size) * count for size, count in found.step_sizes.items())
    # 7 rows that decode are padded to 8; the last of them do it 4 times after the last prompt.
    assert found.step_sizes["8"] == 4
    assert own - found.shared_tokens < tokens < own, "tokens of the 7 that are computed, less some that are shared"
    assert "5 rows with 850 tokens, not computed again" in found.text(None)


def test_duplicates_do_not_dilute_what_is_shared(model: Path) -> None:
    once, thrice = planned(model, FILLED), planned(model, 3 * FILLED)
    assert thrice.duplicates == 12
    assert thrice.step_sizes == once.step_sizes == {"448": 1, "8": 4}


def test_duplicates_do_not_stand_for_the_rows_that_run(model: Path) -> None:
    """One row of 10 tokens is computed, and one of 300: 310 tokens, padded to a multiple of 32."""
    found = planned(model, 9 * ["A" * 10] + ["B" * 300])
    assert found.step_sizes == {"320": 1, "8": 4} and found.most_new_tokens == 2 * 5


def test_sharing_makes_the_prediction_shorter(model: Path) -> None:
    """A token takes a millisecond: the same rows with beginnings of their own take one for each shared token more."""
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    alike, apart = (prediction_of(planned(model, texts, max_num_batched_tokens=2048)) for texts in (FILLED, APART))
    assert apart.generate_seconds == pytest.approx(1e-3 * (1216 + 4 * 8))
    assert alike.generate_seconds == pytest.approx(1e-3 * (448 + 4 * 8))
    assert apart.prefill_seconds - alike.prefill_seconds == pytest.approx(1e-3 * shared_tokens(FILLED))
    assert alike.decode_seconds == pytest.approx(apart.decode_seconds)
    assert (alike.low, alike.high) == (alike.generate_seconds, alike.generate_seconds)


def test_duplicates_make_the_prediction_shorter(model: Path) -> None:
    """12 rows of which 5 differ, against 12 that differ: neither prompts nor new tokens of the others are computed."""
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    apart = [f"{i:02}" + "A" * 38 for i in range(12)]
    alike = [apart[i % 5] for i in range(12)]
    different = planned(model, apart)
    assert different.duplicates == 0 and different.step_sizes == {"480": 1, "16": 4}
    assert prediction_of(different).generate_seconds == pytest.approx(1e-3 * (480 + 4 * 16))
    same = planned(model, alike)
    assert (same.duplicates, same.duplicate_tokens) == (7, 7 * 40)
    assert same.step_sizes == {"224": 1, "8": 4}
    assert prediction_of(same).generate_seconds == pytest.approx(1e-3 * (224 + 4 * 8))
    assert different.comparison is not None and same.comparison is not None
    before = [candidate.generate_seconds for candidate in different.comparison.candidates]
    assert all(b.generate_seconds < a for a, b in zip(before, same.comparison.candidates, strict=True))


def prediction_of(found: Outlook) -> Prediction:
    assert found.prediction is not None
    return found.prediction


def device(model: Path, seconds: dict[str, float]) -> DeviceCost:
    """One on which a step of bfloat16 takes no time but for these quantities."""
    cost = cost_of(model, per_token=0.0)
    step = cost.steps["bfloat16"].seconds
    assert seconds.keys() <= step.keys()
    return replace(cost, steps={**cost.steps, "bfloat16": StepCost(step | seconds)})


def drafts_pay(model: Path, seconds: dict[str, float]) -> dict[str, float | None]:
    """On such a device, for a table of 64 rows."""
    write_device_cost(DeviceKey.of("cpu", "reference"), device(model, seconds))
    return planned(model, [f"{i:010}" for i in range(64)]).drafts_pay


def test_drafts_always_pay_where_steps_are_flat(model: Path) -> None:
    """Five tokens of a row take as long as one: the least share of right drafts that is looked at is enough."""
    assert drafts_pay(model, {"step": 2**-6}) == {"1": 0.01, "4": 0.01, "16": 0.01, "64": 0.01}


def test_drafts_never_pay_where_time_is_in_proportion(model: Path) -> None:
    """Five times the seconds for five tokens at best. Tokens are padded to 8, so that with few rows they are free."""
    assert drafts_pay(model, {"decoding key in bfloat16": 2**-10}) == dict.fromkeys(("1", "4", "16", "64"))
    by_token = drafts_pay(model, {"stored key in bfloat16": 2**-16})
    assert (by_token["16"], by_token["64"]) == (None, None)
    assert by_token["1"] == 0.01
    text = planned(model, [f"{i:010}" for i in range(64)]).text(None)
    assert "1 row: if 1 % or more are right" in text and "16 rows: never; 64 rows: never" in text


def expected_tokens(right: float) -> float:
    """Of a row in a step: one more than drafts that are right up to the first wrong one, of four."""
    return sum((1 + n) * right**n * (1 - right if n < 4 else 1.0) for n in range(5))


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        # As long as 32 tokens, and 1 for each token, padded.
        (
            {"step": 32, "stored key in bfloat16": 1 / 64},
            {"1": (40, 40), "4": (40, 56), "16": (48, 112), "64": (96, 352)},
        ),
        # As long as 100 positions, and 1 for each that a token sees: 10 of the prompt, and half of 5 new ones.
        (
            {"step": 100, "decoding key in bfloat16": 2 / KV_TOKEN},
            {"1": (112.5, 162.5), "4": (150, 350), "16": (300, 1100), "64": (900, 4100)},
        ),
    ],
)
def test_drafts_pay_from_where_a_step_gives_more_tokens_a_second(
    model: Path, seconds: dict[str, float], taken: dict[str, tuple[float, float]]
) -> None:
    """With all the rows' drafts, of so many rows a step takes the second time, and without them the first one."""
    found = drafts_pay(model, seconds)
    assert found.keys() == taken.keys()
    for rows, (plain, drafted) in taken.items():
        right = found[rows]
        assert right is not None
        assert expected_tokens(right) / drafted > 1 / plain >= expected_tokens(right - 0.01) / drafted
    shares = [share for share in found.values() if share is not None]
    assert all(few < more for few, more in pairwise(shares)) and shares[-1] < 1


def test_no_more_rows_side_by_side_than_there_are_to_compute(model: Path) -> None:
    """Duplicates take no place, and `max_num_seqs` bounds it."""
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    assert list(planned(model, [f"{i % 9:010}" for i in range(30)]).drafts_pay) == ["1", "4", "9"]
    assert list(planned(model, [f"{i:010}" for i in range(30)], max_num_seqs=16).drafts_pay) == ["1", "4", "16"]


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"max_num_seqs": 1}, 13),
        ({"max_num_seqs": 3}, 13 + 8 + 8),
        ({"max_num_seqs": 64}, 13 + 8 + 8 + 4 + 2),
        ({"max_num_seqs": 4, "n": 2, "temperature": 1.0}, 2 * (13 + 8)),
    ],
)
@pytest.mark.parametrize(("kv_cache", "of_number"), [("bfloat16", 2), ("float32", 4), ("int8", 1 + 4 / 16)])
def test_kv_cache_of_the_largest_rows_that_run_at_once(
    model: Path, fields: dict[str, Any], blocks: int, kv_cache: str, of_number: float
) -> None:
    """Blocks of 16 for prompt and 20 new tokens: 8 of 100 + 20, once for two equal rows; 4 of 30 + 20; 13 of 190 + 10,
    as the context ends there; 2 of 12 + 20; 8 of 101 + 20. A token and head of int8 has a scale of 4 bytes."""
    texts = ["A" * 100, "B" * 30, "A" * 100, "C" * 190, "D" * 12, "E" * 101]
    found = planned(model, texts, 20, block_size=16, max_model_len=200, kv_cache_dtype=kv_cache, **fields)
    assert found.duplicates == 1
    assert (found.kv_cache, found.kv_cache_bytes) == (kv_cache, blocks * 16 * KV_TOKEN * of_number)


def test_a_table_of_several_windows_is_planned_to_its_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full at the tokens of its first half: rows of the second one share and repeat nothing of the first one."""
    whole = planned(model, FILLED * 2)
    assert (whole.duplicates, whole.shared_tokens, whole.grouped_rows) == (6, shared_tokens(FILLED), 6)
    limits = Limits(slice_rows=2, window_tokens=6 * 200)
    monkeypatch.setattr("batchinfer.jobs.outlook.Windows", partial(Windows, limits=limits))
    halves = planned(model, FILLED * 2)
    assert (halves.rows_to_run, halves.prompt_tokens) == (whole.rows_to_run, whole.prompt_tokens) == (12, 2400)
    assert (halves.duplicates, halves.duplicate_tokens) == (0, 0)
    assert (halves.shared_tokens, halves.groups, halves.grouped_rows) == (2 * shared_tokens(FILLED), 4, 12)
    assert halves.kv_cache_bytes == 2 * whole.kv_cache_bytes


def test_states_of_the_rows_that_run_at_once(model: Path) -> None:
    """Two of three layers keep the last two inputs of 64 channels, in bfloat16; no more rows than places."""
    config = json.loads((model / "config.json").read_text())
    changed = {"model_type": "lfm2", "num_hidden_layers": 3, "full_attn_idxs": [0], "conv_L_cache": 3}
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    a_state = 2 * 2 * 64 * 2
    assert planned(model, APART).state_bytes == 6 * a_state
    found = planned(model, FILLED, max_num_seqs=4)
    assert found.state_bytes == 4 * a_state
    assert re.search(r"\n  states +0 MB of the rows side by side, and up to as much again for what", found.text(None))


def test_a_model_without_states_has_no_line_of_them(model: Path) -> None:
    found = planned(model, FILLED)
    assert found.state_bytes == 0 and "side by side\n" not in found.text(None)
