"""Drafts by lookup, beside a search in lists that is plain enough to be believed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts import earlier_answers
from batchinfer.engine.drafts.lookup import LookupDrafter, Proposals
from batchinfer.engine.drafts.ngram_index import NgramIndex
from batchinfer.engine.sequence import SequenceTable

FUZZED = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MAX_TOKENS = 1 << 17  # so many that the index has millions of slots, and entries do not meet
PLACES = 3


def suffix_ends(text: Sequence[int], newest: Sequence[int], shortest: int, longest: int) -> tuple[int, int]:
    """(length, end) of the longest n-gram at the end of `newest` that ends before a token of `text`; the latest."""
    for n in range(min(longest, len(newest)), shortest - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if list(text[end - n : end]) == list(newest[-n:]) and text[end] >= 0:
                return n, end
    return 0, 0


def reference(
    own: Sequence[int], answers: Sequence[Sequence[int]], speculation: Speculation, most: int
) -> tuple[int, bool, list[int]]:
    """(tokens that agreed, whether from an earlier answer, drafts)."""
    most = min(most, speculation.num_speculative_tokens)
    bounds = speculation.prompt_lookup_min, speculation.prompt_lookup_max
    matched, end = suffix_ends(own, own, *bounds)
    earlier = [token for answer in answers for token in (*answer, -1)] if speculation.method != "ngram" else []
    longer, at = suffix_ends(earlier, own, *bounds)
    if longer > matched:
        followed = earlier[at : earlier.index(-1, at)]
        return longer, True, followed[:most]
    drafts = list(own)
    for i in range(most if matched else 0):
        drafts.append(drafts[end + i])
    return matched, False, drafts[len(own) :]


@dataclass
class Rows:
    """A table with a drafter, and the same texts as lists."""

    speculation: Speculation
    max_tokens: int = MAX_TOKENS
    texts: dict[int, list[int]] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = SequenceTable(PLACES, self.max_tokens, 32)
        self.drafter = LookupDrafter(self.table, self.speculation)

    def begin(self, place: int, row: int, text: list[int]) -> None:
        self.texts[place] = []
        self.table.active[place], self.table.row[place], self.table.length[place] = True, row, 0
        self.grow(place, text)

    def grow(self, place: int, new: list[int]) -> None:
        length = len(self.texts[place])
        self.table.tokens[place, length : length + len(new)] = new
        self.table.length[place] += len(new)
        self.texts[place] += new

    def end(self, answers: list[list[int]]) -> None:
        flat = np.array([token for answer in answers for token in answer], np.int32)
        self.drafter.remember(flat, np.cumsum([0, *map(len, answers)]))
        self.answers += answers

    def draft(self, places: list[int], most: list[int]) -> Proposals:
        return self.drafter.draft(np.array(places, np.int64), np.array(most, np.int64))

    def check(self, places: list[int], most: list[int]) -> None:
        found = self.draft(places, most)
        assert found.tokens.shape == (
            len(places),
            min(max(most, default=0), self.speculation.num_speculative_tokens),
        )
        for i, (place, limit) in enumerate(zip(places, most, strict=True)):
            drafts = found.tokens[i, : found.counts[i]].tolist()
            ours = int(found.matched[i]), bool(found.from_earlier_answer[i]), drafts
            assert ours == reference(self.texts[place], self.answers, self.speculation, limit)


TOKENS = st.integers(0, 2)
TEXT = st.lists(TOKENS, min_size=1, max_size=14)
MOST = st.integers(0, 9)
EVENTS = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, PLACES - 1), TEXT),
    st.tuples(st.just("back"), st.integers(0, PLACES - 1), st.integers(1, 10)),
    st.tuples(st.just("grow"), st.integers(0, PLACES - 1), TEXT),
    st.tuples(st.just("end"), st.lists(st.lists(TOKENS, max_size=10), min_size=1, max_size=3)),
    st.tuples(st.just("draft"), st.lists(st.tuples(st.integers(0, PLACES - 1), MOST), unique_by=lambda pair: pair[0])),
)
LIMITS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted)


@given(st.sampled_from(["ngram", "suffix", "auto"]), LIMITS, st.lists(EVENTS, min_size=5, max_size=25))
@FUZZED
def test_drafts_are_those_of_a_search_in_lists(method: str, limits: list[int], events: list[tuple[Any, ...]]) -> None:
    """Rows that come, go, grow and come back in three places; every draft is the one that lists give."""
    rows = Rows(Speculation(method, 6, None, *limits))
    for row, event in enumerate(events):
        match event:
            case ("begin", place, text):
                rows.begin(place, row, text)
            case ("back", place, kept) if place in rows.texts:
                text = rows.texts[place]
                rows.begin(place, int(rows.table.row[place]), text[:kept])
                rows.check([place], [6])
                rows.grow(place, text[kept:])  # it answers the same as before
            case ("grow", place, new) if place in rows.texts:
                rows.grow(place, new)
            case ("end", answers):
                rows.end(answers)
            case ("draft", asked):
                known = [(place, most) for place, most in asked if place in rows.texts]
                rows.check([place for place, _ in known], [most for _, most in known])
    rows.check(sorted(rows.texts), [6] * len(rows.texts))


@pytest.mark.parametrize("length", [3, 63, 64, 65, 500])
def test_the_same_token_again_and_again_is_drafted_as_often_as_may_be(length: int) -> None:
    rows = Rows(Speculation("auto", 8))
    rows.begin(0, 7, [5] * length)
    found = rows.draft([0], [8])
    assert found.tokens[0].tolist() == [5] * 8
    assert (found.counts[0], found.matched[0]) == (8, min(5, length - 1))


def test_a_repetition_goes_on_beyond_its_period() -> None:
    rows = Rows(Speculation("ngram", 8))
    rows.begin(1, 0, [9, 1, 2, 3, 1, 2, 3])
    assert rows.draft([1], [8]).tokens[0].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_row_does_not_see_the_one_before_it_in_its_place() -> None:
    rows = Rows(Speculation("ngram"))
    rows.begin(0, 0, [1, 2, 3, 4, 5, 1, 2])
    assert rows.draft([0], [3]).tokens[0].tolist() == [3, 4, 5]
    rows.begin(0, 1, [1, 2])
    assert rows.draft([0], [3]).counts.tolist() == [0]


def test_a_row_that_comes_back_after_a_preemption_is_read_again() -> None:
    rows = Rows(Speculation("ngram"))
    rows.begin(0, 0, [1, 2, 3, 1, 2, 3, 1, 2])
    rows.check([0], [4])
    rows.begin(0, 0, [1, 2, 3, 1, 2])
    rows.check([0], [4])


def test_a_draft_may_be_asked_for_twice() -> None:
    rows = Rows(Speculation("auto"))
    rows.begin(0, 0, [1, 2, 3, 1, 2])
    rows.end([[4, 1, 2, 9], [1, 2]])
    rows.check([0], [4])
    rows.check([0], [4])


def test_an_earlier_answer_counts_where_it_agrees_with_more() -> None:
    rows = Rows(Speculation("suffix", 4))
    rows.begin(0, 0, [7, 1, 2, 3, 8, 9, 7, 1, 2])
    rows.end([[6, 7, 1, 2, 40]])
    assert not rows.draft([0], [4]).from_earlier_answer[0], "as many agree in its own text"
    rows.end([[9, 7, 1, 2, 50, 51]])
    found = rows.draft([0], [4])
    assert found.from_earlier_answer[0]
    assert found.tokens[0, : found.counts[0]].tolist() == [50, 51]
    rows.drafter.earlier_answers = None
    assert rows.draft([0], [4]).tokens[0].tolist() == [3, 8, 9, 7]


def test_no_answer_of_an_earlier_row_counts_for_ngram() -> None:
    rows = Rows(Speculation("ngram"))
    rows.begin(0, 0, [1, 2])
    rows.end([[1, 2, 3]])
    assert rows.draft([0], [4]).counts.tolist() == [0]


def test_no_ngram_is_of_two_answers() -> None:
    rows = Rows(Speculation("auto"))
    rows.begin(0, 0, [1, 2])
    rows.end([[5, 1], [2, 3], [], [1, 2]])
    assert rows.draft([0], [4]).counts.tolist() == [0]


def test_answers_are_forgotten_when_the_library_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_answers, "KEPT_TOKENS", 64)
    rows = Rows(Speculation("suffix", 4))
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(60):
        answer = [1000 + i, *rng.integers(0, 4, int(rng.integers(5, 14))).tolist(), 2000 + i]
        rows.end([answer, [7] * (i % 3)])
        kept = [token for known in rows.answers for token in (*known, -1)][-64:]
        for text in ([9, *answer[1:4]], [9, *rows.answers[max(0, len(rows.answers) - 18)][1:4]], [1000 + i - 8, 9, 9]):
            rows.begin(0, 2 * i, text)
            found = rows.draft([0], [4])
            n, drafts = int(found.matched[0]), found.tokens[0, : found.counts[0]].tolist()
            pattern = text[len(text) - n :] + drafts
            if found.from_earlier_answer[0]:
                assert any(kept[j : j + len(pattern)] == pattern for j in range(64)), "this was overwritten"
                hits += 1
        assert rows.drafter.draft(np.array([0]), np.array([4])).counts[0] == 0, "9, 9 was never answered"
    assert hits > 60


def test_nothing_is_forgotten_when_the_index_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_answers, "FIRST_TOKENS", 8)
    rows = Rows(Speculation("suffix", 4))
    sizes = set()
    for i in range(0, 600, 6):
        rows.end([list(range(i, i + 6))])
        rows.begin(0, i, [3, 4])
        assert rows.draft([0], [4]).tokens[0, :1].tolist() == [5]
        rows.begin(0, i + 1, [i + 1, i + 2])
        assert rows.draft([0], [4]).tokens[0, :3].tolist() == [i + 3, i + 4, i + 5]
        assert rows.drafter.earlier_answers is not None
        sizes.add(rows.drafter.earlier_answers.index.size)
    assert sizes == {8, 32, 128, 512, 2048}


def test_an_answer_longer_than_the_library_leaves_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_answers, "KEPT_TOKENS", 64)
    rows = Rows(Speculation("suffix", 4))
    rows.end([list(range(100, 200))])
    rows.begin(0, 0, [120, 121])
    assert rows.draft([0], [4]).counts.tolist() == [0]
    rows.begin(0, 1, [190, 191])
    assert rows.draft([0], [4]).tokens.tolist() == [[192, 193, 194, 195]]


def test_an_index_that_is_full_finds_less_and_never_something_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.engine.drafts.ngram_index.MOST_SLOT_BITS", 6)
    rows = Rows(Speculation("auto", 4))
    rng = np.random.default_rng(0)
    for place in range(PLACES):
        rows.begin(place, place, rng.integers(0, 6, 200).tolist())
    rows.end([rng.integers(0, 6, 300).tolist()])
    for _ in range(200):
        for place in range(PLACES):
            rows.grow(place, [int(rng.integers(0, 6))])
        found = rows.draft([0, 1, 2], [4, 4, 4])
        for i in range(PLACES):
            n, drafts = int(found.matched[i]), found.tokens[i, : found.counts[i]].tolist()
            text = rows.answers[0] if found.from_earlier_answer[i] else rows.texts[i] + drafts
            pattern = rows.texts[i][len(rows.texts[i]) - n :] + drafts
            assert n == 0 or any(text[j : j + len(pattern)] == pattern for j in range(len(text)))


def test_ngrams_of_many_texts_have_slots_of_their_own() -> None:
    """Half of the slots are taken at most: then four of five entries at least are there, as of numbers at random."""
    rng = np.random.default_rng(0)
    index = NgramIndex(2, 5, 1 << 14)
    ngrams = rng.integers(0, 300, (1 << 14, 5)).astype(np.int32)
    hashes = index.salted(index.hashes(ngrams), np.arange(1 << 14) % 64)
    ends = np.arange(1, len(ngrams) + 1)
    index.put(hashes, ends)
    assert (index.find(hashes) == ends[:, None]).mean() > 0.75


def test_a_job_without_drafts_indexes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramIndex, "put", None)
    rows = Rows(Speculation("auto"))
    rows.begin(0, 0, [1, 2, 3])
    rows.end([[1, 2, 3]])
