"""Rows have equal keys if and only if they must have the same answer."""

from dataclasses import replace

import numpy as np

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.rows.answer_keys import answer_keys

COLD, WARM = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)


def key(tokens: list[int], params: SamplingParams = COLD, seed: int = 0) -> bytes:
    return bytes(answer_keys(Requests.of([tokens], params, [seed]))[0])


def test_a_key_follows_from_tokens_params_and_the_seed_of_drawn_tokens() -> None:
    assert key([1, 2, 3]) == key([1, 2, 3], seed=5), "at temperature 0 nothing is drawn"
    assert key([1, 2], WARM, 5) == key([1, 2], WARM, 5)
    different = {
        key([1, 2]), key([1, 2, 0]), key([2, 1]), key([1]), key([258]), key([1, 2], WARM), key([1, 2], WARM, 5),
        key([1, 2], replace(COLD, max_tokens=3)), key([1, 2], replace(COLD, stop=("a",))),
    }  # fmt: skip
    assert len(different) == 9


def test_keys_do_not_depend_on_the_batch() -> None:
    prompts = [[i % 7] * (1 + i % 5) for i in range(35)]
    requests = Requests.of(prompts, COLD)
    shuffled = np.random.default_rng(0).permutation(35)
    assert np.array_equal(answer_keys(requests.take(shuffled)), answer_keys(requests)[shuffled])
    assert [bytes(k) for k in answer_keys(requests)] == [key(prompt) for prompt in prompts]
    assert len(answer_keys(requests.take(np.zeros(0, np.int64)))) == 0
