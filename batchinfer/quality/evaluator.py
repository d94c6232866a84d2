"""A model measured on text: how likely it holds what comes next, and how far it is from a reference."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.engine.engine import Engine
from batchinfer.engine.model_runner import ModelRunner
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.models.batch import Batch
from batchinfer.quality.distances import divergences, log_likelihoods
from batchinfer.quality.layer_errors import SAME_BASIS, LayerErrors, embedding_difference
from batchinfer.text.tokenizer import Tokenizer


@dataclass
class Scores:
    """Sums over the tokens that were predicted: all of a window but its first."""

    windows: int = 0
    tokens: int = 0
    text_bytes: int = 0
    negative_log_likelihood: float = 0.0  # nats
    divergence: float = 0.0  # nats, from the reference
    agreed: int = 0  # tokens for which both models' likeliest token is the same

    def add(
        self, tokenizer: Tokenizer, window: NDArray[np.int32], logits_TV: Tensor, expected_TV: Tensor | None
    ) -> None:
        """Count a window [T], with the logits after each of its tokens and those of the reference."""
        targets = torch.from_numpy(window[1:].astype(np.int64))
        logits = logits_TV[:-1]
        self.windows += 1
        self.tokens += len(targets)
        text = tokenizer.decode_batch(window[1:], np.array([0, len(targets)]))[0]
        self.text_bytes += len(text.encode())
        self.negative_log_likelihood -= float(log_likelihoods(logits, targets).double().sum())
        if expected_TV is not None:
            expected = expected_TV[:-1]
            self.divergence += float(divergences(expected, logits).double().sum())
            self.agreed += int((expected.argmax(-1) == logits.argmax(-1)).sum())

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
        check_vocabularies(runner, reference)
        try:
            self.layers = LayerErrors(runner, reference)
        except ValueError as error:
            self.notes.append(f"no errors by layer: {error}")
            return
        difference = embedding_difference(runner.decoder, reference.decoder)
        if difference > SAME_BASIS:
            self.layers = None
            self.notes.append(
                f"no errors by layer: the embedding differs from the reference's by {100 * difference:.0f} %, as after "
                "a rotation of the residual stream (Hadamard): the reference's states mean nothing to this model"
            )

    @torch.inference_mode()
    def scores(self, windows: Iterable[NDArray[np.int32]]) -> Scores:
        """The sums over all windows, each of which must fit into a step."""
        total = Scores()
        for window in windows:
            if len(window) > self.engine.scheduler.budget:
                raise ValueError(f"a window of {len(window)} tokens is above a step of {self.engine.scheduler.budget}")
            total.add(self.engine.tokenizer, window, *self._logits(window))
        return total

    def _logits(self, window: NDArray[np.int32]) -> tuple[Tensor, Tensor | None]:
        """Logits [len(window), V] after each token, and the reference's."""
        if self.reference is None:
            return all_logits(self.engine, window), None
        if self.layers is None:
            return all_logits(self.engine, window), all_logits(self.reference, window)
        both = zip(steps(self.engine, window), steps(self.reference, window), strict=True)
        ((logits, expected),) = [
            self.layers.step(batch, expected_batch, tokens) for (batch, tokens), (expected_batch, _) in both
        ]
        return logits[: len(window)], expected[: len(window)]


def check_vocabularies(runner: ModelRunner, reference: ModelRunner) -> None:
    """A `ValueError` if logits of the two do not belong to the same tokens."""
    sizes = [r.decoder.config.vocab_size for r in (runner, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"vocab_size is {sizes[0]} in the model and {sizes[1]} in the reference; they must have one vocabulary"
        )


def answers(engine: Engine, requests: Requests) -> dict[int, list[int]]:
    """The new tokens of each row."""
    done = engine.generate(requests)
    return {row: found.tokens_of(i) for found in done for i, row in enumerate(found.rows.tolist())}


@torch.inference_mode()
def distance_along(engine: Engine, reference: Engine, prompt: list[int], answer: list[int]) -> tuple[float, int]:
    """(nats of divergence, tokens of which both hold the same likeliest), summed over the tokens of an answer that
    both are given as it is, whatever they would have said. The engines are alike but for their models."""
    window, first = np.array(prompt + answer[:-1], np.int32), len(prompt) - 1
    nats, agreed = 0.0, 0
    for ours, theirs in zip(steps(engine, window, first), steps(reference, window, first), strict=True):
        found, expected = _logits(engine, *ours), _logits(reference, *theirs)
        nats += float(divergences(expected, found).double().sum())
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return nats, agreed


@torch.inference_mode()
def all_logits(engine: Engine, window: NDArray[np.int32]) -> Tensor:
    """Logits [len(window), V] after each token."""
    return torch.cat([_logits(engine, batch, tokens) for batch, tokens in steps(engine, window)])


def _logits(engine: Engine, batch: Batch, tokens: int) -> Tensor:
    return engine.runner.logits(batch)[:tokens]


def steps(engine: Engine, window: NDArray[np.int32], first: int = 0) -> Iterator[tuple[Batch, int]]:
    """The steps of an idle engine that compute a window, and how many tokens each samples: all from `first` on."""
    engine.add(Requests.of([window.tolist()], SamplingParams(max_tokens=1)))
    start = 0
    while (batch := engine.scheduler.schedule()) is not None:
        rows = np.arange(min(max(first - start, 0), batch.prompt_tokens), batch.prompt_tokens)
        start += batch.prompt_tokens
        yield replace(batch, sampled=torch.from_numpy(np.pad(rows, (0, -len(rows) % MIN_ROWS)))), len(rows)
        engine.scheduler.update(batch, np.zeros(len(batch.sequences), np.int64))
        if len(batch.sequences):
            engine.scheduler.finish(int(batch.sequences[0]))
