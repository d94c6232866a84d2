"""The gated delta rule in tiles and token by token, against the rule in float64, and alone against in company."""

import pytest
import torch
from torch import Tensor

from batchinfer.kernels.gated_delta import DeltaTokens, delta_rule
from batchinfer.kernels.state_pool import StateBatch, StatePool, StateShape, StateTokens

CPU = torch.device("cpu")
NOTHING = torch.empty(0, dtype=torch.int64)
SHAPES = [(1, 1, 1, 1), (2, 4, 16, 24), (3, 3, 24, 16), (1, 3, 8, 64)]  # heads of keys, of values; sizes of both


def drawn(count: int, shape: tuple[int, int, int, int], seed: int = 0) -> DeltaTokens:
    key_heads, heads, key_dim, value_dim = shape
    noise = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=noise)

    query, key = (torch.nn.functional.normalize(normal(count, key_heads, key_dim), dim=-1) for _ in range(2))
    rate, decay = normal(count, heads).sigmoid(), -0.1 * normal(count, heads).exp()
    return DeltaTokens(query, key, normal(count, heads, value_dim), rate, decay)


def pool_of(states: int, shape: tuple[int, int, int, int]) -> Tensor:
    _, heads, key_dim, value_dim = shape
    matrices = StatePool(states, StateShape(1, 1, heads, key_dim, value_dim), torch.float32, CPU).matrices
    assert matrices is not None
    return matrices


def rule(tokens: DeltaTokens) -> tuple[Tensor, Tensor]:
    """The outputs [T, heads, value_dim] and the last state [heads, key_dim, value_dim] as written, in float64."""
    heads = tokens.value.shape[1]
    query, key = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (tokens.query, tokens.key))
    state = torch.zeros(heads, key.shape[2], tokens.value.shape[2], dtype=torch.float64)
    outputs = []
    for q, k, v, rate, decay in zip(query, key, tokens.value.double(), tokens.rate, tokens.decay, strict=True):
        state = state * decay.double().exp()[:, None, None]
        wrong = v - torch.einsum("hkv,hk->hv", state, k)
        state = state + torch.einsum("hk,hv->hkv", k, wrong * rate.double()[:, None])
        outputs.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(outputs), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_prompt_in_tiles_is_the_rule(shape: tuple[int, int, int, int], length: int) -> None:
    tokens, matrices = drawn(length, shape), pool_of(2, shape)
    expected, state = rule(tokens)
    found = delta_rule(tokens, matrices, StateBatch.of_prompts([length]))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrices[1].double(), state, atol=1e-5, rtol=1e-5)
    assert not matrices[0].any(), "the state before the first token"


@pytest.mark.parametrize("shape", SHAPES)
def test_token_by_token_is_the_rule(shape: tuple[int, int, int, int]) -> None:
    """Two sequences are computed; one leaves each state under another number, as drafts do."""
    tokens, matrices = drawn(12, shape), pool_of(9, shape)
    first, second = (rule(DeltaTokens(*(x[i::2] for x in vars(tokens).values()))) for i in (0, 1))
    steps = tuple(
        StateTokens(*map(torch.tensor, ([2 * i, 2 * i + 1], [int(i > 0), 1 + i if i else 0], [1, 2 + i])))
        for i in range(6)
    )
    found = delta_rule(tokens, matrices, StateBatch((), steps, NOTHING, NOTHING))
    torch.testing.assert_close(found[0::2].double(), first[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1::2].double(), second[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrices[1].double(), first[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrices[7].double(), second[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_has_the_same_bits_among_others(shape: tuple[int, int, int, int]) -> None:
    """In tiles, and then token by token, for numbers of sequences up to those of a large step."""
    lengths = [100, 1, 64, 130, *range(1, 30)]
    tokens = drawn(sum(lengths) + len(lengths), shape)
    many = pool_of(len(lengths) + 1, shape)
    prompts = DeltaTokens(*(x[: sum(lengths)] for x in vars(tokens).values()))
    after = DeltaTokens(*(x[sum(lengths) :] for x in vars(tokens).values()))
    found = delta_rule(prompts, many, StateBatch.of_prompts(lengths)).split(lengths)
    own = torch.arange(1, len(lengths) + 1)
    step = StateBatch((), (StateTokens(own - 1, own, own),), NOTHING, NOTHING)
    next_found = delta_rule(after, many, step)
    for i, part in enumerate(zip(*(x.split(lengths) for x in vars(prompts).values()), strict=True)):
        alone = pool_of(2, shape)
        assert delta_rule(DeltaTokens(*part), alone, StateBatch.of_prompts(lengths[i : i + 1])).equal(found[i])
        one = StateBatch((), (StateTokens(*torch.tensor([[0], [1], [1]])),), NOTHING, NOTHING)
        single = DeltaTokens(*(x[i : i + 1] for x in vars(after).values()))
        assert delta_rule(single, alone, one)[0].equal(next_found[i])
        assert alone[1].equal(many[i + 1])


def test_what_is_behind_a_prompt_does_not_matter() -> None:
    """The rows past its end are those of another sequence, whose numbers may not be finite."""
    shape = SHAPES[1]
    tokens, matrices = drawn(70, shape), pool_of(3, shape)
    expected = delta_rule(tokens, matrices, StateBatch.of_prompts([65, 5]))[65:]
    for column in vars(tokens).values():
        column[:65] = float("nan")
    assert delta_rule(tokens, matrices, StateBatch.of_prompts([65, 5]))[65:].equal(expected)
