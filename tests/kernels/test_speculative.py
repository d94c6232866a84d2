"""Verifying drafts, against a loop over Python lists.

The main property: no drafter, good or bad, changes any token of the output.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchinfer.kernels.sampling import SamplingBatch, sample
from batchinfer.kernels.speculative import Drafts, verify

Drafter = Callable[[int, list[int]], list[int]]  # how a sequence, of which it has the text, may go on


@dataclass(frozen=True)
class Drafted:
    """A sequence in a step."""

    tokens: Sequence[int]  # the newest known one, then drafts
    targets: Sequence[int]
    finite: Sequence[bool] | None = None  # None: all of them are
    length: int = 10
    room: int = 100
    ignore_eos: bool = False


@dataclass(frozen=True)
class Outcome:
    new: list[int]
    finite: bool
    why: str  # there are no more new tokens


def by_hand(drafted: Drafted, eos_ids: Sequence[int]) -> Outcome:
    """Token by token, as without speculation: each that is drawn is appended, and the next draft has to be that one."""
    new: list[int] = []
    good = True
    for i, target in enumerate(drafted.targets):
        if len(new) == drafted.room:
            return Outcome(new, good, "room")
        new.append(target)
        good = good and (drafted.finite is None or drafted.finite[i])
        if target in eos_ids and not drafted.ignore_eos:
            return Outcome(new, good, "eos")
        if i + 1 < len(drafted.tokens) and drafted.tokens[i + 1] != target:
            return Outcome(new, good, "wrong")
    return Outcome(new, good, "all right" if new else "no tokens")


def step(
    sequences: Sequence[Drafted], eos_ids: Sequence[int], most: int, dtype: torch.dtype = torch.int64, padding: int = 3
) -> tuple[Drafts, Tensor, Tensor]:
    """The tensors. In the padding behind, all drafts are right and nothing is finite."""

    def flat(column: Callable[[Drafted], Sequence[Any]], kind: torch.dtype, behind: Any = 7) -> Tensor:
        return torch.tensor([x for s in sequences for x in column(s)] + [behind] * padding, dtype=kind)

    def each(column: Callable[[Drafted], Any], kind: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([column(s) for s in sequences], dtype=kind)

    drafts = Drafts(
        offsets=torch.tensor(np.cumsum([0, *(len(s.tokens) for s in sequences)]), dtype=dtype),
        tokens=flat(lambda s: s.tokens, torch.int64),
        lengths=each(lambda s: s.length),
        room=each(lambda s: s.room),
        ignore_eos=each(lambda s: s.ignore_eos, torch.bool),
        eos_ids=torch.tensor(eos_ids, dtype=torch.int64),
        most=most,
    )
    finite = flat(lambda s: [True] * len(s.tokens) if s.finite is None else s.finite, torch.bool, False)
    return drafts, flat(lambda s: s.targets, torch.int64), finite


def check(sequences: Sequence[Drafted], eos_ids: Sequence[int], most: int = 0, **kind: Any) -> list[Outcome]:
    """The outcomes, on which the loop and `verify` agree."""
    outcomes = [by_hand(s, eos_ids) for s in sequences]
    most = max([most, *(len(s.tokens) - 1 for s in sequences)])
    drafts, targets, finite = step(sequences, eos_ids, most, **kind)
    found = verify(drafts, targets, finite)
    assert found.accepted.tolist() == [max(len(o.new) - 1, 0) for o in outcomes]
    assert found.new_tokens.tolist() == [o.new + [-1] * (most + 1 - len(o.new)) for o in outcomes]
    assert found.newest.tolist() == [o.new[-1] if o.new else 0 for o in outcomes]
    assert found.new_lengths.tolist() == [s.length + len(o.new) for s, o in zip(sequences, outcomes, strict=True)]
    assert found.finite.tolist() == [o.finite for o in outcomes]
    return outcomes


EOS = 2
CASES = {
    "no drafts": (Drafted([5], [6]), [6], "all right"),
    "all right": (Drafted([5, 6, 7, 8], [6, 7, 8, 9]), [6, 7, 8, 9], "all right"),
    "all wrong": (Drafted([5, 1, 1, 1], [6, 7, 8, 9]), [6], "wrong"),
    "the middle wrong": (Drafted([5, 6, 1, 8], [6, 7, 8, 9]), [6, 7], "wrong"),
    "the last wrong": (Drafted([5, 6, 7, 1], [6, 7, 8, 9]), [6, 7, 8], "wrong"),
    "right but a place late": (Drafted([5, 5, 6, 7], [6, 7, 8, 9]), [6], "wrong"),
    "right but a place early": (Drafted([5, 7, 8, 9], [6, 7, 8, 9]), [6], "wrong"),
    "eos accepted": (Drafted([5, 6, EOS, 8], [6, EOS, 8, 9]), [6, EOS], "eos"),
    "eos accepted at once": (Drafted([5, EOS, 7, 8], [EOS, 7, 8, 9]), [EOS], "eos"),
    "eos in place of a wrong draft": (Drafted([5, 6, 1, 8], [6, EOS, 8, 9]), [6, EOS], "eos"),
    "eos behind all drafts": (Drafted([5, 6, 7], [6, 7, EOS]), [6, 7, EOS], "eos"),
    "eos without drafts": (Drafted([5], [EOS]), [EOS], "eos"),
    "eos drafted and not drawn": (Drafted([5, 6, EOS], [6, 7, 8]), [6, 7], "wrong"),
    "eos drawn behind what is wrong": (Drafted([5, 1, 7], [6, EOS, EOS]), [6], "wrong"),
    "eos as the newest known token": (Drafted([EOS, 6, 7], [6, 7, 8]), [6, 7, 8], "all right"),
    "eos ignored": (Drafted([5, 6, EOS, 8], [6, EOS, 8, 9], ignore_eos=True), [6, EOS, 8, 9], "all right"),
    "room for 1": (Drafted([5, 6, 7, 8], [6, 7, 8, 9], room=1), [6], "room"),
    "room for 3": (Drafted([5, 6, 7, 8], [6, 7, 8, 9], room=3), [6, 7, 8], "room"),
    "room for all": (Drafted([5, 6, 7, 8], [6, 7, 8, 9], room=4), [6, 7, 8, 9], "all right"),
    "room that ends at eos": (Drafted([5, 6, EOS, 8], [6, EOS, 8, 9], room=2), [6, EOS], "eos"),
    "room that ends before eos": (Drafted([5, 6, EOS, 8], [6, EOS, 8, 9], room=1), [6], "room"),
    "no room": (Drafted([5, 6, 7], [6, 7, 8], room=0), [], "room"),
    "padding": (Drafted([], []), [], "no tokens"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_case_alone(name: str) -> None:
    drafted, new, why = CASES[name]
    assert check([drafted], [EOS]) == [Outcome(new, True, why)]


@pytest.mark.parametrize("backwards", [False, True])
def test_all_cases_in_one_step(backwards: bool) -> None:
    cases = list(CASES.values())[:: -1 if backwards else 1]
    outcomes = check([drafted for drafted, _, _ in cases], [EOS])
    assert outcomes == [Outcome(new, True, why) for _, new, why in cases]
    assert {o.why for o in outcomes} == {"all right", "wrong", "eos", "room", "no tokens"}


@pytest.mark.parametrize(
    ("drafted", "finite", "why"),
    [
        (Drafted([5, 6, 7, 8], [6, 7, 8, 9], [True, True, True, False]), False, "all right"),
        (Drafted([5, 6, 7, 8], [6, 7, 8, 9], [True, False, True, True]), False, "all right"),
        (Drafted([5, 6, 1, 8], [6, 7, 8, 9], [True, False, True, True]), False, "wrong"),
        (Drafted([5, 6, 1, 8], [6, 7, 8, 9], [True, True, False, False]), True, "wrong"),
        (Drafted([5, 1, 1, 1], [6, 7, 8, 9], [False, True, True, True]), False, "wrong"),
        (Drafted([5, EOS, 7], [EOS, 7, 8], [True, False, False]), True, "eos"),
        (Drafted([5, EOS, 7], [EOS, 7, 8], [False, True, True]), False, "eos"),
        (Drafted([5, 6, 7], [6, 7, 8], [True, True, False], room=2), True, "room"),
        (Drafted([5, 6, 7], [6, 7, 8], [True, False, True], room=2), False, "room"),
    ],
)
def test_only_tokens_that_count_have_to_be_finite(drafted: Drafted, finite: bool, why: str) -> None:
    for outcome in check([drafted, drafted], [EOS]):
        assert (outcome.finite, outcome.why) == (finite, why)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 10])
def test_sequences_end_where_the_next_one_goes_on_with_the_same_token(count: int) -> None:
    same = [Drafted([7] * n, [7] * n) for n in (count, 1, count, 1, 1)]
    outcomes = check(same, [])
    assert [len(o.new) for o in outcomes] == [count, 1, count, 1, 1]
    assert {o.why for o in outcomes} == {"all right"}


def test_a_step_may_have_fewer_drafts_than_the_most_and_none_at_all() -> None:
    for eos_ids, most in (([], 9), ([EOS], 1), ([1, EOS, 3], 4)):
        outcomes = check([Drafted([5, EOS], [EOS, 7]), Drafted([5], [6])], eos_ids, most=most)
        assert [o.why for o in outcomes] == ["eos" if eos_ids else "all right", "all right"]
    assert [o.why for o in check([Drafted([5], [6]), Drafted([5], [EOS])], [EOS])] == ["all right", "eos"]


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_drafts_beyond_the_most_are_not_looked_at(most: int) -> None:
    whole = [Drafted([5, 6, 7, 8, 9], [6, 7, 8, 9, 1], [True, True, True, True, False]), Drafted([5, 1], [6, 7])]
    part = [replace(whole[0], tokens=whole[0].tokens[: most + 1], targets=whole[0].targets[: most + 1]), whole[1]]
    found = verify(*step(whole, [], most))
    assert found.new_tokens.tolist() == [by_hand(s, []).new + [-1] * (most if s is whole[1] else 0) for s in part]
    assert found.accepted.tolist() == [most, 0] and found.finite.tolist() == [True, True]


def test_random_steps() -> None:
    """Few different tokens, so that wrong drafts are right by chance, and right ones elsewhere."""
    rng = np.random.default_rng(0)
    seen: Counter[tuple[str, int]] = Counter()
    for i in range(20):
        vocab = int(rng.choice([2, 3, 30]))
        sequences = []
        for _ in range(rng.integers(1, 16)):
            queries = int(rng.integers(0, 11))
            targets = rng.integers(vocab, size=queries)
            oracle = np.concatenate([rng.integers(vocab, size=min(1, queries)), targets[:-1]])
            wrong = rng.random(queries) < rng.choice([0.0, 0.0, 0.2, 1.0])
            sequences.append(
                Drafted(
                    np.where(wrong, rng.integers(vocab, size=queries), oracle).tolist(),
                    targets.tolist(),
                    (rng.random(queries) < rng.choice([0.8, 1.0])).tolist(),
                    length=int(rng.integers(1, 1 << 40)),
                    room=int(rng.choice([1, 4, 1000, 1000])),
                    ignore_eos=bool(rng.random() < 0.3),
                )
            )
        eos_ids = rng.permutation(vocab + 4)[: rng.integers(4)].tolist()
        dtype = (torch.int32, torch.int64)[i % 2]
        for outcome in check(sequences, eos_ids, dtype=dtype, padding=1 + i % 4):
            seen[outcome.why, len(outcome.new)] += 1
    assert {why for why, _ in seen} == {"all right", "wrong", "eos", "room", "no tokens"}
    assert {count for why, count in seen if why == "all right"} == set(range(1, 11))


def test_no_sequences_are_no_fault() -> None:
    assert check([], [EOS], most=3) == []


VOCAB, STATES = 24, 97


@dataclass(frozen=True)
class Toy:
    """A model of S sequences: what follows depends on every token before it, by a state that each one turns."""

    logits: Tensor  # [STATES, VOCAB]
    prompts: list[list[int]]
    room: list[int]
    ignore_eos: list[bool]
    params: SamplingBatch  # of the sequences
    eos_ids: Tensor

    def draw(self, contexts: list[list[int]], of: list[int]) -> tuple[Tensor, Tensor]:
        """What comes behind each context, of the sequence `of`."""
        states = []
        for context in contexts:
            state = 0
            for token in context:
                state = (state * 5 + token + 1) % STATES
            states.append(state)
        positions = torch.tensor([len(context) for context in contexts])
        return sample(self.logits[states], replace(self.params.of(torch.tensor(of)), positions=positions))

    def ended(self, s: int, text: list[int]) -> bool:
        new = text[len(self.prompts[s]) :]
        ends = bool(new) and new[-1] in self.eos_ids.tolist() and not self.ignore_eos[s]
        return ends or len(new) == self.room[s]

    def plainly(self) -> list[list[int]]:
        """Texts, a token of each sequence at a time."""
        texts = [list(prompt) for prompt in self.prompts]
        while running := [s for s, text in enumerate(texts) if not self.ended(s, text)]:
            tokens, _ = self.draw([texts[s] for s in running], running)
            for s, token in zip(running, tokens.tolist(), strict=True):
                texts[s].append(token)
        return texts

    def drafted(self, draft: Drafter) -> tuple[list[list[int]], int]:
        """Texts, and the steps that they took."""
        texts = [list(prompt) for prompt in self.prompts]
        steps = 0
        while running := [s for s, text in enumerate(texts) if not self.ended(s, text)]:
            guesses = [draft(s, texts[s]) for s in running]
            drafts, _, _ = step(
                [
                    Drafted([texts[s][-1], *guess], [], (), len(texts[s]), self._left(s, texts[s]), self.ignore_eos[s])
                    for s, guess in zip(running, guesses, strict=True)
                ],
                self.eos_ids.tolist(),
                most=max(map(len, guesses)),
                padding=0,
            )
            pairs = [
                (s, texts[s] + guess[:i])
                for s, guess in zip(running, guesses, strict=True)
                for i in range(len(guess) + 1)
            ]
            found = verify(drafts, *self.draw([context for _, context in pairs], [s for s, _ in pairs]))
            for row, s in enumerate(running):
                texts[s] += found.new_tokens[row, : found.accepted[row] + 1].tolist()
                assert texts[s][-1] == found.newest[row] and len(texts[s]) == found.new_lengths[row]
                assert found.finite[row]
            steps += 1
        return texts, steps

    def _left(self, s: int, text: list[int]) -> int:
        return len(self.prompts[s]) + self.room[s] - len(text)


def toy(temperature: float) -> Toy:
    rng = np.random.default_rng(0)
    sequences = 6

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((sequences,), value, dtype=dtype)

    params = SamplingBatch(
        column(temperature, torch.float32),
        column(0, torch.int64),
        column(0.9, torch.float32),
        column(0.0, torch.float32),
        torch.arange(sequences) * 7_919_000_000_000 - 5,
        column(0, torch.int64),
    )
    return Toy(
        2 * torch.randn(STATES, VOCAB),
        [rng.integers(VOCAB, size=rng.integers(1, 5)).tolist() for _ in range(sequences)],
        [14, 1, 13, 7, 12, 13],
        [False, False, True, False, False, True],
        params,
        torch.tensor([8, 21]),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "top-p"])
def test_no_drafter_changes_what_is_generated(temperature: float) -> None:
    model = toy(temperature)
    texts = model.plainly()
    new = [len(text) - len(prompt) for text, prompt in zip(texts, model.prompts, strict=True)]
    by_eos = [n < room for n, room in zip(new, model.room, strict=True)]
    assert any(by_eos) and not all(by_eos), "both ends are reached"
    ignoring = [text[len(p) : -1] for text, p, on in zip(texts, model.prompts, model.ignore_eos, strict=True) if on]
    assert any(set(model.eos_ids.tolist()) & set(text) for text in ignoring), "and one is passed over"
    greedy = replace(model, params=replace(model.params, temperature=torch.zeros(len(new))))
    assert (greedy.plainly() == texts) == (temperature == 0), "noise matters"
    rng = np.random.default_rng(1)

    def oracle(s: int, text: list[int]) -> list[int]:
        return texts[s][len(text) :][:4]

    def wrong_in_the_middle(s: int, text: list[int]) -> list[int]:
        return [(token + (i == 2)) % VOCAB for i, token in enumerate(oracle(s, text))]

    def always_wrong(s: int, text: list[int]) -> list[int]:
        return [(token + 1) % VOCAB for token in oracle(s, text)]

    def beyond_the_end(s: int, text: list[int]) -> list[int]:
        return [*oracle(s, text), 8, 8, 8, 8]

    def random(s: int, text: list[int]) -> list[int]:
        guess: list[int] = rng.integers(VOCAB, size=rng.integers(6)).tolist()
        return guess

    def by_turns(s: int, text: list[int]) -> list[int]:
        drafters = (oracle, wrong_in_the_middle, always_wrong, beyond_the_end, random)
        return drafters[rng.integers(len(drafters))](s, text)

    def steps(drafter: Drafter) -> int:
        found, count = model.drafted(drafter)
        assert found == texts
        return count

    longest = max(new)
    assert steps(lambda s, text: []) == longest
    assert steps(always_wrong) == longest
    assert steps(wrong_in_the_middle) == -(-longest // 3)
    assert steps(oracle) == steps(beyond_the_end) == -(-longest // 5)
    assert -(-longest // 5) < steps(random) <= longest
    assert -(-longest // 5) < steps(by_turns) < longest
