"""The sampler's draws, counted, against distributions enumerated in plain Python from the definitions.

Each test makes 100,000 draws with fixed seeds, so none fails only now and then. It passes if chi-squared is below the
value that a correct sampler exceeds with probability 1 in 10,000.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from batchinfer.kernels.sampling import SamplingBatch, sample
from batchinfer.kernels.speculative import Drafts, Verified, verify

DRAWS = 100_000
Z_OF_ONE_IN_10_000 = 3.719
TEMPERATURES, TOP_KS, TOP_PS, MIN_PS = (0.5, 1.0, 1.7), (0, 1, 3, 7), (1.0, 0.9, 0.5), (0.0, 0.05, 0.3)
COMBINATIONS = list(product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS))
PROBABILITIES = [0.03, 0.31, 0.02, 0.24, 0.17, 0.14, 0.09]


@dataclass(frozen=True)
class Sampling:
    """The same parameters for every draw."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def draw(self, logits_rV: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        columns = (
            torch.full_like(seeds, value, dtype=dtype)
            for value, dtype in (
                (self.temperature, torch.float32),
                (self.top_k, torch.int64),
                (self.top_p, torch.float32),
                (self.min_p, torch.float32),
            )
        )
        tokens, finite = sample(logits_rV, SamplingBatch(*columns, seeds, positions))
        assert finite.all()
        return tokens

    def distribution(self, logits: list[float]) -> list[float]:
        """By the definitions: temper, keep the k likeliest, of these the fewest with p of their mass, of these all with
        min_p of the likeliest one's probability; then renormalize."""
        weights = [math.exp(x / self.temperature) for x in logits]
        ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
        kept = ranked[: self.top_k] if self.top_k else ranked
        mass = sum(weights[token] for token in kept)
        nucleus: list[int] = []
        for token in kept:
            if self.top_p < 1 and sum(weights[other] for other in nucleus) >= self.top_p * mass:
                break
            nucleus.append(token)
        kept = [token for token in nucleus if weights[token] >= self.min_p * weights[ranked[0]]]
        mass = sum(weights[token] for token in kept)
        return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


def excess(tokens: Tensor, probabilities: list[float]) -> float:
    """Chi-squared of draws over its critical value: 1 or more is no such sampler. Infinite for an impossible token."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return math.inf
    # The approximation wants five of each kind: what is rarer is one kind.
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    if not degrees:
        return 0.0
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # The critical value by Wilson and Hilferty (1931).
    part = 2 / (9 * degrees)
    return chi_squared / (degrees * (1 - part + Z_OF_ONE_IN_10_000 * math.sqrt(part)) ** 3)


def seeds_of(number: int, count: int = DRAWS) -> Tensor:
    return torch.arange(count) + number * 7_000_003


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_draws_follow_the_enumerated_distribution(temperature: float) -> None:
    logits = [math.log(p) for p in PROBABILITIES]
    rows = torch.tensor(logits).expand(DRAWS, -1)
    for number, (t, *filters) in enumerate(COMBINATIONS):
        if t == temperature:
            sampling = Sampling(t, *filters)
            tokens = sampling.draw(rows, seeds_of(number), torch.full((DRAWS,), number))
            assert excess(tokens, sampling.distribution(logits)) < 1, sampling


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.65}, [0, 1, 2, 3]),
        ({"min_p": 0.5}, [0, 1, 2, 3]),
    ],
)
def test_of_equally_likely_tokens_at_a_border_all_stay(filters: dict[str, float], kept: list[int]) -> None:
    """Tokens of probabilities 0.3, 0.3, 0.15, 0.15, 0.1; in powers of two, so that equal ones are equal to the bit."""
    weights = [2.0, 2.0, 1.0, 1.0, 0.5]
    mass = sum(weights[token] for token in kept)
    expected = [weights[token] / mass if token in kept else 0.0 for token in range(5)]
    rows = torch.tensor(weights).log().expand(DRAWS, -1)
    tokens = Sampling(**filters).draw(rows, seeds_of(1), torch.zeros(DRAWS, dtype=torch.int64))  # type: ignore[arg-type]
    assert excess(tokens, expected) < 1


@pytest.mark.parametrize(
    ("seed_step", "position_step"),
    [(0, 1), (0, 2), (0, 1 << 20), (1, 0), (DRAWS, 0), (1 << 32, 0), (1, 1), (1, -1)],
    ids=str,
)
def test_two_positions_of_a_row_and_two_rows_are_independent(seed_step: int, position_step: int) -> None:
    logits = [math.log(p) for p in PROBABILITIES]
    rows = torch.tensor(logits).expand(DRAWS, -1)
    # Neighbours are drawn from apart: a row's own seed and position, and those a step on.
    seeds, positions = seeds_of(2) * 2, torch.arange(DRAWS) % 7 + 10
    sampling = Sampling(1.3)
    first = sampling.draw(rows, seeds, positions)
    second = sampling.draw(rows, seeds + seed_step, positions + position_step)
    one = sampling.distribution(logits)
    assert excess(first * len(one) + second, [p * q for p, q in product(one, one)]) < 1


# Speculation: a target that knows only the token before, and a drafter that is near it.

VOCABULARY, NEW, DRAFTED = 6, 4, 2
TARGET, _OFF = torch.randn(2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
NEAR = TARGET + 0.6 * _OFF  # logits [token before, token]
SAMPLING = Sampling(0.6)
Drafter = Callable[[Tensor, Tensor, Tensor], Tensor]  # (tokens before, seeds, positions) -> tokens
Verify = Callable[[Drafts, Tensor, Tensor], Verified]


def independent(before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return SAMPLING.draw(NEAR[before], seeds + (1 << 40), positions)


def same_noise(before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return SAMPLING.draw(NEAR[before], seeds, positions)


def same_noise_without_temperature(before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return replace(SAMPLING, temperature=1.0).draw(NEAR[before], seeds, positions)


def likeliest(before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return NEAR[before].argmax(-1)


def always_the_same(before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return torch.full_like(before, 3)


@pytest.fixture(scope="module")
def one_at_a_time() -> Tensor:
    """[DRAWS, 1 + NEW] tokens: a prompt of the token 0, then what is drawn behind it."""
    tokens = torch.zeros(DRAWS, 1, dtype=torch.int64)
    for position in range(1, 1 + NEW):
        new = SAMPLING.draw(TARGET[tokens[:, -1]], seeds_of(3), torch.full((DRAWS,), position))
        tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens


@dataclass
class Speculated:
    tokens: Tensor  # [count, 1 + NEW]
    accepted: int = 0


def speculated(
    drafter: Drafter, verify: Verify = verify, verification: Sampling = SAMPLING, count: int = DRAWS
) -> Speculated:
    """The same sequences with DRAFTED drafts each time, as many of them at once as are not at their end."""
    done = Speculated(torch.zeros(count, 1 + NEW + DRAFTED, dtype=torch.int64))
    lengths, seeds = torch.ones(count, dtype=torch.int64), seeds_of(3, count)
    while len(rows := (lengths < 1 + NEW).nonzero().flatten()):
        known = lengths[rows]
        tokens = done.tokens[rows, known - 1][:, None]
        for i in range(DRAFTED):
            tokens = torch.cat([tokens, drafter(tokens[:, -1], seeds[rows], known + i)[:, None]], 1)
        drafts = Drafts(
            offsets=torch.arange(len(rows) + 1) * (1 + DRAFTED),
            tokens=tokens.flatten(),
            lengths=known,
            room=1 + NEW - known,
            ignore_eos=torch.ones(len(rows), dtype=torch.bool),
            eos_ids=torch.empty(0, dtype=torch.int64),
            most=DRAFTED,
        )
        positions = (known[:, None] + torch.arange(1 + DRAFTED)).flatten()
        targets = verification.draw(TARGET[drafts.tokens], seeds[rows].repeat_interleave(1 + DRAFTED), positions)
        found = verify(drafts, targets, torch.ones_like(targets, dtype=torch.bool))
        for i in range(1 + DRAFTED):
            new = found.new_tokens[:, i]
            done.tokens[rows[new >= 0], known[new >= 0] + i] = new[new >= 0]
        lengths[rows] = found.new_lengths
        done.accepted += int(found.accepted.sum())
    done.tokens = done.tokens[:, : 1 + NEW]
    return done


def worst_excess(tokens: Tensor) -> float:
    """Of each pair of neighbouring positions, beside the target's own distribution of such pairs."""
    steps = [SAMPLING.distribution(row) for row in TARGET.tolist()]
    before, worst = [1.0] + [0.0] * (VOCABULARY - 1), 0.0
    for position in range(1, 1 + NEW):
        pairs = [before[a] * steps[a][b] for a, b in product(range(VOCABULARY), repeat=2)]
        worst = max(worst, excess(tokens[:, position - 1] * VOCABULARY + tokens[:, position], pairs))
        before = [sum(pairs[b::VOCABULARY]) for b in range(VOCABULARY)]
    return worst


