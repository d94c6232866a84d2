"""Whether a step has drafts, and how many: by what steps take, by what came of drafts, and by how many rows there are.

Steps take hours here, so that the look for drafts, whose real time counts too, is nothing beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts.draft_model import DraftModel
from batchinfer.engine.drafts.gate import LONGEST_REST, Gate
from batchinfer.engine.drafts.lookup import Proposals
from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch, Queries

HOUR = 3600.0
DRAFTS = Speculation().num_speculative_tokens
REPEATS = [1, 2, 3, 4] * 8  # 1, 2, 3, 4, 1 and so on are what will be drafted
NOVEL = list(range(100, 132))
READ = ("queries", "prompt_tokens")  # of a batch, by a gate
UNREAD: dict[str, Any] = dict.fromkeys(f.name for f in fields(Batch) if f.name not in READ)
DEVICES: dict[str, Callable[[int], float]] = {  # seconds of a step of so many tokens
    "flat": lambda size: HOUR,
    "between": lambda size: HOUR * (1 + size / 64),
    "saturated": lambda size: HOUR * size / 8,
    "knee": lambda size: HOUR * max(1, size / 64),
    "quick": lambda size: 1e-7,
}


def padded(tokens: int) -> int:
    return -(-tokens // 8) * 8


@dataclass
class StandIn:
    """In place of a draft model."""

    cost: float  # of one draft of all rows, in steps of the target
    unread: int = 0
    error: Exception | None = None
    share = 0.3
    asked: list[int] = field(default_factory=list)  # the most that a row was to have

    def seconds(self, sequences: int, target_seconds: float) -> float:
        return self.cost * target_seconds

    def behind(self, places: Ints) -> int:
        return self.unread

    def draft(self, places: Ints, most: Ints) -> Proposals:
        self.asked.append(int(most.max()))
        if self.error is not None:
            raise self.error
        tokens = np.full((len(places), int(most.max())), 77, np.int32)
        return Proposals(most, tokens, np.zeros_like(most), np.zeros(len(places), np.bool_))


@dataclass
class Rows:
    """Rows of these texts, and a gate that drafts for them."""

    texts: list[list[int]]
    device: str = "flat"
    gate: bool = True
    overlapping: bool = False
    model: StandIn | None = None

    def __post_init__(self) -> None:
        self.places, self.notes, self.seconds = np.arange(len(self.texts)), list[str](), DEVICES[self.device]
        self.table = SequenceTable(len(self.texts), 256, 32)
        self.table.active[:], self.table.row[:], self.table.epoch[:] = True, self.places, self.places
        self.table.end[:] = 200
        for place, text in enumerate(self.texts):
            self.table.tokens[place, : len(text)], self.table.length[place] = text, len(text)
        speculation, drafter = Speculation("auto", model=Path(), gate=self.gate), cast(DraftModel | None, self.model)
        self.gate = Gate(self.table, speculation, padded, drafter, self.overlapping, self.notes)

    def taught(self, share: float | None = None) -> "Rows":
        """Steps of all sizes were seen, and many drafts of which each token was right with this probability."""
        for size in np.random.default_rng(0).permutation(np.tile(np.arange(8, 641, 8), 20)).tolist():
            self.gate.times.observe(size, self.seconds(size))
        tokens = np.random.default_rng(0).random((300, DRAFTS)) < (share or 0.0)
        place, kind = np.array([0]), np.array([self.gate.longest])
        for i, right in enumerate(tokens.cumprod(1).sum(1) if share is not None else []):
            self.gate.looked_up.of(place, np.array([5000 + i]), kind, DRAFTS)  # of a row that begins
            self.gate.looked_up.observe(place, kind, np.array([DRAFTS]), np.array([right]))
        return self

    def draft(self, room: int | list[int] = 64, prompt_tokens: int = 0, budget: int = 4096) -> list[int]:
        rooms = np.broadcast_to(np.array(room), self.places.shape)
        return [int(count) for count in self.gate.draft(self.places, rooms, prompt_tokens, budget)]

    def end_step(self, counts: list[int], right: list[int] | None = None, prompts: int = 0, hours: float = 0) -> None:
        """Of these drafts so many were right, or none; the rows' texts are left as they were."""
        drafts, tokens = np.array(counts), 1 + np.array(right or [0] * len(counts))
        queries = Queries(self.places, self.table.length - 1, 1 + drafts, drafts)
        batch = Batch(queries=queries, prompt_tokens=prompts, **UNREAD)
        new_tokens = NewTokens(self.places, tokens, np.ones(len(counts), np.bool_), int(tokens.sum()) - len(counts))
        self.gate.settle(batch, new_tokens, hours * HOUR or self.seconds(padded(len(queries))))

    def looks(self, steps: int) -> list[int]:
        """At which of the next steps it wanted to look; all drafts are right."""
        looked = []
        for step in range(steps):
            looked += [step] * self.gate.wanted
            counts = self.draft() if self.gate.wanted else [0] * len(self.places)
            self.end_step(counts, counts)
        return looked


