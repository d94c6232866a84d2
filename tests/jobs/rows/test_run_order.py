"""The order of rows against a plain recursion over the tree of tiles, and which rows are computed once."""

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_jobs import make_model, spec, write

from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.rows.duplicates import Followers, leaders
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.run_order import depth_first, shared_tiles
from batchinfer.jobs.rows.token_file import StoredRequests, TokenFile, cut
from batchinfer.jobs.rows.windows import Limits, Windows
from batchinfer.kernels.grain import TILE

Prompt = list[int]


def stored(prompts: Sequence[Prompt], seeds: Sequence[int] | None = None) -> StoredRequests:
    return StoredRequests.of(Requests.of(prompts, SamplingParams(), seeds))


def tiles_of(prompt: Prompt, grain: int = TILE) -> list[tuple[int, ...]]:
    """Those that it may share."""
    return [tuple(prompt[at : at + grain]) for at in range(0, len(prompt) - grain, grain)]


def recursion(prompts: Sequence[Prompt], rows: list[int], level: int = 0) -> list[int]:
    """These rows, which begin with the same `level` tiles, in order."""
    branches: dict[object, list[int]] = {}
    for row in rows:
        tiles = tiles_of(prompts[row])
        branches.setdefault(tiles[level] if level < len(tiles) else row, []).append(row)
    ranked = sorted(branches.values(), key=lambda branch: (-max(len(prompts[row]) for row in branch), branch[0]))
    return [row for branch in ranked for row in (recursion(prompts, branch, level + 1) if branch[1:] else branch)]


@st.composite
def trees(draw: st.DrawFn) -> list[Prompt]:
    """Prompts of tiles out of two, and a tail that is short, a whole tile, or one token more."""
    tile = st.sampled_from([[7] * TILE, [7] * (TILE - 1) + [8]])
    tail = st.sampled_from([1, 2, 63, 64]).map(lambda n: [9] * n)
    prompt = st.tuples(st.lists(tile, max_size=4), tail).map(lambda parts: [*chain(*parts[0]), *parts[1]])
    return draw(st.lists(prompt, min_size=1, max_size=24))


def neighbours(prompts: Sequence[Prompt], order: Sequence[int], grain: int = TILE) -> list[int]:
    """How many tiles each row of the order shares with the one before it."""
    counts = []
    for before, row in pairwise(order):
        ours, theirs = tiles_of(prompts[row], grain), tiles_of(prompts[before], grain)
        equal = [a == b for a, b in zip(ours, theirs, strict=False)]
        counts.append(equal.index(False) if False in equal else len(equal))
    return counts


@given(trees())
@settings(deadline=None)
def test_the_order_is_depth_first_and_longest_first(prompts: list[Prompt]) -> None:
    order = depth_first(stored(prompts), np.arange(len(prompts))).tolist()
    assert order == recursion(prompts, list(range(len(prompts))))


@given(trees())
@settings(deadline=None)
def test_figures_of_what_is_shared(prompts: list[Prompt]) -> None:
    order = np.random.default_rng(len(prompts)).permutation(len(prompts))
    for grain in (TILE, 16):
        expected = neighbours(prompts, order.tolist(), grain)
        assert shared_tiles(stored(prompts), order, grain).tolist() == expected
    order = depth_first(stored(prompts), np.arange(len(prompts)))
    plan = LengthFigures.of(stored(prompts), order, block_size=32)
    assert plan.shared_tokens == TILE * sum(neighbours(prompts, order.tolist()))
    first = [tiles_of(prompt)[0] for prompt in prompts if tiles_of(prompt)]
    groups = [first.count(tile) for tile in set(first) if first.count(tile) > 1]
    assert (plan.groups, plan.grouped_rows) == (len(groups), sum(groups))
    fine = depth_first(stored(prompts), np.arange(len(prompts)), 16)
    figures = LengthFigures.of(stored(prompts), fine, 16, 16)
    assert figures.shared_tokens == 16 * sum(neighbours(prompts, fine.tolist(), 16)) >= plan.shared_tokens


