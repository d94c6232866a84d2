"""A model measured on text: how likely it holds what comes next, and how far it is from a reference."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.batch import Batch
from batchinfer.engine import Engine
from batchinfer.layer_errors import SAME_BASIS, LayerErrors, embedding_difference
from batchinfer.quantize.metrics import divergences, log_likelihoods
from batchinfer.request import Requests, SamplingParams
from batchinfer.runner import ModelRunner


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
    """Runs windows of token ids, of at least two tokens each, through an engine, and a reference engine if given.

    With a reference, `layers` gathers the errors by layer, unless it is None: then `notes` says why.
    """

    def __init__(self, engine: Engine, reference: Engine | None = None) -> None:
        """A `ValueError` says why the two cannot be compared."""
        self.engine, self.reference = engine, reference
        self.layers: LayerErrors | None = None
        self.notes: list[str] = []
        if reference is not None:
            self._compare(engine.runner, reference.runner)

    def _compare(self, runner: ModelRunner, reference: ModelRunner) -> None:
        sizes = [r.decoder.config.vocab_size for r in (runner, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"vocab_size is {sizes[0]} in the model and {sizes[1]} in the reference; they must have one vocabulary"
            )
        self.layers = LayerErrors(runner, reference)
        difference = embedding_difference(runner.decoder, reference.decoder)
        if difference > SAME_BASIS:
            self.layers = None
            self.notes.append(
                f"no errors by layer: the embedding differs from the reference's by {100 * difference:.0f} %, as after "
                "a rotation of the residual stream (Hadamard): the reference's states mean nothing to this model"
            )

    @torch.inference_mode()
    def scores(self, windows: Iterable[NDArray[np.int32]]) -> Scores:
        """The sums over all windows."""
        total = Scores()
        for window in windows:
            targets = torch.from_numpy(window[1:].astype(np.int64))
            logits, expected = self._logits(window)
            logits = logits[:-1]
            total.windows += 1
            total.tokens += len(targets)
            text = self.engine.tokenizer.decode_batch(window[1:], np.array([0, len(targets)]))[0]
            total.text_bytes += len(text.encode())
            total.negative_log_likelihood -= float(log_likelihoods(logits, targets).double().sum())
            if expected is not None:
                expected = expected[:-1]
                total.divergence += float(divergences(expected, logits).double().sum())
                total.agreed += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        return total

    def _logits(self, window: NDArray[np.int32]) -> tuple[Tensor, Tensor | None]:
        """Logits [len(window), V] after each token, and the reference's."""
        if self.reference is None:
            return all_logits(self.engine, window), None
        if self.layers is None:
            return all_logits(self.engine, window), all_logits(self.reference, window)
        with whole_step(self.engine, window) as batch, whole_step(self.reference, window) as expected_batch:
            logits, expected = self.layers.step(batch, expected_batch, len(window))
            return logits[: len(window)], expected[: len(window)]


@torch.inference_mode()
def all_logits(engine: Engine, window: NDArray[np.int32]) -> Tensor:
    """Logits [len(window), V] after each token, in one step."""
    with whole_step(engine, window) as batch:
        return engine.runner.decoder.forward(batch, engine.runner.caches)[: len(window)]


@contextmanager
def whole_step(engine: Engine, window: NDArray[np.int32]) -> Iterator[Batch]:
    """A step of an idle engine that computes and samples each token of a window, to which it must be wide enough."""
    engine.add(Requests.of([window.tolist()], SamplingParams(max_tokens=1)))
    batch = engine.scheduler.schedule()
    if batch is None or batch.prompt_tokens != len(window):
        raise ValueError(f"a window of {len(window)} tokens does not fit into a step of {engine.scheduler.budget}")
    yield replace(batch, sampled=torch.arange(len(batch.tokens)))
    engine.scheduler.update(batch, np.zeros(1, np.int64))
    engine.scheduler.finish(int(batch.sequences[0]))