def drafted(rows: int, device: str, share: float) -> int:
    return sum(Rows([REPEATS] * rows, device).taught(share).draft())


def test_steps_that_take_equally_long_have_many_drafts_of_rows_that_repeat_themselves() -> None:
    counts = Rows([REPEATS, NOVEL] * 4, "flat").taught(0.9).draft()
    assert min(counts[::2]) > 1 and counts[1::2] == [0] * 4
    assert drafted(8, "flat", 0.0) == 0, "drafts that are never right are not worth the look"
    assert drafted(8, "quick", 0.95) == 0, "in the time of the look a step is done"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_saturated_device_has_no_drafts(share: float) -> None:
    """Not even good ones: a token that is right nine times in ten costs what a sure one costs."""
    assert drafted(32, "saturated", share) == 0
    assert share < 0.5 or drafted(32, "flat", share) > 0
    assert share < 0.5 or drafted(4, "saturated", share) == padded(4) - 4, "what is padded anyway costs nothing"


def test_the_fewer_are_right_the_fewer_are_drafted() -> None:
    drafts = [drafted(16, "between", share) for share in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)]
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[0] > 4 * 16 and drafts[-3:] == [0, 0, 0]
    assert len(set(drafts)) >= 4, "not all or nothing"


def test_few_rows_draft_and_many_do_not() -> None:
    """Up to 64 tokens take as long as one: rows fill that with drafts, the fewer they are the more each."""
    rows = np.array([4, 8, 16, 32, 64, 128])
    drafts = np.array([drafted(n, "knee", 0.6) for n in rows.tolist()])
    each = drafts / rows
    assert each[0] > 2 and (np.diff(each[:5]) < 0).all() and (each[-2:] == 0).all()
    assert (rows[:4] + drafts[:4] <= 64).all()


def test_the_row_whose_drafts_were_right_is_drafted_for_first() -> None:
    rows = Rows([REPEATS] * 8).taught()
    for _ in range(20):
        counts = rows.draft()
        rows.end_step(counts, [counts[place] * (place == 3) for place in range(8)])
    assert rows.draft(budget=6) == [0, 0, 0, 6, 0, 0, 0, 0]


def test_a_step_with_prompt_tokens_has_no_drafts() -> None:
    rows = Rows([REPEATS] * 8).taught(0.9)
    assert sum(rows.draft(prompt_tokens=64)) == 0
    rows.end_step([0] * 8, prompts=64)
    assert sum(rows.draft()) > 0, "the next one has some"


def test_without_the_gate_all_is_drafted_whatever_it_costs() -> None:
    rows = Rows([REPEATS] * 32, "saturated", gate=False, overlapping=True).taught(0.0)
    for prompts in (0, 64):
        assert rows.draft(prompt_tokens=prompts) == [DRAFTS] * 32
        rows.end_step([DRAFTS] * 32, prompts=prompts)
    assert Rows([NOVEL] * 8, gate=False, overlapping=True).looks(9) == list(range(9))


@pytest.mark.parametrize("gate", [True, False])
def test_no_more_is_drafted_than_there_is_room_for_and_behind_the_newest_tokens(gate: bool) -> None:
    rows = Rows([[9, *REPEATS], NOVEL, REPEATS[:-1], REPEATS], gate=gate).taught(0.95)
    assert sum(rows.draft(budget=5)) == 5
    assert sum(rows.draft(budget=0)) == 0
    rows.end_step([0] * 4)
    assert rows.draft(room=[3, 64, 5, -2]) == [3, 0, 5, 0]
    assert rows.table.tokens[0, :36].tolist() == [9, *REPEATS, 1, 2, 3]
    assert rows.table.tokens[2, :36].tolist() == [*REPEATS, *REPEATS[:4]]


def test_what_came_of_drafts_is_learned() -> None:
    """Rows of which all drafts turn out to be wrong have no more of them; where they are right, more than at first."""
    wrong, right = (Rows([REPEATS] * 16, "between").taught() for _ in range(2))
    first = wrong.draft()
    assert right.draft() == first and sum(first) > 0
    for _ in range(10):
        wrong.end_step(wrong.draft())
        counts = right.draft()
        right.end_step(counts, counts)
    assert sum(wrong.draft()) == 0 and sum(right.draft()) > sum(first)