def test_only_rows_that_are_chosen_are_in_the_order() -> None:
    prompts = stored([[1] * 100, [2] * 300, [1] * 200, [3]])
    assert depth_first(prompts, np.array([0, 2, 3])).tolist() == [2, 0, 3]
    assert depth_first(prompts, np.array([], np.int64)).tolist() == []


def test_many_rows_and_more_than_is_hashed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.rows.run_order.HASHED_ROWS", 7)
    generator = np.random.default_rng(0)
    heads = [generator.integers(0, 99, 150).tolist() for _ in range(5)]
    tails = [generator.integers(0, 99, int(n)).tolist() for n in generator.integers(1, 300, 200)]
    prompts = [heads[i % 5] + tail for i, tail in enumerate(tails)]
    order = depth_first(stored(prompts), np.arange(200))
    assert order.tolist() == recursion(prompts, list(range(200)))
    assert shared_tiles(stored(prompts), order).tolist() == neighbours(prompts, order.tolist())


@given(
    st.lists(
        st.tuples(st.sampled_from([[1], [1, 0], [2] * 70, [2] * 69 + [3]]), st.integers(0, 1), st.integers(0, 2)),
        min_size=1,
    ),
    st.booleans(),
)
@settings(deadline=None)
def test_rows_that_must_come_out_alike_have_one_leader(rows: list[tuple[Prompt, int, int]], collide: bool) -> None:
    """Params 0 and 2 are greedy, so that the seed is nothing to them. Hashes that collide change nothing but speed."""
    params = SamplingTable.of([SamplingParams(max_tokens=n, temperature=t) for n, t in ((8, 0.0), (8, 0.5), (9, 0.0))])
    prompts, seeds, index = ([row[i] for row in rows] for i in range(3))
    requests = Requests.of(prompts, params[0], seeds)
    requests = Requests(
        requests.rows, requests.token_ids, requests.offsets, requests.seeds, params, np.array(index, np.int32)
    )
    first: dict[object, int] = {}
    expected = [first.setdefault((tuple(p), s if i == 1 else 0, i), row) for row, (p, s, i) in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr("batchinfer.jobs.rows.duplicates._keys", lambda some, _: np.zeros(len(some), np.uint64))
        found = leaders(StoredRequests.of(requests)).tolist()
    if not collide:
        assert found == expected
    # Where keys collide a row is led, if at all, by a row that is its equal.
    assert all(leader == row or expected[row] == leader for row, leader in enumerate(found))


def test_more_duplicates_than_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.rows.duplicates.HASHED_TOKENS", 5)
    prompts = [[i % 7, 1, 2, i % 3] for i in range(100)]
    assert leaders(stored(prompts)).tolist() == [i % 21 for i in range(100)]


def test_followers_are_given_once_and_forgotten() -> None:
    followers = Followers()
    followers.add(np.array([1, 1, 4]), np.array([2, 3, 9]))
    places, rows = followers.take(np.array([4, 0, 1]))
    assert (places.tolist(), rows.tolist()) == ([0, 2, 2], [9, 2, 3])
    followers.add(np.array([20]), np.array([21]))
    assert followers.take(np.array([1, 4]))[1].tolist() == []
    assert followers.take(np.array([20]))[1].tolist() == [21]


def test_what_a_file_holds_is_what_was_appended(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "prompts.arrow"
    file = TokenFile(path)
    whole: list[tuple[Prompt, int, SamplingParams]] = []
    for n in (1, 30, 2, 300):
        params = SamplingTable.of([SamplingParams(max_tokens=int(m)) for m in generator.permutation(3)[:2] + 1])
        prompts = [generator.integers(0, 2**31, int(size)).tolist() for size in generator.integers(1, 99, n)]
        seeds = generator.integers(0, 2**64, n, np.uint64)
        index = generator.integers(0, 2, n).astype(np.int32)
        made = Requests.of(prompts, params[0], seeds.tolist())
        file.append(Requests(made.rows + len(whole), made.token_ids, made.offsets, seeds, params, index))
        whole += [(prompt, int(seed), params[i]) for prompt, seed, i in zip(prompts, seeds, index, strict=True)]
    assert (file.rows, file.tokens) == (333, sum(len(prompt) for prompt, _, _ in whole))
    requests = file.complete()
    assert not path.exists()
    order = generator.permutation(333)
    taken = requests.take(order)
    assert taken.rows.tolist() == order.tolist()
    for i, row in enumerate(order):
        prompt, seed, params_of_row = whole[row]
        assert taken.token_ids[taken.offsets[i] : taken.offsets[i + 1]].tolist() == prompt
        assert (taken.seeds[i], taken.params[taken.param_index[i]]) == (seed, params_of_row)
    assert len(taken.params) == 3


def test_a_file_that_nobody_completes_is_removed(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "prompts.arrow")
    file.append(Requests.of([[1, 2]], SamplingParams()))
    file.close()
    assert not list(tmp_path.iterdir())


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 5), st.integers(1, 20))
def test_pieces_are_as_large_as_they_may_be(lengths: list[int], most_rows: int, most_tokens: int) -> None:
    pieces = [lengths[piece] for piece in cut(np.array(lengths, np.int64), most_rows, most_tokens)]
    assert list(chain(*pieces)) == lengths
    assert all(len(piece) <= most_rows and (sum(piece) <= most_tokens or len(piece) == 1) for piece in pieces)
    for piece, after in pairwise(pieces):
        assert len(piece) == most_rows or sum(piece) + after[0] > most_tokens


