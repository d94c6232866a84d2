"""Measuring a model on text: the likelihood of the text's tokens, and the distance from a reference model."""

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
    """Sums over the predicted tokens, which are all tokens of a chunk but its first."""

    windows: int = 0  # number of chunks; reports call them windows
    tokens: int = 0
    text_bytes: int = 0
    negative_log_likelihood: float = 0.0  # nats
    divergence: float = 0.0  # nats, from the reference
    agreed: int = 0  # number of tokens for which both models have the same most likely token

    def add(
        self, tokenizer: Tokenizer, chunk: NDArray[np.int32], logits_TV: Tensor, expected_TV: Tensor | None
    ) -> None:
        """Add a chunk of token ids [T], with the logits after each token and, if given, those of the reference."""
        targets = torch.from_numpy(chunk[1:].astype(np.int64))
        logits = logits_TV[:-1]
        self.windows += 1
        self.tokens += len(targets)
        text = tokenizer.decode_batch(chunk[1:], np.array([0, len(targets)]))[0]
        self.text_bytes += len(text.encode())
        self.negative_log_likelihood -= float(log_likelihoods(logits, targets).double().sum())
        if expected_TV is not None:
            expected = expected_TV[:-1]
            self.divergence += float(divergences(expected, logits).double().sum())
            self.agreed += int((expected.argmax(-1) == logits.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """Perplexity: exp of the mean negative log-likelihood of a token."""
        return math.exp(self.negative_log_likelihood / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits per byte of the tokens' text."""
        return self.negative_log_likelihood / math.log(2) / self.text_bytes


class Evaluator:
    """Runs chunks of at least two token ids through an engine and, if given, a reference engine.

    With a reference, `layers` gathers the errors by layer. If it is None, they cannot be measured, and `notes` says
    why.
    """

    def __init__(self, engine: Engine, reference: Engine | None = None) -> None:
        """Prepare the comparison. Raises `ValueError` saying why the two engines cannot be compared."""
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
                "a rotation of the residual stream (Hadamard), so the hidden states of the two cannot be compared"
            )

    @torch.inference_mode()
    def scores(self, chunks: Iterable[NDArray[np.int32]]) -> Scores:
        """Return the sums over all chunks. Raises `ValueError` for a chunk that does not fit into one step."""
        total = Scores()
        for chunk in chunks:
            if len(chunk) > (most := self.engine.scheduler.budget):
                raise ValueError(f"a chunk of text has {len(chunk)} tokens; a step takes at most {most}")
            total.add(self.engine.tokenizer, chunk, *self._logits(chunk))
        return total

    def _logits(self, chunk: NDArray[np.int32]) -> tuple[Tensor, Tensor | None]:
        """Return the logits [T, V] after each of a chunk's T tokens, and the reference's."""
        if self.reference is None:
            return all_logits(self.engine, chunk), None
        if self.layers is None:
            return all_logits(self.engine, chunk), all_logits(self.reference, chunk)
        both = zip(steps(self.engine, chunk), steps(self.reference, chunk), strict=True)
        ((logits, expected),) = [
            self.layers.step(batch, expected_batch, tokens) for (batch, tokens), (expected_batch, _) in both
        ]
        return logits[: len(chunk)], expected[: len(chunk)]


def check_vocabularies(runner: ModelRunner, reference: ModelRunner) -> None:
    """Raise `ValueError` if the two models have vocabularies of different sizes."""
    sizes = [r.decoder.config.vocab_size for r in (runner, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"vocab_size is {sizes[0]} in the model and {sizes[1]} in the reference; they must have one vocabulary"
        )


def answers(engine: Engine, requests: Requests) -> dict[int, list[int]]:
    """Generate and return the new tokens of each row."""
    done = engine.generate(requests)
    return {row: found.tokens_of(i) for found in done for i, row in enumerate(found.rows.tolist())}


@torch.inference_mode()
def distance_along(engine: Engine, reference: Engine, prompt: list[int], answer: list[int]) -> tuple[float, int]:
    """Compare two models on the tokens of a given answer: (divergence in nats, number of tokens that agree).

    Both are sums over the answer's tokens, which both models read as they are, whatever they would have generated. A
    token agrees if both models have the same most likely token. The engines must have the same settings.
    """
    token_ids, first = np.array(prompt + answer[:-1], np.int32), len(prompt) - 1
    nats, agreed = 0.0, 0
    for ours, theirs in zip(steps(engine, token_ids, first), steps(reference, token_ids, first), strict=True):
        found, expected = _logits(engine, *ours), _logits(reference, *theirs)
        nats += float(divergences(expected, found).double().sum())
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return nats, agreed


@torch.inference_mode()
def all_logits(engine: Engine, token_ids: NDArray[np.int32]) -> Tensor:
    """Return the logits [T, V] after each of T tokens."""
    return torch.cat([_logits(engine, batch, tokens) for batch, tokens in steps(engine, token_ids)])


def _logits(engine: Engine, batch: Batch, tokens: int) -> Tensor:
    return engine.runner.logits(batch)[:tokens]


def steps(engine: Engine, token_ids: NDArray[np.int32], first: int = 0) -> Iterator[tuple[Batch, int]]:
    """Yield the steps in which an idle engine computes these tokens: (batch, number of sampled tokens).

    All tokens from `first` on are sampled, so that their logits are computed.
    """
    engine.add(Requests.of([token_ids.tolist()], SamplingParams(max_tokens=1)))
    start = 0
    while (batch := engine.scheduler.schedule()) is not None:
        rows = np.arange(min(max(first - start, 0), batch.prompt_tokens), batch.prompt_tokens)
        start += batch.prompt_tokens
        sampled = torch.from_numpy(np.pad(rows, (0, -len(rows) % MIN_ROWS)))
        # A place for each of these rows: the last layer's experts compute as many rows as there are places.
        places = np.full(len(rows), batch.chunks[0].place, np.int64)
        yield replace(batch, sampled=sampled, sequences=places), len(rows)
        engine.scheduler.update(batch, np.zeros(len(batch.sequences), np.int64))
        if len(batch.sequences):
            engine.scheduler.finish(int(batch.sequences[0]))
