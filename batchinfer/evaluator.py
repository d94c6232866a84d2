"""A model measured on text: how likely it holds what comes next, and how far it is from a reference."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.engine import Engine
from batchinfer.quantize.metrics import divergences, log_likelihoods
from batchinfer.request import Requests, SamplingParams


@dataclass
class Scores:
    """Sums over the tokens that were predicted: all of a window but its first."""

    windows: int = 0
    tokens: int = 0
    text_bytes: int = 0
    negative_log_likelihood: float = 0.0  # nats
    divergence: float = 0.0  # nats, from the reference
    agreed: int = 0  # tokens for which both models' likeliest token is the same

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood of a token."""
        return math.exp(self.negative_log_likelihood / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the text that the tokens stand for."""
        return self.negative_log_likelihood / math.log(2) / self.text_bytes


class Evaluator:
    """Runs windows of token ids, of at least two tokens each, through an engine, and a reference engine if given."""

    def __init__(self, engine: Engine, reference: Engine | None = None) -> None:
        self.engine, self.reference = engine, reference

    def scores(self, windows: Iterable[NDArray[np.int32]]) -> Scores:
        """The sums over all windows."""
        total = Scores()
        for window in windows:
            targets = torch.from_numpy(window[1:].astype(np.int64))
            logits = all_logits(self.engine, window)[:-1]
            total.windows += 1
            total.tokens += len(targets)
            text = self.engine.tokenizer.decode_batch(window[1:], np.array([0, len(targets)]))[0]
            total.text_bytes += len(text.encode())
            total.negative_log_likelihood -= float(log_likelihoods(logits, targets).double().sum())
            if self.reference is not None:
                expected = all_logits(self.reference, window)[:-1]
                total.divergence += float(divergences(expected, logits).double().sum())
                total.agreed += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        return total


@torch.inference_mode()
def all_logits(engine: Engine, window: NDArray[np.int32]) -> Tensor:
    """Logits [len(window), V] after each token, in one step: a window must fit into one."""
    engine.add(Requests.of([window.tolist()], SamplingParams(max_tokens=1)))
    batch = engine.scheduler.schedule()
    if batch is None or batch.prompt_tokens != len(window):
        raise ValueError(f"a window of {len(window)} tokens does not fit into a step of {engine.scheduler.budget}")
    everything = replace(batch, sampled=torch.arange(len(batch.tokens)))
    logits = engine.runner.decoder.forward(everything, engine.runner.caches)[: len(window)]
    engine.scheduler.update(batch, logits[-1:].argmax(-1).numpy())
    engine.scheduler.finish(int(batch.sequences[0]))
    return logits
