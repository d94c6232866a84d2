"""`Gate`: decides for each step whether to draft, with which method, and how many tokens.

A draft adds one token to the step. Its worth is the probability that it and all drafts before it are accepted. The gate
takes drafts in the order of their worth, up to the number that gives the most new tokens a second: none where the
device is saturated, many where a step of sixteen tokens takes as long as a step of one.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts.acceptance import Acceptance
from batchinfer.engine.drafts.draft_model import DraftModel
from batchinfer.engine.drafts.lookup import LookupDrafter, Proposals
from batchinfer.engine.drafts.step_times import StepTimes
from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.pool_size import is_out_of_memory
from batchinfer.engine.request import Completions
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.models.batch import Batch

LEAST_GAIN = 1.1  # least gain in speed to draft for; the best of many noisy estimates is biased upwards
APART = 1.2  # ratio between consecutive step sizes that are compared
LONGEST_REST = 16  # most steps in a row without a look for drafts, after looks that found none worth verifying

PROMPTS = 4  # a step with more prompt tokens than this per decoding one is used to time prompt tokens

Floats = NDArray[np.float64]


class Gate:
    """The `Drafter` of an engine. With `speculation.gate` off, every step verifies all drafts that were found."""

    def __init__(
        self,
        table: SequenceTable,
        speculation: Speculation,
        padded: Callable[[int], int],
        model: DraftModel | None,
        overlapping: bool,
        notes: list[str],
    ) -> None:
        """Set up drafting for the sequences of `table`.

        `padded` maps a number of tokens to the number that the step computes, padding included. Where steps are
        `overlapping`, drafting makes a step wait for the one before it. `notes` are lines for the report.
        """
        self._notes = notes
        self.table, self.speculation, self.padded, self.model = table, speculation, padded, model
        self.lookup = LookupDrafter(table, speculation) if speculation.looks_up else None
        self.longest = speculation.prompt_lookup_max
        # Kinds of evidence: length of the n-gram found in the row itself, then the same for earlier answers.
        self.looked_up = Acceptance(2 * self.longest + 2, len(table.active))
        self.modelled = Acceptance(1, len(table.active))
        self.times = StepTimes()
        self._look_seconds = 0.0
        # What the step under way drafted: how it is learned from, places, kinds of evidence, numbers of drafts.
        self._drafted: tuple[Acceptance, Ints, Ints, Ints] | None = None
        self._longest_rest = LONGEST_REST if overlapping else 1
        self._rest, self._last_rest = 0, 1

    @property
    def wanted(self) -> bool:
        """True if drafts are looked up for the next step; the tokens that earlier steps sampled must then be known."""
        return not self.speculation.gate or self._rest == 0

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        """Write drafts into the sequence table; see `Drafter.draft`."""
        none = np.zeros_like(places)
        self._drafted = None
        if self.speculation.gate and (prompt_tokens or self._rest):
            # Steps with prompts follow each other, so that the next ones need no look either.
            self._rest = self._rest or self._longest_rest
            return none
        most = np.minimum(np.maximum(room, 0), self.speculation.num_speculative_tokens)
        started = time.perf_counter()
        found, acceptance = self._look_up(places, most), self.looked_up
        self._look_seconds += 0.2 * (time.perf_counter() - started - self._look_seconds)
        kinds = self._kinds(found)
        counts, rate = self._best(places, found.counts, kinds, budget)
        depth = 0 if counts.any() and not self.speculation.gate else self._depth(places, most, budget, rate)
        if depth and (drafted := self._ask(places, np.minimum(most, depth))) is not None:
            found, kinds, acceptance = drafted, none, self.modelled
            counts = self._within(found.counts, budget)
        if not counts.any():
            self._rest = self._last_rest = min(2 * self._last_rest, self._longest_rest)
            return none
        self._last_rest = 1
        self._write(places, counts, found.tokens)
        self._drafted = acceptance, places, kinds, counts
        return counts

    def settle(self, batch: Batch, new_tokens: NewTokens, seconds: float) -> None:
        """Learn from a step that took `seconds`: its time, and how many of its drafts were accepted."""
        self._rest = max(0, self._rest - 1)
        self.looked_up.fade()
        self.modelled.fade()
        if batch.prompt_tokens > PROMPTS * batch.query_tokens:
            self.times.observe_prompts(batch.prompt_tokens, seconds)
        if not batch.prompt_tokens:
            self.times.observe(self.padded(batch.query_tokens), seconds)
        if batch.drafted and self._drafted is not None:
            acceptance, places, kinds, counts = self._drafted
            accepted = np.zeros(len(self.table.active), np.int64)
            accepted[new_tokens.places] = new_tokens.counts - 1
            tried = counts > 0
            acceptance.observe(places[tried], kinds[tried], counts[tried], accepted[places[tried]])

    def remember(self, done: Completions) -> None:
        """Keep the answers of rows that ended, to copy drafts from."""
        if self.lookup is not None and len(done):
            self.lookup.remember(done.token_ids, done.offsets)

    def _ask(self, places: Ints, most: Ints) -> Proposals | None:
        """Return the draft model's drafts; None if memory holds none."""
        assert self.model is not None
        try:
            found = self.model.draft(places, most)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.model = None
            self._notes.append(f"memory does not hold the draft model's steps ({error}): it drafted no more")
            return None
        return found if found.counts.any() else None

    def _look_up(self, places: Ints, most: Ints) -> Proposals:
        if self.lookup is not None:
            return self.lookup.draft(places, most)
        none = np.zeros_like(places)
        return Proposals(none, np.zeros((len(places), 0), np.int32), none, none > 0)

    def _kinds(self, found: Proposals) -> Ints:
        kinds: Ints = np.minimum(found.matched, self.longest) + found.from_earlier_answer * (self.longest + 1)
        return kinds

    def _depth(self, places: Ints, most: Ints, budget: int, rate: float) -> int:
        """Return how many tokens the draft model should draft for each sequence.

        It is 0 where that brings too little beyond `rate`, the new tokens a second without the draft model.
        """
        if self.model is None:
            return 0
        if not self.speculation.gate:
            return int(most.max(initial=0))
        n, depths = len(places), np.arange(1, self.speculation.num_speculative_tokens + 1)
        depths = depths[n * depths <= budget]
        likely = self.modelled.of(places, self.table.epoch[places], np.zeros_like(places), len(depths))
        worth = (likely * (depths <= most[:, None])).sum(0).cumsum()
        sizes = np.array([self.padded(n * (1 + d)) for d in depths.tolist()], np.int64)
        plain = float(self.times.of(np.array([self.padded(n)]))[0])
        seconds = self.times.of(sizes) + depths * self.model.seconds(n, plain)
        # Computing the tokens that it has not read yet is spread over the tokens that these rows may still get.
        left = np.maximum(self.table.end[places] - self.table.length[places], 1).mean()
        seconds += self.model.behind(places) * self.model.share * self.times.prompt_token / left
        rates = np.append((n + worth) / np.maximum(seconds, 1e-9), 0.0)
        return int(rates.argmax()) + 1 if rates.max() > LEAST_GAIN * rate else 0

    def _best(self, places: Ints, counts: Ints, kinds: Ints, budget: int) -> tuple[Ints, float]:
        """Return how many of each sequence's drafts to verify [n], and the new tokens a second expected of that."""
        if not self.speculation.gate:
            return self._within(counts, budget), 0.0
        n = len(places)
        o_k = np.arange(counts.max(initial=0))
        likely = self.looked_up.of(places, self.table.epoch[places], kinds, len(o_k))
        worth = np.where(o_k < counts[:, None], likely, 0.0).ravel()
        order = np.argsort(-worth, kind="stable")[: min(budget, int(counts.sum()))]
        expected = np.concatenate([[0.0], np.cumsum(worth[order])])
        # Only padded sizes are compared: drafts that take the place of padding cost nothing.
        sizes = _apart(np.unique([self.padded(n + j) for j in range(len(expected))]))
        taken = np.minimum(sizes - n, len(expected) - 1)
        seconds = np.maximum(self.times.of(sizes), 1e-9)
        plain = n / seconds[0]
        rates = (n + expected[taken]) / (seconds + self._look_seconds)
        best = int(rates.argmax())
        if rates[best] < LEAST_GAIN * plain:
            return np.zeros_like(counts), plain
        chosen = np.bincount(order[: taken[best]] // max(len(o_k), 1), minlength=n)
        return chosen, float(rates[best])

    def _within(self, counts: Ints, budget: int) -> Ints:
        """Return `counts` [n] cut so that their sum is at most `budget`; the first sequences come first."""
        left = budget - (np.cumsum(counts) - counts)
        within: Ints = np.clip(left, 0, counts)
        return within

    def _write(self, places: Ints, counts: Ints, tokens: NDArray[np.int32]) -> None:
        """Write the drafts behind the newest token of each sequence."""
        positions, _ = ranges(self.table.length[places], counts)
        drafts = tokens[np.arange(tokens.shape[1]) < counts[:, None]]
        self.table.tokens[np.repeat(places, counts), positions] = drafts


def _apart(sizes: Ints) -> Ints:
    """Keep of growing sizes [n] the first, and each that is `APART` times the last one kept.

    Fewer sizes have fewer step times to learn.
    """
    kept = [int(sizes[0])]
    for size in sizes.tolist():
        if size >= APART * kept[-1]:
            kept.append(size)
    return np.array(kept)