@pytest.mark.parametrize(
    "drafter", [independent, same_noise, same_noise_without_temperature, likeliest, always_the_same]
)
def test_whoever_drafts_sequences_and_their_distribution_are_the_target_s(
    drafter: Drafter, one_at_a_time: Tensor
) -> None:
    tokens = speculated(drafter).tokens
    assert tokens.equal(one_at_a_time)
    assert worst_excess(tokens) < 1


def as_drafted(drafts: Drafts, targets_T: Tensor) -> Tensor:
    """[S, 1 + DRAFTED]: behind each token the draft that is there, behind the last one what the target draws."""
    return torch.cat([drafts.tokens.view(-1, 1 + DRAFTED)[:, 1:], targets_T.view(-1, 1 + DRAFTED)[:, -1:]], 1)


def accepts_everything(drafts: Drafts, targets_T: Tensor, finite_T: Tensor) -> Verified:
    """As where a random number of 0 is below any ratio."""
    return verify(drafts, as_drafted(drafts, targets_T).flatten(), finite_T)


def emits_the_rejected_draft(drafts: Drafts, targets_T: Tensor, finite_T: Tensor) -> Verified:
    found = verify(drafts, targets_T, finite_T)
    rejected = (torch.arange(1 + DRAFTED) == found.accepted[:, None]) & (found.new_tokens >= 0)
    return replace(found, new_tokens=as_drafted(drafts, targets_T).where(rejected, found.new_tokens))


@pytest.mark.parametrize(
    ("verify", "verification"),
    [
        (accepts_everything, SAMPLING),
        (emits_the_rejected_draft, SAMPLING),
        (verify, replace(SAMPLING, temperature=1.0)),
        (verify, replace(SAMPLING, temperature=0.62)),
    ],
    ids=["all accepted", "rejected draft emitted", "no temperature", "another temperature"],
)
def test_faults_that_others_had_are_seen_by_these_counts(verify: Verify, verification: Sampling) -> None:
    assert worst_excess(speculated(independent, verify, verification).tokens) > 1


def test_a_drafter_with_the_same_noise_is_accepted_more_often() -> None:
    accepted = [speculated(drafter, count=20_000).accepted for drafter in (same_noise, independent)]
    assert accepted[0] > 1.5 * accepted[1]
