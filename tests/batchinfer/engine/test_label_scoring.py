"""Rows that choose from labels: the log-probabilities are those of transformers, whatever runs beside a row."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import IdsAsText, assert_blocks_are_free, engine_of, prompts_of
from families import made
from numpy.typing import NDArray

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Choices, FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.grain import TILE

ENDS = (1, 7)
Labels = Sequence[Sequence[int]]
# Labels of one to four tokens; some begin alike, one is the beginning of others, one parts twice.
LABELS = [[20], [20, 30], [20, 30, 40], [20, 30, 41, 50], [21, 22, 23, 24], [21, 22, 23], [25], [20, 31]]
SHARED_START = [[40, 41, 42], [40, 41, 43], [40, 44]]


@pytest.fixture(params=["llama", "lfm2", "qwen3_moe", "qwen3_5_text", "gemma4_text"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return made(make_model, request.param)


@pytest.fixture
def llama(make_model: Callable[..., Path]) -> Path:
    return made(make_model, "llama")


def requests_of(prompts: list[list[int]], labels: Sequence[Labels]) -> Requests:
    plain = Requests.of(prompts, SamplingParams(max_tokens=1))
    return Requests(
        plain.rows, plain.token_ids, plain.offsets, plain.seeds, plain.params, plain.param_index, Choices.of(labels)
    )


def scored(engine: Engine, requests: Requests) -> dict[int, tuple[list[int], NDArray[np.float32]]]:
    """The likeliest label and all scores of each row."""
    found = {}
    for done in engine.generate(requests):
        assert done.scores is not None
        for i, row in enumerate(done.rows.tolist()):
            assert done.finish_reasons[i] == FinishReason.STOP and row not in found
            found[row] = done.tokens_of(i), done.scores.take(np.array([i])).values
    assert_blocks_are_free(engine)
    assert not engine.scheduler.labels.unmade and not engine.table.active.any()
    return found


def by_transformers(model: Path, prompts: list[list[int]], labels: Sequence[Labels]) -> list[list[float]]:
    """The log-probability that each label and then one of `ENDS` follows, by one pass for each label."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def score(prompt: list[int], label: Sequence[int]) -> float:
        with torch.no_grad():
            logits = oracle(torch.tensor([[*prompt, *label]])).logits[0, len(prompt) - 1 :]
        known = torch.log_softmax(logits, -1)
        tokens = known[torch.arange(len(label)), torch.tensor(label)].sum()
        return float(tokens + torch.logsumexp(known[-1, list(ENDS)], -1))

    return [[score(prompt, label) for label in row] for prompt, row in zip(prompts, labels, strict=True)]


def ends(**settings: Any) -> dict[str, Any]:
    return {"tokenizer": IdsAsText(eos_ids=ENDS), "speculation": Speculation("off"), **settings}


def prompts() -> list[list[int]]:
    """Prompts around the edges of blocks and tiles, a template of two tiles, and twins."""
    rng = np.random.default_rng(1)
    stem = rng.integers(2, 320, 2 * TILE).tolist()
    shared = [[*stem, *rng.integers(2, 320, n).tolist()] for n in (1, 30, 31, 32, 40)]
    apart = [rng.integers(2, 320, n).tolist() for n in (1, 31, 32, 33, 64, 100)]
    return [*shared, shared[-1], *apart, apart[-1]]


def test_the_scores_are_those_of_transformers(model: Path) -> None:
    asked = prompts()
    labels = [
        LABELS,
        LABELS,
        SHARED_START,
        [[9]],
        LABELS,
        SHARED_START,
        LABELS,
        *[LABELS] * 3,
        SHARED_START,
        LABELS[:2],
        LABELS,
    ]
    assert len(labels) == len(asked)
    found = scored(engine_of(model, **ends()), requests_of(asked, labels))
    for row, expected in enumerate(by_transformers(model, asked, labels)):
        label, ours = found[row]
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        assert label == labels[row][int(np.argmax(expected))]