def windows_by_tokens(lengths: Sequence[int], slice_rows: int, window_tokens: int) -> list[list[int]]:
    """The rows of each: slice by slice, until it has as many tokens as make it full."""
    windows: list[list[int]] = [[]]
    for first in range(0, len(lengths), slice_rows):
        if sum(lengths[row] for row in windows[-1]) >= window_tokens:
            windows.append([])
        windows[-1] += range(first, min(first + slice_rows, len(lengths)))
    return windows


@pytest.mark.parametrize("window_tokens", [1, 2000, 5001, 1 << 28])
def test_windows_that_are_full_by_tokens_lose_no_row(tmp_path: Path, window_tokens: int) -> None:
    """From a table through the real tokenizer. Each window has its own order and its own duplicates; a row that cannot
    run and those that an earlier run has done are not sent."""
    (model := tmp_path / "model").mkdir()
    config = json.loads((make_model(model) / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    generator = np.random.default_rng(0)
    heads = ["A" * 130, "B" * 70, "B" * 64 + "C" * 70, ""]
    texts = [heads[i % 4] + "D" * int(n) for i, n in enumerate(generator.integers(1, 90, 150))]
    texts[10:12] = texts[40:42] = texts[100:102] = texts[:2]
    texts[77] = ""
    job = preflight(spec(model, write(tmp_path / "in.parquet", prompt=texts)))
    done = np.isin(np.arange(150), [3, 40, 41, 90])
    (folder := tmp_path / "ids").mkdir()
    limits = Limits(slice_rows=7, chunk_rows=9, window_tokens=window_tokens)
    windows = Windows(job.table, job.source, 32, done, folder, limits=limits)
    errors: dict[int, RowError] = {}
    sent: list[int] = []
    followed: list[int] = []
    while not windows.over:
        if windows.reading:
            errors |= windows.read()
        elif (piece := windows.next_chunk()) is not None:
            assert [len(texts[row]) for row in piece.rows] == np.diff(piece.offsets).tolist()
            sent += piece.rows.tolist()
            followed += windows.followers.take(piece.rows)[1].tolist()
    windows.close()
    left = [0 if done[row] else len(text) for row, text in enumerate(texts)]
    prompts = [[ord(sign) for sign in text] for text in texts]
    expected: list[int] = []
    duplicates = 0
    for window in windows_by_tokens(left, 7, window_tokens):
        rows = [row for row in window if left[row]]
        first = sorted({texts[row]: row for row in reversed(rows)}.values())
        expected += recursion(prompts, first)
        duplicates += len(rows) - len(first)
    assert sent == expected
    assert sorted(sent + followed) == [row for row in range(150) if left[row]]
    assert {row: error.code for row, error in errors.items()} == {77: "empty_prompt"}
    assert (windows.figures.rows, windows.figures.prompt_tokens) == (145, sum(left))
    assert (windows.figures.duplicates, len(followed)) == (duplicates, duplicates)
    assert windows.rows_read == 150 and not list(folder.iterdir())
