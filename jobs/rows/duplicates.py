"""Rows that must come out alike: one of them is computed, and the others get its result."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.token_file import StoredRequests, cut
from batchinfer.kernels.ragged import Ints, indices_within, ranges

HASHED_TOKENS = 1 << 21  # that are in memory at a time


def leaders(prompts: StoredRequests) -> Ints:
    """[n] for each row, one at least, the place of the first that has the same tokens, the same params, and the same
    seed where tokens are drawn: its own place where there is none before it."""
    sampled = np.array([params.temperature > 0 for params in prompts.params], np.bool_)[prompts.param_index]
    seeds = np.where(sampled, prompts.seeds, np.uint64(0))
    keys = _keys(prompts, seeds)
    by_key = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(np.concatenate(([True], np.diff(keys[by_key]) != 0)))
    first = np.repeat(by_key[changes], np.diff(changes, append=len(keys)))
    leader = np.arange(len(prompts))
    for kind in (prompts.lengths, prompts.param_index, seeds):
        alike = kind[first] == kind[by_key]
        first, by_key = first[alike], by_key[alike]
    followers = np.sort(by_key[first != by_key])
    candidate = np.empty_like(leader)
    candidate[by_key] = first
    followers = followers[_same_tokens(prompts, followers, candidate[followers])]
    leader[followers] = candidate[followers]
    return leader


def _keys(prompts: StoredRequests, seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[n] hashes, equal for rows that are equal: sums of numbers that belong to the places, by what stands there."""
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
    """[m] whether the prompts at these places, of equal lengths, are equal."""
    same = np.zeros(len(a), np.bool_)
    for some in cut(prompts.lengths[a], len(a), HASHED_TOKENS):
        ours, offsets = prompts.prompts(a[some])
        theirs, _ = prompts.prompts(b[some])
        same[some] = np.logical_and.reduceat(ours == theirs, offsets[:-1])
    return same


class Followers:
    """Rows that wait for the result of another one, their leader; forgotten some time after they have it."""

    def __init__(self) -> None:
        self._leaders = self._followers = np.zeros(0, np.int64)
        self._waiting = np.zeros(0, np.bool_)

    def add(self, leaders: Ints, followers: Ints) -> None:
        """More of them, beside each its leader. Leaders come in order, after all that were added before."""
        self._leaders = np.concatenate((self._leaders[self._waiting], leaders))
        self._followers = np.concatenate((self._followers[self._waiting], followers))
        self._waiting = np.ones(len(self._leaders), np.bool_)

    def take(self, rows: Ints) -> tuple[Ints, Ints]:
        """Of rows that ended: ([m] places in `rows` of those that are led by, [m] the rows that follow them)."""
        first = np.searchsorted(self._leaders, rows, "left")
        counts = np.searchsorted(self._leaders, rows, "right") - first
        found, _ = ranges(first, counts)
        self._waiting[found] = False
        return np.repeat(np.arange(len(rows)), counts), self._followers[found]