@pytest.mark.parametrize("settings", [{"max_num_seqs": 8}, {"max_num_batched_tokens": 64}, {"kv_cache_tokens": 512}])
def test_a_rows_bits_do_not_depend_on_what_runs_beside_it(model: Path, settings: dict[str, Any]) -> None:
    asked = prompts()
    labels: list[Labels] = [LABELS, SHARED_START] * (len(asked) // 2) + [LABELS] * (len(asked) % 2)
    requests = requests_of(asked, labels)
    together = scored(engine_of(model, **ends(**settings)), requests)
    engine = engine_of(model, **ends(prefix_sharing=False))
    for row in range(len(asked)):
        label, scores = scored(engine, requests.take(np.array([row])))[row]
        assert together[row][0] == label
        np.testing.assert_array_equal(together[row][1], scores)


def test_labels_that_begin_alike_share_their_tokens(llama: Path) -> None:
    engine = engine_of(llama, **ends())
    asked = prompts_of(3, 60)
    scored(engine, requests_of(asked, [LABELS] * 3))
    batches = engine.stats().steps
    assert batches <= 5, "all forks at one depth are computed in one step"


def test_of_equally_likely_labels_the_first_is_taken(llama: Path) -> None:
    label, scores = scored(engine_of(llama, **ends()), requests_of([[5, 6]], [[[30], [31], [30], [31]]]))[0]
    assert scores[0] == scores[2] and scores[1] == scores[3]
    assert label == [[30], [31]][int(scores.argmax())]


def test_rows_that_generate_and_rows_that_choose_do_not_disturb_each_other(llama: Path) -> None:
    asked = prompts()
    choosing = requests_of(asked, [LABELS] * len(asked))
    plain = Requests.of(asked, SamplingParams(max_tokens=20, ignore_eos=True))
    plain = Requests(
        plain.rows + 100,
        *[getattr(plain, name) for name in ("token_ids", "offsets", "seeds")],
        plain.params,
        plain.param_index,
    )
    alone = scored(engine_of(llama, **ends()), choosing)
    engine = engine_of(llama, **{**ends(), "speculation": Speculation("ngram")})
    expected = {row: c.tokens_of(i) for c in engine.generate(plain) for i, row in enumerate(c.rows.tolist())}
    engine.add(plain.take(np.arange(5)))
    engine.add(choosing)
    engine.add(plain.take(np.arange(5, len(plain))))
    generated, chosen = {}, {}
    while engine.unfinished:
        done = engine.step()
        for i, row in enumerate(done.rows.tolist()):
            if row >= 100:
                generated[row] = done.tokens_of(i)
            else:
                assert done.scores is not None
                chosen[row] = done.scores.take(np.array([i])).values
    assert generated == expected
    for row, (_, scores) in alone.items():
        np.testing.assert_array_equal(chosen[row], scores)
    assert_blocks_are_free(engine)


def test_a_step_that_memory_does_not_hold_comes_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts()
    requests = requests_of(asked, [LABELS] * len(asked))
    expected = scored(engine_of(model, **ends()), requests)
    engine = engine_of(model, **ends())
    launch, fails = engine.runner.launch, iter([False, True, False, False, True, True] + [False, True] * 3)

    def launched(batch: Any) -> Any:
        if next(fails, False):
            raise torch.OutOfMemoryError("no room")
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", launched)
    monkeypatch.setattr(engine, "_shrink", lambda *_: None)
    for row, (label, scores) in scored(engine, requests).items():
        assert label == expected[row][0]
        np.testing.assert_array_equal(scores, expected[row][1])


def test_a_row_with_more_labels_than_places_is_refused(llama: Path) -> None:
    engine = engine_of(llama, **ends(max_num_seqs=4))
    with pytest.raises(
        ValueError, match=r"row 0 chooses from labels that need 5 sequences side by side .* there are 4"
    ):
        engine.add(requests_of([[3]], [[[n] for n in range(20, 25)]]))


def test_values_that_are_not_finite_are_an_error_of_the_row(llama: Path) -> None:
    engine = engine_of(llama, **ends())
    engine.runner.decoder.embedding[50] = float("nan")
    found = {}
    for done in engine.generate(requests_of([[3, 4], [3, 50], [5, 6]], [[[20], [21]], [[20], [21]], [[20, 50], [21]]])):
        found |= dict(zip(done.rows.tolist(), done.finish_reasons.tolist(), strict=True))
    assert found == {0: FinishReason.STOP, 1: FinishReason.ERROR, 2: FinishReason.ERROR}
    assert_blocks_are_free(engine)


def test_dropped_rows_leave_nothing_behind(llama: Path) -> None:
    engine = engine_of(llama, **ends())
    engine.add(requests_of(prompts(), [LABELS] * len(prompts())))
    for _ in range(2):
        engine.step()
    engine.drop()
    assert_blocks_are_free(engine)
    assert not engine.scheduler.labels.unmade and not engine.unfinished