@pytest.mark.parametrize(("device", "some"), [("flat", True), ("saturated", False)])
def test_what_steps_take_is_learned(device: str, some: bool) -> None:
    """With drafts that are always right: only the device decides, whatever steps of prompts let expect."""
    rows, drafts = Rows([REPEATS] * 16, device), []
    assert sum(rows.draft()) == 0, "nothing is known"
    rows.end_step([0] * 16, prompts=512, hours=1)
    rows.end_step([0] * 16)
    for _ in range(60):
        counts = rows.draft()
        rows.end_step(counts, counts)
        drafts.append(sum(counts))
    assert drafts[0] > 0
    assert min(drafts[-40:]) > 16 * 4 if some else max(drafts[-40:]) == 0


@pytest.mark.parametrize(("text", "share"), [(NOVEL, 0.9), (REPEATS, 0.0)])
def test_looks_that_find_nothing_become_rare_where_steps_overlap(text: list[int], share: float) -> None:
    """A look makes a step wait for the one before it; drafts that pay make looks frequent again."""
    rows, paying = (Rows([row] * 8, overlapping=True).taught(p) for row, p in ((text, share), (REPEATS, 0.9)))
    looked, rests = [0, 2, 6, 14, 14 + LONGEST_REST, 14 + 2 * LONGEST_REST], LONGEST_REST - 1
    assert rows.looks(looked[-1] + 1) == looked
    for place in range(8):
        rows.table.tokens[place, :32] = REPEATS
    ours, theirs = rows.gate.looked_up, paying.gate.looked_up
    rows.gate.looked_up = theirs
    assert rows.draft() == [0] * 8, "it rests, whoever asks"
    assert rows.looks(rests + 5) == list(range(rests, rests + 5))
    rows.gate.looked_up, rows.table.row[:] = ours, 99  # other rows
    rows.table.tokens[:, :32] = text
    assert rows.looks(7) == [0, 2, 6]


def test_each_step_is_looked_at_where_none_overlap_and_few_after_prompts_where_they_do() -> None:
    assert Rows([NOVEL] * 8).taught(0.9).looks(40) == list(range(40))
    rows = Rows([REPEATS] * 8, overlapping=True).taught(0.9)
    rows.draft(prompt_tokens=64)
    assert rows.looks(LONGEST_REST + 2) == [LONGEST_REST, LONGEST_REST + 1]


COSTS = [(0.1, 0, "flat", True), (3.0, 0, "flat", False), (0.1, 0, "saturated", False), (0.1, 10**6, "flat", False)]


@pytest.mark.parametrize(("cost", "unread", "device", "asks"), COSTS)
def test_a_model_is_asked_where_it_pays(cost: float, unread: int, device: str, asks: bool) -> None:
    """Not where its steps are too slow, where the device is saturated, or where it had too much to read first."""
    model = StandIn(cost, unread)
    rows = Rows([NOVEL] * 8, device, model=model).taught()
    rows.gate.times.observe_prompts(512, HOUR)
    counts = rows.draft(room=[64] * 7 + [1])
    assert (sum(counts) > 0) is asks and len(model.asked) == asks
    assert not asks or (1 < counts[0] == model.asked[0] and counts == [counts[0]] * 7 + [1])
    assert (rows.table.tokens[:7, 32 : 32 + counts[0]] == 77).all()


def test_a_model_is_asked_by_what_came_of_its_drafts_and_not_where_the_text_gives_as_much() -> None:
    right, wrong, unasked = models = [StandIn(cost) for cost in (0.1, 0.1, 0.3)]
    rows = [Rows([text] * 8, model=m).taught(0.95) for text, m in zip((NOVEL, NOVEL, REPEATS), models, strict=True)]
    for _ in range(10):
        for of_model in rows:
            counts = of_model.draft()
            of_model.end_step(counts, None if of_model is rows[1] else counts)
    assert right.asked[0] == wrong.asked[0] < right.asked[-1] == DRAFTS
    assert len(right.asked) == 10 and len(wrong.asked) < 5 and not unasked.asked


@pytest.mark.parametrize("gate", [True, False])
def test_a_model_without_memory_is_asked_once(gate: bool) -> None:
    """The rows go on with what lookup finds, and the report tells; any other error is nobody's to hide."""
    with pytest.raises(RuntimeError, match="a shape"):
        Rows([NOVEL] * 8, gate=gate, model=StandIn(0.1, error=RuntimeError("a shape"))).taught().draft()
    model = StandIn(0.1, error=MemoryError("17 GB"))
    rows = Rows([NOVEL] * 8, gate=gate, model=model).taught()
    for text in (NOVEL, NOVEL, REPEATS):
        rows.table.row[7], rows.table.tokens[7, :32] = rows.table.row[7] + 9, text
        counts = rows.draft()
        rows.end_step(counts, counts)
    assert counts[:7] == [0] * 7 and counts[7] > 1
    assert len(model.asked) == 1 and len(rows.notes) == 1 and "17 GB" in rows.notes[0]
