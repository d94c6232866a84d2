"""Rows that must have the same answer: the first of them, their leader, is computed, and the others get its result."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.token_file import StoredRequests, cut
from batchinfer.jobs.spec import JobSpec
from batchinfer.kernels.ragged import Ints, indices_within, ranges

HASHED_TOKENS = 1 << 21  # most tokens in memory at a time
WEIGHTS = np.random.default_rng(1).integers(0, 1 << 63, 4, np.uint64) * np.uint64(2) + np.uint64(1)  # of other columns


def leaders(prompts: StoredRequests) -> Ints:
    """Return the index of each row's leader [n].

    That is the first row with the same tokens, sampling params, labels, scored text and number of samples and, if
    tokens are drawn at random, the same seed. A row without such a row before it is its own leader. There must be one
    row or more.
    """
    seeds = np.where(prompts.drawn, prompts.seeds, np.uint64(0))
    keys = _keys(prompts, seeds)
    others: list[Ints] = [prompts.label_sets(), prompts.wanted, *prompts.scored]
    for column, weight in zip(others, WEIGHTS, strict=False):
        keys += column.astype(np.uint64) * weight
    by_key = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(np.concatenate(([True], np.diff(keys[by_key]) != 0)))
    first = np.repeat(by_key[changes], np.diff(changes, append=len(keys)))
    leader = np.arange(len(prompts))
    kinds: list[NDArray[np.generic]] = [prompts.lengths, prompts.param_index, seeds, *others]
    for kind in kinds:
        alike = kind[first] == kind[by_key]
        first, by_key = first[alike], by_key[alike]
    followers = np.sort(by_key[first != by_key])
    candidate = np.empty_like(leader)
    candidate[by_key] = first
    followers = followers[_same_tokens(prompts, followers, candidate[followers])]
    leader[followers] = candidate[followers]
    return leader


def _keys(prompts: StoredRequests, seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each row [n]: the sum of its tokens times random weights of their positions."""
    longest = int(prompts.lengths.max(initial=0))
    weights = np.random.default_rng(0).integers(0, 1 << 64, longest + 3, np.uint64) | np.uint64(1)
    keys: NDArray[np.uint64] = prompts.lengths.astype(np.uint64) * weights[-1] + seeds * weights[-2]
    keys += prompts.param_index.astype(np.uint64) * weights[-3]
    for some in cut(prompts.lengths, len(prompts), HASHED_TOKENS):
        token_ids, offsets = prompts.prompts(np.arange(some.start, some.stop))
        numbers = token_ids.astype(np.uint64) * weights[indices_within(np.diff(offsets))]
        keys[some] += np.add.reduceat(numbers, offsets[:-1])
    return keys


def _same_tokens(prompts: StoredRequests, a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Return whether the prompts at indices `a` [m] and `b` [m], of equal lengths, have equal tokens [m]."""
    same = np.zeros(len(a), np.bool_)
    for some in cut(prompts.lengths[a], len(a), HASHED_TOKENS):
        ours, offsets = prompts.prompts(a[some])
        theirs, _ = prompts.prompts(b[some])
        same[some] = np.logical_and.reduceat(ours == theirs, offsets[:-1])
    return same


def told_alike(spec: JobSpec, figures: LengthFigures) -> list[str]:
    """Return a note for the log and the report if rows with equal prompts draw equal answers at random.

    The rows of each window are counted, whose duplicates are known.
    """
    rows = figures.duplicates
    if not rows or spec.sampling.temperature == 0 or spec.id_column is not None or spec.openai_batch:
        return []
    return [
        f"{rows:,} {'row has' if rows == 1 else 'rows have'} the prompt of an earlier row and so its answer, also at "
        f"temperature {spec.sampling.temperature:g}: a row's seed comes from its prompt; give --id-column to take it "
        "from the row's id, or --n for several answers of one prompt"
    ]


class Followers:
    """Rows that wait for the result of another row, their leader."""

    def __init__(self) -> None:
        self._leaders = self._followers = np.zeros(0, np.int64)
        self._waiting = np.zeros(0, np.bool_)

    def add(self, leaders: Ints, followers: Ints) -> None:
        """Add followers [n] and their leaders [n]. Leaders are ascending, and greater than all leaders added before."""
        self._leaders = np.concatenate((self._leaders[self._waiting], leaders))
        self._followers = np.concatenate((self._followers[self._waiting], followers))
        self._waiting = np.ones(len(self._leaders), np.bool_)

    def take(self, rows: Ints) -> tuple[Ints, Ints]:
        """Remove the followers of rows that ended. Returns (the index in `rows` of each one's leader [m], followers
        [m])."""
        first = np.searchsorted(self._leaders, rows, "left")
        counts = np.searchsorted(self._leaders, rows, "right") - first
        found, _ = ranges(first, counts)
        self._waiting[found] = False
        return np.repeat(np.arange(len(rows)), counts), self._followers[found]
