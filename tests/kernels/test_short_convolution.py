"""The convolution of the last few positions, in tiles and token by token, against torch's own over whole sequences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.short_convolution import convolve
from batchinfer.kernels.state_pool import StateBatch, StatePool, StateShape, StateTokens

CPU = torch.device("cpu")
NOTHING = torch.empty(0, dtype=torch.int64)


def pool_of(states: int, length: int, channels: int) -> Tensor:
    return StatePool(states, StateShape(length - 1, channels), torch.float32, CPU).inputs


def oracle(x_TC: Tensor, taps_KC: Tensor, bias: Tensor | None) -> Tensor:
    padded = F.pad(x_TC.double().t(), (len(taps_KC) - 1, 0))
    weight = taps_KC.double().t()[:, None]
    return F.conv1d(padded, weight, None if bias is None else bias.double(), groups=x_TC.shape[1]).t()


@pytest.mark.parametrize("length", [2, 3, 4, 7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_prompts_and_what_follows_them(length: int, with_bias: bool) -> None:
    lengths, channels, more = [1, 2, 63, 64, 65, 200], 24, 9
    x, taps = torch.randn(sum(lengths) + more * len(lengths), channels), torch.randn(length, channels)
    bias = torch.randn(channels) if with_bias else None
    inputs = pool_of(len(lengths) + 1, length, channels)
    prompts, after = x[: sum(lengths)], x[sum(lengths) :].view(more, len(lengths), channels)
    found = convolve(prompts, inputs, StateBatch.of_prompts(lengths), taps, bias).split(lengths)
    own = torch.arange(1, len(lengths) + 1)
    step = StateBatch((), (StateTokens(own - 1, own, own),), NOTHING, NOTHING)
    nexts = [convolve(row, inputs, step, taps, bias) for row in after]
    for i, part in enumerate(prompts.split(lengths)):
        whole = oracle(torch.cat([part, after[:, i]]), taps, bias)
        ours = torch.cat([found[i], *(row[i : i + 1] for row in nexts)])
        torch.testing.assert_close(ours.double(), whole, atol=1e-5, rtol=1e-5)
    assert not inputs[0].any(), "the state before the first token"


def test_a_token_has_the_same_bits_in_a_tile_and_alone() -> None:
    x, taps = torch.randn(70, 40), torch.randn(4, 40)
    inputs = pool_of(3, 4, 40)
    found = convolve(x, inputs, StateBatch.of_prompts([70]), taps)
    steps = tuple(StateTokens(*torch.tensor([[i], [2 if i else 0], [2]])) for i in range(70))
    assert convolve(x, inputs, StateBatch((), steps, NOTHING, NOTHING), taps).equal(found)
    assert inputs[1].equal(inputs[2])


def test_sixteen_bits_are_summed_in_float32() -> None:
    x, taps = torch.randn(64, 32).bfloat16(), torch.randn(4, 32)
    inputs = StatePool(2, StateShape(3, 32), torch.bfloat16, CPU).inputs
    found = convolve(x, inputs, StateBatch.of_prompts([64]), taps)
    assert found.dtype == torch.bfloat16
    assert found.equal(oracle(x, taps, None).float().bfloat16())
